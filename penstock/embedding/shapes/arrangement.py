"""How a batch is laid out for the stores, and their output for the model, where the two differ.

Stores read one column a feature, and pool sums and sequences of a fixed number of positions. Here a
column that several features read is repeated, padding is left out, and `max` and `none` are made of
the vectors of single keys: stores give them as sequences, but cut anew, into as many equal ones as
there are samples, so that a few long bags take no more memory than their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from penstock.config import FeatureConfig
from penstock.embedding.checks import (
    check_finite_weights,
    check_offsets,
    check_sequences,
    check_weights,
)
from penstock.embedding.shapes.hash_stack import Stacks
from penstock.embedding.store import PooledFeature, PoolingPlan
from penstock.types import JaggedVectors, KeyedJagged

_PLAIN, _HOLES, _MAX, _NONE = range(4)
_MODE_MAX = 2
"""Number of the mode, as torch's operator knows it."""


class StoreLayout(NamedTuple):
    """Where the stores write the vectors of each feature."""

    plans: tuple[PoolingPlan, ...]
    """Of each store."""
    width: int
    """Columns of their output."""


class Arranged(NamedTuple):
    """A batch as the stores read it."""

    sparse: KeyedJagged
    """One column a feature."""
    layout: StoreLayout | None
    """None: the collection's own."""
    kinds: tuple[_Kind, ...]
    """What is made of the columns after the plain ones; none: nothing is left to do."""
    starts: tuple[int, ...]
    """First column of each kind in the stores' output, and where the last one ends."""
    rows: tuple[Tensor | None, ...]
    """By kind, which vectors of its columns, [B * positions, D], are read: of `holes` [B, P] by
    position, -1: zeros, None: all as they are; else [n] by key.
    """
    offsets: tuple[Tensor | None, ...]
    """By kind [features * B + 1] int64, of its bags in `rows`; None for holes."""


class _Kind(NamedTuple):
    """Features of one dim with which the same is done."""

    what: int
    dim: int
    features: tuple[int, ...]
    names: tuple[str, ...]


