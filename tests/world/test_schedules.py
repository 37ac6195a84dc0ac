"""Random runs of training in a faulty world; the long form is tests/soak/random_world.py."""

import pytest

from tests.world.schedule import run


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_schedules_agree_with_the_oracle(first):
    done = [run(seed) for seed in range(first, first + 20)]
    assert sum(one.legs for one in done) > len(done) < sum(one.steps for one in done)


def test_faults_happen():
    assert sum(run(seed).faults for seed in range(200, 230)) > 2
