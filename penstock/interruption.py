"""Signals that ask a process to stop, and when it does so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from penstock.errors import Interrupted

PATIENCE_S = 1.0
"""How long a process that has nothing to save may take to leave, before it is ended."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """What SIGINT, SIGTERM and SIGHUP do: raise `Interrupted`, at once or when it is asked for.

    At first signals raise where they arrive. Within `deferred` a signal is only noted, and within
    `at_once` in that, it raises again. A second signal always raises.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first that came."""
        self._raises = True
        self._has_something_to_save = False
        self._taker: Callable[[int], None] | None = None
        self._was_heard = threading.Event()
        self._is_left = threading.Event()

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals within the block are noted, for `check`."""
        before = self._raises, self._has_something_to_save
        self._raises, self._has_something_to_save = False, True
        try:
            yield
        finally:
            self._raises, self._has_something_to_save = before

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Signals within the block raise where they arrive; one that was noted raises first."""
        before, self._raises = self._raises, True
        try:
            self.check()
            yield
        finally:
            self._raises = before

    @contextmanager
    def handed_to(self, taker: Callable[[int], None]) -> Iterator[None]:
        """Signals within the block do nothing but call `taker` with their number, each of them.

        One that came before is handed over first.
        """
        self._taker = taker
        try:
            if self.signal is not None:
                taker(self.signal)
            yield
        finally:
            self._taker = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._was_heard.set()
        if self._taker is not None:
            self._taker(number)
            return
        is_first = self.signal is None
        if is_first:
            self.signal = number
        if self._raises or not is_first:
            raise Interrupted(number, is_repeated=not is_first)

    def _watch(self, pipe: int, end: Callable[[int], None]) -> None:
        """Ends the process where the main thread does not come to hear a signal, or to leave.

        Python calls handlers between two instructions of the main thread: never, while that waits
        within a library for a file system that does not answer.
        """
        count = 0
        while number := os.read(pipe, 1):
            if number[0] not in _SIGNALS or self._taker is not None:
                continue
            count += 1
            if count == 1 and self._has_something_to_save:
                continue
            awaited = self._was_heard if count == 1 else self._is_left
            if not awaited.wait(PATIENCE_S) and not self._is_left.is_set():
                end(number[0])


@contextmanager
def interruption(end: Callable[[int], None] | None = None) -> Iterator[Interruption]:
    """Handles signals within the block; those that are ignored, as under nohup, stay so.

    Off the main thread, where Python handles no signals, nothing changes.

    Args:
      end: called, from another thread, with the number of a signal that is not heeded within
        `PATIENCE_S`: of the first one where nothing is to be saved, or of the second. It must not
        return. None: the process is left to itself.
    """
    state = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    # None: handled by something that is not Python.
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {n: handler for n, handler in found.items() if handler not in {signal.SIG_IGN, None}}
    with _watched(state, end):
        for number in before:
            signal.signal(number, state._handle)
        try:
            yield state
        finally:
            state._is_left.set()
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _watched(state: Interruption, end: Callable[[int], None] | None) -> Iterator[None]:
    if end is None:
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    watcher = threading.Thread(
        target=state._watch, args=(read, end), name="penstock-signals", daemon=True
    )
    watcher.start()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        watcher.join()
        os.close(read)
