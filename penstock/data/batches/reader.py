"""Reads the extents of one lane ahead in threads, and gives what they read in order.

A position begins a reader anywhere: in the pieces of a block that a former run began, and behind
them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

from penstock.data.batches.channel import Channel, Closed, Ended, nobody_listens
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.stretches import Passage, Stretch, good_rows_between
from penstock.data.batches.turns import Turns
from penstock.data.columns.decode import Decoder
from penstock.data.columns.far_times import FarTimes
from penstock.data.columns.schema import Columns
from penstock.data.identity import WholeTags
from penstock.data.plan.lanes import Lane
from penstock.data.plan.parts import PartRows
from penstock.data.quarantine import LeftOut
from penstock.data.source import Chunk, Extent, RowPlace
from penstock.errors import DataError
from penstock.position import FileTag, LanePosition, Piece

_CHUNKS_AHEAD, _CHUNKS_AHEAD_IN_LANES = 2, 1
"""Chunks that a reader may decode ahead of the consumer, for each extent it has open: where there
is one lane, and where there are several, which are read side by side."""


class _Task(NamedTuple):
    """Rows [first, stop) of an extent to read in an epoch; stop None: to its end."""

    epoch: int
    extent: int
    first: int = 0
    stop: int | None = None
    good_before: int = 0
    """Good rows to pass over, in place of `first`, where a checkpoint of version 1 counts them."""


class _Open(NamedTuple):
    """An extent that is being read."""

    task: _Task | None
    """None: it could not be found."""
    channel: Channel[Stretch]


class Threads(NamedTuple):
    """That read one lane."""

    number: int
    at_work: threading.Semaphore
    """Lets so many of all lanes read and decode at a time."""


class Reader:
    """Decoded stretches of the rows of a lane of a part, from a position on, in order.

    Safe to use from one thread; an error of a reading thread is raised where its rows would come.
    """

    def __init__(
        self,
        part: PartRows,
        columns: Columns,
        lane: Lane,
        plan: LoaderPlan,
        threads: Threads,
        *,
        tags: WholeTags,
        turns: Turns | None = None,
    ) -> None:
        """Starts the threads.

        Args:
          part: what to read.
          columns: what to decode.
          lane: which of its extents.
          plan: where to begin, and how many epochs to read. Where it trains, stretches say what
            identifies their file, and rows whose event time cannot be are left out.
          threads: each reads an extent.
          tags: of the part's files.
          turns: in which it takes extents, and says where each ends; None: it has its own ones.

        Raises:
          DataError: the data does not have the place at which to start.
        """
        self._part = part
        self._lane = lane
        self._turns = turns
        self._start = plan.start
        self._from: LanePosition = plan.start.lanes[lane.number]
        self._epochs = plan.epochs
        self._tags = tags
        self._trains = plan.trains
        self._far_times: FarTimes | None = None
        if plan.trains and columns.event_time is not None:
            ahead_s = columns.event_time_ahead_s
            self._far_times = FarTimes(columns.event_time, columns.time_unit, ahead_s)
        self._columns = columns.names
        self._decoder = Decoder(columns)
        self._file_numbers = part.numbers
        self._begun = [self._task_of(piece) for piece in self._from.pieces]
        self._first = self._first_tasks()
        self._todo = self._tasks()
        self._draw = threading.Lock()
        self._has_drawn_all = False
        self._open_splits: deque[_Open | None] = deque()
        """None ends an epoch, or the block that was begun."""
        self._split_opened = threading.Condition()
        self._max_open = threads.number + 1
        self._ahead = _CHUNKS_AHEAD if lane.of == 1 else _CHUNKS_AHEAD_IN_LANES
        self._at_work = threads.at_work
        self._tell = nobody_listens if turns is None else turns.news.tell
        self._closed = False
        self._threads = [
            threading.Thread(
                target=self._read_splits,
                name=f"penstock-reader-{lane.number}-{number}",
                daemon=True,
            )
            for number in range(threads.number)
        ]
        for thread in self._threads:
            thread.start()

    def stretches(self) -> Iterator[Stretch]:
        """The next part in order: the block that was begun, if one was, then epoch by epoch."""
        while True:
            try:
                stretch = self.take()
            except Ended:
                return
            yield stretch

    def take(self) -> Stretch:
        """The next stretch of the part that is being read; waits for it.

        Raises:
          Ended: there is none; then the next part begins.
        """
        while True:
            with self._split_opened:
                self._split_opened.wait_for(lambda: self._closed or bool(self._open_splits))
            stretch = self._take(lambda channel: channel.get())
            if stretch is not None:
                return stretch

    def take_now(self) -> Stretch | None:
        """As `take`; None: there is none yet."""
        return self._take(lambda channel: channel.get_now())

    def _take(self, get: Callable[[Channel[Stretch]], Stretch | None]) -> Stretch | None:
        """None: nothing was there, or an extent ended that says nothing of it."""
        with self._split_opened:
            if self._closed:
                raise Closed
            if not self._open_splits:
                return None
            first = self._open_splits[0]
        if first is None:
            self._drop_first()
            raise Ended
        try:
            return get(first.channel)
        except Ended:
            self._drop_first()
            return None if self._turns is None else self._end_of(first)

    def close(self) -> None:
        """Stops the threads; does not wait for them."""
        with self._split_opened:
            self._closed = True
            for one in self._open_splits:
                if one is not None:
                    one.channel.close()
            self._split_opened.notify_all()

    def join(self, patience_s: float) -> None:
        """Waits for the threads after `close`, so long at most.

        Each ends with the read that it is in, which may be of a file system that does not answer.
        """
        end_s = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))

    def _drop_first(self) -> None:
        with self._split_opened:
            self._open_splits.popleft()
            self._split_opened.notify_all()

    def _end_of(self, read: _Open) -> Stretch:
        """Says, behind the rows of an extent, that it was read to its end."""
        assert read.task is not None
        extent = self._part.extents[read.task.extent]
        passage = Passage(*self._place(extent), 0, None, self._part.source.window(extent.path))
        place = RowPlace(extent.path, 0)
        return Stretch(None, place, passage, None, 0, 0, 0, 0, is_end=True)

    def _tasks_in_turn(self, epoch: int) -> Iterator[_Task]:
        assert self._turns is not None
        file, at, row = self._from.cursor
        if epoch == self._start.epoch and row:
            yield self._task_of(Piece(file, at, row, -1))._replace(stop=None)
        for number in self._turns.of_lane(
            self._lane.number, epoch, self._part.extents, self._file_numbers
        ):
            yield _Task(epoch, number)

    def _first_tasks(self) -> Iterator[_Task]:
        """What is left of the epoch in which to begin."""
        start, (file, at, row) = self._start, self._from.cursor
        if self._turns is not None:
            return self._tasks_in_turn(start.epoch)
        if start.version_1 is not None:
            first, good_before, _ = start.version_1
            extents = len(self._part.extents)
            if first > extents:
                raise DataError(
                    f"position in extent {first}, but the data has {extents} extents; it "
                    "is not the data that the checkpoint was taken on"
                )
            return self._tasks_from(_Task(start.epoch, first, good_before=good_before))
        if row:
            return self._tasks_from(self._task_of(Piece(file, at, row, -1))._replace(stop=None))
        return (
            _Task(start.epoch, number)
            for number, extent in self._extents()
            if self._place(extent) >= (file, at)
        )

    def _tasks_from(self, first: _Task) -> Iterator[_Task]:
        if self._turns is not None:
            yield from self._tasks_in_turn(first.epoch)
            return
        for number, _ in self._extents():
            if number >= first.extent:
                yield first if number == first.extent else _Task(first.epoch, number)

    def _extents(self) -> Iterator[tuple[int, Extent]]:
        if self._turns is not None:
            return enumerate(self._part.extents)
        return self._lane.extents(self._part.extents, self._file_numbers)

    def _place(self, extent: Extent) -> tuple[int, int]:
        return self._file_numbers[extent.path], extent.start

    def _task_of(self, piece: Piece) -> _Task:
        place = (piece.file, piece.start)
        for number, extent in self._extents():
            if self._place(extent) == place:
                return _Task(self._start.epoch, number, piece.first, piece.stop)
            if self._place(extent) > place:
                break
        files = self._part.files
        number = piece.file - self._part.first_file
        path = files[number] if 0 <= number < len(files) else f"file {piece.file}"
        raise DataError(
            f"position in the unit of reading of {path} that begins at {piece.start:,}, but none "
            "begins there; it is not the data that the checkpoint was taken on"
        )

    def _tasks(self) -> Iterator[_Task | None]:
        """All that is to be read, in order; None behind each part."""
        if self._start.epoch >= self._epochs:
            return
        if self._from.pieces:
            yield from self._begun
            yield None
        yield from self._first
        yield None
        for epoch in range(self._start.epoch + 1, self._epochs):
            yield from self._tasks_from(_Task(epoch, 0))
            yield None

    def _read_splits(self) -> None:
        while (job := self._next_task()) is not None:
            task, channel = job
            try:
                self._read(task, channel)
                channel.end()
            except Closed:
                return
            # Not handled here: the assembler raises it where the consumer sees it.
            except BaseException as error:
                channel.fail(error)
                return

    def _add(self, one: _Open | None) -> bool:
        """Lets the consumer take it in its turn; False: it was closed meanwhile."""
        with self._split_opened:
            if not self._closed:
                self._open_splits.append(one)
                self._split_opened.notify_all()
        self._tell()
        return not self._closed

    def _next_task(self) -> tuple[_Task, Channel[Stretch]] | None:
        # One at a time, and not while the consumer waits for the rows of extents that are known: to
        # find the next extent, files may have to be opened.
        with self._draw:
            while not self._has_drawn_all:
                with self._split_opened:
                    self._split_opened.wait_for(
                        lambda: self._closed or len(self._open_splits) < self._max_open
                    )
                    if self._closed:
                        return None
                channel: Channel[Stretch] = Channel(self._ahead, self._tell)
                task: _Task | None = None
                try:
                    task = next(self._todo)
                except StopIteration:
                    self._has_drawn_all = True
                    return None
                # Not handled here: the consumer raises it in its place among the rows.
                except BaseException as error:
                    self._has_drawn_all = True
                    channel.fail(error)
                is_end = task is None and not self._has_drawn_all
                if not self._add(None if is_end else _Open(task, channel)):
                    return None
                if task is not None:
                    return task, channel
            return None

    def _read(self, task: _Task, channel: Channel[Stretch]) -> None:
        extent = self._part.extents[task.extent]
        row, good_before = 0, task.good_before
        with closing(self._part.read(extent, self._columns)) as chunks:
            while True:
                with self._at_work:
                    chunk = next(chunks, None)
                    if chunk is None:
                        return
                    begin, end = max(task.first - row, 0), chunk.num_read
                    if task.stop is not None:
                        end = min(end, task.stop - row)
                    if good_before:
                        passed = min(good_before, chunk.table.num_rows)
                        good_before -= passed
                        begin = _behind(chunk, passed)
                    stretch = self._decoded(extent, row, chunk, begin, end)
                if stretch is not None:
                    channel.put(stretch)
                row += chunk.num_read
                if task.stop is not None and row >= task.stop:
                    return

    def _decoded(
        self, extent: Extent, row: int, chunk: Chunk, begin: int, end: int
    ) -> Stretch | None:
        """Rows [begin, end) of a chunk, before which the extent has `row` rows; None: no row."""
        if begin >= end:
            return None
        if self._far_times is not None:
            chunk = self._far_times.leave_out(chunk)
        path = extent.path
        window = self._part.source.window(path)
        passage = Passage(*self._place(extent), row, self._tag_of(chunk, path), window)
        return self._stretch(chunk, path, passage, begin, end)

    def _stretch(self, chunk: Chunk, path: str, passage: Passage, begin: int, end: int) -> Stretch:
        low, high = good_rows_between(chunk, begin, end)
        rows = self._decoder.decode(chunk) if low < high else None
        first, stop = passage.row + begin, passage.row + end
        stretch = Stretch(rows, chunk.place, passage, chunk.kept, low, high, first, stop)
        if not chunk.malformed:
            return stretch
        tag = self._tags.of(path)
        return replace(
            stretch,
            left_out_at=[passage.row + one.line for one in chunk.malformed],
            left_out=[
                LeftOut(tag, line, row.reason, row.text)
                for row, line in zip(chunk.malformed, chunk.malformed_lines, strict=True)
            ],
        )

    def _tag_of(self, chunk: Chunk, path: str) -> FileTag | None:
        if not self._trains:
            return None
        return self._part.source.identify(path, chunk.until) if chunk.until else self._tags.of(path)


def _behind(chunk: Chunk, good: int) -> int:
    """Row of the chunk behind its first `good` good rows; behind them all, its end."""
    if good == chunk.table.num_rows:
        return chunk.num_read
    return good if chunk.kept is None else int(chunk.kept[good])
