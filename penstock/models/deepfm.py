"""DeepFM: a factorization machine and a deep MLP over the same vectors (arXiv:1703.04247)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import DeepFMConfig
from penstock.errors import ConfigError
from penstock.models.first_order import FirstOrder
from penstock.models.inputs import describe_dims, pooled_dims
from penstock.models.mlp import LogitHead
from penstock.types import FeatureShape


class DeepFM(nn.Module):
    """logit = linear term + dot products of all pairs of field vectors + deep MLP of all vectors.

    A field is a feature or a numeric column. Of a feature with D columns the last is the weight of
    the linear term (`FirstOrder`) and the D - 1 before are its vector; the vector of numeric
    column j is its value times a learned vector of D - 1 numbers. The MLP reads the same vectors.

    Source: arXiv:1703.04247 section 2.1. Differs: ReLU without dropout; a bag of many keys is one
    field, so the products of two keys of one bag are left out.
    """

    def __init__(
        self,
        config: DeepFMConfig,
        num_numeric: int,
        features: Sequence[FeatureShape],
    ) -> None:
        super().__init__()
        feature_dims = pooled_dims(config.kind, features)
        if len(set(feature_dims)) > 1 or 1 in feature_dims:
            raise ConfigError(
                "model deepfm needs one embedding dim of at least 2 for all features (the last "
                f"column is the first-order weight), got {describe_dims(features)}; give their "
                "tables one `dim`, or use model kind wide_deep, which takes any dims"
            )
        self.first_order = FirstOrder(num_numeric, feature_dims)
        self.dim = feature_dims[0] - 1 if feature_dims else config.numeric_dim
        self.numeric_vectors = nn.Parameter(torch.empty(num_numeric, self.dim))
        # As the default first values of rows: small beside what they become.
        nn.init.uniform_(self.numeric_vectors, -0.05, 0.05)
        self.num_fields = num_numeric + len(feature_dims)
        self.deep = LogitHead(self.num_fields * self.dim, config.deep)

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, F * D]) -> logits [B]."""
        linear, vectors = self.first_order(dense, embeddings)
        of_numbers = (dense.unsqueeze(2) * self.numeric_vectors).flatten(1)
        fields = torch.cat((of_numbers, vectors), dim=1)
        by_field = fields.view(-1, self.num_fields, self.dim)
        # Sum over pairs of dots = (square of the sum - sum of the squares) / 2: linear in fields.
        pairs = 0.5 * (by_field.sum(1).square() - by_field.square().sum(1)).sum(1)
        deep: Tensor = self.deep(fields)
        logits: Tensor = linear + pairs + deep
        return logits
