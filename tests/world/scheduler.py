"""Tasks of which one runs at a time, chosen by a seed, and a clock that moves when none can.

A task is a thread that holds the baton, or waits for it. It gives it up in `wait` alone, so what it
does in between is one indivisible act, and a seed says all that happens. Nobody sleeps: where no
task can go on, the clock jumps to the next event; where there is none, that is an error, not a
hang.
"""

import heapq
import itertools
import math
import random
import threading

REAL_S = 20.0
"""How long a task may hold the baton: it waits for something that is no part of the world."""
_MOST_TURNS = 1_000_000

_here = threading.local()


def current_task():
    """The task of this thread; None: it is in no world."""
    return getattr(_here, "task", None)


class Killed(BaseException):
    """Ends a task, at whatever it waits for. No part of the code that is tested may catch it."""


class Stuck(AssertionError):
    """No task can go on, and nothing will happen; or one does not give the baton back."""


class Task:
    """A thread of a scheduler."""

    def __init__(self, scheduler, name, owner, act):
        self.scheduler, self.name, self.owner = scheduler, name, owner
        self.is_killed = self.has_ended = False
        self.result = self.error = None
        self.ready, self.deadline = None, math.inf
        self._act = act
        self._baton = threading.Lock()
        self._baton.acquire()
        self._thread = threading.Thread(target=self._run, name=f"world-{name}", daemon=True)
        self._thread.start()

    def can_go_on(self, now):
        return self.is_killed or self.ready is None or self.deadline <= now or self.ready()

    def take_baton(self):
        if not self._baton.acquire(timeout=REAL_S * 10):
            raise Stuck(f"{self.name} got no turn")

    def give_baton(self):
        self._baton.release()

    def join(self):
        self._thread.join(REAL_S)
        return not self._thread.is_alive()

    def _run(self):
        _here.task = self
        self.take_baton()
        try:
            if not self.is_killed:
                self.result = self._act()
        except BaseException as error:
            self.error = error
        self.has_ended = True
        self.scheduler._ended(self)


class Scheduler:
    """Runs tasks until all have ended."""

    def __init__(self, seed=0):
        self.random = random.Random(seed)
        self.now = 0.0
        """Virtual seconds."""
        self.turns = 0
        self.tasks = []
        self._events = []
        self._numbers = itertools.count()
        self._finished = threading.Event()
        self._stuck = None

    def start(self, name, act, owner=None):
        """A new task, which can go on at once."""
        task = Task(self, name, owner, act)
        self.tasks.append(task)
        return task

    def at(self, time, act):
        """Does something when the clock comes to `time`."""
        heapq.heappush(self._events, (time, next(self._numbers), act))

    def kill(self, tasks):
        """Ends tasks where they wait; the one that runs must raise `Killed` by itself."""
        for task in tasks:
            task.is_killed = True

    def run(self):
        """Returns when every task has ended.

        Raises:
          Stuck: some cannot go on (they have ended by then).
        """
        self._hand_over()
        if not self._finished.wait(REAL_S):
            turns = self.turns
            while not self._finished.wait(REAL_S):
                if self.turns == turns:
                    raise Stuck("a task waits for something that is no part of the world")
                turns = self.turns
        if not all(task.join() for task in self.tasks):
            raise Stuck("a thread is left")
        if self._stuck is not None:
            raise Stuck(self._stuck)

    def wait(self, ready, timeout=math.inf):
        """Lets others run until `ready()`; returns whether it came true within `timeout` seconds.

        Raises:
          Killed: in its place.
        """
        task = current_task()
        task.ready, task.deadline = ready, self.now + timeout
        if task.is_killed:
            raise Killed
        self._hand_over(task)
        came = task.ready()
        task.ready, task.deadline = None, math.inf
        if task.is_killed:
            raise Killed
        return came

    def pause(self, most):
        """Lets up to `most` seconds pass."""
        self.wait(lambda: False, self.random.uniform(0, most))

    def _ended(self, task):
        self._hand_over()

    def _hand_over(self, task=None):
        """Gives the baton to the next task; with `task`, returns when that has it again."""
        chosen = self._next()
        if chosen is None:
            self._finished.set()
        elif chosen is not task:
            chosen.give_baton()
        if task is not None and chosen is not task:
            task.take_baton()

    def _next(self):
        self.turns += 1
        while True:
            alive = [task for task in self.tasks if not task.has_ended]
            if not alive:
                return None
            if self.turns > _MOST_TURNS and self._stuck is None:
                self._give_up(alive, f"no end after {_MOST_TURNS} turns")
            able = [task for task in alive if task.can_go_on(self.now)]
            if able:
                return able[0] if len(able) == 1 else self.random.choice(able)
            times = [task.deadline for task in alive]
            if self._events:
                times.append(self._events[0][0])
            self.now = max(self.now, min(times))
            if math.isinf(self.now):
                self._give_up(alive, f"{', '.join(task.name for task in alive)} wait for ever")
                self.now = 0.0
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()

    def _give_up(self, alive, why):
        self._stuck = why
        self.kill(alive)
