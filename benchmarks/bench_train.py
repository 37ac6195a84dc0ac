"""A whole training run beside its parts: the dense model alone and the embedding store alone.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/bench_train.py --data criteo.parquet [--check]

Three things take turns over the same batches, each from a fresh state: the run as `penstock train`
does it (files read, decoded, shuffled and cut in the background; log lines written), the dense
model alone on batches and pooled vectors that lie in memory, and the store alone (look-up,
gradient, update) on those batches. The figure is how many times slower the run is than the sum of
both. The environment variable is what the command line sets: threads of torch that wait must not
take the cores from the others.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from circumstances import commit, end_check, hardware
from rich.console import Console

from penstock import _core
from penstock.config import Job
from penstock.data.dataset import Dataset
from penstock.job_file import load_job
from penstock.run import open_run
from penstock.training.setup import build
from penstock.training.steps.feed import steps_of
from penstock.training.steps.step import look_up
from penstock.types import Batch

GOAL = 1.15


def time_run(job: Job, steps: int) -> float:
    """Seconds a step of the run's own loop, without evaluation and checkpoints."""
    console = Console(file=io.StringIO())
    with (
        tempfile.TemporaryDirectory() as folder,
        open_run(job, Path(folder) / "run", console=console) as run,
    ):
        run.begin(resume=False)
        with run.remaining_batches() as batches:
            groups = steps_of(batches, job.training.accumulate_batches)
            run.step(next(groups))
            begin = time.perf_counter()
            for group in islice(groups, steps):
                run.step(group)
                if run.is_due(job.report.every_steps):
                    run.log()
            return (time.perf_counter() - begin) / steps


def time_dense(job: Job, dataset: Dataset, batches: list[Batch]) -> float:
    """Seconds a step of the model's forward, loss, backward and optimizer."""
    state, trainer, objective, _ = build(job, dataset)
    leaves = [
        torch.randn(batch.batch_size, sum(shape.width for shape in state.collection.feature_shapes))
        for batch in batches
    ]
    begin = time.perf_counter()
    for step, (batch, vectors) in enumerate(zip(batches, leaves, strict=True)):
        leaf = vectors.requires_grad_()
        objective(state.model, (batch.dense, leaf), batch).loss.backward()
        trainer.step(step, trainer.norm())
    return (time.perf_counter() - begin) / len(batches)


def time_store(job: Job, dataset: Dataset, batches: list[Batch]) -> float:
    """Seconds a step of look-up, gradient and update, new keys included."""
    collection = build(job, dataset).state.collection
    grad = torch.ones(batches[0].batch_size, sum(s.width for s in collection.feature_shapes))
    begin = time.perf_counter()
    for batch in batches:
        look_up(collection, batch).backward(grad[: batch.batch_size])
        collection.apply_gradients()
    return (time.perf_counter() - begin) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--job", default=Path(__file__).parents[1] / "jobs" / "criteo.yaml")
    parser.add_argument("--data", required=True)
    parser.add_argument("--set", action="append", default=[], help="field=value of the job")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 if the goal is missed")
    arguments = parser.parse_args()
    if os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        parser.error("set OMP_WAIT_POLICY=PASSIVE, as the command line does")
    _core.keep_freed_memory()  # as well
    job = load_job(arguments.job, [*arguments.set, f"data.source.path={arguments.data}"])
    dataset = Dataset.open(job)
    with closing(dataset.batches("train", batch_size=job.training.batch_size)) as loader:
        batches = list(islice(loader, arguments.steps))
    times = np.array([
        (
            time_run(job, len(batches) - 1),
            time_dense(job, dataset, batches),
            time_store(job, dataset, batches),
        )
        for _ in range(arguments.turns)
    ])
    ratios = times[:, 0] / times[:, 1:].sum(1)
    run_ms, dense_ms, store_ms = np.median(times, 0) * 1e3
    result = {
        "case": f"{job.name}, batch {job.training.batch_size}",
        "run_ms": round(float(run_ms), 3),
        "dense_ms": round(float(dense_ms), 3),
        "store_ms": round(float(store_ms), 3),
        "samples_per_s": round(job.training.batch_size / run_ms * 1e3),
        "run_over_parts": round(float(np.median(ratios)), 3),
        "range": [round(float(ratios.min()), 3), round(float(ratios.max()), 3)],
        "commit": commit(),
        "hardware": hardware(f"torch {torch.__version__}"),
    }
    print(json.dumps(result) if arguments.json else result)
    if arguments.check:
        over = result["run_over_parts"]
        end_check([f"{result['case']}: {over} x its parts, goal {GOAL}"] if over > GOAL else [])


if __name__ == "__main__":
    main()
