"""Kills training with SIGKILL at random moments and compares what becomes of it, bit for bit.

    python tests/integration/kill_and_resume.py --kills 50

A small job with a checkpoint every few steps trains in a process of its own. It is killed, at a
random moment or just after a checkpoint began to appear on disk, and started again with `resume`;
when it ends, another run of the same job begins, until there were enough kills. After each kill
the newest complete checkpoint must pass its checksums; at the end of each run, every table row,
dense weight and optimizer number, and every metric must equal those of a run that nobody stopped.
The moments come from --seed; where they fall in the program depends on the machine.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from run_contents import contents, differences

from penstock import run as story
from penstock.config import Job, parse_job
from penstock.training.checkpoint import checkpoint


def small_job(steps: int, threads: int) -> Job:
    """A job of many tables and few rows, so that a good part of its time goes into checkpoints."""
    return parse_job({
        "name": "crash",
        "data": {
            "source": {"format": "synthetic", "rows": 64 * steps, "keys_per_feature": 2000},
            "label": {"column": "click"},
            "numeric": [{"columns": ["n[0-9]*"]}],
            "shuffle": {"block_rows": 1000},
        },
        "features": [{"columns": ["c[0-9]*"]}],
        "table_defaults": {"dim": 8, "optimizer": {"kind": "adam"}},
        "model": {"kind": "dlrm", "bottom": [8], "top": [16]},
        "training": {
            "batch_size": 64,
        },
        "run": {"threads": threads},
        "report": {"every_steps": 10},
        "checkpoint": {"every_steps": 3, "keep_last": 2},
    })


def train(job: Job, out: Path) -> None:
    """What the killed process does: start, or go on from the newest checkpoint if there is one."""
    resume = checkpoint.latest_checkpoint(out / "checkpoints") is not None
    if out.exists() and not resume:
        # It died before its first checkpoint.
        out.rename(out.with_name(f"{out.name}-{time.monotonic_ns()}"))
    story.train(job, out, resume=resume, console=Console(file=io.StringIO()))


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    while_saving: int = 0
    before_first: int = 0
    finished_runs: int = 0
    problems: list[str] = field(default_factory=list)


def kill_somewhen(process: BaseProcess, out: Path, moment: random.Random, longest_s: float) -> bool:
    """Kills the process at a random moment; False if it ended by itself before."""
    choice = moment.random()
    if choice > 0.1:
        # One in ten dies while it starts; the others once training began, which writes job.yaml.
        wait_for_change(process, out / "job.yaml", 60.0)
    wait(process, moment.uniform(0.0, longest_s))
    if choice > 0.6:
        wait_for_change(process, out / "checkpoints", 2.0)
        wait(process, moment.uniform(0.0, 0.02))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def wait(process: BaseProcess, seconds: float) -> None:
    """Waits, but not beyond the end of the process."""
    process.join(seconds)


def wait_for_change(process: BaseProcess, path: Path, longest_s: float) -> None:
    """Waits until a file or folder is changed or made."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    end = time.monotonic() + longest_s
    while process.is_alive() and time.monotonic() < end:
        if path.exists() and path.stat().st_mtime_ns != before:
            return
        time.sleep(0.0005)


def examine(out: Path, tally: Tally) -> None:
    """After a kill: the newest complete checkpoint must be whole."""
    newest = checkpoint.latest_checkpoint(out / "checkpoints")
    if newest is None:
        tally.before_first += 1
        return
    tally.while_saving += any(".tmp-" in path.name for path in newest.parent.iterdir())
    checkpoint.verify(newest)


def main() -> int:
    """Runs the test; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=240, help="steps of one run")
    parser.add_argument(
        "--longest-s", type=float, default=1.0, help="longest training before a kill"
    )
    parser.add_argument("--threads", type=int, default=2, help="of training")
    arguments = parser.parse_args()
    moment, job, tally = (
        random.Random(arguments.seed),
        small_job(arguments.steps, arguments.threads),
        Tally(),
    )
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["penstock.run"])
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        train(job, whole)
        expected = contents(whole)
        while tally.kills < arguments.kills and not tally.problems:
            out = Path(scratch) / f"run-{tally.finished_runs}"
            ended = False
            while not ended:
                process = spawn.Process(target=train, args=(job, out))
                process.start()
                if tally.kills < arguments.kills and kill_somewhen(
                    process, out, moment, arguments.longest_s
                ):
                    tally.kills += 1
                    examine(out, tally)
                    continue
                process.join()
                if process.exitcode != 0:
                    tally.problems.append(f"resumed run ended with status {process.exitcode}")
                ended = True
            if not tally.problems:
                tally.problems += differences(contents(out), expected)
            tally.finished_runs += 1
    print(
        f"{tally.kills} kills ({tally.while_saving} left a torn checkpoint, {tally.before_first} "
        f"came before the first) in {tally.finished_runs} runs of {arguments.steps} steps, seed "
        f"{arguments.seed}, {time.monotonic() - begin:.0f} s: "
        + ("; ".join(tally.problems) if tally.problems else "every run ended with the same bits")
    )
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
