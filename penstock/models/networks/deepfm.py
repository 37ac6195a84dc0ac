"""DeepFM: a factorization machine and a deep MLP over the same vectors (arXiv:1703.04247)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from penstock.config import DeepFMConfig
from penstock.models.parts.fields import join_fields, numeric_vectors
from penstock.models.parts.first_order import FirstOrder, vector_dim
from penstock.models.parts.mlp import LogitHead
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
        dim = vector_dim(config.kind, features, config.numeric_dim)
        self.first_order = FirstOrder(num_numeric, [feature.dim for feature in features])
        self.dim = dim
        self.numeric_vectors = numeric_vectors(num_numeric, self.dim)
        self.num_fields = num_numeric + len(features)
        self.deep = LogitHead(self.num_fields * self.dim, config.deep)

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, F * D]) -> logits [B]."""
        linear, vectors = self.first_order(dense, embeddings)
        fields = join_fields(dense, self.numeric_vectors, vectors)
        by_field = fields.view(-1, self.num_fields, self.dim)
        # Sum over pairs of dots = (square of the sum - sum of the squares) / 2: linear in fields.
        pairs = 0.5 * (by_field.sum(1).square() - by_field.square().sum(1)).sum(1)
        deep: Tensor = self.deep(fields)
        logits: Tensor = linear + pairs + deep
        return logits
