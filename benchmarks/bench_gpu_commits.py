"""Two checkouts of Penstock on one GPU, by turns: steps of the GPU store, old against new.

    python benchmarks/bench_gpu_commits.py --old PYTHON:CHECKOUT --new PYTHON:CHECKOUT

PYTHON has that checkout's package installed; CHECKOUT is its folder. Each turn is a process of each
checkout, one after the other. A line of JSON a case: of every process the least of six runs of 100
steps (look-up and update; time until the device is done, over the steps), and the medians between
CUDA events. Small steps are the host's time, and differ by half between processes of one checkout:
look at the least of each, and at all of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

CASES = ("one-hot 26 x 512", "one-hot 10 x 104857, RowWiseAdagrad")
STEPS, RUNS = 100, 6


def measure(name: str) -> dict[str, float]:
    """Runs in a checkout: milliseconds of one case."""
    import torch  # noqa: PLC0415 - the parent needs none of these
    from bench_gpu_store import CASES as KNOWN  # noqa: PLC0415
    from bench_gpu_store import Step, filled_store, median_ms  # noqa: PLC0415

    case = next(case for case in KNOWN if case.name == name)
    step, store = Step(case), filled_store(case)
    for i in range(60):
        step.train(store, i)
    runs = []
    for run in range(RUNS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(STEPS):
            step.train(store, 60 + run * STEPS + i)
        torch.cuda.synchronize()
        runs.append((time.perf_counter() - begin) / STEPS * 1e3)
    return {
        "step_ms": round(min(runs), 4),
        "step_events_ms": round(median_ms(lambda i: step.train(store, 1000 + i), STEPS, 16), 4),
        "forward_events_ms": round(
            median_ms(lambda i: step.forward(store, i, insert=False), STEPS, 16), 4
        ),
    }


def of_checkout(where: str, case: str) -> dict[str, float]:
    """The same in a process of its own."""
    python, folder = where.split(":", 1)
    command = [python, str(Path(__file__).resolve()), "--measure", case]
    benchmarks = Path(folder) / "benchmarks"
    done = subprocess.run(command, cwd=benchmarks, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--old", help="PYTHON:CHECKOUT")
    parser.add_argument("--new", help="PYTHON:CHECKOUT")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        sys.path.insert(0, str(Path.cwd()))
        print(json.dumps(measure(options.measure)))
        return
    for case in CASES:
        turns = [
            [of_checkout(where, case) for where in (options.old, options.new)]
            for _ in range(options.turns)
        ]
        line: dict[str, object] = {"case": case, "turns": options.turns}
        for name in turns[0][0]:
            line[name] = {
                which: [turn[number][name] for turn in turns]
                for number, which in enumerate(("old", "new"))
            }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
