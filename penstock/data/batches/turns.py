"""Lanes that take extents as they come to them, so that a slow one gets fewer (policy `elastic`).

Who took what, and how many rows each lane gave to each block, is kept by a `Ledger`: a run that
reads the same data with it again has the same batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple, Protocol, TypeAlias

from penstock.data.source import Extent
from penstock.position import Position, Taken

ExtentPlace: TypeAlias = tuple[int, int]
"""Of an extent: number of its file, and where it starts there, as in `Cursor`."""

_OFFERED = 16
"""Extents among which a lane asks for one at a time."""


class Ledger(Protocol):
    """What lanes have taken. Safe to ask from several threads; one for all ranks."""

    def history(self, epoch: int, lane: int) -> Sequence[ExtentPlace]:
        """All that a lane has taken in an epoch, in its order; of runs before, too."""

    def take(
        self, epoch: int, lane: int, turn: int, upcoming: Sequence[ExtentPlace]
    ) -> ExtentPlace | None:
        """Gives a lane the first of some extents that no lane has taken; None: all are taken.

        Asked again for the same turn it answers the same.

        Args:
          epoch: in which.
          lane: for which.
          turn: how many the lane has taken before.
          upcoming: in the order of reading.
        """

    def block(self, epoch: int, number: int, sizes: Sequence[int]) -> Sequence[int] | None:
        """Rows that each lane gave to a block; None: it was not dealt, or for other sizes.

        Those of other sizes are forgotten, with the blocks behind.
        """

    def add_block(self, epoch: int, number: int, sizes: Sequence[int], rows: Sequence[int]) -> None:
        """Takes note of a block before anybody has a row of it; forgets those behind."""

    def close(self) -> None:
        """Nobody asks any more."""


class News:
    """Wakes who waits for any of several channels."""

    def __init__(self) -> None:
        self._has_come = threading.Event()

    def tell(self) -> None:
        """Something was added to one."""
        self._has_come.set()

    def wait(self, most_s: float) -> None:
        """Returns when something came since the last time, or after some time."""
        self._has_come.wait(most_s)
        self._has_come.clear()


class Turns(NamedTuple):
    """How the lanes that are read here take extents."""

    ledger: Ledger
    news: News
    start: Position
    """Where they begin."""

    def of_lane(
        self, lane: int, epoch: int, extents: Sequence[Extent], files: Mapping[str, int]
    ) -> Iterator[int]:
        """Numbers of the extents that a lane reads in an epoch, behind the one that it has at hand.

        First those that it had taken before the position, and had not come to.

        Args:
          lane: which.
          epoch: from that of the position on.
          extents: of a part.
          files: numbers of the part's files.
        """
        begins = epoch == self.start.epoch
        taken = (self.start.taken if begins else None) or Taken()
        done = set(taken.beyond) | ({*at_hand(self.start)} if begins else set())

        def place(extent: Extent) -> ExtentPlace:
            return files[extent.path], extent.start

        def is_left(one: ExtentPlace) -> bool:
            return one >= taken.before and one not in done

        history = self.ledger.history(epoch, lane)
        again = {one for one in history if is_left(one)}
        numbers: dict[ExtentPlace, int] = {}
        if again:
            for number, extent in enumerate(extents):
                if (one := place(extent)) in again:
                    numbers[one] = number
                if len(numbers) == len(again):
                    break
        # What is no longer there (a file that nobody had begun may go) was taken in vain.
        yield from (numbers[one] for one in history if one in numbers)
        first = 0
        for turn in count(len(history)):
            while True:
                upcoming, behind = _upcoming(extents, first, place, is_left)
                if not upcoming:
                    return
                given = self.ledger.take(epoch, lane, turn, list(upcoming))
                if given is not None:
                    break
                first = behind
            first = upcoming[given] + 1
            yield upcoming[given]


def _upcoming(
    extents: Sequence[Extent],
    first: int,
    place: Callable[[Extent], ExtentPlace],
    is_left: Callable[[ExtentPlace], bool],
) -> tuple[dict[ExtentPlace, int], int]:
    """Some extents that are left, with their numbers, from a number on; and the number behind."""
    found: dict[ExtentPlace, int] = {}
    number = first
    while len(found) < _OFFERED:
        try:
            one = place(extents[number])
        except IndexError:
            break
        if is_left(one):
            found[one] = number
        number += 1
    return found, number


class Progress:
    """Which extents of an epoch were taken to their end, by all lanes together."""

    def __init__(
        self, taken: Taken, extents: Sequence[Extent], files: Mapping[str, int], behind: int
    ) -> None:
        """Begins.

        Args:
          taken: so far.
          extents: of the part.
          files: numbers of the part's files.
          behind: number of the file behind them.
        """
        self._extents, self._files, self._behind = extents, files, behind
        self._beyond = set(taken.beyond)
        self._before = taken.before
        self._number = 0

    def add(self, ended: Iterable[ExtentPlace]) -> Taken:
        """Some more ended; returns all."""
        self._beyond.update(ended)
        while True:
            try:
                extent = self._extents[self._number]
            except IndexError:
                self._before = max(self._before, (self._behind, 0))
                break
            one = self._files[extent.path], extent.start
            if one >= self._before:
                if one not in self._beyond:
                    self._before = one
                    break
                self._beyond.discard(one)
            self._number += 1
        return Taken(self._before, tuple(sorted(self._beyond)))


def at_hand(position: Position) -> list[ExtentPlace]:
    """Extents that lanes have begun, and read on behind the block."""
    return [lane.cursor[:2] for lane in position.lanes if lane.cursor.row]
