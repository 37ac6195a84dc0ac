"""Extents that are found only when somebody asks for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

from penstock.data.source import Extent


class LazyExtents(Sequence[Extent]):
    """The extents of a source, in order: those up to the one asked for have been found, no others.

    The length, a slice and an index from the end need them all. Safe to share by threads.
    """

    def __init__(self, first: Iterable[Extent], more: Callable[[], list[Extent] | None]) -> None:
        """`more` finds those after `first` and each other; None: there are none.

        It is called by one thread at a time. Whoever asks for an extent gets what it raises; then
        it is called again, and must answer as if it had not been called before.
        """
        self._more = more
        self._found = list(first)
        self._is_whole = False
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Extent]:
        number = 0
        while self._find(number + 1):
            yield self._found[number]
            number += 1

    @overload
    def __getitem__(self, index: int) -> Extent: ...
    @overload
    def __getitem__(self, index: slice) -> list[Extent]: ...
    def __getitem__(self, index: int | slice) -> Extent | list[Extent]:
        self._find(index + 1 if isinstance(index, int) and index >= 0 else None)
        return self._found[index]

    def __len__(self) -> int:
        self._find(None)
        return len(self._found)

    def __bool__(self) -> bool:
        return self._find(1)

    def _find(self, count: int | None) -> bool:
        """Finds the first `count`; False: there are fewer. None: all."""
        if count is not None and len(self._found) >= count:
            return True
        with self._lock:
            while not self._is_whole and (count is None or len(self._found) < count):
                more = self._more()
                if more is None:
                    self._is_whole = True
                else:
                    self._found += more
            return count is None or len(self._found) >= count
