"""THE STORY: what a run does, from the job to the summary.

`train` is the main path; `evaluate` and `predict` use what it left behind. How one step works is in
`training/step.py`, what a checkpoint holds in `training/checkpoint.py`, how batches come about in
`data/dataset.py`, where embeddings live in `embedding/collection.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from penstock.config import Job
from penstock.data.dataset import Dataset, Part
from penstock.data.loader import Loader
from penstock.embedding.collection import EmbeddingCollection
from penstock.models import build_model
from penstock.report.environment import usable_cores
from penstock.report.folder import RunFolder
from penstock.report.run_report import RunReport
from penstock.training.checkpoint import Checkpoints, TrainState
from penstock.training.dense import DenseTrainer
from penstock.training.evaluation import evaluate_batches, scored
from penstock.training.interruption import interruption
from penstock.training.metrics import BinaryMetrics
from penstock.training.prediction import write_scores
from penstock.training.step import Clock, train_step
from penstock.types import Batch, Position


def train(
    job: Job, out: Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any] | None:
    """Trains a job to its end, evaluates it, and leaves checkpoint and summary in `out`.

    SIGINT or SIGTERM stops after the current step with a complete checkpoint; a second one leaves
    at once.

    Args:
      job: what to run.
      out: the run folder; new or empty, unless `resume`.
      resume: go on from the newest checkpoint in `out`. The result has the same bits as that of a
        run that was never stopped.
      console: where to print; None: the standard output.

    Returns:
      The content of summary.json; None where a signal stopped the run.

    Raises:
      ConfigError, DataError: the job, the folder or the data is wrong.
      CheckpointError: there is no checkpoint to resume from, or it is damaged or of another job.
      NonFiniteError: the loss became NaN or infinite; checkpoints written before stay good.
    """
    with interruption() as stop, open_run(job, out, resume, console) as run:
        run.restore() if resume else run.start()
        with run.remaining_batches() as batches:
            for batch in islice(run.clock.waiting_for(batches), run.steps_left()):
                run.step(batch)
                if run.is_due(job.training.log_every_steps):
                    run.log()
                if run.is_due(job.training.evaluate_every_steps):
                    run.evaluate()
                if run.is_due(job.training.checkpoint.every_steps):
                    run.save()
                if stop.requested:
                    break
        run.save()
        if stop.requested:
            run.report.interrupted(run.state.step)
            return None
        run.log()
        run.evaluate()
        return run.report.finished(run.summary())
