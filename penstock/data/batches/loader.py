"""Reads, shuffles and cuts batches in the background.

Reader threads decode the next extents ahead; one assembler thread joins their chunks to blocks,
shuffles each block and cuts it into batches; the consumer takes batches from a bounded channel.
What comes out is a pure function of (rows, seed, batch size), whatever the threads do.

A block that a former run began is read again from the pieces it was made of and finished as it was
cut; sizes of batches and blocks count from the next one on.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.data.batches.channel import Channel, Closed, Ended
from penstock.data.batches.reader import Reader
from penstock.data.batches.stretches import (
    Stretch,
    counts_of,
    end_of,
    malformed_in,
    pieces_of,
    rows_within,
    take,
)
from penstock.data.columns.block import Block, Samples
from penstock.data.columns.negatives import draw_rows
from penstock.data.columns.schema import Columns
from penstock.data.identity import WholeTags
from penstock.data.plan.origin import Origin, PlacedRows
from penstock.data.plan.parts import PartRows
from penstock.data.quarantine import LeftOut, Quarantine
from penstock.errors import DataError, Interrupted
from penstock.types import Batch, Counts, Cursor, FileTag, KeyedJagged, Position

_PLAIN_BLOCK_ROWS = 8_192

_PATIENCE_S, _HASTY_S = 30.0, 0.3
"""How long `close` waits for threads: as a rule, and where a signal asks to stop."""


@dataclass(frozen=True, slots=True)
class LoaderPlan:
    """What a loader delivers. Equal plans over equal files deliver equal batches."""

    batch_size: int
    block_rows: int
    """Rows that are joined, and shuffled if `shuffled`; their samples are whole batches."""
    shuffled: bool
    seed: int
    epochs: int
    start: Position
    samples_per_row: int = 1
    """More than 1 where negatives are drawn."""
    redraws: bool = False
    """Whether negatives depend on seed and epoch as well as on the block."""
    block_bytes: int = 2**63 - 1
    """Of decoded rows: a block that would be larger has fewer rows, as many whole batches as fit
    (at least one)."""
    trains: bool = True
    """Positions then identify the files, and an epoch without a good row is an error."""

    @classmethod
    def of(
        cls,
        batch_size: int,
        block_rows: int,
        seed: int,
        epochs: int,
        start: Position,
        *,
        shuffled: bool,
        samples_per_row: int = 1,
        redraws: bool = False,
    ) -> LoaderPlan:
        """Rounds the block up to whole batches, so that only an epoch's last batch is short.

        `block_rows` 0: as many as make no difference.
        """
        plan = cls(
            batch_size,
            block_rows or _PLAIN_BLOCK_ROWS,
            shuffled,
            seed,
            epochs,
            start,
            samples_per_row,
            redraws,
        )
        unit = plan.rows_of_whole_batches
        return replace(plan, block_rows=-(-plan.block_rows // unit) * unit)

    @property
    def rows_of_whole_batches(self) -> int:
        """A block's rows are a multiple of these."""
        return self.batch_size // math.gcd(self.batch_size, self.samples_per_row)

    def rows_to_begin_a_block(self, rows: int) -> int:
        """Rows that must be left after a block of `rows` for another to begin.

        Fewer belong to the last one. Negatives are drawn among the rows of a block, so that none
        may be short.
        """
        return 1 if self.samples_per_row == 1 else rows

    def rows_of_next_block(self, waiting: Sequence[Stretch], rows: int, memory: int) -> int:
        """Good rows to take for a block; 0: more must come first.

        A function of the rows from where the block begins, however they come to be stretches.

        Args:
          waiting: what follows the block before.
          rows: good rows of it.
          memory: bytes of it.
        """
        size = self.block_rows
        if memory > self.block_bytes:
            unit = self.rows_of_whole_batches
            fit = rows_within(waiting, self.block_bytes)
            size = min(size, max(fit // unit, 1) * unit)
        # A row that is left says where the next block begins.
        return size if rows >= size + self.rows_to_begin_a_block(size) else 0


class _Cut(NamedTuple):
    """A block and where it lies; without a block, rows that were all left out."""

    block: Block | None
    placed: Sequence[PlacedRows]
    malformed: Sequence[LeftOut]
    """Of its rows, if nobody has been given them."""
    start: Position
    """Where the first batch that is left of it begins."""
    inside: Position
    """Within it, with the counts of what it leaves out, before the first sample."""
    after: Position
    """Behind it."""


class _Delivery(NamedTuple):
    """What the consumer takes."""

    batch: Batch | None
    position: Position
    """After it."""
    malformed: Sequence[LeftOut] = ()
    first_malformed: int = 0


class Loader:
    """Iterator of batches and context manager; closing it stops its threads.

    Safe to use from one thread. An error in the background is raised, with its type, by the `next`
    that would have given the batch after it; the loader is closed then.
    """

    position: Position
    """After what was delivered: where another loader goes on."""
    has_ended: bool
    """Whether everything was delivered."""

    def __init__(
        self,
        part: PartRows,
        columns: Columns,
        plan: LoaderPlan,
        threads: int,
        prefetch: int,
        *,
        quarantine: Quarantine,
        tags: WholeTags,
        files: Sequence[FileTag],
    ) -> None:
        """Starts reading.

        Args:
          part: what to read.
          columns: what to decode.
          plan: what to deliver.
          threads: that read.
          prefetch: batches that wait for the consumer.
          quarantine: takes malformed rows when the batch is taken behind which they lie.
          tags: of the part's files.
          files: of the part, as far as they were read before `plan.start`.

        Raises:
          DataError: the data does not have the place at which to start.
        """
        self._part = part
        self._quarantine = quarantine
        self._tags = tags
        self._files = list(files)
        self._passed_files = 0
        self._shown_files: tuple[FileTag, ...] | None = None
        self.position = plan.start
        self.has_ended = False
        self._plan = plan
        self._negatives = columns.negatives
        self._groups = columns.groups
        self._features = columns.feature_names
        self._out: Channel[_Delivery] = Channel(prefetch)
        # Half of them, so that neither side wakes the other for every batch.
        self._at_once = max(1, prefetch // 2)
        self._closed = False
        self._reader = Reader(
            part,
            columns,
            plan.start,
            plan.epochs,
            threads,
            tags=tags,
            trains=plan.trains,
        )
        self._assembler = threading.Thread(
            target=self._assemble, name="penstock-assembler", daemon=True
        )
        self._assembler.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.has_ended and not self._closed:
            raise StopIteration
        try:
            while True:
                batch, self.position, malformed, first = self._out.get()
                if malformed:
                    self._quarantine.add(malformed, first if self._plan.trains else None)
                if batch is not None:
                    return batch
        except Closed:
            raise ValueError("the loader is closed; ask the dataset for new batches") from None
        except Ended:
            self.has_ended = True
            raise StopIteration from None
        except BaseException as error:
            self._close(type(error))
            raise

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close(kind)

    def close(self) -> None:
        """Stops the threads and waits for them, but not for ever for a read that does not end."""
        self._close(None)

    def _close(self, why: type[BaseException] | None) -> None:
        patience_s = _HASTY_S if why is not None and issubclass(why, Interrupted) else _PATIENCE_S
        end_s = time.monotonic() + patience_s
        self._closed = True
        self._out.close()
        self._reader.close()
        self._reader.join(patience_s)
        self._assembler.join(max(0.0, end_s - time.monotonic()))

    # The assembler thread.

    def _assemble(self) -> None:
        try:
            for cut in self._blocks():
                deliveries = self._deliver(cut)
                while some := list(islice(deliveries, self._at_once)):
                    self._out.put(*some)
            self._out.end()
        except Closed:
            return
        # Not handled here: `__next__` raises it.
        except BaseException as error:
            self._out.fail(error)

    def _blocks(self) -> Iterator[_Cut]:
        at, plan = self._plan.start, self._plan
        if at.pieces and at.epoch < plan.epochs:
            cut = self._resumed_block()
            yield cut
            at = cut.after
        elif at.version_1 is not None and at.block_row:
            # As it was cut.
            plan = replace(plan, block_rows=at.version_1[2], block_bytes=2**63 - 1)
        for epoch in range(plan.start.epoch, plan.epochs):
            number = at.block if epoch == plan.start.epoch else 0
            waiting: deque[Stretch] = deque()
            rows = memory = 0
            for stretch in self._reader.stretches():
                waiting.append(stretch)
                rows += stretch.size
                memory += stretch.memory
                while size := plan.rows_of_next_block(waiting, rows, memory):
                    taken = take(waiting, size)
                    rows -= size
                    memory = sum(one.memory for one in waiting)
                    (file, start, _, _), first = waiting[0].passage, waiting[0].first
                    cut = self._block(taken, at, (epoch, number), Cursor(file, start, first))
                    yield cut
                    at, number, plan = cut.after, number + 1, self._plan
            if not rows and not number and self._plan.trains:
                raise DataError(
                    f"{self._files[0].path}: no row is left to train on; every one that was read "
                    "is malformed (see quarantine.jsonl in the run) or held out by its time"
                )
            if waiting:
                cut = self._block(list(waiting), at, (epoch, number), self._end(waiting[-1]))
                yield cut
                at = cut.after

    def _resumed_block(self) -> _Cut:
        """The block that a former run began, from what it was made of."""
        start = self._plan.start
        stretches = list(self._reader.stretches())
        found = counts_of(stretches).applied * self._plan.samples_per_row
        if found != start.block_size:
            first = self._files[start.pieces[0].file].path
            raise DataError(
                f"{first}: the block that was begun in it had {start.block_size:,} samples and "
                f"has {found:,} now, so it cannot be finished in its order; put the files and the "
                "job's data back as they were, or train in a new run folder"
            )
        # What the block leaves out was counted with its first batch.
        done = start.block_row // self._plan.samples_per_row
        read, filtered, quarantined, applied = start.counts
        inside = replace(
            start,
            block_row=0,
            samples=start.samples - start.block_row,
            counts=Counts(read - done, filtered, quarantined, applied - done),
            files=self._file_tags(stretches),
        )
        return self._cut(stretches, start, inside, [])

    def _block(
        self, stretches: list[Stretch], at: Position, number: tuple[int, int], cursor: Cursor
    ) -> _Cut:
        """A block of new rows, which begins at `at`; the next one begins at `cursor`."""
        read, filtered, quarantined, applied = at.counts
        done = at.block_row // self._plan.samples_per_row  # of version 1, which has no pieces
        found = counts_of(stretches)
        inside = Position(
            *number,
            pieces=pieces_of(stretches),
            cursor=cursor,
            samples=at.samples - at.block_row,
            counts=Counts(
                read - done + found.filtered + found.quarantined,
                filtered + found.filtered,
                quarantined + found.quarantined,
                applied - done,
            ),
            files=self._file_tags(stretches),
            divided=self._part.divided,
        )
        return self._cut(stretches, at, inside, malformed_in(stretches))

    def _cut(
        self,
        stretches: Sequence[Stretch],
        start: Position,
        inside: Position,
        malformed: Sequence[LeftOut],
    ) -> _Cut:
        good = [one for one in stretches if one.size]
        placed = [PlacedRows(one.place, one.low, one.high) for one in good]
        parts = [(one.rows, one.low, one.high) for one in good if one.rows is not None]
        block = Block(parts, self._negatives) if parts else None
        samples = 0 if block is None else block.num_rows * self._plan.samples_per_row
        inside = replace(inside, block_size=samples)
        after = replace(
            _within(inside, samples, self._plan.samples_per_row),
            block=inside.block + (block is not None),
            block_row=0,
            block_size=0,
            pieces=(),
        )
        return _Cut(block, placed, malformed, start, inside, after)

    def _end(self, last: Stretch) -> Cursor:
        """The place behind all rows that there are."""
        cursor = end_of(last)
        # There rows may be added to the file; elsewhere no extent need be read to see that it ends.
        may_grow = self._part.source.may_grow(self._files[cursor.file].path)
        return cursor if may_grow else Cursor(cursor.file + 1)

    def _file_tags(self, stretches: Sequence[Stretch]) -> tuple[FileTag, ...]:
        """Identities of the part's files as far as they were read, with some more rows."""
        for one in stretches:
            file, tag = one.passage.file, one.passage.tag
            if tag is not None and tag.size > self._files[file].size:
                # Files without a row were passed, too.
                for number in range(self._passed_files, file):
                    if not self._files[number].is_begun:
                        self._files[number] = self._tags.of(self._files[number].path)
                self._passed_files = max(self._passed_files, file)
                self._files[file] = tag
                self._shown_files = None
        if self._shown_files is None:
            self._shown_files = tuple(self._files) if self._plan.trains else ()
        return self._shown_files

    def _deliver(self, cut: _Cut) -> Iterator[_Delivery]:
        per_row = self._plan.samples_per_row
        first_malformed = cut.inside.counts.quarantined - len(cut.malformed) + 1
        if cut.block is None:
            yield _Delivery(None, cut.after, cut.malformed, first_malformed)
            return
        n = cut.block.num_rows * per_row
        begin = cut.start.block_row
        order = self._order(cut, n) if self._plan.shuffled else range(n)
        drawn = self._draw(cut)
        # With negatives a block has many more samples than rows; only some are copied at a time.
        at_once = -(-self._plan.block_rows // self._plan.batch_size) * self._plan.batch_size
        start, at, malformed = begin, cut.start, cut.malformed
        for low in range(begin, n, at_once):
            samples = order[low : low + at_once]
            for rows in cut.block.batches(samples, self._plan.batch_size, drawn):
                stop = start + rows.labels.shape[0]
                end = _within(cut.inside, stop, per_row) if stop < n else cut.after
                batch = self._batch(rows, at, end, self._origin(cut, start, stop))
                yield _Delivery(batch, end, malformed, first_malformed)
                start, at, malformed = stop, end, ()

    def _order(self, cut: _Cut, n: int) -> NDArray[np.int64]:
        key = np.random.SeedSequence(self._seed_of(cut)).generate_state(2, np.uint64)
        return _core.shuffle(int(key[0]), int(key[1]), n)

    def _draw(self, cut: _Cut) -> NDArray[np.int64] | None:
        """Rows from which the block's samples take their items; None: no negatives are drawn."""
        if self._negatives is None or cut.block is None or cut.block.item_rows is None:
            return None
        seed = self._seed_of(cut) if self._plan.redraws else [cut.inside.block]
        where = self._origin(cut, 0, cut.block.num_rows * self._plan.samples_per_row)
        return draw_rows(cut.block.item_rows, self._negatives, seed, str(where))

    def _seed_of(self, cut: _Cut) -> list[int]:
        return [self._plan.seed & (2**64 - 1), cut.inside.epoch, cut.inside.block]

    def _batch(self, rows: Samples, start: Position, end: Position, origin: Origin) -> Batch:
        sparse = KeyedJagged(self._features, rows.values, rows.offsets, rows.key_weights)
        return Batch(
            rows.dense,
            sparse,
            rows.labels,
            rows.weights,
            rows.event_time,
            rows.teacher,
            start,
            end,
            origin,
            dict(zip(self._groups, rows.groups, strict=True)),
        )

    def _origin(self, cut: _Cut, start: int, stop: int) -> Origin:
        """Where the samples [start, stop) of a block come from."""
        per_row = self._plan.samples_per_row
        return Origin(cut.placed, start // per_row, -(-stop // per_row), self._plan.shuffled)


def _within(block: Position, samples: int, per_row: int) -> Position:
    """The place behind some samples of the block whose first sample is at `block`."""
    read, filtered, quarantined, applied = block.counts
    rows = samples // per_row
    return Position(
        block.epoch,
        block.block,
        samples,
        block.block_size,
        block.pieces,
        block.cursor,
        block.samples + samples,
        Counts(read + rows, filtered, quarantined, applied + rows),
        block.files,
        block.divided,
    )
