"""Builds what is trained: tables, model and optimizer, untrained, from the job alone."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from penstock.config import (
    LANES,
    CustomModel,
    Job,
    Label,
    Model,
    MultiTask,
    TwoTowerConfig,
    with_end,
)
from penstock.data.dataset import Dataset
from penstock.embedding.collection.collection import EmbeddingCollection, available_cores
from penstock.errors import CapacityError, ConfigError
from penstock.models import build_model, looks_at_other_samples
from penstock.position import LanePosition, Position
from penstock.ranks.group import ALONE, Group
from penstock.training.checkpoint.best import best_of
from penstock.training.checkpoint.checkpoint import TrainState
from penstock.training.in_batch_softmax import InBatchSoftmax
from penstock.training.objective import Objective, SumOfTasks
from penstock.training.precision import autocast
from penstock.training.steps.dense import DenseTrainer
from penstock.training.steps.division import Division
from penstock.training.tasks import tasks_of


class Untrained(NamedTuple):
    """State at step 0, what updates its dense part, what is minimised, how batches are divided."""

    state: TrainState
    trainer: DenseTrainer
    objective: Objective
    division: Division


def build(
    job: Job,
    dataset: Dataset,
    steps: int | None = None,
    *,
    group: Group = ALONE,
    lanes: int | None = None,
) -> Untrained:
    """Makes tables, model and optimizer: a pure function of the job and the columns of its data.

    Effects: seeds the global generators of torch, numpy and Python, which a custom model may use,
    and sets the number of torch's threads and its default dtype, float32, as numbers and embeddings
    have it; for a deterministic job on a GPU, also torch's deterministic algorithms.

    Args:
      job: what is trained.
      dataset: its data.
      steps: of the whole run, for schedules that last to its end; None: they are not asked.
      group: the ranks of the run, each of which builds it.
      lanes: with which the run began that goes on; None: it is a new one.

    Raises:
      ConfigError: the model does not fit the columns, a table is declared wrongly, or the device
        is not there.
      CapacityError: the model's parameters do not fit into memory.
    """
    tables = dataset.tables
    if steps is not None:
        job, tables = with_end(job, steps), with_end(tables, steps)
    threads = job.run.threads or available_cores()
    # The sums of torch's products depend on how many threads share them.
    is_alike = job.training.deterministic and job.run.threads is None
    torch.set_num_threads(1 if is_alike else threads)
    torch.set_default_dtype(torch.float32)
    _seed_generators(job.training.seed)
    collection = EmbeddingCollection(
        tables,
        dataset.features,
        seed=job.training.seed,
        num_threads=threads,
        deterministic=job.training.deterministic,
        device=job.run.device,
        group=group.tables,
    )
    collection.row_clock.max_jump_s = job.data.event_time_jump_s
    if collection.device.type == "cuda" and job.training.deterministic:
        # Read by cuBLAS when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    model = _model(job, dataset, collection)
    if job.training.autocast is not None:
        autocast(model, collection.device, getattr(torch, job.training.autocast))
    trainer = DenseTrainer(
        model,
        job.training.optimizer,
        job.training.clip_gradient_norm,
        clip_with=collection if job.training.clip_with_tables else None,
    )
    lanes = lanes or lanes_of(job, model)
    start = Position(lanes=(LanePosition(),) * lanes)
    state = TrainState(0, start, collection, model, trainer.optimizer, best=best_of(job))
    division = Division(
        model,
        group,
        lanes=lanes,
        deterministic=job.training.deterministic,
        seed=job.training.seed,
    )
    return Untrained(state, trainer, _objective(job.model, job.data.labels), division)


def _model(job: Job, dataset: Dataset, collection: EmbeddingCollection) -> nn.Module:
    try:
        return build_model(
            job.model,
            dataset.num_numeric,
            collection.feature_shapes,
            num_tasks=len(job.data.labels),
        ).to(collection.device)
    except RuntimeError as error:
        # On the CPU torch has no class of its own for this.
        is_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not is_memory:
            raise
        raise CapacityError(
            "no memory for the parameters of the model; give it narrower layers (model)"
        ) from None


def lanes_of(job: Job, model: nn.Module) -> int:
    """Into how many lanes the data of a new run is divided.

    Raises:
      ConfigError: into several, where a batch must be in one.
    """
    if isinstance(job.model, TwoTowerConfig) and job.data.lanes not in {None, 1}:
        raise ConfigError(
            f"data.lanes {job.data.lanes}: model two_tower learns to tell the items of a whole "
            "batch apart, which one process must have; leave data.lanes out"
        )
    if job.data.lanes is not None:
        return job.data.lanes
    # A lane would be a batch, or a block, of its own.
    is_whole = job.data.negatives is not None or looks_at_other_samples(model)
    return 1 if is_whole else LANES


def _objective(model: Model, labels: Sequence[Label]) -> Objective:
    if isinstance(model, TwoTowerConfig):
        return InBatchSoftmax(labels[0])
    weights = model.task_weights if isinstance(model, MultiTask | CustomModel) else {}
    return SumOfTasks(tasks_of(labels, weights))


def _seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
