"""The stores of a collection: which serves which table and feature, calls to all, their sizes."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penstock import _core
from penstock.config import FeatureConfig, TableConfig
from penstock.embedding.checks import check_batch
from penstock.embedding.collection.weight_gradient import ReadVectors
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import (
    COUNT_BYTES,
    NUMBERS,
    Clock,
    overhead_bytes,
    retains,
    share_of,
)
from penstock.embedding.shapes.arrangement import Arrangement, StoreLayout
from penstock.embedding.shapes.hash_stack import Stacks
from penstock.embedding.sharded.bags import Bags, HostBags
from penstock.embedding.sharded.defaults import PartStore
from penstock.embedding.sharded.exchange import Collective
from penstock.embedding.sharded.placement import ranks_of_whole_tables
from penstock.embedding.sharded.store import Ranks, ShardedStore
from penstock.embedding.store import PooledFeature, PoolingPlan, RowLayout, Store, TableCounters
from penstock.errors import CapacityError, ConfigError
from penstock.kernels.device import kernel_device
from penstock.types import KeyedJagged

_MOST_SHOWN = 20


class TableStats(NamedTuple):
    """Size of one table."""

    name: str
    rows: int
    bytes: int
    """Values, optimizer state and marks of use."""
    memory_bytes: int
    """With this table's share of the index and of free slots."""
    retention: RetentionStats | None = None
    """Of a table with admission, eviction or a budget."""
    is_whole: bool = False
    """Over several ranks one has all rows, and all of the budget."""

    def values(self) -> dict[str, int | float]:
        """By the names that events have."""
        rules = {} if self.retention is None else self.retention._asdict()
        return {"rows": self.rows, "bytes": self.bytes, **rules}


class RetentionStats(NamedTuple):
    """What a table's rules have done since the beginning."""

    admitted: int
    """Rows that training made."""
    refused: int
    """Keys read as the default row in training, each time."""
    evicted: int
    """Rows."""
    evicted_age: float
    """Mean time that evicted rows had not been used for, in the unit of the eviction; 0: none."""
    dropped: int
    """Gradients of rows that left between look-up and update."""
    candidates: int
    """Keys that are counted but have no row yet."""
    budget_used: float
    """Share of `max_bytes`; NaN: there is none."""


class TableGroup(NamedTuple):
    """Tables of one row layout: one store, one call for all of them."""

    store: Store
    plan: PoolingPlan
    trainable: bool


