"""Blocks, one after the other: the rows of all lanes that are shuffled together, and their place.

A block that a former run began is read again from the pieces it was made of and finished as it was
cut; sizes of batches and blocks count from the next one on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from penstock.data.batches.agreement import Agreement, Dealt, LaneBlock, deal
from penstock.data.batches.in_turn import deal_again, deal_now
from penstock.data.batches.lane_queue import LaneQueue, Offer
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.stretches import (
    Stretch,
    counts_of,
    end_of,
    malformed_in,
    pieces_of,
)
from penstock.data.batches.turns import Progress, Turns
from penstock.data.identity import WholeTags
from penstock.data.plan.parts import PartRows
from penstock.data.quarantine import LeftOut
from penstock.errors import DataError
from penstock.position import Counts, Cursor, FileTag, LanePosition, Position, Taken


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
    left_out: int = 0
    """Rows among which no negative can be drawn, if nobody has been told of them."""


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

    def add(
        self, read: Sequence[tuple[int, FileTag]], passed: int, end_of: Callable[[str], int]
    ) -> tuple[FileTag, ...]:
        """Takes note of files that were read so far; returns all.

        Args:
          read: number and identity.
          passed: a lane reads on there, and not before.
          end_of: where the last extent of a file ends whose rows may grow.
        """
        if not self._shows:
            return ()
        read_to = 0
        for numbered, tag in sorted(read):
            read_to = numbered - self._first
            passed = max(passed, numbered)
            if tag.size > self._files[read_to].size:
                self._files[read_to] = tag
                self._shown = None
        source = self.whole.source
        window = source.window(self._files[read_to].path)
        for number in range(self._passed, min(passed - self._first, len(self._files))):
            # A stream that gets an end may do without the windows that are still to be read.
            if number >= read_to and source.window(self._files[number].path) > window:
                break
            self._make_whole(number, end_of)
            self._passed = number + 1
        if self._shown is None:
            self._shown = tuple(self._files)
        return self._shown

    def _make_whole(self, number: int, end_of: Callable[[str], int]) -> None:
        """A lane is behind the file, whatever others have still to read there.

        So rows added to it from now on would be left out, whoever has read how far.
        """
        tag, source = self._files[number], self.whole.source
        if source.may_grow(tag.path) and tag.size < (end := end_of(tag.path)):
            self._files[number], self._shown = source.identify(tag.path, end), None
        elif not tag.is_begun:
            self._files[number], self._shown = self.whole.of(tag.path), None


class Blocks:
    """The blocks of a part from a position on, of which this process reads some lanes."""

    def __init__(
        self,
        part: PartRows,
        plan: LoaderPlan,
        lanes: Sequence[LaneQueue],
        agreement: Agreement,
        files: FileTags,
        turns: Turns | None = None,
        *,
        is_final: bool,
    ) -> None:
        self._turns, self._progress = turns, None if turns is None else _progress(part, plan.start)
        self._part, self._plan, self._files, self._is_final = part, plan, files, is_final
        self._extents, self._ends, self._known_to = iter(part.extents), dict[str, int](), 0
        self.end = plan.start
        """Behind the blocks so far; in the end, where the rows begin that none of them has."""
        self._lanes = {lane.number: lane for lane in lanes}
        self._agreement = agreement

    def __iter__(self) -> Iterator[Cut]:
        at, plan = self._plan.start, self._plan
        if at.is_in_block and at.epoch < plan.epochs:
            cut = self._resumed()
            yield cut
            self.end = at = cut.after
        elif at.version_1 is not None and at.block_row:
            # As it was cut.
            plan = replace(plan, block_rows=at.version_1[2], batch_size=1, block_bytes=2**63 - 1)
        for epoch in range(plan.start.epoch, plan.epochs):
            number = at.block if epoch == plan.start.epoch else 0
            for lane in self._lanes.values():
                lane.begin_epoch()
            if epoch > plan.start.epoch and self._turns is not None:
                self._progress = _progress(self._part, None)
            has_more, window = True, 0
            while has_more:
                dealt = self._deal(plan, window, (epoch, number))
                window = dealt.window
                has_more = not all(dealt.is_last)
                if not sum(dealt.rows) and not number and plan.trains and self._is_final:
                    raise DataError(
                        f"{self._files.path(self._part.first_file)}: no row is left to train on; "
                        "every one that was read is malformed (see quarantine.jsonl in the run), "
                        "held out by its time, or has no others to draw negatives from"
                    )
                cut = self._new(dealt, at, (epoch, number))
                self.end = cut.after
                if not cut.inside.is_in_block and cut.after.counts[1:3] == at.counts[1:3]:
                    break  # no row was left
                yield cut
                at, number, plan = cut.after, number + 1, self._plan

    def _deal(self, plan: LoaderPlan, window: int, number: tuple[int, int]) -> Dealt:
        if self._turns is None:
            return deal(plan, self._ask, window)
        ledger, sizes = self._turns.ledger, plan.sizes_of_blocks
        before = self._agreement.from_first(lambda: ledger.block(*number, sizes) or False)
        if before:
            grows = self._plan.start.span is not None
            lanes = self._plan.num_lanes
            return deal_again(before, self._ask, window, number, lanes=lanes, may_be_later=grows)
        dealt = deal_now(plan, self._ask_now, window, self._turns.news)
        if any(dealt.rows):
            self._agreement.in_first(lambda: ledger.add_block(*number, sizes, dealt.rows))
        return dealt

    def _ask_now(self, wanted: Sequence[int], most_bytes: int, window: int) -> list[Offer]:
        return self._asked(lambda lane: lane.offer_now(wanted[lane.number], most_bytes, window))

    def _ask(self, wanted: Sequence[int], most_bytes: int, window: int) -> list[Offer]:
        return self._asked(lambda lane: lane.offer(wanted[lane.number], most_bytes, window))

    def _asked(self, ask: Callable[[LaneQueue], Offer]) -> list[Offer]:
        offers = self._agreement.offers({n: ask(lane) for n, lane in self._lanes.items()})
        return [offers[number] for number in range(self._plan.num_lanes)]

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
            files=self._tags_with(_tags_of(stretches), start.lanes),
        )
        return Cut(stretches, [], start, inside, self._behind(inside))

    def _new(self, dealt: Dealt, at: Position, number: tuple[int, int]) -> Cut:
        """A block of new rows, which begins at `at`."""
        per_row = self._plan.samples_per_row
        stretches: dict[int, Sequence[Stretch]] = {}
        mine = {}
        for lane, queue in self._lanes.items():
            taken: Sequence[Stretch] = ()
            left_out = 0
            if self._turns is not None and not (dealt.rows[lane] or dealt.is_last[lane]):
                # It may have read nothing yet; what it has left out by now depends on when it is.
                cursor = at.lanes[lane].cursor
            else:
                taken, left_out = self._taken_of(queue, dealt.rows[lane], dealt.is_last[lane])
                cursor = self._cursor(queue, taken, at, lane)
            # What is left out altogether need not be read again to finish the block.
            stretches[lane] = [] if left_out else taken
            found = counts_of(taken)
            place = LanePosition(pieces_of(stretches[lane]), cursor, found.applied * per_row)
            tags, malformed = _tags_of({lane: taken}), malformed_in(taken)
            mine[lane] = LaneBlock(place, found, tags, malformed, _ended(taken), left_out)
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
            files=self._tags_with(
                [tag for block in every for tag in block.tags],
                [block.position for block in every],
            ),
            divided=self._part.divided,
            span=at.span,
            taken=self._taken(every),
        )
        malformed = [row for block in every for row in block.malformed]
        left_out = sum(block.left_out for block in every)
        return Cut(stretches, malformed, at, inside, self._behind(inside), left_out)

    def _taken(self, blocks: Sequence[LaneBlock]) -> Taken | None:
        if self._progress is None:
            return None
        return self._progress.add(place for block in blocks for place in block.ended)

    def _tags_with(
        self, read: Sequence[tuple[int, FileTag]], lanes: Sequence[LanePosition]
    ) -> tuple[FileTag, ...]:
        passed = max(lane.cursor.file for lane in lanes)
        return self._files.add(read, passed, self._end_of)

    def _end_of(self, path: str) -> int:
        """Where the last extent of a file ends; finds no extents but up to the file behind."""
        number = self._part.numbers[path]
        while self._known_to <= number and (extent := next(self._extents, None)) is not None:
            self._ends[extent.path] = extent.stop
            self._known_to = self._part.numbers[extent.path]
        return self._ends.get(path, 0)

    def _behind(self, inside: Position) -> Position:
        """The place behind a block."""
        samples = inside.block_size
        return replace(
            within(inside, samples, self._plan.samples_per_row),
            block=inside.block + (samples > 0),
            block_row=0,
            lanes=tuple(LanePosition(cursor=lane.cursor) for lane in inside.lanes),
        )

    def _taken_of(
        self, queue: LaneQueue, rows: int, is_last: bool
    ) -> tuple[Sequence[Stretch], int]:
        """What a lane gives, and how many good rows of it are left out."""
        if not is_last:
            return queue.take(rows), 0
        if queue.rows == rows:
            return queue.take_all(), 0
        # No negative can be drawn among these: they wait for others, if any come.
        if not self._is_final:
            return [], 0
        left_out = queue.rows
        return queue.leave_out_all(), left_out

    def _cursor(
        self, queue: LaneQueue, taken: Sequence[Stretch], at: Position, lane: int
    ) -> Cursor:
        """Where a lane goes on, of which some rows were taken."""
        if queue.rows:
            return queue.begins_at
        if at.span is not None:
            # So a position says which lanes have rows that wait for those of the next span.
            return Cursor(self._part.first_file + len(self._part.files))
        if not taken:
            return at.lanes[lane].cursor
        cursor = end_of(taken[-1])
        if self._turns is not None:
            return Cursor(cursor.file + 1)
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


def _ended(stretches: Sequence[Stretch]) -> list[tuple[int, int]]:
    return [(one.passage.file, one.passage.start) for one in stretches if one.is_end]


def _progress(part: PartRows, start: Position | None) -> Progress:
    first = part.first_file
    taken = None if start is None else start.taken
    behind = first + len(part.files)
    return Progress(taken or Taken((first, 0)), part.extents, part.numbers, behind)


def within(block: Position, samples: int, per_row: int) -> Position:
    """The place behind some samples of the block whose first sample is at `block`."""
    read, filtered, quarantined, applied = block.counts
    rows = samples // per_row
    return replace(
        block,
        block_row=samples,
        samples=block.samples + samples,
        counts=Counts(read + rows, filtered, quarantined, applied + rows),
    )
