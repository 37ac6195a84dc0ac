"""Blocks, one after the other: the rows of all lanes that are shuffled together, and their place.

A block that a former run began is read again from the pieces it was made of and finished as it was
cut; sizes of batches and blocks count from the next one on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from penstock.data.batches.agreement import Agreement, Dealt, LaneBlock, deal
from penstock.data.batches.lane_queue import LaneQueue, Offer
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.stretches import (
    Stretch,
    counts_of,
    end_of,
    malformed_in,
    pieces_of,
)
from penstock.data.identity import WholeTags
from penstock.data.plan.parts import PartRows
from penstock.data.quarantine import LeftOut
from penstock.errors import DataError
from penstock.types import Counts, Cursor, FileTag, LanePosition, Position


class Cut(NamedTuple):
    """A block and where it lies; it may have no sample, if all of its rows were left out."""

    stretches: Mapping[int, Sequence[Stretch]]
    """By lane, of those that are read here."""
    malformed: Sequence[LeftOut]
    """Of the rows of all lanes, if nobody has been given them."""
    start: Position
    """Where the first batch that is left of it begins."""
    inside: Position
    """Within it, with the counts of what it leaves out, before the first sample."""
    after: Position
    """Behind it."""


class FileTags:
    """Identities of a part's files as far as they were read, by all lanes together."""

    def __init__(
        self, files: Sequence[FileTag], tags: WholeTags, *, shows: bool, first: int = 0
    ) -> None:
        """Of `files` as far as they were read before.

        Args:
          files: the part's.
          tags: identities of whole files.
          shows: whether anybody asks.
          first: number of the first file.
        """
        self._files, self.whole, self._shows, self._first = list(files), tags, shows, first
        self._passed = 0
        self._shown: tuple[FileTag, ...] | None = None

    def path(self, file: int) -> str:
        """Of a file by its number."""
        return self._files[file - self._first].path

    def add(self, read: Sequence[tuple[int, FileTag]]) -> tuple[FileTag, ...]:
        """Takes note of files that were read so far; returns all."""
        for numbered, tag in sorted(read):
            file = numbered - self._first
            if tag.size <= self._files[file].size:
                continue
            # Files without a row were passed, too.
            for number in range(self._passed, file):
                if not self._files[number].is_begun:
                    self._files[number] = self.whole.of(self._files[number].path)
            self._passed = max(self._passed, file)
            self._files[file] = tag
            self._shown = None
        if self._shown is None:
            self._shown = tuple(self._files) if self._shows else ()
        return self._shown


