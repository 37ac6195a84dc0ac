"""Ranks as threads of one process, which tell each other bytes."""

import threading
from concurrent.futures import ThreadPoolExecutor

from penstock.errors import GroupError

PATIENCE_S = 30


class ThreadGroup:
    """What penstock.data asks of ranks."""

    def __init__(self, world, rank):
        self._world, self.rank, self.size = world, rank, world.size

    def gathered_bytes(self, content):
        world = self._world
        try:
            world.slots[self.rank] = content
            world.barrier.wait(PATIENCE_S)
            told = list(world.slots)
            world.barrier.wait(PATIENCE_S)
        except threading.BrokenBarrierError:
            raise GroupError("a rank is gone") from None
        return told


class World:
    """`run` calls a function on every rank and gives what each returned or raised."""

    def __init__(self, size):
        self.size = size
        self.slots = [None] * size
        self.barrier = threading.Barrier(size)

    def run(self, of_rank):
        with ThreadPoolExecutor(self.size) as threads:
            made = [threads.submit(of_rank, ThreadGroup(self, rank)) for rank in range(self.size)]
        return [one.exception() or one.result() for one in made]