class Arrangement:
    """The layouts of a collection."""

    def __init__(
        self,
        features: Sequence[FeatureConfig],
        dims: Sequence[int],
        layout_of: Callable[[Sequence[FeatureConfig], Sequence[int], int], StoreLayout],
        stacks: Stacks,
    ) -> None:
        """Of features, whose vectors have `dims` columns.

        Args:
          features: with distinct names.
          dims: of each.
          layout_of: plans of the stores for features (of poolings that stores know), the first
            column of each, and columns of the output.
          stacks: of the features' tables.
        """
        self._stacks = stacks
        self._features = tuple(features)
        self._dims = tuple(dims)
        self._layout_of = layout_of
        self.names = tuple(feature.name for feature in features)
        read = [feature.input or feature.name for feature in features]
        self.inputs = tuple(dict.fromkeys(read))
        """Columns of a batch, in order."""
        self._selected: Tensor | None = None
        if tuple(read) != self.inputs:
            self._selected = torch.tensor([self.inputs.index(name) for name in read])
        kind_of = [_kind_of(feature) for feature in features]
        self._kinds = _grouped(kind_of, features, dims)
        self.is_plain = (
            self._selected is None
            and not self._kinds
            and not stacks.any
            and all(feature.padding_key is None for feature in features)
        )
        """Whether batches go to the stores, and their outputs to the model, as they are."""
        paddings = [feature.padding_key for feature in features]
        self._has_padding = torch.tensor([padding is not None for padding in paddings])
        self._padding = torch.tensor([padding or 0 for padding in paddings], dtype=torch.int64)
        self._is_cut = torch.tensor([kind in {_MAX, _NONE} for kind in kind_of], dtype=torch.bool)
        self._first_cell, self._num_cells = _cells_of(self._kinds, features)
        self._with_holes = _plan_of_holes(features, self._first_cell)
        plain = [f for f, kind in enumerate(kind_of) if kind == _PLAIN]
        of_kinds = [f for kind in self._kinds if kind.what != _NONE for f in kind.features]
        self._order = _columns_in_order([*plain, *of_kinds], features, dims)
        self._plain = plain
        self._width = sum(dims[f] * (features[f].max_keys or 1) for f in [*plain, *of_kinds])
        self._positions = torch.tensor([feature.max_keys or 1 for feature in features])
        self._layout, self._starts = self._laid_out()
        is_plain = [kind == _PLAIN for kind in kind_of]
        widths = [
            dim * (feature.max_keys or 1) * plain
            for dim, feature, plain in zip(dims, features, is_plain, strict=True)
        ]
        self._factors = stacks.factors_of(widths)

    @property
    def layout(self) -> StoreLayout:
        """The stores' at this time; it grows with the longest batch."""
        return self._layout

    def arrange(self, sparse: KeyedJagged) -> Arranged:
        """A batch as the stores read it.

        Args:
          sparse: of `inputs`; keys and offsets contiguous int64, on any device.

        Raises:
          ConfigError: offsets that do not rise, weights that do not fit or are not finite, a bag
            longer than its sequence.
        """
        if self.is_plain:
            return Arranged(sparse, None, (), (), (), ())
        sparse, holes = self._without_padding(self._columns(sparse))
        if self._stacks.any:
            sparse = self._stacks.spread(sparse)
        if not len(self._kinds):
            return Arranged(sparse, None, (), (), (), ())
        cut = self._cut(sparse)
        rows: list[Tensor | None] = []
        offsets: list[Tensor | None] = []
        for kind in self._kinds:
            if kind.what == _HOLES:
                first = int(self._first_cell[kind.features[0]])
                cells = slice(first, first + self._cells_of(kind))
                rows.append(None if holes is None else holes[:, cells])
                offsets.append(None)
            else:
                of_keys, bags = self._vectors_of(kind, sparse)
                rows.append(of_keys)
                offsets.append(bags)
        kinds = self._kinds
        return Arranged(cut, self._layout, kinds, self._starts, tuple(rows), tuple(offsets))

    def finish(self, raw: Tensor, arranged: Arranged) -> tuple[Tensor, dict[str, JaggedVectors]]:
        """What the model gets of the stores' output.

        Args:
          raw: [B, columns of the layout] float32.
          arranged: the batch.

        Returns:
          [B, W], and of features of pooling `none` their vectors. Differentiable.
        """
        if not arranged.kinds:
            return self._scaled(raw), {}
        size = len(raw)
        parts = [self._scaled(raw[:, : arranged.starts[0]])]
        ragged: dict[str, JaggedVectors] = {}
        ends = arranged.starts[1:]
        each = (arranged.kinds, arranged.starts[:-1], ends, arranged.rows, arranged.offsets)
        for kind, start, end, rows, offsets in zip(*each, strict=True):
            columns = raw[:, start:end]
            if kind.what == _HOLES:
                parts.append(columns if rows is None else _with_holes(columns, rows, kind.dim))
                continue
            assert rows is not None and offsets is not None
            vectors = columns.reshape(-1, kind.dim)
            rows, offsets = rows.to(raw.device), offsets.to(raw.device)
            if kind.what == _NONE:
                ragged.update(_by_feature(kind, F.embedding(rows, vectors), offsets, size))
            elif size:
                pooled: Tensor = _Largest.apply(vectors, rows, offsets)  # type: ignore[no-untyped-call]
                by_feature = pooled.view(len(kind.features), size, kind.dim)
                parts.append(by_feature.transpose(0, 1).reshape(size, -1))
        parts = [part for part in parts if part.shape[1]]
        if not size or not parts:
            return raw.new_zeros(size, self._width) + raw.sum(), ragged
        pooled = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if self._order is not None:
            pooled = pooled.index_select(1, self._order.to(raw.device))
        return pooled, ragged

    def sequence_lengths(self, sparse: KeyedJagged) -> Tensor:
        """Keys of each bag, [F, B] int64; holes that are kept count as keys."""
        columns = self._columns(sparse)
        lengths = columns.offsets.diff().view(len(self.names), -1)
        closed = self._without_padding(columns)[0].offsets.diff().view(lengths.shape)
        return torch.where(self._on(sparse, self._first_cell >= 0)[:, None], lengths, closed)

    def _columns(self, sparse: KeyedJagged) -> KeyedJagged:
        """Checked, and with each column as often as it is read."""
        if not sparse.is_checked:
            check_weights(sparse)
            check_offsets(sparse)
            check_finite_weights(sparse)
        if self._selected is None:
            return sparse
        return replace(sparse.select(self._selected), features=self.names)

    def _without_padding(self, sparse: KeyedJagged) -> tuple[KeyedJagged, Tensor | None]:
        """Without keys that stand for nothing; and where the others were, if holes are kept."""
        if not bool(self._has_padding.any()) or not len(sparse.values):
            return sparse, None
        size, lengths = sparse.batch_size, sparse.offsets.diff()
        bag = torch.repeat_interleave(lengths)
        feature = bag // size
        is_padding = sparse.values == self._on(sparse, self._padding)[feature]
        is_padding &= self._on(sparse, self._has_padding)[feature]
        if not bool(is_padding.any()):
            return sparse, None
        kept = is_padding.logical_not()
        before = _ends(kept.long())
        offsets = before[sparse.offsets]
        cells = None
        if self._num_cells:
            check_sequences(self._with_holes, sparse)
            first = self._on(sparse, self._first_cell)[feature]
            key = (kept & (first >= 0)).nonzero()[:, 0]
            place = key - sparse.offsets[bag[key]]
            cells = torch.full((size, self._num_cells), -1, device=bag.device)
            cells[bag[key] % size, first[key] + place] = before[key] - offsets[bag[key]]
        weights = None if sparse.weights is None else sparse.weights[kept]
        return KeyedJagged(self.names, sparse.values[kept], offsets, weights), cells

    def _cut(self, sparse: KeyedJagged) -> KeyedJagged:
        """With columns of single vectors cut anew; the layout grows where it must."""
        size = sparse.batch_size
        if not size or not bool(self._is_cut.any()):
            return sparse
        ends = sparse.offsets[::size]
        needed = ends.diff().cpu().add_(size - 1).div_(size, rounding_mode="floor")
        if bool((self._is_cut & (needed > self._positions)).any()):
            grown = torch.maximum(self._positions, _rounded(needed))
            self._positions = torch.where(self._is_cut, grown, self._positions)
            self._layout, self._starts = self._laid_out()
        positions = self._on(sparse, self._positions)[:, None]
        cut = ends[:-1, None] + torch.arange(size, device=ends.device) * positions
        cut = torch.minimum(cut, ends[1:, None])
        whole = sparse.offsets[:-1].view(-1, size)
        offsets = torch.where(self._on(sparse, self._is_cut)[:, None], cut, whole).view(-1)
        return replace(
            sparse, offsets=torch.cat([offsets, ends[-1:]]), is_checked=False, is_one_hot=False
        )

    def _vectors_of(self, kind: _Kind, sparse: KeyedJagged) -> tuple[Tensor, Tensor]:
        """Which vectors a kind's keys have in its columns of the output; its bags of them."""
        size, device = sparse.batch_size, sparse.offsets.device
        features = torch.tensor(kind.features)
        positions = self._positions[features]
        first_position = positions.cumsum(0) - positions
        width = int(positions.sum())
        lengths = sparse.offsets.diff().view(len(self.names), size)[features.to(device)]
        counts = lengths.sum(1)
        of_key = torch.repeat_interleave(counts)
        key = torch.arange(len(of_key), device=device) - _ends(counts)[of_key]
        each = self._on(sparse, positions)[of_key]
        rows = key.div(each, rounding_mode="floor") * width + key % each
        rows += self._on(sparse, first_position)[of_key]
        return rows, _ends(lengths.view(-1))

    def _cells_of(self, kind: _Kind) -> int:
        return int(self._positions[list(kind.features)].sum())

    def _laid_out(self) -> tuple[StoreLayout, tuple[int, ...]]:
        """Plans and columns for the positions there are: plain features, then kind after kind."""
        positions = self._positions.tolist()
        features, columns = list(self._features), [0] * len(self._features)
        column, starts = 0, []
        for f in self._plain:
            columns[f] = column
            column += self._dims[f] * positions[f]
        for kind in self._kinds:
            starts.append(column)
            for f in kind.features:
                columns[f] = column
                column += kind.dim * positions[f]
                given = {"pooling": "sequence", "max_keys": positions[f]}
                features[f] = features[f].model_copy(update=given)
        return self._layout_of(features, columns, column), (*starts, column)

    def _scaled(self, plain: Tensor) -> Tensor:
        """Columns of the plain features, where bags of stores have more rows than keys."""
        return plain * self._factors.to(plain.device) if self._stacks.any else plain

    @staticmethod
    def _on(sparse: KeyedJagged, numbers: Tensor) -> Tensor:
        """Numbers by feature, where a batch is."""
        return numbers.to(sparse.offsets.device)


