"""Ranks that die within a save: the newest complete checkpoint is always there.

All points are tried by `tests/soak/death_within_a_save.py`.
"""

import os
import shutil

import pytest

from penstock.ranks.group import ALONE
from penstock.training.checkpoint import checkpoint as checkpoint_module
from penstock.training.checkpoint.checkpoint import latest_checkpoint, verify
from tests.unit.training.test_checkpoint_over_ranks import (
    made,
    names,
    rows_of,
    threads,  # noqa: F401
    trained,
)
from tests.world.mail import Faults
from tests.world.ranks import World
from tests.world.scheduler import Killed, current_task

RANKS = 2
CALLS = ("mkdir", "open", "write", "fsync", "rename")


class Death:
    """Kills a rank, or all of them, instead of its call `at` of what changes the disk."""

    def __init__(self, patch, at, *, takes_all):
        self.at, self.takes_all = at, takes_all
        self.calls = 0
        self.is_armed = False
        for name in CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        remove = checkpoint_module.shutil.rmtree

        def rmtree(path, *arguments, **named):
            task = current_task()
            if task is None or not task.is_killed:  # the dead clear nothing away
                remove(path, *arguments, **named)

        patch.setattr(checkpoint_module.shutil, "rmtree", rmtree)

    def _counted(self, call):
        def counted(*arguments, **named):
            task = current_task()
            if task is not None and self.is_armed:
                self.calls += 1
                if self.calls - 1 == self.at:
                    tasks = task.scheduler.tasks if self.takes_all else [task]
                    task.scheduler.kill(tasks)
                    raise Killed
            return call(*arguments, **named)

        return counted


def dies_within(directory, path, patch, at, *, takes_all):
    """Whether ranks that go on from `path` died within their next save."""
    death = Death(patch, at, takes_all=takes_all)

    def act(group):
        run = made(directory, group).restored(path)
        run.train(1)
        group.gathered_bytes(b"")  # so that nobody is at anything else
        death.is_armed = True
        return run.save()

    world = World(RANKS, faults=Faults(late=0.0, doubled=0.0))
    ended = world.ended(act)
    death.is_armed = False
    died = [one for one in ended if isinstance(one, Killed)]
    assert bool(died) == (death.calls > at)
    return bool(died)


def tried(folder, *, takes_all, first=0, every=1):
    """How many points within a save of two ranks were tried; AssertionError where one loses it."""
    expected = {step: rows_of(trained(folder / f"alone-{step}", 1, step)[0]) for step in (2, 3)}
    _, whole = trained(folder / "before", RANKS, 2)
    found, point, points = set(), first, 0
    while True:
        directory = folder / f"run-{point}"
        shutil.copytree(whole.parent, directory)
        with pytest.MonkeyPatch.context() as patch:
            died = dies_within(directory, directory / whole.name, patch, point, takes_all=takes_all)
        newest = latest_checkpoint(directory)
        step = verify(newest).step
        found.add(step)
        runs = [made(directory, ALONE).restored(newest)]
        assert rows_of(runs) == expected[step]
        _, last = trained(directory, RANKS, 1, newest)
        assert verify(last).step == step + 1
        assert not [name for name in names(directory) if "tmp" in name or "replaced" in name]
        shutil.rmtree(directory)
        if not died:
            break
        point, points = point + every, points + 1
    assert found == {2, 3}
    return points


@pytest.mark.parametrize("takes_all", [False, True])
def test_the_last_complete_checkpoint_is_there_at_every_point(tmp_path, takes_all):
    """Of one rank or all; what the dead left is cleared away by those who go on."""
    assert tried(tmp_path, takes_all=takes_all, first=3 + takes_all, every=11) > 4
