"""Tasks: what each label of a job means for the loss, the scores and the metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from penstock.config import Label
from penstock.training.metrics.binary import MAX_BINS, BinaryMetrics, RankingMetrics
from penstock.training.metrics.regression import RegressionMetrics
from penstock.training.metrics.sample_metrics import CPU, SampleMetrics
from penstock.types import Batch


class Task(ABC):
    """One label of a job, which one output of the model predicts.

    Args:
      label: the job's.
      weight: of its loss in the sum over the tasks.
    """

    def __init__(self, label: Label, weight: float = 1.0) -> None:
        self.label = label
        self.weight = weight

    @property
    def name(self) -> str:
        """What metrics and scores go by."""
        return self.label.title

    def loss(
        self,
        outputs: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        total: Tensor | None = None,
    ) -> Tensor:
        """Weighted mean over the samples whose label is known; 0 where there is none.

        Args:
          outputs: [B] float32, of the model.
          labels: [B] float32; NaN where missing, if the label may be missing.
          weights: [B] float32, or None for all 1.
          total: [] by which the weighted sum is divided, in place of the sum of the weights.
        """
        if self.label.missing == "ignore":
            known = ~labels.isnan()
            labels = torch.where(known, labels, 0.0)
            weights = known.to(outputs.dtype) if weights is None else weights * known
        if total is not None and weights is None:
            weights = torch.ones_like(outputs)
        return self._mean_loss(outputs, labels, weights, total)

    def total_weight(self, labels: Tensor, weights: Tensor | None) -> Tensor:
        """[] float32 sum of the weights of the samples whose label is known."""
        known = labels.isfinite() if self.label.missing == "ignore" else torch.ones_like(labels)
        return (known if weights is None else weights * known).sum(dtype=torch.float32)

    def known(
        self, outputs: Tensor, labels: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What is measured: scores, labels and weights of the samples whose label is known.

        Returns:
          [n] each (weights may be None), and which samples they are, [B] bool; None: all.
        """
        scores = self.metric_scores(outputs)
        if self.label.missing == "fail":
            return scores, labels, weights, None
        known = ~labels.isnan()
        return scores[known], labels[known], None if weights is None else weights[known], known

    @abstractmethod
    def _mean_loss(
        self, outputs: Tensor, labels: Tensor, weights: Tensor | None, total: Tensor | None
    ) -> Tensor: ...

    @abstractmethod
    def metrics(self, max_bins: int | None = MAX_BINS, device: torch.device = CPU) -> SampleMetrics:
        """Empty metrics; `max_bins` and `device` as of `BinaryMetrics`."""

    @abstractmethod
    def metric_scores(self, outputs: Tensor) -> Tensor:
        """What the metrics read, [B]."""

    @abstractmethod
    def prediction(self, outputs: Tensor) -> Tensor:
        """What a user reads, [B] float32: a probability, or a number in the label's unit."""

    @abstractmethod
    def loss_of(self, metrics: Mapping[str, float]) -> float:
        """The loss of the samples that `metrics` were computed of; 0 where there is none."""


class BinaryTask(Task):
    """0 or 1; the output is a logit, learnt by cross-entropy, or a score of another objective."""

    def __init__(self, label: Label, weight: float = 1.0, *, gives_logits: bool = True) -> None:
        super().__init__(label, weight)
        self._gives_logits = gives_logits

    def metrics(self, max_bins: int | None = MAX_BINS, device: torch.device = CPU) -> SampleMetrics:
        """AUC; of logits also log loss and calibration."""
        kind = BinaryMetrics if self._gives_logits else RankingMetrics
        return kind(max_bins, device)

    def metric_scores(self, outputs: Tensor) -> Tensor:
        """The outputs."""
        return outputs

    def prediction(self, outputs: Tensor) -> Tensor:
        """Probabilities of logits, and scores as they are."""
        return torch.sigmoid(outputs) if self._gives_logits else outputs

    def loss_of(self, metrics: Mapping[str, float]) -> float:
        """Log loss."""
        return metrics["log_loss"] if metrics["samples"] else 0.0

    def _mean_loss(
        self, outputs: Tensor, labels: Tensor, weights: Tensor | None, total: Tensor | None
    ) -> Tensor:
        if weights is None:
            return binary_cross_entropy_with_logits(outputs, labels)
        losses = binary_cross_entropy_with_logits(outputs, labels, weights, reduction="sum")
        return losses / _at_least_tiny(weights.sum() if total is None else total)


