"""Scores held-out or new rows with the model as it is; inserts no row, changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from penstock.embedding.collection import EmbeddingCollection
from penstock.training.metrics import BinaryMetrics, logits_of_probabilities
from penstock.training.step import look_up
from penstock.types import Batch


def evaluate_batches(
    batches: Iterable[Batch], model: nn.Module, collection: EmbeddingCollection
) -> dict[str, float]:
    """Measures the model on batches with labels.

    Returns:
      What `BinaryMetrics.compute` returns; where the batches know their teacher, also
      `teacher_auc`, the AUC of the true probabilities on the same samples, and
      `share_of_teacher`, (auc - 0.5) / (teacher_auc - 0.5).
    """
    metrics, teacher = BinaryMetrics(), BinaryMetrics()
    for batch, logits in scored(batches, model, collection):
        metrics.update(logits, batch.labels, batch.weights)
        if batch.teacher is not None:
            best = logits_of_probabilities(batch.teacher)
            teacher.update(best, batch.labels, batch.weights)
    result, best_reachable = metrics.compute(), teacher.compute()
    if best_reachable["samples"]:
        result["teacher_auc"] = best_reachable["auc"]
        result["share_of_teacher"] = share_of_the_way(result["auc"], best_reachable["auc"])
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
