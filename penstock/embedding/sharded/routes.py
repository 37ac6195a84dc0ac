"""Which keys of a batch go to which rank, and how what comes is laid out for a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import device as Device

from penstock import _core
from penstock.embedding.sharded.shard_map import ShardMap, bucket_of, table_words
from penstock.embedding.store import PoolingPlan
from penstock.types import KeyedJagged


class Wanted(NamedTuple):
    """Keys of a batch, by owner and table."""

    keys: Tensor
    """[U] int64, those of one owner and table side by side."""
    counts: Tensor
    """[ranks, tables] int64."""
    numbers: Tensor
    """[N] int64 by place in the packed batch: which of `keys`; 0 for keys of other stores."""
    num_read: int
    """Places of the plan's features."""


class Owners(NamedTuple):
    """Whose the keys of some tables are."""

    of_bucket: Tensor
    """[buckets] int64 ranks."""
    words: Tensor
    """[T] int64, of the tables; see `shard_map.table_words`."""
    of_table: Tensor
    """[T] int64: the rank that has a whole table; -1: its rows go by bucket."""
    wholes: tuple[int, ...]
    """The same."""
    num_ranks: int

    @classmethod
    def by(
        cls, shard_map: ShardMap, names: Sequence[str], wholes: Mapping[str, int], device: Device
    ) -> Owners:
        """Of tables by name, of which some are whole."""
        of_table = tuple(wholes.get(name, -1) for name in names)
        return cls(
            shard_map.on(device),
            table_words(names).to(device),
            torch.tensor(of_table, dtype=torch.int64, device=device),
            of_table,
            shard_map.num_ranks,
        )

    def of(self, tables: Tensor, keys: Tensor) -> Tensor:
        """[n] int64 ranks of keys [n] of tables [n]."""
        by_bucket = self.of_bucket[bucket_of(self.words[tables], keys)]
        if max(self.wholes, default=-1) < 0:
            return by_bucket
        whole = self.of_table[tables]
        return torch.where(whole < 0, by_bucket, whole)

    def served(self, plan: PoolingPlan) -> Served:
        """What each rank sums up of a plan's features."""
        return served_of(plan, self.wholes, self.num_ranks)

    def places_of(self, rank: int, table: int, keys: Tensor) -> Tensor:
        """[m] int64: which of the keys [n] of a table are a rank's."""
        return (self.of(torch.full_like(keys, table), keys) == rank).nonzero()[:, 0]


class Served(NamedTuple):
    """The features of a plan whose rows each rank has, or some of them."""

    features: tuple[tuple[int, ...], ...]
    """Of each rank, by their numbers in the plan; one at least where there are any, which may have
    no key there.
    """
    places: NDArray[np.int64]
    """[ranks * F]: where each feature is among those of a rank; -1: it is not."""
    counts: Tensor
    """[ranks] int64."""

    def number(self, rank: int) -> int:
        """Of features that a rank serves."""
        return len(self.features[rank])

    def elsewhere(self, rank: int) -> int:
        """Sums of a sample that come from other ranks."""
        return int(self.counts.sum() - self.counts[rank])


@lru_cache(maxsize=64)
def served_of(plan: PoolingPlan, wholes: tuple[int, ...], num_ranks: int) -> Served:
    """Of a plan whose tables are whole on these ranks, or spread (-1)."""
    of_feature = [wholes[feature.table] for feature in plan.features]
    any_one = (0,) if of_feature else ()
    features = [
        tuple(f for f, whole in enumerate(of_feature) if whole in (-1, rank)) or any_one
        for rank in range(num_ranks)
    ]
    places = np.full((num_ranks, len(of_feature)), -1)
    for rank, some in enumerate(features):
        places[rank, some] = np.arange(len(some))
    return Served(tuple(features), places.ravel(), torch.tensor([len(some) for some in features]))


