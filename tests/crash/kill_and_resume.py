"""Kills training with SIGKILL at random moments and compares what becomes of it, bit for bit.

    python tests/crash/kill_and_resume.py --kills 50

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
import json
import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from penstock import run as story
from penstock.config import Job, parse_job
from penstock.training import checkpoint

# Seconds and rates are of the machine, not of the run.
MEASURED = {"seconds", "samples_per_s"}


def small_job(steps: int) -> Job:
    """A job of many tables and few rows, so that a good part of its time goes into checkpoints."""
    return parse_job({
        "name": "crash",
        "data": {
            "source": {"format": "synthetic", "rows": 64 * steps, "keys_per_feature": 2000},
            "label": {"column": "click"},
            "numeric": [{"columns": ["n[0-9]*"]}],
            "shuffle": {"window_rows": 1000},
        },
        "features": [{"columns": ["c[0-9]*"]}],
        "table_defaults": {"dim": 8, "optimizer": {"kind": "adam"}},
        "model": {"kind": "dlrm", "bottom": [8], "top": [16]},
        "training": {
            "batch_size": 64,
            "threads": 1,
            "log_every_steps": 10,
            "checkpoint": {"every_steps": 3, "keep_last": 2},
        },
    })


def train(job: Job, out: Path) -> None:
    """What the killed process does: start, or go on from the newest checkpoint if there is one."""
    resume = story.has_checkpoint(out)
    if out.exists() and not resume:
        out = restart_folder(out)
    story.train(job, out, resume=resume, console=Console(file=io.StringIO()))


def restart_folder(out: Path) -> Path:
    """Moves a run that died before its first checkpoint out of the way."""
    out.rename(out.with_name(f"{out.name}-before-first-checkpoint-{time.monotonic_ns()}"))
    return out


def contents(out: Path) -> dict[str, object]:
    """All that a run computed: rows by key, dense weights, optimizer state, metrics."""
    with story.open_trained(out) as trained:
        state = trained.state
        found: dict[str, object] = {"step": state.step, "position": state.position}
        for table in state.collection.tables:
            parts = list(state.collection.export_table(table.name))
            keys = torch.cat([part.keys for part in parts])
            order = keys.argsort()
            found[f"rows of {table.name}"] = (
                keys[order],
                torch.cat([part.values for part in parts])[order],
                torch.cat([part.state for part in parts])[order],
            )
        found["dense"] = state.model.state_dict()
        assert state.optimizer is not None
        found["optimizer"] = state.optimizer.state_dict()
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics"] = [
        {name: value for name, value in json.loads(line).items() if name not in MEASURED}
        for line in lines
    ]
    return found


def differences(left: object, right: object, path: str = "") -> list[str]:
    """Paths at which two trees of tensors and plain values are not the same bits."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        same = (
            same
            and torch.equal(
                left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)
            )
            if left.dim()
            else torch.equal(left, right)
        )
        return [] if same else [path]
    if isinstance(left, dict) and isinstance(right, dict) and list(left) == list(right):
        return [bad for key in left for bad in differences(left[key], right[key], f"{path}/{key}")]
    if (
        isinstance(left, list | tuple)
        and isinstance(right, list | tuple)
        and len(left) == len(right)
    ):
        return [
            bad
            for i, pair in enumerate(zip(left, right, strict=True))
            for bad in differences(*pair, f"{path}/{i}")
        ]
    return [] if left == right else [path]


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    while_saving: int = 0
    before_first: int = 0
    finished_runs: int = 0
    problems: list[str] = field(default_factory=list)


def kill_somewhen(
    process: multiprocessing.Process, out: Path, moment: random.Random, longest_s: float
) -> bool:
    """Kills the process at a random moment; False if it ended by itself before."""
    folder = out / "checkpoints"
    deadline = time.monotonic() + moment.uniform(0.0, longest_s)
    aim_at_save = moment.random() < 0.5
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    if aim_at_save:
        before = folder.stat().st_mtime_ns if folder.exists() else 0
        give_up = time.monotonic() + 2.0
        while process.is_alive() and time.monotonic() < give_up:
            if folder.exists() and folder.stat().st_mtime_ns != before:
                break
        time.sleep(moment.uniform(0.0, 0.01))
    killed = process.is_alive()
    process.kill()
    process.join()
    return killed and process.exitcode == -9


def examine(job: Job, out: Path, tally: Tally) -> None:
    """After a kill: the newest complete checkpoint must pass; a torn one must not be chosen."""
    folder = out / "checkpoints"
    if not story.has_checkpoint(out):
        tally.before_first += 1
        return
    newest = checkpoint.Checkpoints(folder, job).latest()
    assert newest is not None
    if any(path != newest and not is_complete(path) for path in folder.iterdir()):
        tally.while_saving += 1
    checkpoint.verify(newest)


def is_complete(path: Path) -> bool:
    """Whether a folder is a committed checkpoint by its name."""
    return path.is_dir() and path.name.startswith("step-")


def main() -> int:
    """Runs the test; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=240, help="steps of one run")
    parser.add_argument("--longest-s", type=float, default=2.0, help="longest life before a kill")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    moment, job, tally = random.Random(arguments.seed), small_job(arguments.steps), Tally()
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["penstock.run", "kill_and_resume"])
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
                    examine(job, out, tally)
                    continue
                process.join()
                if process.exitcode != 0:
                    tally.problems.append(f"resumed run ended with status {process.exitcode}")
                ended = True
            if not tally.problems:
                tally.problems += differences(contents(out), expected)
            tally.finished_runs += 1
    print(
        f"{tally.kills} kills ({tally.while_saving} left a torn checkpoint, {tally.before_first} came "
        f"before the first) in {tally.finished_runs} runs of {arguments.steps} steps, seed "
        f"{arguments.seed}, {time.monotonic() - begin:.0f} s: "
        + ("; ".join(tally.problems) if tally.problems else "every run ended with the same bits")
    )
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