class TableStores:
    """Every table of a collection, in as few stores as their row layouts allow."""

    def __init__(
        self,
        tables: Sequence[TableConfig],
        features: Sequence[FeatureConfig],
        *,
        num_threads: int,
        device: torch.device,
        ranks: Ranks | None = None,
        **options: Any,
    ) -> None:
        """Makes empty tables.

        Args:
          tables: with distinct names.
          features: of these tables.
          num_threads: of a store on the CPU.
          device: where the rows live.
          ranks: over whom they are spread; None: all are here.
          options: of each store: `seed`, `deterministic`.

        Raises:
          ConfigError: no such GPU, or no Triton.
        """
        self.is_on_gpu = device.type != "cpu"
        self.device = kernel_device(device) if self.is_on_gpu else device
        """Of rows and outputs. In Triton's interpreter that of stores on a GPU is the CPU."""
        self._names = [table.name for table in tables]
        self._places = places_of(tables)
        self._outputs = _core.buffer_pool()
        tables_of: dict[int, list[TableConfig]] = {}
        for table in tables:
            tables_of.setdefault(self._places[table.name][0], []).append(table)
        stores = []
        for its_tables in tables_of.values():
            store: PartStore
            held = [share_of(table, ranks.part[1] if ranks else 1) for table in its_tables]
            if self.is_on_gpu:
                # Needs Triton, which not everyone has.
                from penstock.embedding.gpu_store import GpuStore

                store = GpuStore(held, device=device, **options)
            else:
                store = HostStore(held, num_threads=num_threads, **options)
            whole: Store = store
            if ranks is not None:
                wholes = ranks_of_whole_tables(tables, features, ranks.part[1])
                whole = self._spread(store, ranks, num_threads, wholes, options["deterministic"])
            stores.append((whole, its_tables[0].trainable))
        self._num_stores = len(stores)
        dim_of = {table.name: table.dim for table in tables}
        dims = [dim_of[feature.table] for feature in features]
        stack_of = {table.name: table.hash_stack for table in tables}
        stacks = Stacks(features, [stack_of[feature.table] for feature in features])
        self.arrangement = Arrangement(features, dims, self._layout_of, stacks)
        plans = self.arrangement.layout.plans
        self.groups = tuple(
            TableGroup(store, plan, trainable)
            for (store, trainable), plan in zip(stores, plans, strict=True)
        )

    def _spread(
        self,
        store: PartStore,
        ranks: Ranks,
        num_threads: int,
        wholes: Mapping[str, int],
        deterministic: bool,
    ) -> ShardedStore:
        dim = store.layout.dim
        bags: Bags = HostBags(dim, num_threads)
        if self.is_on_gpu:
            from penstock.embedding.sharded.device_bags import DeviceBags

            bags = DeviceBags(dim, self.device, deterministic=deterministic)
        exchange = Collective(ranks.group, self.device)
        return ShardedStore(
            store,
            bags,
            exchange,
            device=self.device,
            deterministic=deterministic,
            reduction=ranks.reduction,
            wholes=wholes,
        )

    def _layout_of(
        self, features: Sequence[FeatureConfig], columns: Sequence[int], width: int
    ) -> StoreLayout:
        plans = plans_of(self._places, features, columns)
        groups = range(self._num_stores)
        return StoreLayout(
            tuple(PoolingPlan(plans.get(group, ()), width) for group in groups), width
        )

    @property
    def trained(self) -> list[tuple[Store, PoolingPlan]]:
        """What an update changes."""
        return [(store, plan) for store, plan, trainable in self.groups if trainable]

    def find_table(self, name: str) -> tuple[Store, int]:
        """The store of a table, and its number there.

        Raises:
          ConfigError: there is no such table.
        """
        if name not in self._places:
            raise ConfigError(f"no table {name!r}; {nearest(name, self._names)}")
        group, number = self._places[name]
        return self.groups[group].store, number

    def on_device(
        self,
        sparse: KeyedJagged,
        layout: StoreLayout | None = None,
        *,
        non_blocking: bool = False,
    ) -> KeyedJagged:
        """An arranged batch where the stores take it; on the CPU it is the batch itself.

        Raises:
          ConfigError: it cannot be looked up, by some plan.
        """
        is_there = sparse.is_checked and sparse.values.device == self.device
        if is_there or not self.is_on_gpu:
            return sparse
        for plan in (layout or self.arrangement.layout).plans:
            check_batch(plan, sparse)
        is_one_hot = bool((sparse.offsets.diff() == 1).all())
        moved = sparse.to(self.device, non_blocking=non_blocking)
        return replace(moved, is_checked=True, is_one_hot=is_one_hot)

    def advance(self, clock: Clock) -> None:
        """Moves the time of trained tables on."""
        for store, _ in self.trained:
            store.advance(clock)

    def pooled_lookup(
        self,
        sparse: KeyedJagged,
        layout: StoreLayout | None = None,
        *,
        insert: bool,
        reads_vectors: bool = False,
    ) -> tuple[Tensor, list[Any]]:
        """One look-up in every store; with `insert` new keys of trained tables get rows.

        `reads_vectors`: whether `read_looked_up` comes next.

        Returns:
          [B, columns of the layout] float32, and what each store needs to know of it for its
          gradient.
        """
        plans, width = layout or self.arrangement.layout
        out = self._output(sparse.batch_size, width)
        lookups = [
            store.pooled_lookup(
                plan, sparse, insert=insert and trainable, out=out, reads_vectors=reads_vectors
            )
            for (store, _, trainable), plan in zip(self.groups, plans, strict=True)
        ]
        return out, lookups

    def read_looked_up(self, sparse: KeyedJagged, lookups: Sequence[Any]) -> ReadVectors:
        """What the gradient of the weights needs of a look-up just done."""
        pairs = zip(self.groups, lookups, strict=True)
        vectors = [group.store.read_looked_up(lookup) for group, lookup in pairs]
        return ReadVectors.of(sparse, [lookup.plan for lookup in lookups], vectors)

    def _output(self, size: int, width: int) -> Tensor:
        """Float32, undefined."""
        if self.is_on_gpu:
            return torch.empty(size, width, dtype=torch.float32, device=self.device)
        rows = self._outputs.take_rows(size, width)
        if rows is None:
            raise CapacityError(f"no memory for the output of a batch of {size}")
        return torch.from_numpy(rows)

    def table_stats(self) -> list[TableStats]:
        """Rows and bytes of each table, in the order of the collection's."""
        stats = {}
        for store, _, _ in self.groups:
            memory, counters = store.memory(), store.counters()
            for number, table in enumerate(store.tables):
                rows = int(counters.rows[number])
                share = rows / memory.rows if memory.rows else 0.0
                used = memory.row_bytes + memory.index_bytes
                stats[table.name] = TableStats(
                    table.name,
                    rows,
                    rows * store.layout.row_bytes,
                    round(share * used),
                    _retention_stats(store, number, counters) if retains(table) else None,
                    table.placement == "whole",
                )
        return [stats[name] for name in self._names]

    def check_invariants(self) -> None:
        """Raises AssertionError if a store is inconsistent. Reads everything: for tests."""
        for store, _, _ in self.groups:
            store.check_invariants()