def wanted_of(plan: PoolingPlan, batch: KeyedJagged, owners: Owners, *, once: bool) -> Wanted:
    """The keys that a plan reads of a batch.

    Args:
      plan: not by key.
      batch: checked.
      owners: of the tables of the plan's store.
      once: a key of a table that occurs several times travels once.
    """
    num_keys, device = batch.values.numel(), batch.values.device
    num_tables = owners.words.numel()
    num_groups = owners.num_ranks * num_tables
    if not batch.batch_size or not plan.features:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        counts = torch.zeros(owners.num_ranks, num_tables, dtype=torch.int64)
        return Wanted(empty, counts, torch.zeros(num_keys, dtype=torch.int64, device=device), 0)
    of_feature = _tables_of(plan, len(batch.features), device)
    per_feature = batch.offsets[:: batch.batch_size].diff()
    tables = torch.repeat_interleave(of_feature, per_feature, output_size=num_keys)
    keys, places = batch.values, None
    if len(plan.features) < len(batch.features):
        places = (tables >= 0).nonzero()[:, 0]
        keys, tables = keys[places], tables[places]
    num_read = keys.numel()
    group = owners.of(tables, keys) * num_tables + tables
    keys, counts, own = (_on_host if device.type == "cpu" else _on_device)(
        keys, group, num_groups, once=once
    )
    if places is not None:
        own = torch.zeros_like(batch.values).index_copy_(0, places, own)
    return Wanted(keys, counts.view(owners.num_ranks, num_tables), own, num_read)


def _on_host(
    keys: Tensor, group: Tensor, num_groups: int, *, once: bool
) -> tuple[Tensor, Tensor, Tensor]:
    made = _core.grouped_keys(keys.numpy(), group.numpy(), num_groups, once)
    found, counts, numbers = (torch.from_numpy(part) for part in made)
    return found, counts, numbers


def _on_device(
    keys: Tensor, group: Tensor, num_groups: int, *, once: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_core.grouped_keys`, by sorting; with `once` keys of a group are in rising order."""
    if once:
        order = torch.argsort(keys, stable=True)
        order = order[torch.argsort(group[order], stable=True)]
        keys, group = keys[order], group[order]
        is_first = torch.ones_like(keys, dtype=torch.bool)
        is_first[1:] = (keys[1:] != keys[:-1]) | (group[1:] != group[:-1])
        number = is_first.cumsum(0) - 1
        keys, group = keys[is_first], group[is_first]
    else:
        order = torch.argsort(group, stable=True)
        keys, group = keys[order], group[order]
        number = torch.arange(keys.numel(), device=keys.device)
    own = torch.empty_like(number)
    own[order] = number
    return keys, torch.bincount(group, minlength=num_groups).cpu(), own


@lru_cache(maxsize=64)
def _tables_of(plan: PoolingPlan, num_features: int, device: torch.device) -> Tensor:
    """[F] int64 table of each packed feature; -1: another store's."""
    tables = [-1] * num_features
    for feature in plan.features:
        tables[feature.packed_feature] = feature.table
    return torch.tensor(tables, dtype=torch.int64, device=device)


class Arrived(NamedTuple):
    """Keys that ranks want of this one, as its store takes them."""

    block: KeyedJagged
    """A bag for each table; see `PoolingPlan.by_key`."""
    order: Tensor
    """[M] int64: which of the keys, as they came, is at each place of the block."""
    per_rank: list[int]
    """Keys of each rank."""

    def as_they_came(self, rows: Tensor) -> Tensor:
        """Rows of the block [M, ...] in the order in which its keys came."""
        came = torch.empty_like(rows)
        came[self.order] = rows
        return came

    def as_block(self, rows: Tensor) -> Tensor:
        """Inverse of `as_they_came`."""
        return rows[self.order]


def arrived(names: tuple[str, ...], keys: Tensor, counts: Tensor) -> Arrived:
    """Lays out keys [M] int64, `counts` [ranks, tables] int64 of each rank and table, as a block.

    Those of one table are in the order of ranks.
    """
    num_tables = counts.shape[1]
    device = keys.device
    # Where each (rank, table) begins among the keys that came, and in the block: no sorting.
    came = counts.flatten().cumsum(0).view_as(counts) - counts
    sizes = counts.t().flatten()
    shifts = came.t().flatten() - (sizes.cumsum(0) - sizes)
    order = torch.repeat_interleave(shifts, sizes, output_size=keys.numel())
    order = (order + torch.arange(keys.numel())).to(device)
    offsets = torch.zeros(num_tables + 1, dtype=torch.int64)
    torch.cumsum(counts.sum(0), 0, out=offsets[1:])
    block = KeyedJagged(names, keys[order], offsets.to(device), is_checked=True)
    return Arrived(block, order, counts.sum(1).tolist())
