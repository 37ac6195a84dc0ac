"""One training step, with its time split between waiting for data, embeddings and dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from penstock.embedding.collection import EmbeddingCollection
from penstock.errors import NonFiniteError
from penstock.training.dense import DenseTrainer
from penstock.types import Batch

Item = TypeVar("Item")


@dataclass
class Clock:
    """Seconds spent on each part of a run."""

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("data", "embedding", "dense", "evaluation", "checkpoint"), 0.0
        )
    )
    """data: waiting for the next batch; embedding: look-up, gradients and update of rows; dense:
    model forward, backward and update.
    """

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Adds the time of the `with` block to `part`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - begin

    def waiting_for(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items; the time until each arrives counts as `data`."""
        source = iter(items)
        while True:
            with self.measure("data"):
                item = next(source, None)
            if item is None:
                return
            yield item


def steps_s(seconds: Mapping[str, float]) -> float:
    """Seconds of training itself, without evaluation and checkpoints."""
    return seconds["data"] + seconds["embedding"] + seconds["dense"]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step saw, before its update."""

    loss: float
    """Weighted mean of the binary cross-entropy, in nats."""
    logits: Tensor
    """[B] float32, detached."""


def train_step(
    model: nn.Module,
    collection: EmbeddingCollection,
    trainer: DenseTrainer,
    batch: Batch,
    step: int,
    clock: Clock,
) -> StepResult:
    """Trains on one batch: forward, backward, one update of dense weights and touched rows.

    The embeddings enter the model as a leaf, so that the backward pass of the dense model and that
    of the embeddings run, and are timed, one after the other; the gradients are the same.

    Args:
      model: maps (dense [B, n], embeddings [B, sum D]) to logits [B].
      collection: the embedding tables; in training mode.
      trainer: updates the model's parameters.
      batch: the samples.
      step: number of this step, from 0.
      clock: gets the time spent.

    Raises:
      NonFiniteError: the loss or a gradient is not finite. Nothing was updated.
    """
    with clock.measure("embedding"):
        if batch.event_time is not None:
            collection.time_s = int(batch.event_time.max()) // 1000
        pooled = look_up(collection, batch)
    with clock.measure("dense"):
        leaf = pooled.detach().requires_grad_()
        logits = model(batch.dense, leaf)
        loss = weighted_loss(logits, batch.labels, batch.weights)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"step {step}: the loss is {value}; {_place(batch)}")
        loss.backward()  # type: ignore[no-untyped-call]
        if leaf.grad is not None and not bool(leaf.grad.isfinite().all()):
            raise NonFiniteError(
                f"step {step}: the gradient of the embeddings is NaN or infinite; {_place(batch)}"
            )
        try:
            trainer.step(step)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {_place(batch)}") from None
    with clock.measure("embedding"):
        if leaf.grad is not None and pooled.requires_grad:
            pooled.backward(leaf.grad)  # type: ignore[no-untyped-call]
        collection.apply_gradients()
    return StepResult(value, logits.detach())


def look_up(collection: EmbeddingCollection, batch: Batch) -> Tensor:
    """Pooled embeddings of a batch, [B, sum D] float32; [B, 0] for a job without features."""
    if not collection.features:
        return batch.dense.new_zeros((batch.batch_size, 0))
    pooled: Tensor = collection(batch.sparse)
    return pooled


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted mean of the binary cross-entropy; 0 where all weights are 0.

    Args:
      logits: [B] float32.
      labels: [B] float32 in {0, 1}.
      weights: [B] float32, or None for all 1.
    """
    if weights is None:
        return binary_cross_entropy_with_logits(logits, labels)
    total = weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum") / total


def _place(batch: Batch) -> str:
    first, last = batch.start.samples, batch.end.samples - 1
    return (
        f"stopped before any update, at the batch {batch.origin} (epoch {batch.start.epoch}, "
        f"samples {first} to {last} of the run). Look at these rows, lower the learning rate or "
        "set training.clip_gradient_norm; the last checkpoint stays good"
    )
