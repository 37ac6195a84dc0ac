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

from penstock.embedding.collection import EmbeddingCollection
from penstock.errors import NonFiniteError
from penstock.training.dense import DenseTrainer
from penstock.training.objective import Objective
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
    """Of the objective."""
    outputs: Tensor
    """[B] or [B, L] float32 of the model, detached, on the CPU."""


def train_step(
    model: nn.Module,
    objective: Objective,
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
      model: see `model_inputs`.
      objective: from the model and the batch to the loss.
      collection: the embedding tables; in training mode.
      trainer: updates the model's parameters.
      batch: the samples, on the collection's device (`feed.on_device`).
      step: number of this step, from 0.
      clock: gets the time spent.

    Raises:
      NonFiniteError: the loss or a gradient is not finite. Nothing was updated.
    """
    with clock.measure("embedding"):
        if batch.event_time is not None:
            collection.observe_times(batch.event_time)
        pooled = look_up(collection, batch)
    with clock.measure("dense"):
        leaf = pooled.detach().requires_grad_()
        loss, outputs = objective(model, model_inputs(collection, batch, leaf), batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"step {step}: the loss is {value}; {_place(batch)}")
        torch.autograd.backward(loss)
        if leaf.grad is not None and not is_finite(leaf.grad):
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
    return StepResult(value, outputs.detach().cpu())


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum is one pass, and finite unless something is not, or all are huge.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def look_up(collection: EmbeddingCollection, batch: Batch) -> Tensor:
    """Embeddings of a batch, [B, W] float32; [B, 0] for a job without features."""
    if not collection.features:
        return batch.dense.new_zeros((batch.batch_size, 0))
    pooled: Tensor = collection(batch.sparse)
    return pooled


def model_inputs(
    collection: EmbeddingCollection, batch: Batch, embeddings: Tensor
) -> tuple[Tensor, ...]:
    """What a model's `forward` is called with.

    Returns:
      dense [B, n] and embeddings [B, W]; of a job with sequences also lengths [B, S] int64, the
      keys that each sequence of a sample has.
    """
    lengths = collection.sequence_lengths(batch.sparse)
    return (batch.dense, embeddings, lengths) if lengths.shape[1] else (batch.dense, embeddings)


def _place(batch: Batch) -> str:
    first, last = batch.start.samples, batch.end.samples - 1
    return (
        f"stopped before any update, at the batch {batch.origin} (epoch {batch.start.epoch}, "
        f"samples {first} to {last} of the run). Look at these rows, lower the learning rate or "
        "set training.clip_gradient_norm; the last checkpoint stays good"
    )
