"""Ranks as threads of one process: an exchange that needs no network, and can be late."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from penstock.embedding.collection import table_stores
from penstock.embedding.sharded import store
from penstock.embedding.sharded.exchange import alike_of, check_alike
from penstock.embedding.sharded.store import Ranks
from penstock.errors import GroupError

_PATIENCE_S = 60


class World:
    """What threads share; `late` makes each of them wait up to so many seconds, at random."""

    def __init__(self, size, late=0.0, seed=0):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots = [None] * size
        self.late, self.seed = late, seed

    def run(self, of_rank):
        """What `of_rank(exchange)` returns on each rank; the first error is raised."""
        with ThreadPoolExecutor(self.size) as threads:
            made = [threads.submit(self._run, of_rank, rank) for rank in range(self.size)]
        errors = [one.exception() for one in made if one.exception() is not None]
        gone = [error for error in errors if "barrier" in str(error)]
        for error in [one for one in errors if one not in gone] + gone:
            raise error
        return [one.result() for one in made]

    def _run(self, of_rank, rank):
        try:
            return of_rank(ThreadRank(self, rank))
        except BaseException:
            self.barrier.abort()
            raise


class ThreadRank:
    """An `Exchange` for one thread of a world."""

    def __init__(self, world, rank):
        self.world, self.rank, self.size = world, rank, world.size
        self.calls = []
        self._number = 0
        self._random = random.Random(world.seed * 1000 + rank)

    def headers(self, call, said, to_each):
        self._number += 1
        self.calls.append((self._number, call, tuple(to_each.shape)))
        alike = alike_of(self._number, call, said, to_each.shape[1])
        theirs = self._all((alike, to_each))
        check_alike(self.rank, alike, torch.stack([one for one, _ in theirs]))
        return torch.stack([each[self.rank] for _, each in theirs])

    def to_all(self, call, rows, sent, wanted):
        assert len(sent) == len(wanted) == self.size
        parts = rows.split(list(sent))
        came = [each[self.rank] for each in self._all(parts)]
        assert [len(part) for part in came] == list(wanted), (call, wanted)
        assert {(part.dtype, part.shape[1:]) for part in came} == {(rows.dtype, rows.shape[1:])}
        return torch.cat(came)

    def combined(self, call, numbers, *, largest=False):
        every = torch.stack(list(self._all(numbers)))
        return every.amax(0) if largest else every.sum(0)

    def _all(self, mine):
        if self.world.late:
            time.sleep(self._random.uniform(0, self.world.late))
        try:
            self.world.slots[self.rank] = mine
            self.world.barrier.wait(_PATIENCE_S)
            theirs = tuple(self.world.slots)
            self.world.barrier.wait(_PATIENCE_S)
        except threading.BrokenBarrierError:
            raise GroupError("barrier: another rank is gone") from None
        return theirs


class ThreadGroup:
    """A `Group` for one thread of a world, and the process group that its `Ranks` name."""

    def __init__(self, exchange):
        self.exchange = exchange
        self.tables = Ranks(_Named(exchange), "sum")
        self.rank, self.size = exchange.rank, exchange.size

    def gathered(self, values):
        return torch.stack([one.clone() for one in self.exchange._all(values.cpu())])

    def gathered_bytes(self, content):
        return list(self.exchange._all(content))

    def add(self, values):
        values.copy_(self.gathered(values).sum(0).to(values))

    def beside(self):
        return self


class _Named:
    """What `Ranks` asks of a process group."""

    def __init__(self, exchange):
        self.exchange = exchange

    def rank(self):
        return self.exchange.rank

    def size(self):
        return self.exchange.size


def over_threads(monkeypatch):
    """Collections over the ranks of a `ThreadGroup` talk by its threads."""
    for module in (store, table_stores):
        monkeypatch.setattr(module, "Collective", lambda group, device: group.exchange)
