"""What a `Loader` has of threads, in a world: its assembler is a task of its rank.

The threads that read files stay real: none of them waits for another rank. Outside of a world
everything is as it is.
"""

import math
import threading

from penstock.data.batches.channel import Channel
from tests.world.scheduler import current_task


class TaskThread:
    """A `threading.Thread`."""

    def __init__(self, target, name, daemon):
        task = current_task()
        self._scheduler, self._owner = task.scheduler, task.owner
        self._target, self._name, self._task = target, f"{name} of {task.name}", None

    def start(self):
        self._task = self._scheduler.start(self._name, self._target, self._owner)

    def join(self, timeout=None):
        self._scheduler.wait(lambda: self._task.has_ended, math.inf if timeout is None else timeout)

    def is_alive(self):
        return not self._task.has_ended


class Condition:
    """A `threading.Condition`: one task runs at a time, so that there is nothing to lock."""

    def __init__(self, scheduler):
        self._scheduler = scheduler

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def wait_for(self, predicate):
        if not predicate():
            self._scheduler.wait(predicate)

    def notify_all(self):
        """Who waits looks by itself."""


class TaskThreads:
    """In place of the module `threading`."""

    Semaphore, Lock, Event = threading.Semaphore, threading.Lock, threading.Event

    @staticmethod
    def Thread(target, name, daemon):  # noqa: N802 (its name)
        kind = threading.Thread if current_task() is None else TaskThread
        return kind(target=target, name=name, daemon=daemon)


def channel(capacity):
    """A `Channel` between tasks."""
    made = Channel(capacity)
    task = current_task()
    if task is not None:
        made._changed = Condition(task.scheduler)
    return made
