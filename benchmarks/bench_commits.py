"""Two checkouts of Penstock against each other, by turns: is the new one slower?

    python benchmarks/bench_commits.py --old ../before --new .            # a JSON line a case
    python benchmarks/bench_commits.py --old ../before --new . --check    # and fails where it is

Each checkout has an environment of its own in `.venv` (`make .venv/.installed`). A process each
holds the same tables and batches; a turn is some steps of one and then of the other, in an order
that changes. Where memory comes to lie differs between processes and is worth some per cent, so a
case runs in several pairs of them: reported are the median over pairs of the median ratio
new / old of their turns, and its 95 % interval by bootstrap over pairs. A case is slower where its
whole interval lies above the goal.

Commits of before look whether gradients are finite in jobs alone, not in a loop of one's own as
this is one; `--old-checks` has the old one do that here too, so that like is set against like.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

GOAL = 1.03
TURN_S = 0.15

CASES = {
    # tables, keys a bag, batch, dim, rows a table, threads, budget
    "one hot, D=16, batch 1024, 1 thread": (26, 1, 1024, 16, 100_000, 1, None),
    "one hot, D=16, batch 1024, 2 threads": (26, 1, 1024, 16, 100_000, 2, None),
    "one hot, D=16, batch 4096, 1 thread": (26, 1, 4096, 16, 100_000, 1, None),
    "one hot, D=128, batch 1024, 1 thread": (26, 1, 1024, 128, 20_000, 1, None),
    "five keys a bag, D=16, batch 1024, 1 thread": (26, 5, 1024, 16, 100_000, 1, None),
    "one evicting table, D=16, batch 16384, 1 thread": (1, 1, 16384, 16, 1 << 40, 1, 2_000_000),
    "one evicting table of 2.2 M rows, D=16": (1, 1, 16384, 16, 1 << 40, 1, 2_200_000),
}


def make_steps(case: str, checks: bool) -> Callable[[], None]:
    """Runs in a checkout: tables filled with the case's keys, and a call that trains one step.

    `checks`: the step looks whether its gradient is finite before it hands it over.
    """
    import torch  # noqa: PLC0415 - the parent needs none of these

    from penstock.config import Adagrad, Eviction, FeatureConfig, TableConfig  # noqa: PLC0415
    from penstock.embedding import EmbeddingCollection  # noqa: PLC0415
    from penstock.types import KeyedJagged  # noqa: PLC0415

    count, bag, size, dim, rows, threads, kept = CASES[case]
    limits = {}
    if kept:
        limits = {"eviction": Eviction(ttl=10**9), "max_bytes": kept * (dim * 8 + 40)}
    tables = [
        TableConfig(name=f"t{n}", dim=dim, optimizer=Adagrad(), **limits) for n in range(count)
    ]
    features = [FeatureConfig(name=f"f{n}", table=f"t{n}", pooling="sum") for n in range(count)]
    collection = EmbeddingCollection(tables, features, num_threads=threads)
    torch.set_num_threads(threads)
    generator = np.random.default_rng(0)
    names = tuple(feature.name for feature in features)
    offsets = torch.arange(0, count * size * bag + 1, bag)
    batches = []
    for _ in range(256 if kept else 32):  # more keys than are kept: each step evicts
        keys = generator.integers(0, rows, count * size * bag)
        batches.append(KeyedJagged(names, torch.from_numpy(keys), offsets))
    grad = torch.randn(size, count * dim)
    at = 0

    def step() -> None:
        nonlocal at
        out = collection(batches[at % len(batches)])
        if checks and not math.isfinite(float(grad.sum())):
            raise SystemExit("the gradient is not finite")
        out.backward(grad)
        collection.apply_gradients()
        at += 1

    for _ in range(len(batches)):
        step()
    return step


def serve(case: str, checks: bool) -> None:
    """The process of one checkout: prints the seconds of as many steps as a line of stdin asks."""
    step = make_steps(case, checks)
    begin = time.perf_counter()
    step()
    print(time.perf_counter() - begin, flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - begin, flush=True)


class Checkout:
    """A checkout's process for one case."""

    def __init__(self, folder: Path, case: str, checks: bool = False) -> None:
        python = folder / ".venv" / "bin" / "python"
        command = [str(python), str(Path(__file__).resolve()), "--serve", case]
        command += ["--old-checks"] if checks else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.step_s = self._answer()

    def seconds_of(self, steps: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.communicate()

    def _answer(self) -> float:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")
        return float(line)


def interval_of(medians: np.ndarray) -> list[float]:
    """The 95 % interval of the median of pairs of processes, by bootstrap."""
    draws = np.random.default_rng(0).choice(medians, (2000, len(medians)))
    return [round(float(q), 4) for q in np.quantile(np.median(draws, 1), [0.025, 0.975])]


def ratios_of_pair(
    case: str, old: Path, new: Path, turns: int, checks: bool
) -> tuple[np.ndarray, float]:
    """New over old, by turn, of one process each; and the old one's seconds a step."""
    pair = [Checkout(old, case, checks), Checkout(new, case)]
    steps = max(1, int(TURN_S / min(checkout.step_s for checkout in pair)))
    times = np.empty((turns, 2))
    for turn in range(turns):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[turn, which] = pair[which].seconds_of(steps)
    for checkout in pair:
        checkout.end()
    return times[:, 1] / times[:, 0], float(np.median(times[:, 0])) / steps


def compare(case: str, arguments: argparse.Namespace) -> dict[str, object]:
    old, new, pairs, turns = arguments.old, arguments.new, arguments.pairs, arguments.turns
    found = [ratios_of_pair(case, old, new, turns, arguments.old_checks) for _ in range(pairs)]
    medians = np.array([np.median(ratios) for ratios, _ in found])
    return {
        "case": case,
        "new_over_old": round(float(np.median(medians)), 4),
        "interval": interval_of(medians),
        "range_of_pairs": [round(float(medians.min()), 4), round(float(medians.max()), 4)],
        "old_step_ms": round(float(np.median([step_s for _, step_s in found])) * 1e3, 3),
        "pairs": pairs,
        "turns": turns,
        "old_checks": arguments.old_checks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="checkout to compare with")
    parser.add_argument("--new", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--pairs", type=int, default=9, help="of processes, a case")
    parser.add_argument("--turns", type=int, default=10, help="of a pair")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these")
    parser.add_argument(
        "--old-checks", action="store_true", help="the old one's gradients are looked at, too"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a case is slower")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.old_checks)
        return
    if arguments.old is None:
        parser.error("--old FOLDER: the checkout to compare with")
    from circumstances import commit, end_check, hardware  # noqa: PLC0415

    slower = []
    for case in arguments.case or CASES:
        found = compare(case, arguments)
        print(
            json.dumps(
                found | {"commit": commit(), "hardware": hardware(f"numpy {np.__version__}")}
            ),
            flush=True,
        )
        if found["interval"][0] > GOAL:
            slower.append(f"{case}: {found['new_over_old']} x the old one, goal {GOAL}")
    if arguments.check:
        end_check(slower)


if __name__ == "__main__":
    main()
