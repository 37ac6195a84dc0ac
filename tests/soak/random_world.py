"""Random runs of training in a faulty world, against rows in a dictionary and a log of samples.

    python -m tests.soak.random_world --schedules 10000 --seed 1

What a schedule is says `tests/world/schedule.py`; one that fails is run again by its seed:
`python -m tests.soak.random_world --schedules 1 --first SEED`.
"""

from __future__ import annotations

import argparse
import time

import torch

from tests.world.schedule import Done, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, help="number of the first schedule, over all seeds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin, told = time.perf_counter(), 0
    first = options.seed * 10_000_000 if options.first is None else options.first
    total = Done(0, 0, 0, 0)
    for number in range(options.schedules):
        done = run(first + number)
        total = Done(*(a + b for a, b in zip(total, done, strict=True)))
        if time.perf_counter() - begin > 10 * (told + 1):
            told += 1
            print(f"{number + 1} of {options.schedules} schedules agree", flush=True)
    minutes = (time.perf_counter() - begin) / 60
    print(
        f"{options.schedules} schedules agree, {options.schedules / minutes:.0f} a minute: "
        f"{total.steps} steps, {total.rows} rows at their ends, {total.legs} times that ranks "
        f"began, {total.faults} deaths and cut messages"
    )


if __name__ == "__main__":
    main()
