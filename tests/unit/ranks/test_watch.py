"""What a rank says that does not come to its next batch."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from penstock.interruption import Interruption
from penstock.ranks import watch as module
from penstock.ranks.watch import Watch


class Group(SimpleNamespace):
    """Ranks that are all at the same place."""

    def gathered(self, values):
        return torch.stack([values] * self.size)


@pytest.fixture
def watched(monkeypatch):
    """Makes a watch of little patience, and gives what it says."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    told = []

    def made(size):
        return Watch(Group(rank=1, size=size), lambda item: f"batch {item}", told.append), told

    return made


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("never")


def hang(told, number):
    until(lambda: len(told) >= number)


def test_a_rank_that_hangs_says_where_twice_as_long_each_time(watched):
    watch, told = watched(2)
    began_s = time.monotonic()
    for item in watch.in_step([7, 8], Interruption()):
        if item == 7:
            hang(told, 3)  # 0.05, 0.1 and 0.2 s
            assert time.monotonic() - began_s >= 0.2
    assert all("rank 1 of 2 has been at one batch, batch 7, for" in one for one in told[:3])
    assert all(__file__ in one for one in told[:3])
    assert not any(one.name == "penstock-watch" for one in threading.enumerate())


def test_a_rank_that_waits_for_its_first_batch_says_so(watched):
    watch, told = watched(3)

    def slow():
        hang(told, 1)
        yield 1

    assert list(watch.in_step(slow(), Interruption())) == [1]
    assert "before the first batch" in told[0]


def test_an_evaluation_between_two_steps_is_watched_by_the_same_thread(watched):
    watch, _ = watched(2)
    for _ in watch.in_step(range(2), Interruption()):
        for item in watch.in_step("abc", Interruption()):
            assert watch._at[1] == item
            names = [one.name for one in threading.enumerate()]
            assert names.count("penstock-watch") == 1


def test_the_line_is_that_of_the_code_that_called_torch(watched):
    watch, told = watched(2)

    class Waits(torch.nn.Module):
        def forward(self, told):
            with (condition := threading.Condition()):
                while not told:
                    condition.wait(0.01)
            return told

    for _ in watch.in_step([0], Interruption()):
        torch.nn.Sequential(Waits())(told)
    assert f"now in forward ({__file__}:" in told[0]


def test_what_is_left_early_is_no_longer_watched(watched):
    watch, _ = watched(2)
    for _ in watch.in_step(range(9), Interruption()):
        break
    until(lambda: not any(one.name == "penstock-watch" for one in threading.enumerate()))


def test_one_process_is_not_watched(watched):
    watch, told = watched(1)
    for _ in watch.in_step(range(2), Interruption()):
        assert not any(one.name == "penstock-watch" for one in threading.enumerate())
    assert not told
