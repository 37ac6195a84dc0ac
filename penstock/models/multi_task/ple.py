"""PLE: experts of each label beside shared ones, layer on layer (doi:10.1145/3383313.3412236)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import PLEConfig
from penstock.models.multi_task.shared_bottom import join_tasks
from penstock.models.parts.inputs import pooled_dims
from penstock.models.parts.mlp import MLP, LogitHead, glorot_linear
from penstock.types import FeatureShape


class Experts(nn.ModuleList):
    """MLPs of one input: [B, inputs] -> a list of [B, H]."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, inputs] -> E times [B, H]."""
        return [expert(x) for expert in self]


class ExtractionLayer(nn.Module):
    """Experts of each label and shared ones; a gate of each label mixes its own and the shared.

    A gate is a softmax, linear in what the experts of its label read. The shared gate, which the
    last layer has not, mixes all experts of the layer.

    Source: doi:10.1145/3383313.3412236 (RecSys 2020) sections 4.1 and 4.2.
    """

    def __init__(self, config: PLEConfig, inputs: int, num_tasks: int, *, is_last: bool) -> None:
        super().__init__()

        def experts(count: int) -> Experts:
            return Experts(MLP(inputs, config.expert) for _ in range(count))

        def gate(count: int) -> nn.Linear:
            return glorot_linear(inputs, count, bias=False)

        own, shared = config.task_experts, config.shared_experts
        self.of_tasks = nn.ModuleList(experts(own) for _ in range(num_tasks))
        self.shared = experts(shared)
        self.gates = nn.ModuleList(gate(own + shared) for _ in range(num_tasks))
        self.shared_gate = None if is_last else gate(num_tasks * own + shared)

    def forward(
        self, of_tasks: Sequence[Tensor], of_all: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """L times [B, inputs], and [B, inputs] -> L times [B, H], and [B, H] (None if last)."""
        own = [experts(x) for experts, x in zip(self.of_tasks, of_tasks, strict=True)]
        shared = self.shared(of_all)
        mixed = [
            _mix(gate(x), [*experts, *shared])
            for gate, x, experts in zip(self.gates, of_tasks, own, strict=True)
        ]
        if self.shared_gate is None:
            return mixed, None
        return mixed, _mix(self.shared_gate(of_all), [*sum(own, []), *shared])


def _mix(scores: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """(scores [B, E], E times [B, H]) -> [B, H]."""
    shares_B1E = torch.softmax(scores, dim=1).unsqueeze(1)
    return torch.bmm(shares_B1E, torch.stack(tuple(experts), dim=1)).squeeze(1)


class PLE(nn.Module):
    """Progressive layered extraction: output l = tower l of what the last layer has for label l.

    All of the first layer reads numbers and embeddings; later layers what the one before mixed.

    Source: doi:10.1145/3383313.3412236 (RecSys 2020) section 4.2.
    """

    def __init__(
        self,
        config: PLEConfig,
        num_numeric: int,
        features: Sequence[FeatureShape],
        num_tasks: int,
    ) -> None:
        super().__init__()
        width = num_numeric + sum(pooled_dims(config.kind, features))
        self.layers = nn.ModuleList(
            ExtractionLayer(
                config,
                config.expert[-1] if number else width,
                num_tasks,
                is_last=number == config.layers - 1,
            )
            for number in range(config.layers)
        )
        self.towers = nn.ModuleList(
            LogitHead(config.expert[-1], config.towers) for _ in range(num_tasks)
        )

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, n], embeddings [B, W]) -> outputs [B, L]; of one task [B]."""
        of_all = torch.cat((dense, embeddings), dim=1)
        of_tasks = [of_all] * len(self.towers)
        for layer in self.layers:
            of_tasks, of_all = layer(of_tasks, of_all)
        return join_tasks([tower(x) for tower, x in zip(self.towers, of_tasks, strict=True)])
