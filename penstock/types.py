"""The nouns that all planes share.

Shape letters: B samples, N keys of a batch (non-zeros), U unique keys, D embedding dim, V floats
of a row (value and
optimizer state), F features, T tables, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.errors import ConfigError
from penstock.position import Position


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
        """Makes one bag a sample of `keys`: [B] gives bags of one key, [B, n] bags of n.

        Raises:
          ConfigError: another shape, or no integers (see `as_keys`).
        """
        if keys.dim() not in {1, 2}:
            raise ConfigError(f"keys of shape {tuple(keys.shape)}: expected [B] or [B, n]")
        per_bag = 1 if keys.dim() == 1 else keys.shape[1]
        offsets = torch.arange(keys.shape[0] + 1, dtype=torch.int64, device=keys.device) * per_bag
        return cls(as_keys(keys.reshape(-1)).contiguous(), offsets)

    @classmethod
    def from_starts(cls, values: Tensor, starts: Tensor, weights: Tensor | None = None) -> Jagged:
        """Makes bags from where each begins, as nn.EmbeddingBag's `offsets`: [B], from 0.

        The last one ends with the keys.
        """
        end = starts.new_full((1,), values.numel(), dtype=torch.int64)
        return cls(values, torch.cat([starts.to(torch.int64), end]), weights)

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
        places += torch.arange(len(places), device=places.device)
        weights = None if self.weights is None else self.weights[places]
        return Jagged(self.values[places], offsets, weights)


class JaggedVectors(NamedTuple):
    """The vectors of one ragged column's keys, one after the other."""

    values: Tensor
    """[N, D] float32; those of sample b are `values[offsets[b]:offsets[b + 1]]`."""
    offsets: Tensor
    """[B + 1] int64, from 0 to N."""


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
          ConfigError: batch sizes or devices differ, keys are no integers, or weights do not fit
            their keys.
        """
        if not columns:
            return cls((), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        sizes = {name: column.offsets.numel() - 1 for name, column in columns.items()}
        # Not by a set: a size that torch.export leaves open has no hash.
        if any(size != next(iter(sizes.values())) for size in sizes.values()):
            raise ConfigError(f"features of one batch differ in batch size: {sizes}")
        devices = {name: str(column.values.device) for name, column in columns.items()}
        if len(set(devices.values())) != 1:
            raise ConfigError(
                f"keys of one batch lie on different devices: {devices}; move them to one"
            )
        return cls(
            tuple(columns),
            torch.cat([
                as_keys(each.values, f"feature {name!r}") for name, each in columns.items()
            ]),
            _chain_offsets([column.offsets for column in columns.values()]),
            _join_weights(columns),
        )

    def select(self, numbers: Sequence[int] | Tensor) -> KeyedJagged:
        """Columns by their numbers, each as often as it is named; copies."""
        number = torch.as_tensor(numbers, dtype=torch.int64, device=self.offsets.device)
        names = tuple(self.features[n] for n in number.tolist())
        shape = len(self.features), self.batch_size
        starts = self.offsets[:-1].view(shape)[number].view(-1)
        lengths = self.offsets.diff().view(shape)[number].view(-1)
        offsets = lengths.new_zeros(lengths.numel() + 1)
        torch.cumsum(lengths, 0, out=offsets[1:])
        places = torch.repeat_interleave(starts - offsets[:-1], lengths)
        places += torch.arange(len(places), device=places.device)
        weights = None if self.weights is None else self.weights[places]
        return KeyedJagged(names, self.values[places], offsets, weights)

    def without_weights(self) -> KeyedJagged:
        """The same batch, all weights 1."""
        return replace(self, weights=None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> KeyedJagged:
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> KeyedJagged:
        """The same batch in pinned memory, as a DataLoader asks for with `pin_memory=True`."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> KeyedJagged:
        weights = None if self.weights is None else change(self.weights)
        return replace(
            self, values=change(self.values), offsets=change(self.offsets), weights=weights
        )


def _tensors_of(sparse: KeyedJagged) -> tuple[list[Any], list[str]]:
    weights = [] if sparse.weights is None else [sparse.weights]
    return [sparse.values, sparse.offsets, *weights], list(sparse.features)


def _named_tensors_of(sparse: KeyedJagged) -> tuple[list[Any], list[str]]:
    tensors, features = _tensors_of(sparse)
    names = map(pytree.GetAttrKey, ("values", "offsets", "weights"))
    return [*zip(names, tensors, strict=False)], features


def _of_tensors(tensors: Iterable[Any], features: list[str]) -> KeyedJagged:
    # Tensors that were changed are not known to be right any more.
    return KeyedJagged(tuple(features), *tensors)


# So that torch.export, and whatever else looks for tensors in arguments, finds them.
pytree.register_pytree_node(
    KeyedJagged,
    _tensors_of,
    _of_tensors,
    serialized_type_name="penstock.types.KeyedJagged",
    to_dumpable_context=lambda features: features,
    from_dumpable_context=lambda features: features,
    flatten_with_keys_fn=_named_tensors_of,
)
# Plain data: batches, and programs that were exported with one, are loaded with weights_only=True.
torch.serialization.add_safe_globals([Jagged, KeyedJagged])


_WHOLE = {torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32}


def as_keys(values: Tensor, what: str = "keys") -> Tensor:
    """The same integers as int64.

    Raises:
      ConfigError: no integers (floats have rounded large ids already), or beyond int64.
    """
    if values.dtype == torch.int64:
        return values
    if values.dtype in _WHOLE:
        return values.to(torch.int64)
    if values.dtype == torch.uint64:
        keys = values.view(torch.int64)
        if bool((keys < 0).any()):
            raise ConfigError(
                f"{what}: uint64 {int(keys[keys < 0][0]) + 2**64} is beyond int64; give the same "
                "bits as values.view(torch.int64)"
            )
        return keys
    raise ConfigError(
        f"{what} of {values.dtype}: keys are integers, and a float has rounded large ones already; "
        "keep ids as int64 from where they are read"
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
        if weights is not None and not weights.is_floating_point():
            raise ConfigError(f"weights of feature {name!r}: {weights.dtype}; expected float32")
        parts.append(
            torch.ones(values.shape, dtype=torch.float32, device=values.device)
            if weights is None
            else weights.to(torch.float32)
        )
    return torch.cat(parts)


def _chain_offsets(parts: Sequence[Tensor]) -> Tensor:
    lengths = torch.cat([offsets.diff() for offsets in parts])
    chained = torch.zeros(lengths.numel() + 1, dtype=torch.int64, device=lengths.device)
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
    lane_sizes: tuple[int, ...] = ()
    """Samples of each lane of the data, over all ranks; those of a lane lie side by side, in the
    order of lanes. Empty: of nobody who divides it.
    """

    @property
    def batch_size(self) -> int:
        """B."""
        return self.dense.shape[0]
