"""Runs whose lanes read at their own pace, killed again and again: each row once, and once more so?

    python -m tests.soak.elastic_killed [--runs 4] [--kills 50] [--ranks 1 2 3] [--seed 1]

Each run is killed (`kill -9`) at random moments: its process; of several ranks one or all of them;
or the process that keeps their ledger, which the run must survive. Then it goes on, on another
number of ranks, to its end. Every row must have been applied once: as many as there are, and a row
of a table for each. Then another run replays its ledger, on another number of ranks, without a
kill, and must come to the same bits. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from penstock.training.checkpoint.checkpoint import latest_checkpoint
from tests.soak.bits_over_ranks import differences, of_ranks, start, train, without_lines


def write_files(folder: Path, files: int, rows: int) -> int:
    """Files of unlike sizes; how many rows they have."""
    rng, total = np.random.default_rng(5), 0
    folder.mkdir()
    for number in range(files):
        size = int(rng.integers(0, 2 * rows))
        columns = {
            "label": rng.integers(0, 2, size),
            "row": total + np.arange(size),
            "item": rng.zipf(1.3, size) % 500,
        }
        pq.write_table(pa.table(columns), folder / f"{number:03}.parquet", row_group_size=400)
        total += size
    return total


def fields_of(folder: Path) -> dict[str, object]:
    """A job of one epoch."""
    return {
        "data": {
            "source": {"format": "parquet", "path": str(folder / "*.parquet")},
            "label": {"column": "label"},
            "shuffle": {"block_rows": 700},
            "lanes": 4,
            "policy": "elastic",
        },
        "features": [{"columns": ["row"]}, {"columns": ["item"]}],
        "table_defaults": {"dim": 4, "optimizer": {"kind": "adam"}},
        "model": {"kind": "dlrm", "bottom": [], "top": [8]},
        "training": {"batch_size": 64, "deterministic": True},
        "checkpoint": {"every_steps": 11},
        "report": {"every_steps": 20},
    }


def keeper_of(processes: list[int]) -> int | None:
    """The process that keeps the ledger of ranks."""
    for number in processes:
        for child in of_ranks(number):
            try:
                words = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if b"penstock.ledger.service" in words:
                return child
    return None


def _lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


class Victim:
    """A run that is killed."""

    def __init__(self, folder: Path, data: Path, rows: int, ranks: list[int], seed: int) -> None:
        folder.mkdir()
        self._rng, self._ranks, self._rows = random.Random(seed), ranks, rows
        self._out, self._again = folder / "run", folder / "again"
        self._job = folder / "job.yaml"
        self._job.write_text(yaml.safe_dump(fields_of(data)))
        self._replay = folder / "replay.yaml"
        fields = fields_of(data)
        fields["data"]["replay"] = str(self._out)
        self._replay.write_text(yaml.safe_dump(fields))
        self.met = Counter[str]()

    def run(self, kills: int) -> Counter[str]:
        """All of it; what was killed."""
        has_ended = False
        while sum(self.met.values()) < kills and not has_ended:
            has_ended = self._leg(kills)
        train(self._job, self._out, self._rng.choice(self._ranks), *self._resume())
        train(self._replay, self._again, self._rng.choice(self._ranks))
        found, again = without_lines(self._out), without_lines(self._again)
        unlike = differences(found, again)
        assert not unlike, f"the replay differs: {unlike[:5]}"
        counts = found["position"].counts
        assert tuple(counts) == (self._rows, 0, 0, self._rows), counts
        summary = json.loads((self._out / "summary.json").read_text())
        assert summary["tables"]["row"]["rows"] == self._rows, "a row was never applied"
        return self.met

    def _resume(self) -> list[str]:
        there = self._out.exists() and latest_checkpoint(self._out / "checkpoints") is not None
        if not there and self._out.exists():
            shutil.rmtree(self._out)
        return ["--resume"] if there else []

    def _leg(self, kills: int) -> bool:
        """Until a kill that ends it; whether it came to its end by itself."""
        more = self._resume()
        process = start(self._job, self._out, self._rng.choice(self._ranks), *more)
        seen = _lines(self._out)
        if at_work := self._rng.random() < 0.8:
            limit_s = time.monotonic() + 60
            while _lines(self._out) <= seen and time.monotonic() < limit_s:
                time.sleep(0.02)
                if process.poll() is not None:
                    break
        while True:
            try:
                status = process.wait(self._rng.uniform(0, 4))
                errors = process.communicate()[1]
                assert status == 0, errors
                return True
            except subprocess.TimeoutExpired:
                pass
            ranks = of_ranks(process.pid)
            keeper = keeper_of(ranks)
            if keeper is not None and self._rng.random() < 0.5:
                os.kill(keeper, signal.SIGKILL)
                self.met["ledger"] += 1
                if sum(self.met.values()) >= kills:
                    assert process.wait(600) == 0, process.communicate()[1]
                    return True
                continue
            os.kill(self._rng.choice([process.pid, *ranks]), signal.SIGKILL)
            process.communicate(timeout=60)
            self.met["reading" if at_work else "starting"] += 1
            return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--kills", type=int, default=50, help="of each run, if it lasts so long")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", type=int, default=4000, help="of a file, about")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.runs) as threads:
        folder, met = Path(name), Counter[str]()
        rows = write_files(folder / "data", 60, options.rows)
        runs = [
            threads.submit(
                Victim(folder / str(n), folder / "data", rows, options.ranks, options.seed + n).run,
                options.kills,
            )
            for n in range(options.runs)
        ]
        for number, run in enumerate(runs):
            met += run.result()
            print(f"run {number}: each row once, and the replay has the same bits", flush=True)
    print(
        json.dumps({
            "soak": "elastic_killed",
            "outcome": "each row once; the replay has the same bits",
            "kills": sum(met.values()),
            "met": dict(met),
            "rows": rows,
            "ranks": options.ranks,
            "seed": options.seed,
            "seconds": round(time.monotonic() - began),
        })
    )


if __name__ == "__main__":
    main()
