"""Fields: a vector for each numeric column and each feature, as several models read them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def numeric_vectors(num_numeric: int, dim: int) -> nn.Parameter:
    """Makes a vector for each numeric column: [num_numeric, dim]."""
    vectors = nn.Parameter(torch.empty(num_numeric, dim))
    # As the default first values of rows: small beside what they become.
    nn.init.uniform_(vectors, -0.05, 0.05)
    return vectors


def join_fields(dense: Tensor, of_numbers: Tensor, of_features: Tensor) -> Tensor:
    """The vector of number j is its value times its learnt vector; those of the features follow.

    Args:
      dense: [B, n].
      of_numbers: [n, D], see `numeric_vectors`.
      of_features: [B, F * D].

    Returns:
      [B, (n + F) * D].
    """
    scaled = (dense.unsqueeze(2) * of_numbers).flatten(1)
    return torch.cat((scaled, of_features), dim=1)
