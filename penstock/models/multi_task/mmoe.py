"""MMoE: MLPs that all labels share, mixed anew for each (doi:10.1145/3219819.3220007)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import MMoEConfig
from penstock.models.multi_task.shared_bottom import join_tasks
from penstock.models.parts.inputs import pooled_dims
from penstock.models.parts.mlp import MLP, LogitHead, glorot_linear
from penstock.types import FeatureShape


class MMoE(nn.Module):
    """Multi-gate mixture of experts: output l = tower l of (sum over experts of gate l x expert).

    The gate of a label is a softmax over the experts, linear in numbers and embeddings.

    Source: doi:10.1145/3219819.3220007 (KDD 2018) section 4.2.
    """

    def __init__(
        self,
        config: MMoEConfig,
        num_numeric: int,
        features: Sequence[FeatureShape],
        num_tasks: int,
    ) -> None:
        super().__init__()
        width = num_numeric + sum(pooled_dims(config.kind, features))
        self.experts = nn.ModuleList(MLP(width, config.expert) for _ in range(config.experts))
        self.gates = nn.ModuleList(
            glorot_linear(width, config.experts, bias=False) for _ in range(num_tasks)
        )
        self.towers = nn.ModuleList(
            LogitHead(config.expert[-1], config.towers) for _ in range(num_tasks)
        )

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, n], embeddings [B, W]) -> outputs [B, L]; of one task [B]."""
        x = torch.cat((dense, embeddings), dim=1)
        experts_BEH = torch.stack([expert(x) for expert in self.experts], dim=1)
        outputs = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            shares_B1E = torch.softmax(gate(x), dim=1).unsqueeze(1)
            outputs.append(tower(torch.bmm(shares_B1E, experts_BEH).squeeze(1)))
        return join_tasks(outputs)
