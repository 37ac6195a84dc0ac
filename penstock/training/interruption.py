"""SIGINT and SIGTERM as a question that the loop asks after each step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_AT_ONCE = 130
"""Exit status after a second signal."""


@dataclass
class Interruption:
    """Whether a signal has asked the run to stop."""

    requested: bool = False


@contextmanager
def interruption() -> Iterator[Interruption]:
    """Turns SIGINT and SIGTERM within the block into `Interruption.requested`.

    A second signal leaves at once with `SystemExit(130)`. Off the main thread, where Python
    handles no signals, nothing changes.
    """
    state = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if state.requested:
            raise SystemExit(EXIT_AT_ONCE)
        state.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
