"""Runs over a folder that grows, killed again and again: is every row applied once, to the bit?

    python -m tests.soak.growing_killed [--runs 8] [--kills 25] [--ranks 1 2] [--seed 1]

While files of one hour after the other appear, each run is killed (`kill -9` of its process; of
several ranks, of one of them or of all) at random moments of start-up, reading, saving and waiting,
and goes on. Then it is given an end, and must come to the weights, optimizer state and counts of a
run over all files at once, that nobody killed. Runs go on side by side. Prints a line of JSON.
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
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from penstock.training.checkpoint.checkpoint import latest_checkpoint
from tests.soak.bits_over_ranks import contents, differences, of_ranks, start, train

ROWS = 1_500
PATH = "{YYYY}-{MM}-{DD}/{HH}.parquet"
END = "2026-03-04"
_HOURS = 72


def write_hours(folder: Path) -> list[Path]:
    """Files of 72 hours, of which some have none and some have few rows."""
    rng, made = np.random.default_rng(5), []
    for hour in range(_HOURS):
        if hour % 17 == 5:
            continue
        rows = 3 if hour % 11 == 0 else ROWS
        path = folder / f"2026-03-{1 + hour // 24:02}" / f"{hour % 24:02}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = hour * 10_000 + np.arange(rows)
        columns = {
            "label": rng.integers(0, 2, rows),
            "row": ids,
            "item": rng.zipf(1.3, rows) % 500,
        }
        pq.write_table(pa.table(columns), path)
        made.append(path)
    return made


def fields_of(folder: Path, end: str) -> dict[str, object]:
    """A job of files by the hour."""
    source = {"name": "x", "files": {"format": "parquet", "path": str(folder / PATH)}}
    stream = {"name": "s", "window": "hour", "start": "2026-03-01", "end": end, "sources": [source]}
    return {
        "data": {
            "source": {"format": "streams", "poll": "1s", "streams": [stream]},
            "label": {"column": "label"},
            "shuffle": {"block_rows": 700},
            "lanes": 4,
        },
        # A row of its own for each sample: trained twice, it would have other bits.
        "features": [{"columns": ["row"]}, {"columns": ["item"]}],
        "table_defaults": {"dim": 4, "optimizer": {"kind": "adam"}},
        "model": {"kind": "dlrm", "bottom": [], "top": [8]},
        "training": {"batch_size": 64, "deterministic": True},
        "checkpoint": {"every_steps": 7},
    }


def outcome(out: Path) -> dict[str, object]:
    """What a run has learnt, and what it has read; not which files it had to list for that."""
    found = contents(out)
    position = found.pop("position")
    del found["lines"]
    return {**found, "counts": list(position.counts), "samples": position.samples}


def _events(out: Path) -> list[str]:
    """The lines that a run has told, whole ones."""
    path = out / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


class Log(NamedTuple):
    """What grows."""

    hours: list[Path]
    """Files, as they appear."""
    job_of: Callable[[Path, str], dict[str, object]]
    """The job, by its folder and end."""
    end: str
    """In the end."""
    most_s: float = 5
    """Between two files."""


def killed(folder: Path, kills: int, ranks: list[int], seed: int, log: Log) -> Counter[str]:
    """One run; what it was killed at."""
    rng, pace = random.Random(seed), random.Random(-seed)
    grown, met = folder / "grown", Counter[str]()
    grown.mkdir(parents=True)
    job, out = folder / "job.yaml", folder / "run"
    job.write_text(yaml.safe_dump(log.job_of(grown, "now")))
    is_over = threading.Event()

    def grow() -> None:
        for path in log.hours:
            to = grown / path.parent.name / path.name
            to.parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / "part")
            (folder / "part").rename(to)
            if is_over.wait(pace.uniform(log.most_s / 10, log.most_s)):
                is_over.clear()

    feeder = threading.Thread(target=grow)
    feeder.start()
    is_new = True
    while sum(met.values()) < kills:
        before = latest_checkpoint(out / "checkpoints") if out.exists() else None
        seen = _events(out)
        process = start(job, out, rng.choice(ranks), *([] if is_new else ["--resume"]))
        if at_work := rng.random() < 0.8:
            limit_s = time.monotonic() + 60
            while len(_events(out)) <= len(seen) + 1 and time.monotonic() < limit_s:
                time.sleep(0.05)
        try:
            process.wait(rng.uniform(0, 5))
            raise AssertionError(f"ended by itself: {process.communicate()[1]}")
        except subprocess.TimeoutExpired:
            victim = rng.choice([process.pid, *of_ranks(process.pid)])
            os.kill(victim, signal.SIGKILL)
            process.communicate(timeout=60)
        newest = latest_checkpoint(out / "checkpoints") if out.exists() else None
        kinds = [line["kind"] for line in map(json.loads, _events(out)[len(seen) :])]
        doing = "waiting" if kinds[-1:] == ["waiting"] else "reading"
        saved = "saved since it began" if newest != before else "not saved since it began"
        met[f"{doing}, {saved}" if at_work else "starting"] += 1
        if (is_new := newest is None) and out.exists():
            shutil.rmtree(out)
    while feeder.is_alive():
        is_over.set()
        time.sleep(0.01)
    more = [] if is_new else ["--resume"]
    end = f"data.source.streams.0.end={log.end}"
    train(job, out, rng.choice(ranks), *more, "--set", end)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--kills", type=int, default=25, help="of each run")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.runs + 1) as threads:
        folder = Path(name)
        log = Log(write_hours(folder / "whole"), fields_of, END)
        job = folder / "whole.yaml"
        job.write_text(yaml.safe_dump(fields_of(folder / "whole", END)))
        (folder / "of-whole").mkdir()
        whole = threads.submit(train, job, folder / "of-whole" / "run", 1)
        runs = [
            threads.submit(
                killed, folder / str(n), options.kills, options.ranks, options.seed + n, log
            )
            for n in range(options.runs)
        ]
        whole.result()
        expected, met = outcome(folder / "of-whole" / "run"), Counter[str]()
        for number, run in enumerate(runs):
            met += run.result()
            unlike = differences(expected, outcome(folder / str(number) / "run"))
            assert not unlike, f"run {number}: {unlike[:5]}"
            print(f"run {number}: {options.kills} kills, the same bits", flush=True)
    print(
        json.dumps({
            "soak": "growing_killed",
            "outcome": "the same bits",
            "kills": sum(met.values()),
            "met": dict(met),
            "rows": expected["counts"][0],
            "ranks": options.ranks,
            "seed": options.seed,
            "seconds": round(time.monotonic() - began),
        })
    )


if __name__ == "__main__":
    main()