class RegressionTask(Task):
    """A number, learnt by squared error; the output is (number - offset) / scale."""

    def metrics(self, max_bins: int | None = MAX_BINS, device: torch.device = CPU) -> SampleMetrics:
        """Errors in the label's unit; `max_bins` has no meaning here."""
        return RegressionMetrics(device)

    def metric_scores(self, outputs: Tensor) -> Tensor:
        """Numbers in the label's unit."""
        return self.prediction(outputs)

    def prediction(self, outputs: Tensor) -> Tensor:
        """Numbers in the label's unit."""
        return outputs * self.label.scale + self.label.offset

    def loss_of(self, metrics: Mapping[str, float]) -> float:
        """Mean squared error over the square of the scale."""
        return (metrics["rmse"] / self.label.scale) ** 2 if metrics["samples"] else 0.0

    def _mean_loss(
        self, outputs: Tensor, labels: Tensor, weights: Tensor | None, total: Tensor | None
    ) -> Tensor:
        squares = (outputs - (labels - self.label.offset) / self.label.scale).square()
        if weights is None:
            return squares.mean()
        return (squares * weights).sum() / _at_least_tiny(weights.sum() if total is None else total)


def tasks_of(labels: Sequence[Label], weights: Mapping[str, float]) -> tuple[Task, ...]:
    """A task for each label; `weights` by name, 1 where it has none."""
    kinds = {"binary": BinaryTask, "regression": RegressionTask}
    return tuple(kinds[label.task](label, weights.get(label.title, 1.0)) for label in labels)


def output_of_task(values: Tensor, task: int) -> Tensor:
    """Column of a task: [B, L] -> [B]; a job of one label has [B] as it is."""
    return values if values.dim() == 1 else values[:, task]


class TaskMetrics:
    """The metrics of each task of a job. Of one task alone, they are its own, without a name."""

    def __init__(self, tasks: Sequence[Task], device: torch.device = CPU) -> None:
        self._tasks = tuple(tasks)
        self._metrics = [task.metrics(device=device) for task in tasks]

    def add(self, batch: Batch, outputs: Tensor, loss: float) -> None:
        """Adds the samples of a batch with the outputs [B] or [B, L] of the model.

        `loss` is not read: it is a mean over the batch, and the whole has another.

        Raises:
          NonFiniteError: an output is NaN or infinite.
        """
        labels, weights = batch.labels, batch.weights
        for number, (task, metrics) in enumerate(zip(self._tasks, self._metrics, strict=True)):
            of_task = output_of_task(outputs, number), output_of_task(labels, number)
            scores, known, of_known, _ = task.known(*of_task, weights)
            metrics.update(scores, known, of_known)

    def compute(self) -> dict[str, Any]:
        """The metrics of all samples so far: of one task its own, else see `combined`."""
        found = [metrics.compute() for metrics in self._metrics]
        return found[0] if len(found) == 1 else combined(self._tasks, found)

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors; of several tasks `<number of the task>/<name>`."""
        if len(self._metrics) == 1:
            return self._metrics[0].state_dict()
        return {
            f"{number}/{name}": tensor
            for number, metrics in enumerate(self._metrics)
            for name, tensor in metrics.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`; replaces what was there."""
        if len(self._metrics) == 1:
            self._metrics[0].load_state_dict(state)
            return
        for number, metrics in enumerate(self._metrics):
            prefix = f"{number}/"
            metrics.load_state_dict({
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(prefix)
            })


def combined(tasks: Sequence[Task], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins the metrics of several tasks.

    Returns:
      loss: sum over the tasks of weight times loss; samples: the most that one of them has;
      tasks: by name, what each has of its own.
    """
    losses = [
        task.weight * task.loss_of(metrics) for task, metrics in zip(tasks, found, strict=True)
    ]
    samples = max(metrics["samples"] for metrics in found)
    return {
        "loss": math.fsum(losses) if samples else math.nan,
        "samples": samples,
        "tasks": {task.name: dict(one) for task, one in zip(tasks, found, strict=True)},
    }


def _at_least_tiny(total: Tensor) -> Tensor:
    return total.clamp_min(torch.finfo(torch.float32).tiny)
