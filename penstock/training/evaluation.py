"""Scores held-out or new rows with the model as it is; inserts no row, changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn

from penstock.config import EvaluationConfig, MetricsConfig
from penstock.data.batches.loader import Loader
from penstock.data.dataset import Dataset
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.embedding.collection.pending import is_finite
from penstock.errors import NonFiniteError
from penstock.models import TwoTower
from penstock.position import LanePosition, Position
from penstock.ranks.group import Group
from penstock.training.items import Catalogue
from penstock.training.metrics.binary import MAX_BINS, BinaryMetrics, logits_of_probabilities
from penstock.training.metrics.grouped import SLICE_BINS, GroupedAUC, SliceMetrics
from penstock.training.metrics.recall import Recall
from penstock.training.objective import Objective, check_outputs
from penstock.training.steps.division import Division, some
from penstock.training.steps.feed import on_device
from penstock.training.steps.step import batch_error, look_up, model_inputs
from penstock.training.tasks import BinaryTask, Task, combined, output_of_task
from penstock.types import Batch

CALIBRATION_BUCKETS = 20


class Evaluator:
    """Measures a model on batches with labels.

    Args:
      dataset: whose items are the candidates of recall, where that is wanted.
      model: see `training.steps.step.model_inputs`.
      objective: whose tasks are measured.
      collection: the embedding tables.
      config: `metrics` and `batch_size` are read.
      division: how batches are divided; None: they are not.
    """

    def __init__(
        self,
        dataset: Dataset,
        model: nn.Module,
        objective: Objective,
        collection: EmbeddingCollection,
        config: EvaluationConfig,
        division: Division | None = None,
    ) -> None:
        self._division = division or Division(model)
        self._dataset = dataset
        self._model = model
        self._objective = objective
        self._collection = collection
        self._config = config

    def held_out(self, ranks: Group) -> Loader:
        """The batches of the held-out part, with all that is measured of them.

        `ranks`: who tells the ranks' readers of each other.
        """
        return self._dataset.batches(
            "evaluation",
            batch_size=self._config.batch_size,
            groups=True,
            start=Position(lanes=(LanePosition(),) * self._division.lanes),
            ranks=ranks,
        )

    def measure(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """Measures the model as it is, see `evaluate_batches`; recall too, where it is wanted."""
        with evaluation_mode(self._model, self._collection):
            recall = self._recall()
            found = scored(batches, self._model, self._collection, self._division)
            return evaluate_batches(found, self._objective, self._config.metrics, recall)

    def _recall(self) -> Recall | None:
        at = self._config.metrics.recall_at
        if not at:
            return None
        assert isinstance(self._model, TwoTower)
        return Recall(self._catalogue, at, self._model, self._collection)

    @cached_property
    def _catalogue(self) -> Catalogue:
        """Items do not change, so the parts are read once."""
        assert isinstance(self._model, TwoTower)
        names = tuple(feature.name for feature in self._collection.features)
        made = Catalogue(names, self._model.item_features)
        for part in self._dataset.parts:
            with self._dataset.batches(
                part, batch_size=self._config.batch_size, shuffle=False
            ) as batches:
                for batch in batches:
                    made.add(batch.sparse)
        return made


def evaluate_batches(
    batches: Iterable[Scored],
    objective: Objective,
    wanted: MetricsConfig,
    recall: Recall | None = None,
) -> dict[str, Any]:
    """Measures what a model made of batches with labels.

    Args:
      batches: from `scored`, with the columns of `wanted` in their `groups`.
      objective: whose tasks are measured.
      wanted: metrics besides the usual ones.
      recall: gets the batches too.

    Returns:
      Of one task, what its metrics compute (`BinaryMetrics`, `RegressionMetrics`), and where
      wanted `grouped_auc` (of binary tasks) and `slices`: by column, what `GroupedAUC.compute` and
      `SliceMetrics.compute` return; of a binary task also `calibration_buckets`, see
      `BinaryMetrics.calibration_buckets`. Of several tasks, see `tasks.combined`.

      Where one binary task is learnt and the batches know their teacher, also `teacher_auc`, the
      AUC of the true probabilities on the same samples, and `share_of_teacher`,
      (auc - 0.5) / (teacher_auc - 0.5). What `Recall.compute` returns, where it is given.
    """
    of_tasks = [_TaskEvaluation(task, wanted) for task in objective.tasks]
    teacher = BinaryMetrics(None if wanted.exact_auc else MAX_BINS)
    for batch, inputs, outputs in batches:
        for number, one in enumerate(of_tasks):
            one.update(batch, output_of_task(outputs, number), output_of_task(batch.labels, number))
        if recall is not None:
            recall.update(batch, inputs)
        if batch.teacher is not None and len(of_tasks) == 1:
            best = logits_of_probabilities(batch.teacher)
            teacher.update(best, batch.labels, batch.weights)
    found = [one.compute() for one in of_tasks]
    if len(found) > 1:
        return combined(objective.tasks, found)
    (result,) = found
    result |= {} if recall is None else recall.compute()
    best_reachable = teacher.compute()
    if best_reachable["samples"] and "auc" in result:
        result["teacher_auc"] = best_reachable["auc"]
        result["share_of_teacher"] = share_of_the_way(result["auc"], best_reachable["auc"])
    return result


class _TaskEvaluation:
    """Everything that is measured of one task."""

    def __init__(self, task: Task, wanted: MetricsConfig) -> None:
        bins = None if wanted.exact_auc else MAX_BINS
        self._task = task
        self._metrics = task.metrics(bins)
        columns = wanted.grouped_auc if isinstance(task, BinaryTask) else ()
        self._grouped = {column: GroupedAUC() for column in columns}
        slice_bins = None if wanted.exact_auc else SLICE_BINS
        self._slices = {
            one.by: SliceMetrics(one.top, lambda: task.metrics(slice_bins)) for one in wanted.slices
        }

    def update(self, batch: Batch, outputs: Tensor, labels: Tensor) -> None:
        """Adds the samples of a batch: outputs and labels [B] of this task."""
        scores, labels, weights, known = self._task.known(outputs, labels, batch.weights)
        self._metrics.update(scores, labels, weights)
        for by_column in (self._grouped, self._slices):
            for column, of_column in by_column.items():
                groups = batch.groups[column]
                if known is not None:
                    groups = groups.filter(pa.array(known.numpy()))
                of_column.update(groups, scores, labels, weights)

    def compute(self) -> dict[str, Any]:
        result: dict[str, Any] = dict(self._metrics.compute())
        if self._grouped:
            result["grouped_auc"] = {name: one.compute() for name, one in self._grouped.items()}
        if self._slices:
            result["slices"] = {name: one.compute() for name, one in self._slices.items()}
        if isinstance(self._metrics, BinaryMetrics):
            buckets = self._metrics.calibration_buckets(CALIBRATION_BUCKETS)
            result["calibration_buckets"] = buckets
        return result


def share_of_the_way(auc: float, best: float) -> float:
    """How far `auc` is on the way from 0.5 (knowing nothing) to `best`; NaN if there is none."""
    return (auc - 0.5) / (best - 0.5) if best > 0.5 else math.nan


class Scored(NamedTuple):
    """A batch and what a model made of it."""

    batch: Batch
    """Over ranks, what is measured of it is that of all of them, see `Division.whole`."""
    inputs: tuple[Tensor, ...]
    """See `model_inputs`; on the collection's device, of this rank."""
    outputs: Tensor
    """[B] or [B, L] float32, on the CPU."""


