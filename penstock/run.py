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


@contextmanager
def open_run(
    job: Job, out: Path, resume: bool = False, console: Console | None = None
) -> Iterator[Run]:
    """Builds everything that a training run needs; closes it on the way out.

    Nothing is written to `out` before the data and the model were found to fit the job.
    """
    folder = RunFolder(out)
    if not resume:
        folder.refuse_unless_new()
    dataset = Dataset.open(job, quarantine=folder.quarantine_file)
    state, trainer = build_state(job, dataset)
    steps = -(-dataset.num_rows("train") * job.training.epochs // job.training.batch_size)
    total = min(steps, job.training.max_steps or steps) * job.training.batch_size
    with closing(RunReport(folder, job, total, console)) as report:
        yield Run(job, folder, dataset, state, trainer, Checkpoints(folder.checkpoints, job), report)


def build_state(job: Job, dataset: Dataset) -> tuple[TrainState, DenseTrainer]:
    """Makes the untrained tables, model and optimizer: a pure function of the job."""
    threads = job.training.threads or usable_cores()
    torch.set_num_threads(threads)
    torch.manual_seed(job.training.seed)
    collection = EmbeddingCollection(
        dataset.tables, dataset.features, seed=job.training.seed, num_threads=threads
    )
    model = build_model(
        job.model,
        len(dataset.numeric),
        collection.feature_dims,
        [feature.name for feature in dataset.features],
    )
    trainer = DenseTrainer(model, job.training.optimizer, job.training.clip_gradient_norm)
    state = TrainState(collection=collection, model=model, optimizer=trainer.optimizer)
    return state, trainer


@dataclass
class Run:
    """A training run while it is open."""

    job: Job
    folder: RunFolder
    dataset: Dataset
    state: TrainState
    trainer: DenseTrainer
    checkpoints: Checkpoints
    report: RunReport
    clock: Clock = field(default_factory=Clock)

    def start(self) -> None:
        """Begins at step 0."""
        self.report.start(step=0, samples=0)

    def restore(self) -> None:
        """Begins where the newest checkpoint ends."""
        self.checkpoints.restore(self.checkpoints.newest(), self.state)
        self.report.start(self.state.step, self.state.position.samples)

    def remaining_batches(self) -> Loader:
        """The batches from the current position to the end of the last epoch."""
        training = self.job.training
        return self.dataset.batches(
            "train",
            batch_size=training.batch_size,
            seed=training.seed,
            epochs=training.epochs,
            start=self.state.position,
        )

    def steps_left(self) -> int | None:
        """Steps until `max_steps`; None where the data alone ends the run."""
        most = self.job.training.max_steps
        return None if most is None else max(0, most - self.state.step)

    def is_due(self, every_steps: int | None) -> bool:
        """Whether something that happens every so many steps happens after this one."""
        return every_steps is not None and self.state.step % every_steps == 0

    def step(self, batch: Batch) -> None:
        """Trains on one batch and moves on."""
        state = self.state
        result = train_step(
            state.model, state.collection, self.trainer, batch, state.step, self.clock
        )
        state.metrics.update(result.logits, batch.labels, batch.weights)
        state.step += 1
        state.position = batch.end
        self.gradient_norm = result.gradient_norm
        self.samples += batch.batch_size
        self.report.advance(state.step, state.position.samples)

    def log(self) -> None:
        """Records the metrics of the steps since the last log: each batch before its update."""
        window = self.state.metrics.compute()
        if not window["samples"]:
            return
        self.state.metrics = BinaryMetrics()
        ...