class _Largest(torch.autograd.Function):
    """nn.EmbeddingBag's `max` of bags of which no two read the same vector.

    The values and ties are torch's; its backward pass takes ten times as long.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        pooled: Tensor
        pooled, _, _, largest = torch.ops.aten._embedding_bag(
            vectors, rows, offsets, mode=_MODE_MAX, include_last_offset=True
        )
        ctx.save_for_backward(largest, offsets)
        ctx.count = len(vectors)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        largest, offsets = ctx.saved_tensors
        # That of an empty bag is no vector.
        grad = torch.where(offsets.diff()[:, None] > 0, grad, 0.0)
        spread = grad.new_zeros(ctx.count, grad.shape[1])
        return spread.scatter_add_(0, largest.clamp(min=0), grad), None, None


def _kind_of(feature: FeatureConfig) -> int:
    if feature.holes == "keep":
        return _HOLES
    return {"max": _MAX, "none": _NONE}.get(feature.pooling, _PLAIN)


def _grouped(
    kind_of: Sequence[int], features: Sequence[FeatureConfig], dims: Sequence[int]
) -> tuple[_Kind, ...]:
    groups: dict[tuple[int, int], list[int]] = {}
    for f, kind in enumerate(kind_of):
        if kind != _PLAIN:
            groups.setdefault((kind, dims[f]), []).append(f)
    return tuple(
        _Kind(kind, dim, tuple(members), tuple(features[f].name for f in members))
        for (kind, dim), members in sorted(groups.items())
    )


def _cells_of(kinds: Sequence[_Kind], features: Sequence[FeatureConfig]) -> tuple[Tensor, int]:
    """The first of each feature's positions among all that may be holes; -1: of none; and all."""
    first, cells = [-1] * len(features), 0
    for kind in kinds:
        for f in kind.features if kind.what == _HOLES else ():
            first[f] = cells
            cells += features[f].max_keys or 0
    return torch.tensor(first, dtype=torch.int64), cells


