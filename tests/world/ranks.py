"""The ranks of a world: each is an `Exchange` and a `Group`.

    World(3, seed=7).run(lambda rank: rank.gathered(torch.tensor(rank.rank)))

runs a function on three ranks. What it raises on any of them is raised; `ended` gives what each
returned or raised.
"""

import itertools
import random

import torch

from penstock.data.batches import loader
from penstock.embedding.collection import table_stores
from penstock.embedding.sharded import store
from penstock.embedding.sharded.exchange import alike_of, check_alike
from penstock.embedding.sharded.store import Ranks
from penstock.errors import GroupError
from tests.world.loading import TaskThreads, channel
from tests.world.mail import Faults, Mail
from tests.world.scheduler import Killed, Scheduler, current_task

PATIENCE = 1000.0
"""Virtual seconds that a rank waits for a message."""
LATE = Faults()
PUNCTUAL = Faults(late=0.0, doubled=0.0, pauses=0.0)


class Lost(GroupError):
    """A message did not come. The cause is elsewhere."""


class World:
    """So many ranks, and what happens to them: a function of the seed."""

    def __init__(self, size, *, faults=LATE, seed=0):
        self.size, self.faults, self.seed = size, faults, seed
        self._begin()

    def _begin(self):
        self.scheduler = Scheduler(self.seed)
        self.mail = Mail(self.scheduler, self.faults, self.size)
        self.left = []
        """Names of tasks that ran on when the function had returned on their rank."""

    def run(self, of_rank):
        """What `of_rank(rank)` returns on each; else the first error of one that lost nobody."""
        tasks = self._run(of_rank)
        errors = [task.error for task in tasks if task.error is not None]
        for error in sorted(errors, key=lambda one: isinstance(one, Lost)):
            raise error
        return [task.result for task in tasks]

    def ended(self, of_rank):
        """What `of_rank(rank)` returns, or raises, on each: `Killed` where the rank died.

        Ranks of a former call may go on, if that ended at the same call of all.

        Raises:
          Stuck: ranks wait for ever.
        """
        return [task.result if task.error is None else task.error for task in self._run(of_rank)]

    def _run(self, of_rank):
        self._begin()
        tasks = [
            self.scheduler.start(f"rank-{number}", self._life(of_rank, number), number)
            for number in range(self.size)
        ]
        self.scheduler.run()
        return tasks

    def _life(self, of_rank, number):
        def life():
            try:
                return of_rank(Rank(self, number))
            finally:
                rest = [t for t in self.scheduler.tasks if t.owner == number and not t.has_ended]
                self.left += [t.name for t in rest if t.name != f"rank-{number}"]
                self.scheduler.kill(rest)
                self.mail.leave(number)

        return life

    def die(self, number):
        """Ends a rank, from one of its tasks."""
        self.scheduler.kill([task for task in self.scheduler.tasks if task.owner == number])
        raise Killed


class Rank:
    """An `Exchange` and a `Group`, of one rank of a world and one channel."""

    def __init__(self, world, rank, name="0"):
        self.world, self.rank, self.size = world, rank, world.size
        self.tables = Ranks(_Named(self), "sum")
        self.calls = []
        """Number, name and shape of what `headers` was given."""
        self._channel = name
        self._numbers = itertools.count()
        self._beside = itertools.count()

    # Exchange

    def headers(self, call, said, to_each):
        number = len(self.calls) + 1
        self.calls.append((number, call, tuple(to_each.shape)))
        alike = alike_of(number, call, said, to_each.shape[1])
        theirs = self._to_each("headers", [(alike, row.clone()) for row in to_each])
        check_alike(self.rank, alike, torch.stack([one for one, _ in theirs]))
        return torch.stack([row for _, row in theirs])

    def to_all(self, call, rows, sent, wanted):
        assert len(sent) == len(wanted) == self.size
        came = self._to_each("to_all", [part.clone() for part in rows.split(list(sent))])
        assert [len(part) for part in came] == list(wanted), (call, wanted)
        assert {(part.dtype, part.shape[1:]) for part in came} == {(rows.dtype, rows.shape[1:])}
        return torch.cat(came)

    def combined(self, call, numbers, *, largest=False):
        every = torch.stack(self._all("combined", numbers.clone()))
        return every.amax(0) if largest else self._sum(every)

    # Group

    def gathered(self, values):
        every = self._all("gathered", values.detach().cpu().clone())
        assert {(one.dtype, one.shape) for one in every} == {(values.dtype, values.shape)}
        return torch.stack(every)

    def gathered_bytes(self, content):
        return self._all("gathered_bytes", bytes(content))

    def add(self, values):
        every = torch.stack(self._all("add", values.detach().cpu().clone()))
        values.copy_(self._sum(every).to(values))

    def beside(self):
        return Rank(self.world, self.rank, f"{self._channel}.{next(self._beside)}")

    def _sum(self, every):
        """In an order that is nobody's to know, the same one on all ranks."""
        order = list(range(self.size))
        random.Random(f"{self.world.seed} {self._channel} {next(self._numbers)}").shuffle(order)
        total = every[order[0]].clone()
        for one in order[1:]:
            total += every[one]
        return total

    def _all(self, kind, mine):
        return self._to_each(kind, [mine] * self.size)

    def _to_each(self, kind, to_each):
        """Sends something to each rank; returns what came from each, in their order.

        Raises:
          Lost: something did not come, as its sender is gone, or within `PATIENCE`.
        """
        world, number = self.world, next(self._numbers)
        mail, scheduler = world.mail, world.scheduler
        if current_task().is_killed:
            raise Killed
        if scheduler.random.random() < world.faults.pauses:
            scheduler.pause(world.faults.late)
        others = [rank for rank in range(self.size) if rank != self.rank]
        scheduler.random.shuffle(others)
        for other in others:
            content = kind, to_each[other]
            if not mail.send(self.rank, other, self._channel, number, content):
                world.die(self.rank)
        place = self.rank, self._channel, number

        def absent():
            return [other for other in others if not mail.has(*place, other)]

        def is_over():
            missing = absent()
            return not missing or bool(mail.gone[self.rank].intersection(missing))

        scheduler.wait(is_over, PATIENCE)
        if missing := absent():
            raise Lost(
                f"rank {self.rank} of {self.size} waits for rank {missing[0]}, which is gone"
            )
        came = {other: mail.take(*place, other) for other in others}
        kinds = {kind, *(theirs for theirs, _ in came.values())}
        assert kinds == {kind}, f"call {number} of rank {self.rank}: {kinds}"
        return [came[n][1] if n in came else to_each[n] for n in range(self.size)]


class _Named:
    """What `Ranks` asks of a process group."""

    def __init__(self, exchange):
        self.exchange = exchange

    def rank(self):
        return self.exchange.rank

    def size(self):
        return self.exchange.size


def in_world(monkeypatch):
    """Collections over the ranks of a world, and loaders, are part of it."""
    for module in (store, table_stores):
        monkeypatch.setattr(module, "Collective", lambda group, device: group.exchange)
    monkeypatch.setattr(loader, "threading", TaskThreads)
    monkeypatch.setattr(loader, "Channel", channel)