def scored(
    batches: Iterable[Batch],
    model: nn.Module,
    collection: EmbeddingCollection,
    division: Division | None = None,
) -> Iterator[Scored]:
    """Yields each batch with the inputs and outputs of the model.

    Args:
      batches: on the CPU.
      model: see `model_inputs`.
      collection: the embedding tables.
      division: how they are divided, over ranks too; None: they are not.

    Raises:
      BatchError: the model raised, or gave outputs of a wrong shape.
      NonFiniteError: an output is NaN or infinite.

    Effects: model and collection are in evaluation mode while the iterator is alive, and then as
    before.
    """
    division = division or Division(model)
    with evaluation_mode(model, collection):
        for batch in batches:
            try:
                with torch.no_grad():
                    there = on_device(batch, collection)
                    inputs = model_inputs(collection, there, look_up(collection, there))
                    scores = _outputs(model, inputs, batch, division)
            # A user's model may raise anything.
            except Exception as error:
                raise batch_error("the model's forward pass", batch, error) from error
            if not is_finite(scores):
                bad = int((~scores.isfinite()).sum())
                raise NonFiniteError(
                    f"{bad:,} of {scores.numel():,} outputs of the model are NaN or infinite, at "
                    f"the batch {batch.origin}; look at these rows, or use an earlier checkpoint"
                )
            whole, scores = division.whole(batch, scores)
            yield Scored(whole, inputs, scores)


def _outputs(
    model: nn.Module, inputs: tuple[Tensor, ...], batch: Batch, division: Division
) -> Tensor:
    """[B] or [B, L] of this rank's samples, on the CPU."""
    found = [torch.zeros(0, *batch.labels.shape[1:])]
    for part in division.parts(batch):
        outputs = model(*(one[part.rows] for one in inputs))
        check_outputs(outputs, some(batch, part.rows))
        found.append(outputs.cpu())
    return found[-1] if len(found) <= 2 else torch.cat(found)


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Puts modules into evaluation mode, and then back."""
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)
