"""What the time of a run went to."""

import time

from penstock.interruption import interruption
from penstock.training.steps.step import Clock


def test_no_time_counts_in_which_there_was_nothing_to_wait_for():
    idle_s = [0.0]

    def items():
        time.sleep(0.05)
        yield 1
        time.sleep(0.05)
        idle_s[0] += 0.05
        yield 2
        idle_s[0] += 100  # beside a step

    clock = Clock()
    with interruption() as stop:
        assert list(clock.waiting_for(items(), stop, lambda: idle_s[0])) == [1, 2]
    assert 0.05 <= clock.seconds["data"] < 0.1
