"""Which columns of the embeddings belong to which feature, and what a model cannot read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from penstock.errors import ConfigError
from penstock.types import FeatureShape


def pooled_dims(kind: str, features: Sequence[FeatureShape]) -> tuple[int, ...]:
    """Columns of each feature, for a model that reads pooled vectors alone.

    Raises:
      ConfigError: a feature is a sequence.
    """
    for feature in features:
        if feature.length is not None:
            raise ConfigError(
                f"model {kind} reads one vector a feature, but {feature.name!r} is a sequence; "
                "give it another pooling, or use model kind din or hstu"
            )
    return tuple(feature.dim for feature in features)


def describe_dims(features: Sequence[FeatureShape]) -> str:
    """`user 16, item 8`."""
    return ", ".join(f"{feature.name} {feature.dim}" for feature in features)


def columns_of(features: Sequence[FeatureShape]) -> dict[str, slice]:
    """By name of the feature: its columns in the embeddings [B, W]."""
    ends = list(accumulate(feature.width for feature in features))
    return {
        feature.name: slice(end - feature.width, end)
        for feature, end in zip(features, ends, strict=True)
    }
