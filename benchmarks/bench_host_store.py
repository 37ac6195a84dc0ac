"""Look-up + backward + update of the host store beside its peers.

    python benchmarks/bench_host_store.py [--peer-python PYTHON] [--json] [--check]

26 tables x 100 k rows, one key a feature, Zipf 1.05, D = 16 and 128, batch 1 k, 4 k and 16 k,
row-wise Adagrad. Contestants take turns, so that a busy neighbour slows all of them; figures are
medians over all turns. FBGEMM (TorchRec's CPU kernel) runs in this process where it is installed,
else in the interpreter named by --peer-python, else it is left out and --check fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import contestants
import numpy as np
import torch
from circumstances import commit, end_check, hardware
from contestants import CONTESTANTS, Case, Step

DIMS = (16, 128)
BATCH_SIZES = (1024, 4096, 16384)
PEERS = ("fbgemm", "torch")
# Speed of Penstock over FBGEMM's, at least, by dim and batch size; over torch's, 1.
FBGEMM_GOALS = {(16, 4096): 5.0, (128, 4096): 4.0}
OTHER_FBGEMM_GOAL = 3.0


class Remote:
    """A contestant in another interpreter."""

    def __init__(self, python: str) -> None:
        script = Path(contestants.__file__)
        self._process = subprocess.Popen(
            [python, str(script), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def time(self, contestant: str, case: Case, seconds: float) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(
            contestants.request_line(contestant, case, seconds),
            file=self._process.stdin,
            flush=True,
        )
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{contestant} failed in the interpreter given by --peer-python")
        return json.loads(line)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def run_case(case: Case, turns: int, seconds: float, remote: Remote | None) -> dict:
    """Times all contestants in turns; milliseconds a step, medians and spread."""
    steps: dict[str, Step] = {}
    away = []
    for name, (_, build) in CONTESTANTS.items():
        if contestants.runs_here(name):
            steps[name] = build(case)
            contestants.time_steps(steps[name], 0, 0.0)
        elif remote is not None:
            away.append(name)
            remote.time(name, case, 0.0)
    times: dict[str, list[list[float]]] = {name: [] for name in [*steps, *away]}
    for turn in range(turns):
        for name, step in steps.items():
            times[name].append(contestants.time_steps(step, turn * 1000, seconds))
        for name in away:
            times[name].append(remote.time(name, case, seconds))
    del steps
    gc.collect()
    result = {"case": case.name, "dim": case.dim, "batch_size": case.batch_size}
    for name, parts in times.items():
        medians = [float(np.median(part)) for part in parts]
        result[name] = {
            "ms": round(float(np.median(np.concatenate(parts))), 3),
            "ms_lowest_turn": round(min(medians), 3),
            "ms_highest_turn": round(max(medians), 3),
        }
    for peer in PEERS:
        if peer in result:
            # Turn by turn: both saw the same neighbours.
            ratios = [
                np.median(theirs) / np.median(ours)
                for ours, theirs in zip(times["penstock"], times[peer], strict=True)
            ]
            result[f"speed_over_{peer}"] = round(float(np.median(ratios)), 2)
            result[f"speed_over_{peer}_range"] = [round(float(f(ratios)), 2) for f in (min, max)]
    return result


def misses(results: list[dict]) -> list[str]:
    """One line for each case and peer whose goal is not reached."""
    lines = []
    for result in results:
        case = (result["dim"], result["batch_size"])
        goals = {"fbgemm": FBGEMM_GOALS.get(case, OTHER_FBGEMM_GOAL), "torch": 1.0}
        for peer, goal in goals.items():
            reached = result.get(f"speed_over_{peer}")
            if reached is None:
                lines.append(f"{result['case']}: {peer} did not run (see --peer-python)")
            elif reached < goal:
                lines.append(f"{result['case']}: {reached} x {peer}, goal {goal} x")
    return lines


def machine() -> str:
    """Processor, cores and torch of this run."""
    return hardware(f"torch {torch.__version__}")


def print_table(results: list[dict]) -> None:
    print(f"{machine()}; milliseconds a step (lowest - highest turn), thousand samples/s")
    names = [name for name in CONTESTANTS if name in results[0]]
    print(f"{'case':>12} " + " ".join(f"{name:>32}" for name in names) + "   speed over")
    for result in results:
        cells = []
        for name in names:
            t = result[name]
            rate = result["batch_size"] / t["ms"]
            spread = f"({t['ms_lowest_turn']:.2f}-{t['ms_highest_turn']:.2f})"
            cells.append(f"{t['ms']:8.2f} {spread:>16} {rate:6.0f}")
        over = ", ".join(
            f"{peer} {result[f'speed_over_{peer}']:.2f}" for peer in PEERS if peer in result
        )
        print(f"{result['case']:>12} " + " ".join(f"{cell:>32}" for cell in cells) + f"   {over}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", help="interpreter that has fbgemm-gpu-cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a case")
    parser.add_argument("--check", action="store_true", help="exit 1 if a case misses its goal")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one contestant's turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    with ExitStack() as stack:
        remote = None
        if arguments.peer_python and not contestants.runs_here("fbgemm"):
            remote = stack.enter_context(Remote(arguments.peer_python))
        for dim in DIMS:
            for batch_size in BATCH_SIZES:
                case = Case(dim, batch_size, arguments.threads)
                results.append(run_case(case, arguments.turns, arguments.seconds, remote))
                if arguments.json:
                    context = {"commit": commit(), "hardware": machine()}
                    print(json.dumps({**results[-1], **context}), flush=True)
    if not arguments.json:
        print_table(results)
    if arguments.check:
        end_check(misses(results))


if __name__ == "__main__":
    main()
