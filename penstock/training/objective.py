"""The objective: from a model and a batch to the loss, and to what metrics and scores read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from penstock.errors import ConfigError
from penstock.training.metrics.sample_metrics import CPU
from penstock.training.tasks import Task, TaskMetrics, output_of_task
from penstock.types import Batch


class Outcome(NamedTuple):
    """What a forward pass came to."""

    loss: Tensor
    """[] to be minimised."""
    outputs: Tensor
    """[B], or [B, L] of a job of several labels: one column a task."""


class RunningMetrics(Protocol):
    """Metrics of the steps since the last log line; part of a checkpoint."""

    def add(self, batch: Batch, outputs: Tensor, loss: float) -> None:
        """Adds the samples of a batch, and the loss that the objective gave for it."""

    def compute(self) -> dict[str, Any]:
        """The metrics of all samples so far; `samples` is one of them."""

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors of fixed names."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""


class Objective(Protocol):
    """What training minimises, and how the model's outputs are read."""

    tasks: tuple[Task, ...]
    """In the order of the labels."""

    def __call__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        batch: Batch,
        totals: Tensor | None = None,
    ) -> Outcome:
        """Runs the model on its inputs and compares what it gives with the labels.

        Args:
          model: what is trained.
          inputs: of its `forward`.
          batch: with the labels.
          totals: sums of `total_weights` of all batches of a step, of which the loss then is the
            share of this one; None: it is the only one.
        """

    def total_weights(self, batch: Batch) -> Tensor:
        """[L] float32 weights of the samples that each task's loss is a mean of."""

    def metrics(self, device: torch.device = CPU) -> RunningMetrics:
        """Empty metrics of training steps, summed on a device."""

    def scores(self, outputs: Tensor) -> dict[str, Tensor]:
        """By task: what a user reads of `outputs`, [B] float32."""


def check_outputs(outputs: Any, batch: Batch) -> None:
    """Raises `ConfigError` unless the outputs of a model are as many as the labels of the batch.

    Others would broadcast against the labels, to a loss of something else.
    """
    wanted = batch.labels.shape
    if isinstance(outputs, Tensor) and outputs.shape == wanted and outputs.is_floating_point():
        return
    got = type(outputs).__name__
    if isinstance(outputs, Tensor):
        got = f"{str(outputs.dtype).removeprefix('torch.')} {list(outputs.shape)}"
    raise ConfigError(f"it returned {got}; it must return logits {list(wanted)}")


class SumOfTasks:
    """The weighted sum of the losses of the tasks, one output of the model each.

    The loss of a task is the weighted mean over the samples of the batch whose label is known.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)

    def __call__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        batch: Batch,
        totals: Tensor | None = None,
    ) -> Outcome:
        """See `Objective`."""
        outputs = model(*inputs)
        check_outputs(outputs, batch)
        if len(self.tasks) == 1:
            total = None if totals is None else totals[0]
            loss = self.tasks[0].loss(outputs, batch.labels, batch.weights, total)
            return Outcome(loss, outputs)
        losses = [
            task.weight
            * task.loss(
                output_of_task(outputs, number),
                output_of_task(batch.labels, number),
                batch.weights,
                None if totals is None else totals[number],
            )
            for number, task in enumerate(self.tasks)
        ]
        return Outcome(sum(losses[1:], losses[0]), outputs)

    def total_weights(self, batch: Batch) -> Tensor:
        """See `Objective`."""
        return torch.stack([
            task.total_weight(output_of_task(batch.labels, number), batch.weights)
            for number, task in enumerate(self.tasks)
        ])

    def metrics(self, device: torch.device = CPU) -> RunningMetrics:
        """Those of each task."""
        return TaskMetrics(self.tasks, device)

    def scores(self, outputs: Tensor) -> dict[str, Tensor]:
        """Probabilities, and numbers in the unit of their label."""
        return {
            task.name: task.prediction(output_of_task(outputs, number))
            for number, task in enumerate(self.tasks)
        }
