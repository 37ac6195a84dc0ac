"""A random run of training on ranks, which fail and go on as others: all of it said by a seed.

`run(seed)` compares what came of it with the oracle, and raises AssertionError where it differs.
"""

import json
import threading
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch

from penstock.embedding.host_store import HostStore
from penstock.embedding.sharded import lookups
from penstock.embedding.sharded.bags import HostBags
from penstock.embedding.sharded.shard_map import ShardMap
from penstock.embedding.sharded.store import ShardedStore
from penstock.embedding.store import PooledGradient
from penstock.errors import DataError, FailedElsewhere, GroupError, Interrupted
from penstock.interruption import Interruption
from penstock.ledger.file import LedgerFile
from penstock.position import Position
from penstock.ranks.in_step import in_step
from penstock.ranks.together import of_checkpoint
from tests.world.data import Reading, drawn
from tests.world.mail import Faults
from tests.world.oracle import (
    BAGS,
    Log,
    Oracle,
    any_way,
    bits_of,
    gradient,
    merged,
    plan_of,
    tables_of,
)
from tests.world.ranks import PATIENCE, World, in_world
from tests.world.scheduler import Killed

_MOST_LEGS = 8
SIGNAL = 15


class Saved(NamedTuple):
    """A checkpoint."""

    step: int
    position: dict
    rows: list
    """Of each table, of all ranks; empty: none yet."""


class Done(NamedTuple):
    """What a schedule came to."""

    steps: int
    rows: int
    legs: int
    faults: int


class Leg(NamedTuple):
    """What happens until ranks end, or go on as others."""

    ranks: int
    shard_map: ShardMap
    wholes: dict
    """Ranks of whole tables."""
    faults: Faults
    save_at: frozenset
    """Steps after which a checkpoint is taken."""
    number: int
    signal_at: tuple | None
    """Rank and step at which a signal comes; then all stop and save."""


class _Kept(LedgerFile):
    """A ledger that outlives who reads by it."""

    def close(self):
        """Others go on with it."""


