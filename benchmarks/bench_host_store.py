"""Look-up + backward + update of the host store beside its peers.

    python benchmarks/bench_host_store.py [--peer-python PYTHON] [--json] [--check]

26 tables x 100 k rows, one key a feature, Zipf 1.05, D = 16 and 128, batch 1 k, 4 k and 16 k,
row-wise Adagrad. Contestants take turns, so that a busy neighbour slows all of them; figures are
medians over all turns. Each has a process of its own, in which its threads may wait as its library
has them wait (spinning, by default), and a peer is measured with one thread and with all: what
counts is the faster. FBGEMM (TorchRec's CPU kernel) runs in this interpreter where it is installed,
else in the one named by --peer-python, else it is left out and --check fails.

Goals are for FBGEMM as it comes. `fbgemm_kept` is FBGEMM where the C library keeps freed
memory, as Penstock's command line has it do; otherwise each output of some megabytes costs the page
faults of all of them. `bare` is the machine's limit: a program that is told where each key's row is
and which keys are equal (bare_step.cc; needs a C++ compiler, `c++`, on x86-64).
"""

from __future__ import annotations

import argparse
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
from contestants import Case

DIMS = (16, 128)
BATCH_SIZES = (1024, 4096, 16384)
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
# By label: which of CONTESTANTS, and its environment. Penstock has that of its command line, where
# torch's threads are idle and must not spin.
LINEUP = {
    "penstock": ("penstock", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "fbgemm": ("fbgemm", {}),
    "fbgemm_kept": ("fbgemm", KEPT_MEMORY),
    "torch": ("torch", {}),
    "bare": ("bare", {}),
}
PEERS = ("fbgemm", "fbgemm_kept", "torch")
# Speed of Penstock over FBGEMM's, at least, by dim and batch size; over torch's, 1.
FBGEMM_GOALS = {(16, 4096): 5.0, (128, 4096): 4.0}
OTHER_FBGEMM_GOAL = 3.0


class Contestant:
    """One of them, in a process of its own."""

    def __init__(self, label: str, threads: int, python: str) -> None:
        self.label = label
        self.threads = sorted({1, threads}) if label in PEERS else [threads]
        """Numbers of threads that it is measured with."""
        self._name, environment = LINEUP[label]
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "MALLOC_"))
        }
        self._process = subprocess.Popen(
            [python, str(Path(contestants.__file__)), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**inherited, **environment},
            text=True,
        )

    def time(self, case: Case, threads: int, seconds: float) -> list[float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = contestants.request_line(self._name, threads, case, seconds)
        print(request, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.label} failed in its interpreter")
        return json.loads(line)

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def line_up(threads: int, peer_python: str | None) -> list[Contestant]:
    """All that have an interpreter."""
    lineup = []
    for label, (name, _) in LINEUP.items():
        python = sys.executable if contestants.runs_here(name) else peer_python
        if python is not None:
            lineup.append(Contestant(label, threads, python))
    return lineup


def run_case(case: Case, turns: int, seconds: float, lineup: list[Contestant]) -> dict:
    """Times all contestants in turns; milliseconds a step, medians and spread."""
    times: dict[tuple[str, int], list[list[float]]] = {}
    for turn in range(turns + 1):
        for one in lineup:
            for threads in one.threads:
                part = one.time(case, threads, seconds if turn else 0.0)
                if turn:  # the first one builds and warms up
                    times.setdefault((one.label, threads), []).append(part)
    result: dict = {"case": case.name, "dim": case.dim, "batch_size": case.batch_size}
    best: dict[str, list[list[float]]] = {}
    for (name, threads), parts in times.items():
        medians = [float(np.median(part)) for part in parts]
        ms = round(float(np.median(np.concatenate(parts))), 3)
        if name not in result or ms < result[name]["ms"]:
            best[name] = parts
            result[name] = {
                "ms": ms,
                "ms_lowest_turn": round(min(medians), 3),
                "ms_highest_turn": round(max(medians), 3),
                "threads": threads,
            }
    for peer in (*PEERS, "bare"):
        if peer in result:
            # Turn by turn: both saw the same neighbours.
            ratios = [
                np.median(theirs) / np.median(ours)
                for ours, theirs in zip(best["penstock"], best[peer], strict=True)
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
    print(f"{machine()}; milliseconds a step (lowest - highest turn), thousand samples/s, threads")
    names = [name for name in LINEUP if name in results[0]]
    print(f"{'case':>12} " + " ".join(f"{name:>36}" for name in names) + "   speed over")
    for result in results:
        cells = []
        for name in names:
            t = result[name]
            rate = result["batch_size"] / t["ms"]
            spread = f"({t['ms_lowest_turn']:.2f}-{t['ms_highest_turn']:.2f})"
            cells.append(f"{t['ms']:8.2f} {spread:>16} {rate:6.0f} {t['threads']:3d}")
        over = ", ".join(
            f"{peer} {result[f'speed_over_{peer}']:.2f}" for peer in names if peer != "penstock"
        )
        print(f"{result['case']:>12} " + " ".join(f"{cell:>36}" for cell in cells) + f"   {over}")


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
    results = []
    with ExitStack() as stack:
        lineup = [
            stack.enter_context(one) for one in line_up(arguments.threads, arguments.peer_python)
        ]
        for dim in DIMS:
            for batch_size in BATCH_SIZES:
                case = Case(dim, batch_size)
                results.append(run_case(case, arguments.turns, arguments.seconds, lineup))
                if arguments.json:
                    context = {"commit": commit(), "hardware": machine()}
                    print(json.dumps({**results[-1], **context}), flush=True)
    if not arguments.json:
        print_table(results)
    if arguments.check:
        end_check(misses(results))


if __name__ == "__main__":
    main()
