"""Reads, shuffles and cuts batches in the background.

Reader threads decode the next splits ahead; one assembler thread joins their chunks to windows,
shuffles each window and cuts it into batches; the consumer takes batches from a bounded channel.
What comes out is a pure function of (rows, seed, batch size), whatever the threads do.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.data.channel import Channel, Closed, Ended
from penstock.data.decode import Decoder
from penstock.data.negatives import draw_rows
from penstock.data.origin import Origin, PlacedRows
from penstock.data.parts import PartRows
from penstock.data.schema import Columns
from penstock.data.source import Place
from penstock.data.window import Rows, Samples, Window
from penstock.errors import DataError
from penstock.types import Batch, KeyedJagged, Position

_CHUNKS_AHEAD = 2
"""Chunks that a reader may decode ahead of the assembler, for each split it has open."""
_PLAIN_WINDOW_ROWS = 8_192


@dataclass(frozen=True, slots=True)
class LoaderPlan:
    """What a loader delivers. Equal plans over equal files deliver equal batches."""

    batch_size: int
    window_rows: int
    """Rows that are joined, and shuffled if `shuffled`; their samples are whole batches."""
    shuffled: bool
    seed: int
    epochs: int
    start: Position
    samples_per_row: int = 1
    """More than 1 where negatives are drawn."""
    redraws: bool = False
    """Whether negatives depend on seed and epoch as well as on the window."""
    window_bytes: int = 2**63 - 1
    """Of decoded rows: a window that would be larger has fewer rows, as many whole batches as fit
    (at least one)."""

    @classmethod
    def of(
        cls,
        batch_size: int,
        window_rows: int,
        seed: int,
        epochs: int,
        start: Position,
        *,
        shuffled: bool,
        samples_per_row: int = 1,
        redraws: bool = False,
    ) -> LoaderPlan:
        """Rounds the window up to whole batches, so that only an epoch's last batch is short.

        `window_rows` 0: as many as make no difference.
        """
        plan = cls(
            batch_size,
            window_rows or _PLAIN_WINDOW_ROWS,
            shuffled,
            seed,
            epochs,
            start,
            samples_per_row,
            redraws,
        )
        unit = plan.rows_of_whole_batches
        return replace(plan, window_rows=-(-plan.window_rows // unit) * unit)

    @property
    def rows_of_whole_batches(self) -> int:
        """A window's rows are a multiple of these."""
        return self.batch_size // math.gcd(self.batch_size, self.samples_per_row)

    def rows_to_begin_a_window(self, rows: int) -> int:
        """Rows that must be left after a window of `rows` for another to begin.

        Fewer belong to the last one. Negatives are drawn among the rows of a window, so that none
        may be short.
        """
        return 1 if self.samples_per_row == 1 else rows


class _Piece(NamedTuple):
    """A stretch of decoded rows on its way into a window."""

    rows: Rows
    place: Place
    split: int
    split_row: int
    """Number within the split of the row 0 of `rows`."""
    start: int
    stop: int

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.rows.memory(self.start, self.stop)


class _Stretch(NamedTuple):
    """A window and where it lies."""

    rows: Window
    at: Position
    """Of its first row."""
    after: Position
    """Of the first row of the window after it."""
    placed: Sequence[PlacedRows]


