"""The world itself: faults do what they are to do, and nothing waits for ever."""

import threading
import time

import pytest
import torch

from penstock.errors import GroupError
from tests.world.mail import Faults
from tests.world.ranks import PATIENCE, Lost, World
from tests.world.scheduler import Killed, Scheduler, Stuck


def sums(rank):
    """Some calls of all kinds, and what they say."""
    said = []
    for number in range(5):
        sent = [number + other for other in range(rank.size)]
        rows = torch.full((sum(sent), 2), 10 * rank.rank + number)
        wanted = [number + rank.rank] * rank.size
        came = rank.to_all("look-up", rows, sent, wanted)
        said.append(came[:, 0].tolist())
        said.append(rank.headers("find", 0, torch.full((rank.size, 1), rank.rank)).tolist())
        said.append(rank.combined("norm", torch.tensor(rank.rank), largest=True).item())
        said.append(rank.gathered_bytes(bytes([rank.rank] * number)))
        total = torch.tensor([1 << rank.rank])
        rank.add(total)
        said.append(total.item())
    return said


def wanted(rank, size):
    """What `sums` says."""
    said = []
    for number in range(5):
        said.append([10 * other + number for other in range(size) for _ in range(number + rank)])
        said.append([[other] for other in range(size)])
        said.append(size - 1)
        said.append([bytes([other] * number) for other in range(size)])
        said.append((1 << size) - 1)
    return said


@pytest.mark.parametrize("size", [1, 2, 4])
def test_late_and_doubled_messages_do_no_harm(size):
    overtaken = dropped = 0
    for seed in range(10):
        world = World(size, faults=Faults(late=50.0, doubled=0.5), seed=seed)
        assert world.run(sums) == [wanted(rank, size) for rank in range(size)]
        dropped += world.mail.dropped
        overtaken += world.scheduler.now > 0
    assert size == 1 or dropped > 10 < 20 * overtaken


def test_a_seed_says_all_that_happens():
    def turns(seed):
        world = World(3, seed=seed)
        world.run(sums)
        return world.scheduler.turns, world.scheduler.now, world.mail.dropped

    assert turns(1) == turns(1) != turns(2)


@pytest.mark.parametrize("number", range(0, 150, 7))
def test_a_cut_message_is_an_error_on_all_in_bounded_virtual_time(number):
    begin = time.perf_counter()
    world = World(4, faults=Faults(cut=number), seed=number)
    ended = world.ended(lambda rank: (sums(rank), sums(rank)))
    assert all(isinstance(one, GroupError) for one in ended)
    assert PATIENCE <= world.scheduler.now - world.mail.fault_at < PATIENCE + 10
    assert time.perf_counter() - begin < PATIENCE / 10


@pytest.mark.parametrize("number", range(0, 150, 7))
def test_a_rank_that_dies_is_heard_by_all_without_patience(number):
    world = World(4, faults=Faults(dies=number), seed=number)
    ended = world.ended(lambda rank: (sums(rank), sums(rank)))
    assert sorted(type(one).__name__ for one in ended) == ["Killed", "Lost", "Lost", "Lost"]
    assert world.scheduler.now < 10


def test_a_rank_that_leaves_early_is_not_waited_for():
    world = World(3)
    ended = world.ended(lambda rank: rank.rank or sums(rank))
    assert isinstance(ended[0], Lost) and ended[1:] == [1, 2]


def test_ranks_at_unlike_calls_are_an_error():
    def act(rank):
        if rank.rank:
            return rank.gathered_bytes(b"")
        return rank.gathered(torch.tensor(1))

    with pytest.raises(AssertionError, match=r"call 0 of rank \d: .*gathered_bytes"):
        World(2).run(act)


def test_what_waits_for_ever_is_told_at_once_and_leaves_no_thread():
    before = threading.active_count()

    def act(rank):
        rank.world.scheduler.wait(lambda: False)

    with pytest.raises(Stuck, match="rank-0, rank-1 wait for ever"):
        World(2).run(act)
    assert threading.active_count() == before


def test_tasks_of_a_rank_end_with_it():
    def act(rank):
        scheduler = rank.world.scheduler
        scheduler.start("beside", lambda: scheduler.wait(lambda: False), 0)
        scheduler.wait(lambda: False, 1.0)

    world = World(1)
    world.run(act)
    assert world.left == ["beside"]
    assert isinstance(world.scheduler.tasks[1].error, Killed)


def test_the_clock_moves_when_nobody_can_go_on():
    scheduler, seen = Scheduler(), []

    def act():
        scheduler.at(5.0, lambda: seen.append("event"))
        assert not scheduler.wait(lambda: False, 3.0)
        assert scheduler.now == 3.0 and not seen
        assert scheduler.wait(lambda: bool(seen), 3.0)
        assert scheduler.now == 5.0

    task = scheduler.start("one", act)
    scheduler.run()
    assert task.error is None
