"""A DLRM from Parquet files through `penstock train` on a GPU: samples a second in steady state.

    python benchmarks/bench_train_gpu.py [--batch 65536 2048] [--seconds 60] [--json] [--check]

MLPerf's layer sizes, 26 tables of dim 128 with row-wise Adagrad, one key a feature, Zipf keys among
`--keys` a table, bfloat16 autocast. The files are written first, uncompressed, into a folder that
is removed; they are small enough to stay in the page cache and are read over and over. What counts
is the time between lines of metrics.jsonl, after the first `--warm` seconds of training: reading,
metrics and log lines are in it; opening, the first batches and the checkpoint at the end are not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from circumstances import commit, end_check, hardware

TABLES, NUMBERS, FILES = 26, 13, 16
SKEW = 1.05
TRACED = 40
"""Steps, before those that count, for the stage that holds the run back."""
GOALS = {65_536: 5e6, 2_048: 1.5e6}
"""Samples a second."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=list(GOALS))
    parser.add_argument("--rows", type=int, default=1 << 22)
    parser.add_argument("--keys", type=int, default=1_000_000, help="of a table")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--warm", type=float, default=20.0, help="seconds that do not count")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="as of the command")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    arguments = parser.parse_args()
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), arguments.rows, arguments.keys)
        for batch_size in arguments.batch:
            found = measure(Path(folder), batch_size, arguments)
            rate, goal = found["samples_per_s"], GOALS.get(batch_size, 0.0)
            if rate < goal:
                missed.append(f"batch {batch_size:,}: {rate:,.0f} samples/s, goal {goal:,.0f}")
            print(json.dumps(found) if arguments.json else told(found), flush=True)
    if arguments.check:
        end_check(missed)


def write_log(folder: Path, rows: int, keys: int) -> None:
    """Rows of a click log in several files, without compression."""

    def write(number: int) -> None:
        random = np.random.default_rng(number)
        count = rows // FILES
        columns: dict[str, Any] = {"click": (random.random(count) < 0.3).astype(np.int8)}
        for n in range(NUMBERS):
            columns[f"n{n}"] = random.random(count, dtype=np.float32)
        for c in range(TABLES):
            columns[f"c{c}"] = zipf(random, count, keys)
        options = {"compression": "none", "use_dictionary": False, "row_group_size": 1 << 16}
        pq.write_table(pa.table(columns), folder / f"part-{number:03d}.parquet", **options)

    with ThreadPoolExecutor() as threads:
        list(threads.map(write, range(FILES)))


def zipf(random: np.random.Generator, count: int, keys: int) -> np.ndarray:
    """[count] int64 below `keys`, frequent ones anywhere among them."""
    # The inverse of the distribution of x^-SKEW on [1, keys + 1).
    gap = 1.0 - SKEW
    rank = (random.random(count) * ((keys + 1.0) ** gap - 1.0) + 1.0) ** (1.0 / gap)
    return (rank.astype(np.int64) * 2_654_435_761) % keys


def job_of(folder: Path, batch_size: int, device: str) -> dict[str, Any]:
    """The job, as fields."""
    return {
        "name": "bench",
        "data": {
            "source": {"format": "parquet", "path": str(folder / "part-*.parquet")},
            "label": {"column": "click"},
            "numeric": [{"columns": ["n[0-9]*"]}],
            "split": None,
        },
        "features": [{"columns": ["c[0-9]*"]}],
        "table_defaults": {
            "dim": 128,
            "optimizer": {"kind": "row_wise_adagrad", "learning_rate": 0.01},
        },
        "model": {"kind": "dlrm", "bottom": [512, 256, 128], "top": [1024, 1024, 512, 256]},
        "training": {"batch_size": batch_size, "epochs": 100_000, "autocast": "bfloat16"},
        "run": {"device": device},
        "report": {"every_steps": max(1, (1 << 21) // batch_size)},
        "checkpoint": {"every_steps": None},
        "evaluation": {"every_steps": None},
    }


def measure(folder: Path, batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains in a process of its own until there is enough to measure."""
    out = folder / f"run-{batch_size}"
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(job_of(folder, batch_size, arguments.device)))
    code = "from penstock.cli import main; main()"
    sets = [part for one in arguments.sets for part in ("--set", one)]
    command = [sys.executable, "-c", code, "train", str(job), "--out", str(out), *sets]
    command += ["--profile", str(TRACED)]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            counted = wait_for(process, out / "metrics.jsonl", arguments)
        finally:
            # The second one leaves at once: the checkpoint would take longer than all else.
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            process.wait(120)
    if len(counted) < 2:
        raise SystemExit((folder / "output.txt").read_text()[-4000:])
    first, last = counted[0], counted[-1]
    wall_s = last["time_s"] - first["time_s"]
    samples = last["samples"] - first["samples"]
    seconds = {
        part: sum(line["seconds"][part] for line in counted[1:]) for part in first["seconds"]
    }
    peak = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    (profile,) = lines_of(out / "metrics.jsonl", "profile")
    return {
        "batch_size": batch_size,
        "samples_per_s": samples / wall_s,
        "wall_s": wall_s,
        "share_of_wall": {part: spent / wall_s for part, spent in seconds.items() if spent},
        "held_back_by": profile["text"],
        "stages_ms": {
            name: {place: round(s * 1e3, 3) for place, s in spent.items()}
            for name, spent in profile["stages"].items()
        },
        "log_loss": [first["log_loss"], last["log_loss"]],
        "file_bytes": sum(part.stat().st_size for part in folder.glob("part-*.parquet")),
        "page_cache": "warm: the files were just written, and were read several times",
        "sets": arguments.sets,
        "hardware": hardware(f"{peak}, torch {torch.__version__}"),
        "commit": commit(),
    }


def wait_for(
    process: subprocess.Popen[bytes], path: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The lines of the steady state, once there are enough of them."""
    while process.poll() is None:
        time.sleep(0.5)
        lines = lines_of(path, "train")
        counted = [line for line in lines if line["time_s"] > lines[0]["time_s"] + arguments.warm]
        if counted and counted[-1]["time_s"] - counted[0]["time_s"] >= arguments.seconds:
            return counted
    return []


def lines_of(path: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of a kind, as far as they are written."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0].splitlines()
    return [line for line in map(json.loads, whole) if line["kind"] == kind]


def told(found: dict[str, Any]) -> str:
    """One line for a reader."""
    shares = ", ".join(f"{part} {share:.0%}" for part, share in found["share_of_wall"].items())
    return (
        f"batch {found['batch_size']:,}: {found['samples_per_s'] / 1e6:.2f} M samples/s over "
        f"{found['wall_s']:.0f} s; {shares}; held back by {found['held_back_by']}; log loss "
        f"{found['log_loss'][0]:.4f} to {found['log_loss'][1]:.4f}; {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
