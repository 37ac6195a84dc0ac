"""DLRM: an MLP of the numbers, dot products of all pairs, an MLP of both (arXiv:1906.00091)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import DLRMConfig
from penstock.models.parts.inputs import common_dim
from penstock.models.parts.mlp import MLP, LogitHead
from penstock.types import FeatureShape


class DLRM(nn.Module):
    """Deep learning recommendation model.

    The bottom MLP turns the numbers into one vector of the embedding dim D. It and the F feature
    vectors are F + 1 vectors; the dot product of each pair of two different ones (the lower
    triangle without the diagonal) stands behind the bottom vector as input of the top MLP.

    Without numeric columns a learned constant vector takes the bottom MLP's place, so that its
    dot products are a linear term of each embedding. Without features only the MLPs are left.

    Source: arXiv:1906.00091 section 2 and its reference code (`arch_interaction_itself` False).
    """

    def __init__(
        self,
        config: DLRMConfig,
        num_numeric: int,
        features: Sequence[FeatureShape],
    ) -> None:
        super().__init__()
        dim = common_dim(config.kind, features, instead="dcn_v2")
        self.num_features = len(features)
        last_width = config.bottom[-1] if config.bottom else num_numeric
        self.dim = last_width if dim is None else dim
        if num_numeric:
            self.bottom = MLP(num_numeric, (*config.bottom, self.dim))
        else:
            # Unit length on average, like an embedding that has been trained.
            self.constant = nn.Parameter(torch.randn(self.dim) * self.dim**-0.5)
        self.has_numeric = num_numeric > 0
        vectors = self.num_features + 1
        row, column = torch.tril_indices(vectors, vectors, offset=-1)
        # Not persistent: it follows from the number of features.
        self.pairs: Tensor
        self.register_buffer("pairs", row * vectors + column, persistent=False)
        self.top = LogitHead(self.dim + row.numel(), config.top)

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, F * D]) -> logits [B]."""
        batch_size = dense.shape[0]
        bottom = self.bottom(dense) if self.has_numeric else self.constant.expand(batch_size, -1)
        vectors = torch.cat((bottom, embeddings), dim=1)
        vectors = vectors.view(batch_size, self.num_features + 1, self.dim)
        dots = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        logits: Tensor = self.top(torch.cat((bottom, dots.index_select(1, self.pairs)), dim=1))
        return logits
