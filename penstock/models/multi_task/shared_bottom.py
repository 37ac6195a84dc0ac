"""Shared bottom: one MLP of all inputs, and on it a tower for each label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import SharedBottomConfig
from penstock.models.parts.inputs import pooled_dims
from penstock.models.parts.mlp import MLP, LogitHead
from penstock.types import FeatureShape


class SharedBottom(nn.Module):
    """Output l = tower l of (shared MLP of numbers and embeddings).

    Source: Caruana, Multitask learning (1997); the base model of doi:10.1145/3219819.3220007
    section 3.
    """

    def __init__(
        self,
        config: SharedBottomConfig,
        num_numeric: int,
        features: Sequence[FeatureShape],
        num_tasks: int,
    ) -> None:
        super().__init__()
        self.bottom = MLP(num_numeric + sum(pooled_dims(config.kind, features)), config.bottom)
        self.towers = nn.ModuleList(
            LogitHead(self.bottom.outputs, config.towers) for _ in range(num_tasks)
        )

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, n], embeddings [B, W]) -> outputs [B, L]; of one task [B]."""
        shared = self.bottom(torch.cat((dense, embeddings), dim=1))
        return join_tasks([tower(shared) for tower in self.towers])


def join_tasks(outputs: Sequence[Tensor]) -> Tensor:
    """L times [B] -> [B, L]; of one task [B]."""
    return outputs[0] if len(outputs) == 1 else torch.stack(tuple(outputs), dim=1)
