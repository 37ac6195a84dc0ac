"""The nouns that all planes share.

Shape letters: B samples, N keys of a batch (non-zeros), U unique keys, D embedding dim, V floats
of a row (value and
optimizer state), F features, T tables, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from penstock.errors import ConfigError


class Jagged(NamedTuple):
    """One ragged column in CSR form.

    The keys of sample b are `values[offsets[b]:offsets[b + 1]]`.
    """

    values: Tensor
    """[N] int64 keys, any value."""
    offsets: Tensor
    """[B + 1] int64, non-decreasing, from 0 to N."""
    weights: Tensor | None = None
    """[N] float32, finite: factor of each key's vector; None: all 1."""

    @classmethod
    def from_dense(cls, keys: Tensor) -> Jagged:
        """Makes one bag a sample of `keys`: [B] int64 gives bags of one key, [B, n] bags of n."""
        if keys.dim() not in {1, 2}:
            raise ConfigError(f"keys of shape {tuple(keys.shape)}: expected [B] or [B, n]")
        per_bag = 1 if keys.dim() == 1 else keys.shape[1]
        offsets = torch.arange(keys.shape[0] + 1, dtype=torch.int64) * per_bag
        return cls(keys.reshape(-1).to(torch.int64).contiguous(), offsets)

    def truncate(self, max_keys: int, keep: Literal["first", "last"] = "first") -> Jagged:
        """Cuts longer bags down to their first or last `max_keys` keys, weights along with them.

        Raises:
          ConfigError: `max_keys` is below 1.
        """
        if max_keys < 1:
            raise ConfigError(f"max_keys is {max_keys}; a bag keeps at least 1 key")
        lengths = self.offsets.diff()
        kept = lengths.clamp(max=max_keys)
        if torch.equal(kept, lengths):
            return self
        offsets = torch.zeros_like(self.offsets)
        torch.cumsum(kept, 0, out=offsets[1:])
        source = self.offsets[:-1] if keep == "first" else self.offsets[1:] - kept
        places = torch.repeat_interleave(source - offsets[:-1], kept)
        places += torch.arange(len(places))
        weights = None if self.weights is None else self.weights[places]
        return Jagged(self.values[places], offsets, weights)


@dataclass(frozen=True, slots=True)
class KeyedJagged:
    """All ragged columns of a batch, packed feature by feature.

    The keys of feature f of sample b are `values[offsets[f * B + b]:offsets[f * B + b + 1]]`.
    """

    features: tuple[str, ...]
    """[F] names, in the order of packing."""
    values: Tensor
    """[N] int64 keys, any value."""
    offsets: Tensor
    """[F * B + 1] int64, non-decreasing, from 0 to N."""
    weights: Tensor | None = None
    """[N] float32, finite, any sign: factor of each key's vector, by position in `values`; None:
    all 1.
    """
    is_checked: bool = False
    """Offsets and weights are known to be right, and bags to fit their sequences: a store on a GPU
    need not wait to look at them. See `EmbeddingCollection.to_device`.
    """
    is_one_hot: bool = False
    """Every bag is known to hold one key."""

    @property
    def batch_size(self) -> int:
        """B. With no features it is 0."""
        return (self.offsets.numel() - 1) // len(self.features) if self.features else 0

    def __getitem__(self, feature: str) -> Jagged:
        """The column of one feature (a view of the keys, rebased offsets)."""
        if feature not in self.features:
            raise ConfigError(f"no feature {feature!r}; there are {', '.join(self.features)}")
        first = self.features.index(feature) * self.batch_size
        offsets = self.offsets[first : first + self.batch_size + 1]
        keys = slice(int(offsets[0]), int(offsets[-1]))
        weights = None if self.weights is None else self.weights[keys]
        return Jagged(self.values[keys], offsets - offsets[0], weights)

    @classmethod
    def pack(cls, columns: dict[str, Jagged]) -> KeyedJagged:
        """Packs single columns of equal batch size.

        If one has weights, the keys of those without have weight 1.

        Raises:
          ConfigError: batch sizes differ, or weights do not fit their keys.
        """
        if not columns:
            return cls((), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        sizes = {name: column.offsets.numel() - 1 for name, column in columns.items()}
        if len(set(sizes.values())) != 1:
            raise ConfigError(f"features of one batch differ in batch size: {sizes}")
        return cls(
            tuple(columns),
            torch.cat([column.values for column in columns.values()]),
            _chain_offsets([column.offsets for column in columns.values()]),
            _join_weights(columns),
        )


def _join_weights(columns: Mapping[str, Jagged]) -> Tensor | None:
    if all(column.weights is None for column in columns.values()):
        return None
    parts = []
    for name, (values, _, weights) in columns.items():
        if weights is not None and weights.shape != values.shape:
            raise ConfigError(
                f"weights of feature {name!r}: {list(weights.shape)} for keys of "
                f"{list(values.shape)}; give one weight a key"
            )
        parts.append(torch.ones(values.shape) if weights is None else weights)
    return torch.cat(parts)


def _chain_offsets(parts: Sequence[Tensor]) -> Tensor:
    lengths = torch.cat([offsets.diff() for offsets in parts])
    chained = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=chained[1:])
    return chained


class FeatureShape(NamedTuple):
    """Which columns of the embeddings [B, W] belong to a feature, as models see it."""

    name: str
    dim: int
    """Columns of one vector."""
    length: int | None = None
    """Positions of a sequence, each of `dim` columns; None: one pooled vector."""

    @property
    def width(self) -> int:
        """Columns of the feature."""
        return self.dim * (self.length or 1)


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the input the next unread sample lies; enough to continue a run bit for bit.

    A window is the run of `shuffle.window_rows` rows that are shuffled together. (`split`,
    `split_row`) is where it begins.
    """

    epoch: int = 0
    window: int = 0
    """Number of the window within the epoch."""
    window_row: int = 0
    """Samples of the window already delivered."""
    split: int = 0
    """Number of the split (unit of reading) in which the window begins."""
    split_row: int = 0
    """Rows of that split that lie before the window."""
    samples: int = 0
    """Samples delivered since the beginning of the run."""

    def to_dict(self) -> dict[str, int]:
        """Plain numbers, for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Position:
        """Inverse of `to_dict`."""
        return cls(**{name: int(value) for name, value in fields.items()})


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of samples, on the CPU. To be read: batches may share memory, offsets too."""

    dense: Tensor
    """[B, number of numeric columns] float32, finite."""
    sparse: KeyedJagged
    labels: Tensor
    """[B] float32, or [B, L] where the job names several labels: 0 or 1, or the number of a
    regression. NaN where a label is missing; where the source lacks its column (prediction), all.
    """
    weights: Tensor | None
    """[B] float32 sample weights."""
    event_time: Tensor | None
    """[B] int64, milliseconds since 1970 UTC."""
    teacher: Tensor | None
    """[B] float32: the true click probability, where the source is synthetic and knows it."""
    start: Position
    """Where this batch begins."""
    end: Position
    """Where the batch after it begins; a checkpoint taken after this batch's step stores it."""
    origin: object
    """Its `str` is the rows' place for messages: `day_3.parquet rows 8192-16383 (shuffled)`."""
    groups: Mapping[str, pa.Array] = field(default_factory=dict)
    """Columns by which metrics are grouped, as they are in the source: [B] int64, text or bytes,
    null where missing. In evaluation alone.
    """

    @property
    def batch_size(self) -> int:
        """B."""
        return self.dense.shape[0]