class Schedule:
    """One run."""

    def __init__(self, seed):
        self.seed, self.rng = seed, np.random.default_rng(seed)
        self.pooling = str(self.rng.choice(list(BAGS)))
        self.plan, self.tables = plan_of(self.pooling), tables_of(self.pooling)
        self.data = drawn(self.rng, self.pooling)
        self.reading = Reading.drawn(self.rng)
        self.deterministic = bool(self.rng.random() < 0.5)
        self.log = Log()
        self.saved = Saved(0, self.reading.start().to_dict(), [])
        self.shard_map = ShardMap.even(1)
        self.parts = {}
        """Parts of checkpoints by step and rank."""
        try:
            self.batches = self._batches_of_one_process()
        except DataError as error:
            # As it should be, where too few rows are all that there is.
            assert self.reading.draws and "draw" in str(error), error
            self.reading = self.reading._replace(draws=False)
            self.batches = self._batches_of_one_process()
        takes_turns = not self.reading.draws and self.rng.random() < 0.4
        self.ledger = _Kept(None) if takes_turns else None
        """What lanes take, whoever reads them; None: each has its own."""

    def _batches_of_one_process(self, ledger=None):
        found = []
        start = self.reading.start()
        with self.reading.loader(self.data, self.seed, start, ledger=ledger) as loader:
            for batch in loader:
                found.append((ids_of(batch), batch.lane_sizes, batch.end))
        self.counts = loader.position.counts
        if self.reading.draws:
            assert self.counts.read == sum(self.counts[1:])
            each = Counter(Counter(one for ids, *_ in found for one in ids).values())
            assert each == {
                self.reading.samples_per_row * self.reading.epochs: len({
                    one for ids, *_ in found for one in ids
                })
            }
            return found
        samples, size = len(self.data.samples), self.reading.batch_size
        of_epoch = [
            min(size, of - low) for of in self.data.of_windows for low in range(0, of, size)
        ]
        assert [len(ids) for ids, *_ in found] == of_epoch * self.reading.epochs
        for epoch in range(self.reading.epochs):
            some = found[epoch * len(of_epoch) : (epoch + 1) * len(of_epoch)]
            assert sorted(one for ids, *_ in some for one in ids) == list(range(samples))
        return found

    def run(self):
        """All legs, then the comparison."""
        threads = threading.active_count()
        faults = 0
        for number in range(_MOST_LEGS):
            leg = self._drawn_leg(number)
            world = World(leg.ranks, faults=leg.faults, seed=self.seed * _MOST_LEGS + number)
            ended = world.ended(lambda rank, leg=leg: self._of_rank(rank, leg))
            faults += world.mail.fault_at is not None
            self._check_threads(threads)
            if self._has_finished(world, ended):
                break
            self.log.cut(self.saved.step)
        if self.ledger is not None:
            # In the order that came about.
            self.batches = self._batches_of_one_process(self.ledger)
        oracle = Oracle(self.data.samples, self.seed, self.pooling)
        self.log.check(oracle, self.batches)
        rows = {}
        for bits in ended:
            assert not rows.keys() & bits.keys(), "a row on two ranks"
            rows |= bits
        assert rows == oracle.bits(), "rows differ from the oracle's"
        return Done(len(self.batches), len(rows), number + 1, faults)

    @staticmethod
    def _check_threads(number):
        """None is left; on a busy machine one that was told to end takes a moment."""
        end_s = time.monotonic() + 20
        while threading.active_count() > number and time.monotonic() < end_s:
            time.sleep(0.001)
        assert threading.active_count() == number, threading.enumerate()

    def _drawn_leg(self, number_of_leg):
        is_last = number_of_leg == _MOST_LEGS - 1
        rng, steps = self.rng, len(self.batches)
        ranks = int(rng.integers(1, 1 + min(4, self.reading.lanes)))
        fault = rng.random()
        number = int(rng.integers(0, 6 * ranks * ranks * (steps - self.saved.step + 2)))
        late = float(rng.choice([0.0, 0.001, 0.02]))
        faults = Faults(
            late=late,
            doubled=float(rng.choice([0.0, 0.3])),
            cut=number if fault < 0.25 and not is_last else None,
            dies=number if 0.25 <= fault < 0.5 and not is_last else None,
        )
        save_at = frozenset(rng.integers(0, steps + 1, int(rng.integers(0, 3))).tolist())
        signal_at = None
        if 0.5 <= fault < 0.7 and not is_last and self.saved.step < steps:
            signal_at = int(rng.integers(ranks)), int(rng.integers(self.saved.step, steps))
        weights = 1 + rng.permutation(ranks) * int(rng.integers(0, 3))
        self.shard_map = self.shard_map.resized(weights.tolist())
        wholes = {one.name: int(rng.integers(ranks)) for one in self.tables if rng.random() < 0.3}
        return Leg(ranks, self.shard_map, wholes, faults, save_at, number_of_leg, signal_at)

    def _has_finished(self, world, ended):
        """Whether all ranks came to the end; checks how they ended."""
        errors = [one for one in ended if isinstance(one, BaseException)]
        fault_at = world.mail.fault_at
        if not errors:
            assert not world.left, f"tasks are left: {world.left}"
            return True
        assert len(errors) == len(ended) or fault_at is not None, ended
        if all(isinstance(error, Interrupted) for error in errors) and len(errors) == len(ended):
            assert not world.left, f"tasks are left: {world.left}"
            return False
        for error in errors:
            if not isinstance(error, GroupError | FailedElsewhere | Killed | Interrupted):
                raise error
        assert fault_at is not None, ended
        # They waited once for what did not come, and heard of each other.
        assert world.scheduler.now - fault_at < PATIENCE + 60 * (1 + world.faults.late)
        # Whoever ended well had nothing more to ask of the others.
        return False

    def _of_rank(self, rank, leg):
        """What a rank does: rows by (table, key) at its end."""
        local = HostStore(self.tables, seed=self.seed, deterministic=self.deterministic)
        store = ShardedStore(
            local,
            HostBags(local.layout.dim, 1),
            rank,
            device=torch.device("cpu"),
            deterministic=self.deterministic,
            reduction="sum",
            shard_map=leg.shard_map,
            wholes=leg.wholes,
        )
        saved = self.saved
        for table, rows in enumerate(saved.rows):
            store.insert_or_assign(table, rows)
        step, start = saved.step, Position.from_dict(json.loads(json.dumps(saved.position)))
        stop = Interruption()
        signal_at = leg.signal_at[1] if (leg.signal_at or (-1,))[0] == rank.rank else None
        position = start
        luck = [self.seed, leg.number]
        reads = self.reading.loader(self.data, self.seed, start, rank.beside(), luck, self.ledger)
        with reads as loader, stop.deferred():
            try:
                for batch in in_step(loader, rank, stop):
                    if step == signal_at:
                        stop.signal = SIGNAL
                    self._train(store, batch, step, rank)
                    step, position = step + 1, batch.end
                    if step in leg.save_at:
                        self._save(store, rank, step, position)
            except Interrupted:
                self._save(store, rank, step, position)
                raise
        assert loader.position.counts == self.counts
        assert self.counts.quarantined == self.data.malformed * self.reading.epochs
        rank.gathered(torch.tensor(0))
        store.check_invariants()
        for number, table in enumerate(self.tables):
            is_elsewhere = leg.wholes.get(table.name, rank.rank) != rank.rank
            assert not (is_elsewhere and store.num_rows(number)), "rows of a whole table elsewhere"
        return bits_of(store)[0]

    def _train(self, store, batch, step, rank):
        out = torch.full((batch.batch_size, self.plan.stride), 7.0)
        lookup = store.pooled_lookup(self.plan, batch.sparse, insert=True, out=out)
        ids = ids_of(batch)
        grad = torch.from_numpy(gradient(ids, out))
        self.log.add(step, rank.rank, ids, out.numpy(), batch.end)
        store.apply_gradients(self.plan, [PooledGradient(lookup, batch.sparse, grad)], step)

    def _save(self, store, rank, step, position):
        with of_checkpoint(rank, "write a checkpoint"):
            self.parts[step, rank.rank] = bits_of(store)[1], position.to_dict()
        if rank.rank == 0:
            parts = [self.parts[step, number] for number in range(rank.size)]
            assert all(at == parts[0][1] for _, at in parts), "positions of ranks differ"
            tables = zip(*(of_tables for of_tables, _ in parts), strict=True)
            self.saved = Saved(step, parts[0][1], [merged(each) for each in tables])


def ids_of(batch):
    """The ids of a batch's samples."""
    return batch.sparse["id"].values.tolist()


def run(seed):
    """One schedule, of a seed."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            in_world(patch)
            patch.setattr(lookups, "way_of", any_way)
            return Schedule(seed).run()
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
