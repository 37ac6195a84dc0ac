"""ESMM: labels that happen one after the other, learnt on all rows (arXiv:1804.07931)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import ESMMConfig
from penstock.errors import ConfigError
from penstock.models.multi_task.shared_bottom import join_tasks
from penstock.models.parts.inputs import pooled_dims
from penstock.models.parts.mlp import LogitHead
from penstock.types import FeatureShape


class ESMM(nn.Module):
    """Output l is the logit of p_1 * ... * p_l, where p_l = sigmoid(MLP l of all inputs).

    p_l is the probability of label l where label l - 1 is 1: of two labels the paper's click rate
    and conversion rate, which the product learns without a bias to rows that were clicked.

    Source: arXiv:1804.07931 section 2. Differs: any number of labels.
    """

    def __init__(
        self,
        config: ESMMConfig,
        num_numeric: int,
        features: Sequence[FeatureShape],
        num_tasks: int,
    ) -> None:
        super().__init__()
        if num_tasks < 2:
            raise ConfigError(
                "model esmm learns labels that happen one after the other; give it at least 2"
            )
        width = num_numeric + sum(pooled_dims(config.kind, features))
        self.towers = nn.ModuleList(LogitHead(width, config.towers) for _ in range(num_tasks))

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, n], embeddings [B, W]) -> logits [B, L]."""
        x = torch.cat((dense, embeddings), dim=1)
        first, *others = (tower(x) for tower in self.towers)
        logits = [first]
        for conditional in others:
            logits.append(logit_of_product(logits[-1], conditional))
        return join_tasks(logits)


def logit_of_product(first: Tensor, second: Tensor) -> Tensor:
    """Logit of sigmoid(first) * sigmoid(second), exact to rounding wherever they are: [B] alike.

    The product is 1 / (1 + e^-first + e^-second + e^-(first + second)), so its odds are 1 over all
    but the 1; the probabilities themselves would round to 0 and 1.
    """
    return -torch.logsumexp(torch.stack((-first, -second, -(first + second))), dim=0)
