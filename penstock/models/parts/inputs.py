"""Which columns of the embeddings belong to which feature, and what a model cannot read."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

import torch
from torch import Tensor, nn

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


def common_dim(
    kind: str,
    features: Sequence[FeatureShape],
    *,
    at_least: int = 1,
    because: str = "",
    instead: str,
) -> int | None:
    """The one dim of all features, for a model that needs one; None where there is no feature.

    Args:
      kind: of the model, named in the error.
      features: pooled.
      at_least: that the dim must be.
      because: why, for the error.
      instead: a model kind that takes any dims.

    Raises:
      ConfigError: a feature is a sequence, or the dims differ or are less.
    """
    dims = pooled_dims(kind, features)
    if len(set(dims)) > 1 or (dims and dims[0] < at_least):
        least = f" of at least {at_least}" if at_least > 1 else ""
        because = f" ({because})" if because else ""
        raise ConfigError(
            f"model {kind} needs one embedding dim{least} for all features{because}, got "
            f"{describe_dims(features)}; give their tables one `dim`, or use model kind {instead}, "
            "which takes any dims"
        )
    return dims[0] if dims else None


def which_match(
    field: str, patterns: Sequence[str], features: Sequence[FeatureShape]
) -> list[bool]:
    """[F] Whether the name of each feature matches one of the globs of `model.<field>`.

    Raises:
      ConfigError: a glob matches no feature.
    """
    names = [feature.name for feature in features]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"model.{field}: {pattern!r} matches no feature; there are {', '.join(names)}"
            )
    return [any(fnmatchcase(name, pattern) for pattern in patterns) for name in names]


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


def columns_where(chosen: Sequence[bool], features: Sequence[FeatureShape]) -> Tensor:
    """Columns of the chosen features in the embeddings [B, W], int64, in order."""
    widths = torch.tensor([feature.width for feature in features], dtype=torch.int64)
    is_column = torch.tensor(list(chosen), dtype=torch.bool).repeat_interleave(widths)
    return is_column.nonzero().squeeze(1)


class CandidateAndSequence(nn.Module):
    """Takes the inputs of a model of one candidate and one sequence apart.

    Raises:
      ConfigError: there is no such candidate or sequence, their dims differ, or there is another
        sequence.
    """

    def __init__(
        self, kind: str, features: Sequence[FeatureShape], candidate: str, sequence: str
    ) -> None:
        super().__init__()
        by_name = {feature.name: feature for feature in features}
        for field, name in (("candidate", candidate), ("sequence", sequence)):
            if name not in by_name:
                raise ConfigError(
                    f"model.{field}: no feature {name!r}; there are {', '.join(by_name)}"
                )
        if by_name[candidate].length is not None:
            raise ConfigError(
                f"model.candidate: {candidate!r} is a sequence; name a feature of one vector"
            )
        if by_name[sequence].length is None:
            raise ConfigError(
                f"model.sequence: {sequence!r} has one vector; give it pooling sequence and "
                "max_keys"
            )
        for feature in features:
            if feature.length is not None and feature.name != sequence:
                raise ConfigError(
                    f"model {kind} reads one sequence, {sequence!r}, but {feature.name!r} is "
                    "another; give it another pooling"
                )
        if by_name[candidate].dim != by_name[sequence].dim:
            raise ConfigError(
                f"model {kind} compares {candidate!r} with {sequence!r}, but their dims are "
                f"{by_name[candidate].dim} and {by_name[sequence].dim}; let them share a table"
            )
        self.dim = by_name[sequence].dim
        """D"""
        self.length = by_name[sequence].length or 0
        """L, the most keys of the sequence."""
        columns = columns_of(features)
        self.candidate, self.sequence = columns[candidate], columns[sequence]
        is_other = torch.ones(sum(feature.width for feature in features), dtype=torch.bool)
        is_other[self.candidate] = is_other[self.sequence] = False
        # Not persistent: it follows from the features.
        self.others: Tensor
        self.register_buffer("others", is_other.nonzero().squeeze(1), persistent=False)

    def forward(self, embeddings: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Takes them apart.

        Args:
          embeddings: [B, W].
          lengths: [B, 1] keys of the sequence.

        Returns:
          candidate [B, D]; sequence [B, L, D], zeros beyond its keys whatever was there; where the
          keys are, [B, L] bool; the columns of the other features, [B, W - D - L * D].
        """
        places = torch.arange(self.length, device=lengths.device)
        is_key = places < lengths
        sequence = embeddings[:, self.sequence].view(len(embeddings), self.length, self.dim)
        sequence = torch.where(is_key.unsqueeze(2), sequence, 0.0)
        others = embeddings.index_select(1, self.others)
        return embeddings[:, self.candidate], sequence, is_key, others
