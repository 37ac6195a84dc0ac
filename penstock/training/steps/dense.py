"""The dense half of a step: clip the gradients of the model's parameters, set the rate, update."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from penstock.config import DenseOptimizer
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.errors import NonFiniteError


def build_optimizer(
    config: DenseOptimizer, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Makes the torch optimizer of a job; its rate is the job's, before the schedule.

    Args:
      config: kind and hyper-parameters.
      parameters: at least one.
    """
    owned = list(parameters)
    # One kernel for all elements: 4 times as fast as torch's default on a CPU, for MLPs of this
    # size. Only Adagrad lacks it on a GPU.
    fused = config.kind != "adagrad" or all(each.device.type == "cpu" for each in owned)
    rate, decay = config.learning_rate, config.weight_decay
    match config.kind:
        case "adam":
            return torch.optim.Adam(owned, lr=rate, weight_decay=decay, fused=fused)
        case "adamw":
            return torch.optim.AdamW(owned, lr=rate, weight_decay=decay, fused=fused)
        case "sgd":
            return torch.optim.SGD(
                owned, lr=rate, weight_decay=decay, momentum=config.momentum, fused=fused
            )
        case "adagrad":
            return torch.optim.Adagrad(owned, lr=rate, weight_decay=decay, fused=fused)


class DenseTrainer:
    """Updates a model's parameters from their gradients, one step at a time.

    The step number is the caller's, so this holds no state beside the optimizer's.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DenseOptimizer,
        clip_gradient_norm: float | None = None,
        clip_with: EmbeddingCollection | None = None,
    ) -> None:
        """Takes the parameters of `model` that require gradients.

        Args:
          model: its parameters must already be on their device.
          config: optimizer and schedule.
          clip_gradient_norm: largest L2 norm of all gradients together; None: no clipping.
          clip_with: tables whose gradients count and are clipped, too; None: those of the model
            alone.
        """
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._config = config
        self._clip_gradient_norm = clip_gradient_norm
        self._clip_with = clip_with
        self.optimizer: torch.optim.Optimizer | None = None
        """None where the model has no trainable parameter."""
        if self._parameters:
            self.optimizer = build_optimizer(config, self._parameters.values())

    def learning_rate(self, step: int) -> float:
        """The rate that `step` (from 0) uses."""
        return self._config.learning_rate * self._config.schedule.factor(step)

    def step(self, step: int) -> float:
        """Applies the gradients of one step and clears them; those of tables are clipped alone.

        Args:
          step: number of the step, from 0; sets the learning rate.

        Returns:
          L2 norm of all gradients before clipping; 0 where there is none.

        Raises:
          NonFiniteError: a gradient, or the norm, is NaN or infinite. Nothing has been updated.
        """
        gradients = [
            parameter.grad for parameter in self._parameters.values() if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        if self._clip_with is not None:
            norm = torch.hypot(norm, self._clip_with.gradient_norm().to(norm.device))
        if not math.isfinite(float(norm)):
            raise NonFiniteError(self._describe_non_finite(step))
        if self._clip_gradient_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters.values(), self._clip_gradient_norm, norm
            )
            if self._clip_with is not None and float(norm) > self._clip_gradient_norm:
                self._clip_with.scale_gradients(self._clip_gradient_norm / (float(norm) + 1e-6))
        if self.optimizer is None or not gradients:
            return float(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _describe_non_finite(self, step: int) -> str:
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            bad = _count_non_finite(parameter.grad)
            if bad:
                return (
                    f"step {step}: the gradient of {name!r} is NaN or infinite in {bad} of "
                    f"{parameter.numel()} elements; lower training.optimizer.learning_rate, set "
                    "training.clip_gradient_norm, or look for extreme numeric inputs"
                )
        return (
            f"step {step}: the gradients are finite, but their L2 norm overflows float32; lower "
            "training.optimizer.learning_rate or scale the numeric inputs"
        )


def _count_non_finite(values: Tensor) -> int:
    return values.numel() - int(torch.isfinite(values).sum())