def _plan_of_holes(features: Sequence[FeatureConfig], first_cell: Tensor) -> PoolingPlan:
    """What bags are checked by before padding leaves them."""
    members = [f for f, cell in enumerate(first_cell.tolist()) if cell >= 0]
    pooled = [PooledFeature(f, 0, "sequence", 0, features[f].max_keys) for f in members]
    return PoolingPlan(tuple(pooled), 0)


def _columns_in_order(
    made: Sequence[int], features: Sequence[FeatureConfig], dims: Sequence[int]
) -> Tensor | None:
    """Which columns of the features `made`, side by side, are the output's; None: as they are."""
    wanted = sorted(made)
    if list(made) == wanted:
        return None
    widths = [dims[f] * (features[f].max_keys or 1) for f in range(len(features))]
    first, column = {}, 0
    for f in made:
        first[f] = column
        column += widths[f]
    return torch.cat([torch.arange(first[f], first[f] + widths[f]) for f in wanted])


def _with_holes(columns: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Sequences [B, P * D] with vectors moved to `rows` [B, P], -1: zeros."""
    rows = rows.to(columns.device)
    vectors = columns.view(len(columns), rows.shape[1], dim)
    moved = vectors.gather(1, rows.clamp(min=0)[:, :, None].expand(-1, -1, dim))
    return torch.where(rows[:, :, None] < 0, 0.0, moved).flatten(1)


def _by_feature(
    kind: _Kind, vectors: Tensor, offsets: Tensor, size: int
) -> dict[str, JaggedVectors]:
    first = offsets[::size] if size else offsets.new_zeros(len(kind.names) + 1)
    parts = torch.split(vectors, first.diff().tolist())
    bags = offsets[:-1].view(len(kind.names), size)
    ends = torch.cat([bags, first[1:, None]], 1) - first[:-1, None]
    return {
        name: JaggedVectors(part, own)
        for name, part, own in zip(kind.names, parts, ends, strict=True)
    }


def _ends(lengths: Tensor) -> Tensor:
    """[n + 1] int64: 0, and the sums up to each."""
    ends = lengths.new_zeros(lengths.numel() + 1)
    torch.cumsum(lengths, 0, out=ends[1:])
    return ends


def _rounded(needed: Tensor) -> Tensor:
    """The next of 1, 2, 3, 4, 6, 8, 12, ...: so that layouts do not change with every batch."""
    power = 2 ** needed.clamp(min=1).double().log2().floor().long()
    half = power + power // 2
    return torch.where(needed <= power, power, torch.where(needed <= half, half, 2 * power))
