"""The contract of metrics over samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")


class SampleMetrics(Protocol):
    """Metrics of one task, summed batch by batch."""

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None, /) -> None:
        """Adds samples, [B] each."""

    def compute(self) -> dict[str, float]:
        """The metrics of all samples so far."""

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors of fixed names."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
