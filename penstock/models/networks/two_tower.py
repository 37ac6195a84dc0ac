"""Two towers: a vector of the user, a vector of the item, and their similarity."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from penstock.config import TwoTowerConfig
from penstock.errors import ConfigError
from penstock.models.parts.frequency import FrequencySketch
from penstock.models.parts.inputs import columns_where, pooled_dims, which_match
from penstock.models.parts.mlp import MLP, glorot_linear
from penstock.types import FeatureShape


class Tower(nn.Module):
    """An MLP with a linear output, of length 1 if `unit`: [B, inputs] -> [B, dim]."""

    def __init__(self, inputs: int, widths: Sequence[int], dim: int, *, unit: bool) -> None:
        super().__init__()
        self.hidden = MLP(inputs, widths)
        self.out = glorot_linear(self.hidden.outputs, dim)
        self.unit = unit

    def forward(self, values: Tensor) -> Tensor:
        """[B, inputs] -> [B, dim]."""
        vectors: Tensor = self.out(self.hidden(values))
        return normalize(vectors, dim=1) if self.unit else vectors


class TwoTower(nn.Module):
    """Score of a pair = similarity of user vector and item vector, over the temperature.

    The user's tower reads the numbers and all features that are not the item's.

    Source: doi:10.1145/3298689.3346996 (Yi et al., RecSys 2019).
    """

    def __init__(
        self, config: TwoTowerConfig, num_numeric: int, features: Sequence[FeatureShape]
    ) -> None:
        super().__init__()
        pooled_dims(config.kind, features)
        is_item = which_match("items", config.items, features)
        if all(is_item) and not num_numeric:
            raise ConfigError(
                "model.items: all features are the item's, and nothing is left for the user's "
                "tower; name those of the item alone"
            )
        is_user = [not whether for whether in is_item]
        self.item_features = tuple(place for place, whether in enumerate(is_item) if whether)
        """Places of the item's features."""
        # Not persistent: they follow from the features.
        self.item_columns: Tensor
        self.user_columns: Tensor
        self.register_buffer("item_columns", columns_where(is_item, features), persistent=False)
        self.register_buffer("user_columns", columns_where(is_user, features), persistent=False)
        unit = config.similarity == "cosine"
        user_inputs = num_numeric + self.user_columns.numel()
        self.user = Tower(user_inputs, config.user, config.dim, unit=unit)
        self.item = Tower(self.item_columns.numel(), config.item, config.dim, unit=unit)
        self.temperature = config.temperature
        self.frequencies = FrequencySketch(config.frequency_buckets, config.frequency_memory)
        """Of the items among the samples; the training loss counts and reads it."""

    def users(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, n], embeddings [B, W]) -> user vectors [B, dim]."""
        of_user = embeddings.index_select(1, self.user_columns)
        vectors: Tensor = self.user(torch.cat((dense, of_user), dim=1))
        return vectors

    def items(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, W], of which the item's columns are read -> item vectors [B, dim]."""
        vectors: Tensor = self.item(embeddings.index_select(1, self.item_columns))
        return vectors

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, n], embeddings [B, W]) -> scores [B] of each row's user with its item."""
        pair = self.users(dense, embeddings) * self.items(embeddings)
        return pair.sum(1) / self.temperature