class Loader:
    """Iterator of batches and context manager; closing it stops its threads.

    Safe to use from one thread. An error in the background is raised, with its type, by the `next`
    that would have given the batch after it; the loader is closed then.
    """

    def __init__(
        self, part: PartRows, columns: Columns, plan: LoaderPlan, threads: int, prefetch: int
    ) -> None:
        if plan.start.split > len(part.splits):
            raise DataError(
                f"position in split {plan.start.split}, but the data has {len(part.splits)} "
                "splits; it is not the data that the checkpoint was taken on"
            )
        self._part = part
        self._plan = plan
        self._negatives = columns.negatives
        self._groups = columns.groups
        self._features = columns.feature_names
        self._columns = columns.names
        self._decoder = Decoder(columns)
        self._out: Channel[Batch] = Channel(prefetch)
        # Half of them, so that neither side wakes the other for every batch.
        self._at_once = max(1, prefetch // 2)
        self._open_splits: deque[Channel[_Piece]] = deque()
        self._split_opened = threading.Condition()
        self._todo = self._splits_to_read()
        self._max_open = threads + 1
        self._finished = False
        self._closed = False
        self._threads = [
            threading.Thread(target=self._read_splits, name=f"reader-{number}", daemon=True)
            for number in range(threads)
        ]
        self._threads.append(threading.Thread(target=self._assemble, name="assembler", daemon=True))
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._finished and not self._closed:
            raise StopIteration
        try:
            return self._out.get()
        except Closed:
            raise ValueError("the loader is closed; ask the dataset for new batches") from None
        except Ended:
            self._finished = True
            raise StopIteration from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads and waits for them: at most for the read that each is in."""
        self._closed = True
        self._out.close()
        with self._split_opened:
            for channel in self._open_splits:
                channel.close()
            self._split_opened.notify_all()
        for thread in self._threads:
            thread.join()

    # Reader threads.

    def _splits_to_read(self) -> Iterator[tuple[int, int]]:
        """(epoch, split) in order, from the start."""
        for epoch in range(self._plan.start.epoch, self._plan.epochs):
            for split in self._splits_of(epoch):
                yield epoch, split

    def _splits_of(self, epoch: int) -> range:
        start = self._plan.start
        return range(start.split if epoch == start.epoch else 0, len(self._part.splits))

    def _read_splits(self) -> None:
        while (job := self._next_split()) is not None:
            epoch, split, channel = job
            try:
                self._read_split(epoch, split, channel)
                channel.end()
            except Closed:
                return
            # Not handled here: the assembler raises it where the consumer sees it.
            except BaseException as error:
                channel.fail(error)
                return

    def _next_split(self) -> tuple[int, int, Channel[_Piece]] | None:
        with self._split_opened:
            self._split_opened.wait_for(
                lambda: self._closed or len(self._open_splits) < self._max_open
            )
            job = None if self._closed else next(self._todo, None)
            if job is None:
                return None
            channel: Channel[_Piece] = Channel(_CHUNKS_AHEAD)
            self._open_splits.append(channel)
            self._split_opened.notify_all()
            return *job, channel

    def _read_split(self, epoch: int, split: int, channel: Channel[_Piece]) -> None:
        start = self._plan.start
        skip = start.split_row if (epoch, split) == (start.epoch, start.split) else 0
        row = 0
        for chunk in self._part.read(self._part.splits[split], self._columns):
            n = chunk.table.num_rows
            if n and row + n > skip:
                rows = self._decoder.decode(chunk)
                channel.put(_Piece(rows, chunk.place, split, row, max(skip - row, 0), n))
            row += n

    # The assembler thread.

    def _assemble(self) -> None:
        try:
            for window in self._windows():
                batches = self._cut(window)
                while some := list(islice(batches, self._at_once)):
                    self._out.put(*some)
            self._out.end()
        except Closed:
            return
        # Not handled here: `__next__` raises it.
        except BaseException as error:
            self._out.fail(error)

    def _windows(self) -> Iterator[_Stretch]:
        per_row = self._plan.samples_per_row
        start = replace(self._plan.start, window_row=0)
        at = replace(start, samples=self._plan.start.samples - self._plan.start.window_row)
        for epoch in range(self._plan.start.epoch, self._plan.epochs):
            waiting: deque[_Piece] = deque()
            rows = memory = 0
            for piece in self._pieces(epoch):
                waiting.append(piece)
                rows += piece.stop - piece.start
                memory += piece.memory
                while size := self._rows_of_next_window(waiting, rows, memory):
                    taken = _take(waiting, size)
                    rows -= size
                    memory = sum(piece.memory for piece in waiting)
                    after = Position(
                        epoch=epoch,
                        window=at.window + 1,
                        split=waiting[0].split,
                        split_row=waiting[0].split_row + waiting[0].start,
                        samples=at.samples + size * per_row,
                    )
                    yield self._window(taken, at, after)
                    at = after
            after = Position(epoch=epoch + 1, samples=at.samples + rows * per_row)
            if rows:
                yield self._window(list(waiting), at, after)
            at = after

    def _rows_of_next_window(self, waiting: Sequence[_Piece], rows: int, memory: int) -> int:
        """Rows to take for a window; 0: more must come first.

        A function of the rows from where the window begins, however they come to be pieces.
        """
        plan = self._plan
        size = plan.window_rows
        if memory > plan.window_bytes:
            unit = plan.rows_of_whole_batches
            fit = _rows_within(waiting, plan.window_bytes)
            size = min(size, max(fit // unit, 1) * unit)
        # A row that is left says where the next window begins.
        return size if rows >= size + plan.rows_to_begin_a_window(size) else 0

    def _window(self, pieces: list[_Piece], at: Position, after: Position) -> _Stretch:
        parts = [(piece.rows, piece.start, piece.stop) for piece in pieces]
        placed = [PlacedRows(piece.place, piece.start, piece.stop) for piece in pieces]
        return _Stretch(Window(parts, self._negatives), at, after, placed)

    def _pieces(self, epoch: int) -> Iterator[_Piece]:
        """Decoded pieces of one epoch, in order."""
        for _ in self._splits_of(epoch):
            with self._split_opened:
                self._split_opened.wait_for(lambda: self._closed or bool(self._open_splits))
                if self._closed:
                    raise Closed
                channel = self._open_splits[0]
            while True:
                try:
                    piece = channel.get()
                except Ended:
                    break
                yield piece
            with self._split_opened:
                self._open_splits.popleft()
                self._split_opened.notify_all()

    def _cut(self, window: _Stretch) -> Iterator[Batch]:
        n = window.rows.num_rows * self._plan.samples_per_row
        begin = 0
        if (
            window.at.epoch == self._plan.start.epoch
            and window.at.window == self._plan.start.window
        ):
            begin = self._plan.start.window_row
            if begin > n:
                raise DataError(
                    f"position after {begin:,} samples of a window that has {n:,}; "
                    "data.shuffle was other when the checkpoint was taken, or the data was"
                )
        order = self._order(window, n) if self._plan.shuffled else range(n)
        drawn = self._draw(window)
        # With negatives a window has many more samples than rows; only some are copied at a time.
        at_once = -(-self._plan.window_rows // self._plan.batch_size) * self._plan.batch_size
        start, at = begin, _after(window.at, begin)
        for low in range(begin, n, at_once):
            samples = order[low : low + at_once]
            for rows in window.rows.batches(samples, self._plan.batch_size, drawn):
                stop = start + rows.labels.shape[0]
                end = _after(window.at, stop) if stop < n else window.after
                yield self._batch(rows, at, end, self._origin(window, start, stop))
                start, at = stop, end

    def _order(self, window: _Stretch, n: int) -> NDArray[np.int64]:
        key = np.random.SeedSequence(self._seed_of(window)).generate_state(2, np.uint64)
        return _core.shuffle(int(key[0]), int(key[1]), n)

    def _draw(self, window: _Stretch) -> NDArray[np.int64] | None:
        """Rows from which the window's samples take their items; None: no negatives are drawn."""
        if self._negatives is None or window.rows.items is None:
            return None
        seed = self._seed_of(window) if self._plan.redraws else [window.at.window]
        where = self._origin(window, 0, window.rows.num_rows * self._plan.samples_per_row)
        return draw_rows(window.rows.items, self._negatives, seed, str(where))

    def _seed_of(self, window: _Stretch) -> list[int]:
        return [self._plan.seed & (2**64 - 1), window.at.epoch, window.at.window]

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

    def _origin(self, window: _Stretch, start: int, stop: int) -> Origin:
        """Where the samples [start, stop) of a window come from."""
        per_row = self._plan.samples_per_row
        return Origin(window.placed, start // per_row, -(-stop // per_row), self._plan.shuffled)


def _after(window: Position, samples: int) -> Position:
    """The place after some samples of the window that begins at `window`."""
    return Position(
        window.epoch,
        window.window,
        samples,
        window.split,
        window.split_row,
        window.samples + samples,
    )


def _rows_within(pieces: Sequence[_Piece], most_bytes: int) -> int:
    """How many of the first rows take up at most so much memory; all of them take more."""
    rows = 0
    for piece in pieces:
        memory = piece.memory
        if memory > most_bytes:
            before = piece.rows.memory_before(piece.start, piece.stop)
            return rows + int(np.searchsorted(before, most_bytes, side="right")) - 1
        most_bytes -= memory
        rows += piece.stop - piece.start
    return rows


def _take(waiting: deque[_Piece], rows: int) -> list[_Piece]:
    """Removes the first `rows` rows of the pieces, cutting the last one taken."""
    taken = []
    while rows:
        piece = waiting.popleft()
        size = piece.stop - piece.start
        if size > rows:
            waiting.appendleft(piece._replace(start=piece.start + rows))
            piece = piece._replace(stop=piece.start + rows)
            size = rows
        taken.append(piece)
        rows -= size
    return taken