class Blocks:
    """The blocks of a part from a position on, of which this process reads some lanes."""

    def __init__(
        self,
        part: PartRows,
        plan: LoaderPlan,
        lanes: Sequence[LaneQueue],
        agreement: Agreement,
        files: FileTags,
    ) -> None:
        self._part, self._plan, self._files = part, plan, files
        self._lanes = {lane.number: lane for lane in lanes}
        self._agreement = agreement

    def __iter__(self) -> Iterator[Cut]:
        at, plan = self._plan.start, self._plan
        if at.is_in_block and at.epoch < plan.epochs:
            cut = self._resumed()
            yield cut
            at = cut.after
        elif at.version_1 is not None and at.block_row:
            # As it was cut.
            plan = replace(plan, block_rows=at.version_1[2], batch_size=1, block_bytes=2**63 - 1)
        for epoch in range(plan.start.epoch, plan.epochs):
            number = at.block if epoch == plan.start.epoch else 0
            for lane in self._lanes.values():
                lane.begin_epoch()
            has_more, window = True, 0
            while has_more:
                dealt = deal(plan, self._ask, window)
                window = dealt.window
                has_more = not all(dealt.is_last)
                is_all = at.span is None  # where streams grow, more may come
                if not sum(dealt.rows) and not number and plan.trains and is_all:
                    raise DataError(
                        f"{self._files.path(self._part.first_file)}: no row is left to train on; "
                        "every one that was read is malformed (see quarantine.jsonl in the run) "
                        "or held out by its time"
                    )
                cut = self._new(dealt, at, (epoch, number))
                if not cut.inside.is_in_block:
                    break  # no row was left
                yield cut
                at, number, plan = cut.after, number + 1, self._plan

    def _ask(self, wanted: Sequence[int], most_bytes: int, window: int) -> list[Offer]:
        mine = {
            number: lane.offer(wanted[number], most_bytes, window)
            for number, lane in self._lanes.items()
        }
        offers = self._agreement.offers(mine)
        return [offers[number] for number in range(len(wanted))]

    def _resumed(self) -> Cut:
        """The block that a former run began, from what it was made of."""
        start, per_row = self._plan.start, self._plan.samples_per_row
        stretches: dict[int, list[Stretch]] = {}
        for number, lane in self._lanes.items():
            before = start.lanes[number]
            stretches[number] = lane.rest_of_block() if before.pieces else []
            found = counts_of(stretches[number]).applied * per_row
            if found != before.samples:
                first = self._files.path(before.pieces[0].file)
                raise DataError(
                    f"{first}: the block that was begun in it had {before.samples:,} samples and "
                    f"has {found:,} now, so it cannot be finished in its order; put the files and "
                    "the job's data back as they were, or train in a new run folder"
                )
        # What the block leaves out was counted with its first batch.
        done = start.block_row // per_row
        read, filtered, quarantined, applied = start.counts
        inside = replace(
            start,
            block_row=0,
            samples=start.samples - start.block_row,
            counts=Counts(read - done, filtered, quarantined, applied - done),
            files=self._files.add(_tags_of(stretches)),
        )
        return Cut(stretches, [], start, inside, self._behind(inside))

    def _new(self, dealt: Dealt, at: Position, number: tuple[int, int]) -> Cut:
        """A block of new rows, which begins at `at`."""
        per_row = self._plan.samples_per_row
        stretches: dict[int, list[Stretch]] = {}
        mine = {}
        for lane, queue in self._lanes.items():
            if dealt.is_last[lane]:
                taken = queue.take_all()
                cursor = self._end(taken[-1]) if taken else at.lanes[lane].cursor
            else:
                taken = queue.take(dealt.rows[lane])
                cursor = queue.begins_at
            stretches[lane] = taken
            found = counts_of(taken)
            place = LanePosition(pieces_of(taken), cursor, found.applied * per_row)
            mine[lane] = LaneBlock(place, found, _tags_of({lane: taken}), malformed_in(taken))
        blocks = self._agreement.blocks(mine)
        every = [blocks[lane] for lane in range(self._plan.num_lanes)]
        read, filtered, quarantined, applied = at.counts
        done = at.block_row // per_row  # of version 1, which has no pieces
        new_filtered = sum(block.counts.filtered for block in every)
        new_quarantined = sum(block.counts.quarantined for block in every)
        inside = Position(
            *number,
            lanes=tuple(block.position for block in every),
            samples=at.samples - at.block_row,
            counts=Counts(
                read - done + new_filtered + new_quarantined,
                filtered + new_filtered,
                quarantined + new_quarantined,
                applied - done,
            ),
            files=self._files.add([tag for block in every for tag in block.tags]),
            divided=self._part.divided,
            span=at.span,
        )
        malformed = [row for block in every for row in block.malformed]
        return Cut(stretches, malformed, at, inside, self._behind(inside))

    def _behind(self, inside: Position) -> Position:
        """The place behind a block."""
        samples = inside.block_size
        return replace(
            within(inside, samples, self._plan.samples_per_row),
            block=inside.block + (samples > 0),
            block_row=0,
            lanes=tuple(LanePosition(cursor=lane.cursor) for lane in inside.lanes),
        )

    def _end(self, last: Stretch) -> Cursor:
        """The place behind all rows that there are."""
        cursor = end_of(last)
        # There rows may be added to the file; elsewhere no extent need be read to see that it ends.
        may_grow = self._part.source.may_grow(self._files.path(cursor.file))
        return cursor if may_grow else Cursor(cursor.file + 1)


def _tags_of(stretches: Mapping[int, Sequence[Stretch]]) -> list[tuple[int, FileTag]]:
    """Number and identity of the files of stretches, as far as those reach; each file once."""
    found: dict[int, FileTag] = {}
    for of_lane in stretches.values():
        for one in of_lane:
            file, tag = one.passage.file, one.passage.tag
            if tag is not None and (file not in found or tag.size > found[file].size):
                found[file] = tag
    return list(found.items())


def within(block: Position, samples: int, per_row: int) -> Position:
    """The place behind some samples of the block whose first sample is at `block`."""
    read, filtered, quarantined, applied = block.counts
    rows = samples // per_row
    return Position(
        block.epoch,
        block.block,
        samples,
        block.lanes,
        block.samples + samples,
        Counts(read + rows, filtered, quarantined, applied + rows),
        block.files,
        block.divided,
        block.span,
    )
