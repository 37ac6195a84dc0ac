"""Which items the samples have, and every different one of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.types import Batch, KeyedJagged

MAX_ITEMS = 1 << 20
"""Items that a catalogue keeps; of more, a uniform sample by their hash."""
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685


class _Bags(NamedTuple):
    """Bags of several features of n samples."""

    keys: Tensor
    """[N] int64, feature by feature."""
    lengths: Tensor
    """[F, n] int64"""
    weights: Tensor | None
    """[N] of the keys."""


def item_ids(sparse: KeyedJagged, features: Sequence[int]) -> Tensor:
    """Hashes the items of a batch: equal where all keys of the item's features are.

    Args:
      sparse: [B] samples.
      features: places of the item's features.

    Returns:
      [B] int64. The order of the keys of a bag counts; their weights do not.
    """
    size, device = sparse.batch_size, sparse.values.device
    bags = _take(sparse, features, torch.arange(size, device=device))
    lengths = bags.lengths.flatten()
    bag = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    place = torch.arange(len(bag), device=device) - (lengths.cumsum(0) - lengths)[bag]
    of_bag = torch.zeros(len(lengths), dtype=torch.int64, device=device)
    of_bag.index_add_(0, bag, _mixed(bags.keys + (place + 1) * _GOLDEN))
    number = torch.arange(len(features), device=device).repeat_interleave(size)
    of_bag += number * _GOLDEN + lengths
    return _mixed(of_bag).view(len(features), size).sum(0)


class Catalogue:
    """Every different item of the batches given, with the keys of its features.

    Of an item that comes with different weights of its keys, the first are kept. At most
    `max_items` are kept: when more come, half of all are dropped, chosen by their hash, so that
    the rest is a uniform sample whatever the order.

    Args:
      features: all, in the order of the batches.
      item_features: places of the item's.
      max_items: most items that are kept.
    """

    def __init__(
        self,
        features: tuple[str, ...],
        item_features: Sequence[int],
        max_items: int = MAX_ITEMS,
    ) -> None:
        self._features = features
        self._item_features = tuple(item_features)
        self._max_items = max_items
        self._halvings = 0
        self.ids = torch.zeros(0, dtype=torch.int64)
        """[items] hashes, see `item_ids`; ascending."""
        empty = torch.zeros(0, dtype=torch.int64)
        self._bags = _Bags(empty, torch.zeros(len(self._item_features), 0, dtype=torch.int64), None)

    @classmethod
    def of(
        cls,
        batches: Iterable[Batch],
        features: tuple[str, ...],
        item_features: Sequence[int],
        max_items: int = MAX_ITEMS,
    ) -> Catalogue:
        """The items of all batches."""
        made = cls(features, item_features, max_items)
        for batch in batches:
            made.add(batch.sparse)
        return made

    @property
    def is_sampled(self) -> bool:
        """Whether there were too many items to keep them all."""
        return self._halvings > 0

    def add(self, sparse: KeyedJagged) -> None:
        """Adds the items of a batch that are not there yet."""
        ids, row = _first_of_each(item_ids(sparse, self._item_features))
        is_new = self._is_kept(ids) & ~torch.isin(ids, self.ids, assume_unique=True)
        if not bool(is_new.any()):
            return
        self._join(ids[is_new], _take(sparse, self._item_features, row[is_new]))
        while len(self.ids) > self._max_items:
            self._halvings += 1
            kept = self._is_kept(self.ids).nonzero()[:, 0]
            packed = self.packed(kept)
            self.ids = self.ids[kept]
            self._bags = _take(packed, self._item_features, torch.arange(len(kept)))

    def packed(self, items: Tensor) -> KeyedJagged:
        """The items of those places as a batch, with empty bags in all other features."""
        bags = _gathered(self._bags, items)
        lengths = torch.zeros(len(self._features), len(items), dtype=torch.int64)
        lengths[list(self._item_features)] = bags.lengths
        offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
        torch.cumsum(lengths.flatten(), 0, out=offsets[1:])
        return KeyedJagged(self._features, bags.keys, offsets, bags.weights)

    def _is_kept(self, ids: Tensor) -> Tensor:
        return _mixed(ids + _GOLDEN) & ((1 << min(self._halvings, 62)) - 1) == 0

    def _join(self, ids: Tensor, new: _Bags) -> None:
        old = self._bags
        weights = None
        if old.weights is not None or new.weights is not None:
            parts = (
                torch.ones(len(part.keys)) if part.weights is None else part.weights
                for part in (old, new)
            )
            weights = _by_feature(old.lengths, new.lengths, *parts)
        joined = _Bags(
            _by_feature(old.lengths, new.lengths, old.keys, new.keys),
            torch.cat((old.lengths, new.lengths), dim=1),
            weights,
        )
        self.ids, order = torch.cat((self.ids, ids)).sort()
        self._bags = _gathered(joined, order)


def _by_feature(old_lengths: Tensor, new_lengths: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Joins the keys of two sets of bags so that each feature's lie together."""
    of_feature = torch.cat((old_lengths.sum(1), new_lengths.sum(1)))
    feature = torch.arange(len(old_lengths)).repeat(2).repeat_interleave(of_feature)
    return torch.cat((old, new))[feature.argsort(stable=True)]


def _take(sparse: KeyedJagged, features: Sequence[int], rows: Tensor) -> _Bags:
    """The bags of some features of some samples."""
    numbers = torch.tensor(features, dtype=torch.int64, device=rows.device)
    chosen = numbers.unsqueeze(1) * sparse.batch_size + rows
    return _keys_at(sparse.values, sparse.weights, sparse.offsets, chosen)


def _gathered(bags: _Bags, items: Tensor) -> _Bags:
    """The bags of some items."""
    features, count = bags.lengths.shape
    offsets = torch.zeros(features * count + 1, dtype=torch.int64)
    torch.cumsum(bags.lengths.flatten(), 0, out=offsets[1:])
    chosen = torch.arange(features).unsqueeze(1) * count + items
    return _keys_at(bags.keys, bags.weights, offsets, chosen)


def _keys_at(keys: Tensor, weights: Tensor | None, offsets: Tensor, bags: Tensor) -> _Bags:
    """Copies bags [F, n], by their numbers, from CSR form."""
    firsts, lengths = offsets[bags].flatten(), offsets.diff()[bags]
    flat = lengths.flatten()
    places = torch.repeat_interleave(firsts - (flat.cumsum(0) - flat), flat)
    places += torch.arange(len(places), device=places.device)
    return _Bags(keys[places], lengths, None if weights is None else weights[places])


def _first_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different values, ascending, and where each comes first."""
    ordered, order = ids.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first], order[is_first]


def _mixed(values: Tensor) -> Tensor:
    """SplitMix64's finalizer, on int64 that wrap."""
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * _MIX_1
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * _MIX_2
    return values ^ ((values >> 31) & ((1 << 33) - 1))
