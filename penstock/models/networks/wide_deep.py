"""Wide & Deep: a linear model that memorizes beside an MLP that generalizes (arXiv:1606.07792)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import WideDeepConfig
from penstock.models.parts.first_order import FirstOrder
from penstock.models.parts.inputs import pooled_dims, which_match
from penstock.models.parts.mlp import LogitHead
from penstock.types import FeatureShape


class WideDeep(nn.Module):
    """logit = linear term of numbers and wide features + deep MLP of numbers and embeddings.

    The last column of a wide feature is its weight in the linear term (`FirstOrder`); the columns
    before, and all those of other features, are the embedding that the MLP reads. So a wide
    feature of dim 1 is wide alone, and may have an optimizer of its own in its table.

    Source: arXiv:1606.07792 section 3. Differs: numbers enter both parts; one optimizer for
    dense weights of both parts.
    """

    def __init__(
        self,
        config: WideDeepConfig,
        num_numeric: int,
        features: Sequence[FeatureShape],
    ) -> None:
        super().__init__()
        feature_dims = pooled_dims(config.kind, features)
        # All of no feature is none, and no mistake.
        patterns = [pattern for pattern in config.wide if features or pattern != "*"]
        is_wide = which_match("wide", patterns, features)
        self.first_order = FirstOrder(num_numeric, feature_dims, is_wide)
        width = num_numeric + sum(self.first_order.vector_dims)
        self.deep = LogitHead(width, config.deep) if width else None

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, sum of dims]) -> logits [B]."""
        linear, vectors = self.first_order(dense, embeddings)
        logits: Tensor = linear
        if self.deep is not None:
            logits = linear + self.deep(torch.cat((dense, vectors), dim=1))
        return logits
