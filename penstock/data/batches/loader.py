"""Reads, shuffles and cuts batches in the background.

Reader threads decode the next extents of each lane ahead; one assembler thread joins their rows to
blocks, shuffles each lane's part of a block and cuts batches that have of all lanes; the consumer
takes batches from a bounded channel. What comes out is a pure function of (rows, lanes, seed, batch
size), whatever the threads do. Where several ranks read, each gives of a batch what its lanes have.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import NamedTuple

from penstock.data.batches.agreement import Agreement, ReaderGroup
from penstock.data.batches.blocks import Blocks, Cut, within
from penstock.data.batches.channel import Channel, Closed, Ended
from penstock.data.batches.lane_queue import LaneQueue
from penstock.data.batches.lanes_block import LanesBlock
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.reader import Reader, Threads
from penstock.data.batches.stage import Following, Stage
from penstock.data.batches.turns import Ledger, News, Turns
from penstock.data.columns.block import Samples, no_samples
from penstock.data.columns.decode import Decoder
from penstock.data.columns.schema import Columns
from penstock.data.plan.lanes import Lane, lanes_of_rank
from penstock.data.quarantine import LeftOut, Quarantine, check_most
from penstock.errors import GroupError, Interrupted
from penstock.position import Position
from penstock.types import Batch, KeyedJagged

_PATIENCE_S, _HASTY_S = 30.0, 0.3
"""How long `close` waits for threads: as a rule, and where a signal asks to stop."""


class ReadAhead(NamedTuple):
    """How far a loader is ahead of who takes its batches."""

    threads: int
    """That read and decode at a time."""
    batches: int
    """That wait to be taken."""


class _Delivery(NamedTuple):
    """What the consumer takes."""

    batch: Batch | None
    position: Position
    """After it."""
    malformed: Sequence[LeftOut] = ()
    first_malformed: int = 0
    left_out: int = 0
    """See `Cut.left_out`."""


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
        stage: Stage,
        columns: Columns,
        plan: LoaderPlan,
        ahead: ReadAhead,
        *,
        quarantine: Quarantine,
        ranks: ReaderGroup | None = None,
        following: Following | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Starts reading.

        Args:
          stage: what to read; its files are nobody else's.
          columns: what to decode.
          plan: what to deliver, from the start of the stage on.
          ahead: how far.
          quarantine: takes malformed rows when the batch is taken behind which they lie.
          ranks: that read the lanes together; None: this process reads all.
          following: gives what comes behind the stage; None: nothing does.
          ledger: of which lanes take extents as they come to them, the same on all ranks; it is
            closed with the loader. None: each lane has its own extents.

        Raises:
          DataError: the data does not have the place at which to start.
        """
        self._quarantine = quarantine
        self.position = plan.start
        self.on_left_out: Callable[[str], None] = lambda words: None
        """Told, by whoever takes the batches, of rows among which no negative can be drawn."""
        self.has_ended = False
        self._plan = plan
        self._negatives = columns.negatives
        self._groups = columns.groups
        self._features = columns.feature_names
        self._out: Channel[_Delivery] = Channel(ahead.batches)
        # Half of them, so that neither side wakes the other for every batch.
        self._at_once = max(1, ahead.batches // 2)
        self._closed = False
        self._decoder, self._schema = Decoder(columns), stage.part.source.schema
        self._columns, self._num_threads = columns, ahead.threads
        self._ledger = ledger
        self._following, self._is_closed = following, threading.Event()
        rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self._lanes = lanes_of_rank(plan.num_lanes, rank, size)
        self._agreement = Agreement(ranks)
        self._change = threading.Lock()
        self._readers: list[Reader] = []
        self._stage, self._blocks = stage, self._begin(stage)
        self._assembler = threading.Thread(
            target=self._assemble, name="penstock-assembler", daemon=True
        )
        self._assembler.start()

    def _begin(self, stage: Stage) -> Blocks:
        """Starts the threads that read a stage; those of the one before have come to its end."""
        plan = replace(self._plan, start=stage.start)
        at_work = threading.Semaphore(self._num_threads)
        turns = None if self._ledger is None else Turns(self._ledger, News(), stage.start)
        of_lane = Threads(-(-self._num_threads // max(len(self._lanes), 1)), at_work)
        with self._change:
            if self._is_closed.is_set():
                raise Closed
            self._readers = [
                Reader(
                    stage.part,
                    self._columns,
                    Lane(number, plan.num_lanes),
                    plan,
                    of_lane,
                    tags=stage.files.whole,
                    turns=turns,
                )
                for number in self._lanes
            ]
        queues = [
            LaneQueue(number, reader, plan)
            for number, reader in zip(self._lanes, self._readers, strict=True)
        ]
        return Blocks(
            stage.part,
            plan,
            queues,
            self._agreement,
            stage.files,
            turns,
            is_final=stage.is_final,
        )

    @property
    def is_waiting(self) -> bool:
        """Whether all that there is was read, and more may come."""
        return self._following is not None and self._following.is_waiting

    @property
    def waited_s(self) -> float:
        """Seconds so far in which there was nothing to deliver, as files were still to appear."""
        return 0.0 if self._following is None else self._following.waited_s

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.has_ended and not self._closed:
            raise StopIteration
        try:
            while True:
                batch, position, malformed, first, left_out = self._out.get()
                if left_out:
                    self.on_left_out(
                        f"{left_out:,} rows at the end of the data are left out (counted as "
                        "filtered): no negative can be drawn among the last rows of their lane, "
                        "as all have one item, or a user has all items"
                    )
                if malformed:
                    self._quarantine.add(malformed, first if self._plan.trains else None)
                if self._plan.trains:
                    check_most(position.counts, malformed, self._plan.most_malformed)
                self.position = position
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
        with self._change:
            self._is_closed.set()
            readers = self._readers
        for reader in readers:
            reader.close()
        for reader in readers:
            reader.join(max(0.0, end_s - time.monotonic()))
        self._assembler.join(max(0.0, end_s - time.monotonic()))
        if self._ledger is not None:
            self._ledger.close()

    # The assembler thread.

    def _assemble(self) -> None:
        stage: Stage | None = self._stage
        try:
            while stage is not None:
                for cut in self._blocks:
                    deliveries = self._deliver(cut)
                    while some := list(islice(deliveries, self._at_once)):
                        self._out.put(*some)
                stage = self._after(self._blocks.end)
                if stage is not None:
                    self._blocks = self._begin(stage)
            self._out.end()
        except Closed:
            self._leave()
        # Not handled here: `__next__` raises it.
        except BaseException as error:
            self._out.fail(error)
            self._leave()

    def _after(self, end: Position) -> Stage | None:
        if self._following is None:
            return None
        return self._following.after(
            end, self._agreement.from_first, self._is_closed, self._out.is_empty
        )

    def _leave(self) -> None:
        """The other ranks stop reading, too, but for those that are gone."""
        with suppress(GroupError):
            self._agreement.leave()

    def _deliver(self, cut: Cut) -> Iterator[_Delivery]:
        """A batch after the other: of each what the lanes that are read here give to it."""
        plan, whole = self._plan, cut.inside
        first_malformed = whole.counts.quarantined - len(cut.malformed) + 1
        if not whole.block_size:
            yield _Delivery(None, cut.after, cut.malformed, first_malformed, cut.left_out)
            return
        block = LanesBlock(cut, plan, self._negatives)
        stop, at, malformed = cut.start.block_row, cut.start, cut.malformed
        left_out = cut.left_out
        for number, rows in enumerate(block.batches()):
            stop = min(stop + plan.batch_size, whole.block_size)
            end = cut.after
            if stop < whole.block_size:
                end = within(whole, stop, plan.samples_per_row)
            lanes = tuple(block.lane_sizes[number])
            batch = self._batch(rows or self._nothing, at, end, block.origin(number), lanes)
            yield _Delivery(batch, end, malformed, first_malformed, left_out)
            at, malformed, left_out = end, (), 0

    @cached_property
    def _nothing(self) -> Samples:
        """What a rank has of a batch none of whose samples its lanes give."""
        return no_samples(self._decoder.nothing(self._schema))

    def _batch(
        self,
        rows: Samples,
        start: Position,
        end: Position,
        origin: object,
        lanes: tuple[int, ...],
    ) -> Batch:
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
            lanes,
        )
