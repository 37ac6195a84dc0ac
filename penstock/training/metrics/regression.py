"""Metrics of predicted numbers, summed batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from penstock.errors import NonFiniteError
from penstock.training.metrics.sample_metrics import CPU


class RegressionMetrics:
    """Root mean squared error, mean absolute error and bias of predictions.

    Sums are float64 and additive: metrics of two parts of a data set merge into those of the
    whole.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        # Weighted sums of: squared error, absolute error, error, one; then the number of samples.
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)

    def update(self, predictions: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Adds samples.

        Args:
          predictions: [B] any float type.
          labels: [B] finite, in the same unit.
          weights: [B] >= 0; None: 1 each.

        Raises:
          NonFiniteError: a prediction is NaN or infinite. On a GPU that is not looked at, and the
            metrics are NaN.
        """
        there = self._sums
        predicted = predictions.detach().to(there)
        if not predicted.is_cuda and not bool(torch.isfinite(predicted).all()):
            bad = predicted.numel() - int(torch.isfinite(predicted).sum())
            raise NonFiniteError(f"{bad} of {predicted.numel()} predictions are NaN or infinite")
        error = predicted - labels.to(there)
        weight = torch.ones_like(error) if weights is None else weights.to(there)
        self._sums += torch.stack((
            (error.square() * weight).sum(),
            (error.abs() * weight).sum(),
            (error * weight).sum(),
            weight.sum(),
            torch.full_like(there[0], error.numel()),
        ))

    def merge(self, other: RegressionMetrics) -> None:
        """Adds all samples of `other`, which stays as it is."""
        self._sums += other._sums

    def compute(self) -> dict[str, float]:
        """The metrics of all samples so far, in the unit of the labels.

        Returns:
          rmse: root of the mean squared error.
          mae: mean absolute error.
          bias: mean prediction minus mean label.
          samples: their number, without weights.

          NaN without samples (or weight).
        """
        squared, absolute, error, weight, samples = self._sums.tolist()
        return {
            "rmse": math.sqrt(squared / weight) if weight else math.nan,
            "mae": absolute / weight if weight else math.nan,
            "bias": error / weight if weight else math.nan,
            "samples": int(samples),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All state; not shared with this object."""
        return {"sums": self._sums.to("cpu", copy=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`; replaces what was there."""
        self._sums = state["sums"].to(self._sums.device, copy=True)
