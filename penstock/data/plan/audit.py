"""Counts anew, in the files, what a position says was read of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from penstock.data.plan.counting import Stages, count_rows, no_stages
from penstock.data.plan.lanes import Lane
from penstock.data.plan.parts import PartRows
from penstock.data.source import Extent
from penstock.position import Counts, Cursor, Position


class Audit(NamedTuple):
    """What a position counts, and what is found."""

    counts: Counts
    in_files: int
    """Rows of the files that are listed, before the position, in all epochs."""
    said: int
    """Rows that the position says were read of them, with those of the block being delivered that
    were not given to the model yet."""

    @property
    def is_right(self) -> bool:
        """Whether nothing was lost and nothing read twice."""
        read, filtered, quarantined, applied = self.counts
        return read == filtered + quarantined + applied and self.in_files == self.said


def audit(
    part: PartRows, position: Position, samples_per_row: int, stages: Stages = no_stages
) -> Audit:
    """Counts the rows of a part that lie before a position, lane by lane.

    Args:
      part: the training part, of the files of the position.
      position: where a run is.
      samples_per_row: more than 1 where negatives are drawn.
      stages: told of the counting; rows of text must be read for it.

    Raises:
      DataError: a file cannot be read.
    """
    whole, rows = _passed(part.extents, part.numbers, position)
    # Each once: rows of text are counted by reading them.
    wanted = list(part.extents) if position.epoch else whole
    counted = dict(zip(wanted, count_rows(part.source, wanted, stages), strict=True))
    rows += sum(counted[extent] for extent in whole)
    if position.epoch:
        rows += position.epoch * sum(counted.values())
    left = 0
    if position.is_in_block:
        left = position.block_size // samples_per_row - position.block_row // samples_per_row
    before = position.counts.read - (0 if position.span is None else position.span.read)
    return Audit(position.counts, rows, before + left)


def _passed(
    extents: Sequence[Extent], numbers: Mapping[str, int], position: Position
) -> tuple[list[Extent], int]:
    """The extents of the epoch that were read to their end, and rows read of others."""
    whole: list[Extent] = []
    rows = 0
    if position.taken is not None:
        before, beyond = position.taken.before, set(position.taken.beyond)
        for extent in extents:
            place = numbers[extent.path], extent.start
            if place < before or place in beyond:
                whole.append(extent)
        return whole, sum(lane.cursor.row for lane in position.lanes)
    begins = () if position.span is None else position.span.begins
    for number, lane in enumerate(position.lanes):
        # What lies before was read in the span before.
        begin, behind = begins[number] if begins else Cursor(), lane.cursor
        for _, extent in Lane(number, len(position.lanes)).extents(extents, numbers):
            place = numbers[extent.path], extent.start
            if begin[:2] <= place < behind[:2]:
                whole.append(extent)
            if place == begin[:2]:
                rows -= begin.row
            if place == behind[:2]:
                rows += behind.row
    return whole, rows
