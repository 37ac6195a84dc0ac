"""The linear part that several models share: a weight for each key, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.models.parts.inputs import common_dim
from penstock.types import FeatureShape


def vector_dim(kind: str, features: Sequence[FeatureShape], numeric_dim: int) -> int:
    """Columns of the vector of a field, where the last column of every feature is a weight.

    `numeric_dim` where there is no feature.

    Raises:
      ConfigError: a feature is a sequence, or the dims differ or are 1.
    """
    dim = common_dim(
        kind,
        features,
        at_least=2,
        because="the last column is the first-order weight",
        instead="wide_deep",
    )
    return numeric_dim if dim is None else dim - 1


class FirstOrder(nn.Module):
    """Linear term of numbers and keys, and the columns that are left for the rest of the model.

    The weight of a key is the last column of its row: it is looked up, updated, saved and evicted
    with the row, at the price of one column, and a pooled bag reads the sum (or mean) of its keys'
    weights, which is their linear term. The other columns are the embedding.

    Args:
      num_numeric: columns of `dense`, which get a weight each.
      feature_dims: [F] columns of each feature.
      has_weight: [F] whether the last column of the feature is a weight; None: of every one.
    """

    def __init__(
        self,
        num_numeric: int,
        feature_dims: Sequence[int],
        has_weight: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        chosen = [True] * len(feature_dims) if has_weight is None else list(has_weight)
        ends = torch.tensor([0, *feature_dims]).cumsum(0)[1:]
        weights = ends[torch.tensor(chosen, dtype=torch.bool)] - 1
        is_vector = torch.ones(sum(feature_dims), dtype=torch.bool)
        is_vector[weights] = False
        # Not persistent: they follow from the features.
        self.weight_columns: Tensor
        self.vector_columns: Tensor
        self.register_buffer("weight_columns", weights, persistent=False)
        self.register_buffer("vector_columns", is_vector.nonzero().squeeze(1), persistent=False)
        self.vector_dims = tuple(
            dim - weight for dim, weight in zip(feature_dims, chosen, strict=True)
        )
        """[F] columns of each feature without its weight."""
        self.number_weights = nn.Parameter(torch.zeros(num_numeric))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, dense: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """(dense [B, n], embeddings [B, sum D]) -> linear term [B], [B, sum of vector_dims]."""
        of_keys = embeddings.index_select(1, self.weight_columns).sum(1)
        linear = self.bias + dense @ self.number_weights + of_keys
        return linear, embeddings.index_select(1, self.vector_columns)
