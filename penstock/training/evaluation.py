"""Scores held-out or new rows with the model as it is; inserts no row, changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import MetricsConfig
from penstock.embedding.collection import EmbeddingCollection
from penstock.training.grouped_metrics import GroupedAUC, SliceMetrics
from penstock.training.metrics import MAX_BINS, BinaryMetrics, logits_of_probabilities
from penstock.training.step import look_up
from penstock.types import Batch

CALIBRATION_BUCKETS = 20


def evaluate_batches(
    batches: Iterable[Batch],
    model: nn.Module,
    collection: EmbeddingCollection,
    wanted: MetricsConfig,
) -> dict[str, Any]:
    """Measures the model on batches with labels.

    Args:
      batches: with the columns of `wanted` in their `groups`.
      model: maps (dense [B, n], embeddings [B, sum D]) to logits [B].
      collection: the embedding tables.
      wanted: metrics besides the usual ones.

    Returns:
      What `BinaryMetrics.compute` returns; where the batches know their teacher, also
      `teacher_auc`, the AUC of the true probabilities on the same samples, and
      `share_of_teacher`, (auc - 0.5) / (teacher_auc - 0.5). `grouped_auc` and `slices`, where
      wanted: by column, what `GroupedAUC.compute` and `SliceMetrics.compute` return.
      `calibration_buckets`, see `BinaryMetrics.calibration_buckets`.
    """
    bins = None if wanted.exact_auc else MAX_BINS
    metrics, teacher = BinaryMetrics(bins), BinaryMetrics(bins)
    grouped = {column: GroupedAUC() for column in wanted.grouped_auc}
    slices = {one.by: SliceMetrics(one.top, exact_auc=wanted.exact_auc) for one in wanted.slices}
    for batch, logits in scored(batches, model, collection):
        metrics.update(logits, batch.labels, batch.weights)
        for by_column in (grouped, slices):
            for column, of_column in by_column.items():
                of_column.update(batch.groups[column], logits, batch.labels, batch.weights)
        if batch.teacher is not None:
            best = logits_of_probabilities(batch.teacher)
            teacher.update(best, batch.labels, batch.weights)
    result: dict[str, Any] = dict(metrics.compute())
    best_reachable = teacher.compute()
    if best_reachable["samples"]:
        result["teacher_auc"] = best_reachable["auc"]
        result["share_of_teacher"] = share_of_the_way(result["auc"], best_reachable["auc"])
    if grouped:
        result["grouped_auc"] = {column: one.compute() for column, one in grouped.items()}
    if slices:
        result["slices"] = {column: one.compute() for column, one in slices.items()}
    result["calibration_buckets"] = metrics.calibration_buckets(CALIBRATION_BUCKETS)
    return result


def share_of_the_way(auc: float, best: float) -> float:
    """How far `auc` is on the way from 0.5 (knowing nothing) to `best`; NaN if there is none."""
    return (auc - 0.5) / (best - 0.5) if best > 0.5 else math.nan


def scored(
    batches: Iterable[Batch], model: nn.Module, collection: EmbeddingCollection
) -> Iterator[tuple[Batch, Tensor]]:
    """Yields each batch with its logits [B] float32.

    Effects: model and collection are in evaluation mode while the iterator is alive, and then as
    before.
    """
    with _evaluation_mode(model, collection):
        for batch in batches:
            with torch.no_grad():
                logits = model(batch.dense, look_up(collection, batch))
            yield batch, logits


@contextmanager
def _evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)