def places_of(tables: Sequence[TableConfig]) -> dict[str, tuple[int, int]]:
    """Of each table by name its group, and its number there.

    A group is of one row layout, and trained or frozen as a whole.
    """
    groups: dict[tuple[RowLayout, bool], int] = {}
    sizes: list[int] = []
    places = {}
    for table in tables:
        group = groups.setdefault((RowLayout.of(table), table.trainable), len(groups))
        if group == len(sizes):
            sizes.append(0)
        places[table.name] = group, sizes[group]
        sizes[group] += 1
    return places


def plans_of(
    places: Mapping[str, tuple[int, int]],
    features: Sequence[FeatureConfig],
    columns: Sequence[int],
) -> dict[int, tuple[PooledFeature, ...]]:
    """The features that each group serves, of those that serve any.

    Args:
      places: from `places_of`.
      features: of tables there.
      columns: the first of each.
    """
    served: dict[int, list[PooledFeature]] = {}
    for f, (feature, column) in enumerate(zip(features, columns, strict=True)):
        group, number = places[feature.table]
        assert feature.pooling != "none"
        one = PooledFeature(f, number, feature.pooling, column, feature.max_keys)
        served.setdefault(group, []).append(one)
    return {group: tuple(ones) for group, ones in served.items()}


def refuse_duplicates(what: str, names: Sequence[str]) -> None:
    """Raises ConfigError with the names that are given twice."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigError(f"{what} names must differ; given twice: {', '.join(twice)}")


def unknown_table(feature: FeatureConfig, known: Sequence[str]) -> str:
    """What is wrong with a feature whose table is not among those `known`."""
    return f"feature {feature.name!r}: no table {feature.table!r}; {nearest(feature.table, known)}"


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that was meant, or those there are."""
    near = difflib.get_close_matches(name, known, n=1)
    more = ", ..." if len(known) > _MOST_SHOWN else ""
    tables = ", ".join(known[:_MOST_SHOWN]) or "none"
    return f"did you mean {near[0]!r}?" if near else f"tables: {tables}{more}"


def _retention_stats(store: Store, number: int, counters: TableCounters) -> RetentionStats:
    """Of a table by its number in a store, from the store's counters."""
    table = store.tables[number]
    numbers = dict(zip(NUMBERS, counters.numbers[number].tolist(), strict=True))
    candidates = int(counters.candidates[number])
    row_bytes = store.layout.row_bytes + overhead_bytes(table)
    used = int(counters.rows[number]) * row_bytes + candidates * COUNT_BYTES
    return RetentionStats(
        admitted=numbers["admitted"],
        refused=numbers["refused"],
        evicted=numbers["evicted"],
        evicted_age=numbers["evicted_age"] / max(1, numbers["evicted"]),
        dropped=numbers["dropped"],
        candidates=candidates,
        budget_used=math.nan if table.max_bytes is None else used / table.max_bytes,
    )
