"""Builds what is trained: tables, model and optimizer, untrained, from the job alone."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from penstock.config import CustomModel, Job, Label, Model, MultiTask, TwoTowerConfig, with_end
from penstock.data.dataset import Dataset
from penstock.embedding.collection.collection import EmbeddingCollection, available_cores
from penstock.errors import CapacityError
from penstock.models import build_model
from penstock.training.checkpoint.best import best_of
from penstock.training.checkpoint.checkpoint import TrainState
from penstock.training.dense import DenseTrainer
from penstock.training.in_batch_softmax import InBatchSoftmax
from penstock.training.objective import Objective, SumOfTasks
from penstock.training.precision import autocast
from penstock.training.tasks import tasks_of
from penstock.types import Position


class Untrained(NamedTuple):
    """State at step 0, what updates its dense part, and what is minimised."""

    state: TrainState
    trainer: DenseTrainer
    objective: Objective


def build(job: Job, dataset: Dataset, steps: int | None = None) -> Untrained:
    """Makes tables, model and optimizer: a pure function of the job and the columns of its data.

    Effects: seeds the global generators of torch, numpy and Python, which a custom model may use,
    and sets the number of torch's threads and its default dtype, float32, as numbers and embeddings
    have it; for a deterministic job on a GPU, also torch's deterministic algorithms.

    Args:
      job: what is trained.
      dataset: its data.
      steps: of the whole run, for schedules that last to its end; None: they are not asked.

    Raises:
      ConfigError: the model does not fit the columns, a table is declared wrongly, or the device
        is not there.
      CapacityError: the model's parameters do not fit into memory.
    """
    tables = dataset.tables
    if steps is not None:
        job, tables = with_end(job, steps), with_end(tables, steps)
    threads = job.run.threads or available_cores()
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    _seed_generators(job.training.seed)
    collection = EmbeddingCollection(
        tables,
        dataset.features,
        seed=job.training.seed,
        num_threads=threads,
        deterministic=job.training.deterministic,
        device=job.run.device,
    )
    collection.row_clock.max_jump_s = job.data.event_time_jump_s
    if collection.device.type == "cuda" and job.training.deterministic:
        # Read by cuBLAS when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    labels = job.data.labels
    try:
        model = build_model(
            job.model, dataset.num_numeric, collection.feature_shapes, num_tasks=len(labels)
        ).to(collection.device)
    except RuntimeError as error:
        # On the CPU torch has no class of its own for this.
        is_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not is_memory:
            raise
        raise CapacityError(
            "no memory for the parameters of the model; give it narrower layers (model)"
        ) from None
    if job.training.autocast is not None:
        autocast(model, collection.device, getattr(torch, job.training.autocast))
    trainer = DenseTrainer(
        model,
        job.training.optimizer,
        job.training.clip_gradient_norm,
        clip_with=collection if job.training.clip_with_tables else None,
    )
    state = TrainState(0, Position(), collection, model, trainer.optimizer, best=best_of(job))
    return Untrained(state, trainer, _objective(job.model, labels))


def _objective(model: Model, labels: Sequence[Label]) -> Objective:
    if isinstance(model, TwoTowerConfig):
        return InBatchSoftmax(labels[0])
    weights = model.task_weights if isinstance(model, MultiTask | CustomModel) else {}
    return SumOfTasks(tasks_of(labels, weights))


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
