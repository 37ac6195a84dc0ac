"""DCN-v2: explicit feature crosses and a deep MLP (arXiv:2008.13535)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import DCNConfig
from penstock.models.parts.inputs import pooled_dims
from penstock.models.parts.mlp import MLP, LogitHead, glorot_linear
from penstock.types import FeatureShape


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x, where W is full or the product of two thin matrices."""

    def __init__(self, width: int, low_rank: int | None) -> None:
        super().__init__()
        if low_rank is None:
            self.weight: nn.Module = glorot_linear(width, width)
        else:
            self.weight = nn.Sequential(
                glorot_linear(width, low_rank, bias=False), glorot_linear(low_rank, width)
            )

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """(x0 [B, width], x [B, width]) -> [B, width]."""
        return torch.addcmul(x, x0, self.weight(x))


class DCN(nn.Module):
    """Deep and cross network, version 2.

    x0 is the concatenation of numbers and embeddings, of any dims. `parallel`: the logit is linear
    in [cross layers of x0, deep MLP of x0]. `stacked`: the deep MLP reads the cross layers'
    output.

    Source: arXiv:2008.13535 section 3, without the mixture of experts of its section 3.3.
    """

    def __init__(
        self, config: DCNConfig, num_numeric: int, features: Sequence[FeatureShape]
    ) -> None:
        super().__init__()
        width = num_numeric + sum(pooled_dims(config.kind, features))
        self.cross = nn.ModuleList(
            CrossLayer(width, config.low_rank) for _ in range(config.cross_layers)
        )
        self.is_parallel = config.structure == "parallel"
        if self.is_parallel:
            self.deep = MLP(width, config.deep)
            beside = self.deep.outputs if config.deep else 0
            self.has_deep = bool(config.deep)
            self.head = LogitHead(width + beside, ())
        else:
            self.head = LogitHead(width, config.deep)

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, sum of dims]) -> logits [B]."""
        x0 = torch.cat((dense, embeddings), dim=1)
        x = x0
        for layer in self.cross:
            x = layer(x0, x)
        if self.is_parallel and self.has_deep:
            x = torch.cat((x, self.deep(x0)), dim=1)
        logits: Tensor = self.head(x)
        return logits
