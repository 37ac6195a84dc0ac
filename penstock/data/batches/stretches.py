"""Stretches of decoded rows on their way into blocks, and the rows that were left out of them.

Rows are counted as they stand in their extent, those left out (malformed, of another part) among
them, so that a position says to the row what was read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.data.columns.block import Rows
from penstock.data.quarantine import LeftOut
from penstock.data.source import Chunk, Place
from penstock.position import Counts, Cursor, FileTag, Piece


class Passage(NamedTuple):
    """Where a chunk was read."""

    file: int
    """Number among the files of its part."""
    start: int
    """Of its extent."""
    row: int
    """Rows of the extent before the chunk."""
    tag: FileTag | None
    """What identifies the file as far as it was read; None: nobody asks."""
    window: int = 0
    """Of event time, that the file is in; see `Source.window`."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows [first, stop) of an extent, of which the good ones are rows [low, high) of `rows`."""

    rows: Rows | None
    """Of the whole chunk; None: no row of the stretch is good."""
    place: Place
    passage: Passage
    kept: NDArray[np.int64] | None
    """As in `Chunk`."""
    low: int
    high: int
    first: int
    stop: int
    left_out_at: Sequence[int] = ()
    """Rows of the extent at which those of `left_out` stand, ascending."""
    left_out: Sequence[LeftOut] = ()
    """Malformed rows of the whole chunk."""
    is_end: bool = False
    """Whether it has no row, and says that its extent was read to its end."""

    @property
    def size(self) -> int:
        """Good rows."""
        return self.high - self.low

    @property
    def memory(self) -> int:
        """Bytes of the good rows."""
        return 0 if self.rows is None else self.rows.memory(self.low, self.high)

    @property
    def malformed(self) -> Sequence[LeftOut]:
        """Malformed rows of the stretch."""
        if not self.left_out:
            return ()
        begin, end = (bisect_left(self.left_out_at, row) for row in (self.first, self.stop))
        return self.left_out[begin:end]

    @property
    def first_good(self) -> int:
        """Row of the extent at which the first good row stands; there must be one."""
        return self.passage.row + (self.low if self.kept is None else int(self.kept[self.low]))

    def cut(self, good: int) -> tuple[Stretch, Stretch]:
        """Cuts it before its good row number `good`, of which there must be more than that."""
        rest = replace(self, low=self.low + good)
        rest = replace(rest, first=rest.first_good)
        return replace(self, high=rest.low, stop=rest.first), rest


def good_rows_between(chunk: Chunk, first: int, stop: int) -> tuple[int, int]:
    """Numbers [low, high) in the table of the good rows among rows [first, stop) of the chunk."""
    if chunk.kept is None:
        return first, stop
    low, high = np.searchsorted(chunk.kept, (first, stop))
    return int(low), int(high)


def take(waiting: deque[Stretch], rows: int) -> list[Stretch]:
    """Removes the first `rows` good rows, and the rows left out before the next good one.

    There must be a next one.
    """
    taken = []
    while rows:
        stretch = waiting.popleft()
        if stretch.size > rows:
            stretch, rest = stretch.cut(rows)
            waiting.appendleft(rest)
        taken.append(stretch)
        rows -= stretch.size
    while not waiting[0].size:
        taken.append(waiting.popleft())
    if waiting[0].first < waiting[0].first_good:
        left_out, rest = waiting.popleft().cut(0)
        taken.append(left_out)
        waiting.appendleft(rest)
    return taken


def rows_within(stretches: Sequence[Stretch], most_bytes: int) -> int:
    """How many of the first good rows take up at most so much memory; all of them take more."""
    rows = 0
    for one in stretches:
        memory = one.memory
        if one.rows is not None and memory > most_bytes:
            before = one.rows.memory_before(one.low, one.high)
            return rows + int(np.searchsorted(before, most_bytes, side="right")) - 1
        most_bytes -= memory
        rows += one.size
    return rows


def pieces_of(stretches: Sequence[Stretch]) -> tuple[Piece, ...]:
    """What the stretches are made of; neighbours are joined."""
    pieces: list[Piece] = []
    for one in stretches:
        file, start = one.passage[:2]
        if pieces and pieces[-1][:2] == (file, start) and pieces[-1].stop == one.first:
            pieces[-1] = pieces[-1]._replace(stop=one.stop)
        elif one.first < one.stop:
            pieces.append(Piece(file, start, one.first, one.stop))
    return tuple(pieces)


def end_of(stretch: Stretch) -> Cursor:
    """The place behind its last row."""
    return Cursor(stretch.passage.file, stretch.passage.start, stretch.stop)


def counts_of(stretches: Sequence[Stretch]) -> Counts:
    """Counts of the rows of stretches, if all good ones are applied."""
    read = sum(one.stop - one.first for one in stretches)
    applied = sum(one.size for one in stretches)
    quarantined = sum(len(one.malformed) for one in stretches if one.left_out)
    return Counts(read, read - applied - quarantined, quarantined, applied)


def malformed_in(stretches: Sequence[Stretch]) -> list[LeftOut]:
    """The malformed rows of stretches, in order."""
    return [row for one in stretches if one.left_out for row in one.malformed]
