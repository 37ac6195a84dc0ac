"""Says where a rank is that does not come to its next batch: others wait for it, or it for them."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from penstock.interruption import Interruption
from penstock.ranks.group import Group
from penstock.ranks.in_step import in_step

PATIENCE_S = 120.0
"""At one batch, until a rank says so; then twice as long, and so on."""

Item = TypeVar("Item")
_TORCH, _PYTHON = str(Path(torch.__file__).parent), str(Path(threading.__file__).parent)


class Watch:
    """Of one rank of several; alone nobody waits, and nothing is watched.

    A rank that hangs, in a user's model or in a read that does not end, holds up all ranks, and
    none of them fails. So each says, from a thread of its own, at which batch it has been for long
    and in which line: those that wait are in `penstock/ranks` or `penstock/embedding/sharded`, the
    one that they wait for is elsewhere.
    """

    def __init__(
        self,
        group: Group,
        place: Callable[[Any], object],
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Watches nothing yet.

        Args:
          group: this rank is of.
          place: where an item is, by the `str` of what it returns.
          tell: called from the other thread; None: on the standard error, where nothing that this
            process is at can be in the way.
        """
        self._group, self._place = group, place
        self._tell = tell or _on_standard_error
        self._at: tuple[float, object] = 0.0, None
        """Since when, and the item."""
        self._is_watched = False
        self.is_waiting: Callable[[], bool] = lambda: False
        """Whether there is no data yet, so that nobody is at anything."""

    def in_step(self, items: Iterable[Item], stop: Interruption) -> Iterator[Item]:
        """See `penstock.ranks.in_step`, by this thread: at each item until it has the next."""
        items = in_step(items, self._group, stop)
        if self._group.size == 1:
            yield from items
            return
        if self._is_watched:  # an evaluation between two steps
            yield from self._noted(items)
            return
        self._at, self._is_watched = (time.monotonic(), None), True
        is_over = threading.Event()
        arguments = threading.get_ident(), is_over
        watcher = threading.Thread(
            target=self._look, args=arguments, name="penstock-watch", daemon=True
        )
        watcher.start()
        try:
            yield from self._noted(items)
        finally:
            is_over.set()
            watcher.join()
            self._is_watched = False

    def _noted(self, items: Iterable[Item]) -> Iterator[Item]:
        for item in items:
            self._at = time.monotonic(), item
            yield item

    def _look(self, watched: int, is_over: threading.Event) -> None:
        told, patience_s = self._at, PATIENCE_S
        while True:
            at = self._at
            if at is not told:
                told, patience_s = at, PATIENCE_S
            left_s = at[0] + patience_s - time.monotonic()
            if left_s > 0:
                if is_over.wait(left_s):
                    return
                continue
            patience_s *= 2
            if self.is_waiting():
                continue
            batch = (
                "before the first batch"
                if at[1] is None
                else f"at one batch, {self._place(at[1])},"
            )
            self._tell(
                f"rank {self._group.rank} of {self._group.size} has been {batch} for "
                f"{time.monotonic() - at[0]:.0f} s, now in {_line_of(watched)}"
            )


def _line_of(thread: int) -> str:
    """Where a thread is, in the code that called torch's or Python's own."""
    stack = traceback.extract_stack(sys._current_frames()[thread])
    line = next((one for one in reversed(stack) if not _is_library(one.filename)), stack[-1])
    return f"{line.name} ({line.filename}:{line.lineno})"


def _is_library(file: str) -> bool:
    is_python = file.startswith(_PYTHON) and "site-packages" not in file
    return is_python or file.startswith((_TORCH, "<"))


def _on_standard_error(words: str) -> None:
    with suppress(OSError):
        os.write(2, f"{words}\n".encode())
