"""Plain Python rows in a dictionary: the oracle that the contract suite compares every store with.

Slow and obvious on purpose. Pooling and updates run in numpy, one row after the other; sums are in
float64, so that
fused kernels are compared with something better than themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from penstock.config import AdmitFrequent, TableConfig
from penstock.embedding import checks
from penstock.embedding.dict_table import DictRow, DictTable, FloatArray
from penstock.embedding.retention import (
    NUMBERS,
    Clock,
    RetentionState,
    admission_seed,
    default_of,
    limits_of,
    over_budget,
    refuses,
    retains,
)
from penstock.embedding.rules import optimizer
from penstock.embedding.rules.rounding import round_update
from penstock.embedding.store import (
    Candidates,
    Cursor,
    DefaultGradients,
    FindResult,
    PooledFeature,
    PooledGradient,
    PooledLookup,
    PoolingPlan,
    RowLayout,
    StoreMemory,
    TableCounters,
    TableRows,
    own_copy,
)
from penstock.errors import CapacityError
from penstock.types import KeyedJagged

Item = TypeVar("Item")
SMALLEST_DIVISOR = np.finfo(np.float32).tiny
"""A smaller sum of weights counts as 0: its inverse is beyond float32."""


class DictLookup(PooledLookup):
    """What a look-up leaves for the update: the batch, copied; its keys are looked up again."""

    num_missing = 0
    is_applied = False

    def __init__(self, store: DictStore, plan: PoolingPlan, batch: KeyedJagged) -> None:
        """Copies the batch."""
        super().__init__(store, plan, batch)
        self.batch = own_copy(batch, torch.device("cpu"))
        self.on_default: set[tuple[int, int]] = set()
        """(table, key) that read the default row."""

    def reads_default(self) -> Tensor:
        """See `PooledLookup`."""
        reads = torch.zeros(self.num_keys, dtype=torch.bool)
        for feature in self.plan.features:
            place = int(self.batch.offsets[feature.packed_feature])
            for _, keys, _ in _bags(self.plan, self.batch, feature):
                reads[place] = (feature.table, int(keys)) in self.on_default
                place += 1
        return reads


class DictStore:
    """Satisfies `Store`; rows are kept in float64, as numbers of the table's dtype.

    Those of float32 tables are not rounded.
    """

    def __init__(self, tables: Sequence[TableConfig], *, seed: int = 0) -> None:
        self.tables = tuple(tables)
        self.layout = RowLayout.of(tables[0])
        self._seed = seed
        self._version = 0
        self._step = 0
        self._tables = []
        for table in tables:
            value = torch.full((self.layout.dim,), default_of(table)).to(self.layout.dtype)
            default = DictRow(
                value.double().numpy(),
                np.full(self.layout.state_dim, optimizer.initial_state(table.optimizer)),
            )
            limits = limits_of(table, self.layout.row_bytes)
            draws = admission_seed(seed, table.name)
            self._tables.append(DictTable(table, limits, draws, default))

    def _insert(self, table: int, keys: list[int], *, explicit: bool = False) -> None:
        """Gives rows to the absent keys, where admitted."""
        held = self._tables[table]
        absent = held.admit(keys, self._step, explicit=explicit)
        if any(key not in held.rows for key in keys):
            self._version += 1
        held.rows.update(zip(absent, self._tables[table].initial(absent, self._seed), strict=True))

    def _read(self, table: int, keys: list[int]) -> list[DictRow]:
        held = self._tables[table]
        absent = [key for key in dict.fromkeys(keys) if key not in held.rows]
        if refuses(held.config):
            return [held.rows.get(key, held.default) for key in keys]
        initial = dict(zip(absent, self._tables[table].initial(absent, self._seed), strict=True))
        return [held.rows[key] if key in held.rows else initial[key] for key in keys]

    def find(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find`."""
        held, rows = self._tables[table].rows, self._read(table, keys.tolist())
        return FindResult(
            _stack([row.value for row in rows], self.layout.dim),
            _stack([row.state for row in rows], self.layout.state_dim),
            torch.tensor([key in held for key in keys.tolist()], dtype=torch.bool),
        )

    def find_or_insert(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find_or_insert`."""
        held = self._tables[table].rows
        found = torch.tensor([key in held for key in keys.tolist()], dtype=torch.bool)
        self._insert(table, keys.tolist())
        return self.find(table, keys)._replace(found=found)

    def insert_or_assign(self, table: int, rows: TableRows) -> int:
        """See `Store.insert_or_assign`."""
        rows = checks.checked_rows(rows, self.layout, torch.device("cpu"))
        held, keys = self._tables[table], rows.keys.tolist()
        before = set(held.rows)
        self._insert(table, keys, explicit=True)
        self._version += 1
        values = rows.values.to(self.layout.dtype).double().numpy()
        state = rows.state.double().numpy()
        for i, key in enumerate(keys):
            if key in held.rows:
                row = held.rows[key] = DictRow(values[i].copy(), state[i].copy())
                row.last_use = held.numbers["now"]
                if rows.usage is not None:
                    last_use, row.uses = [*rows.usage[i].tolist(), 0][:2]
                    held.numbers["ahead"] += last_use > row.last_use
                    row.last_use = min(last_use, row.last_use)
        if any(key not in held.rows for key in keys):
            raise CapacityError(over_budget(held.config, held.limits))
        return len(set(keys) - before)

    def erase(self, table: int, keys: Tensor) -> int:
        """See `Store.erase`."""
        self._version += 1
        rows = self._tables[table].rows
        return sum(rows.pop(key, None) is not None for key in keys.tolist())

    def export_batch(self, table: int, cursor: Cursor, max_rows: int) -> tuple[TableRows, Cursor]:
        """See `Store.export_batch`."""
        part, after = _export(self._tables[table].rows, self._version, cursor, max_rows)
        usage = [[row.last_use, row.uses][: self.layout.usage_dim] for row in part.values()]
        rows = TableRows(
            torch.tensor(list(part), dtype=torch.int64),
            _stack([row.value for row in part.values()], self.layout.dim).to(self.layout.dtype),
            _stack([row.state for row in part.values()], self.layout.state_dim),
            torch.tensor(usage, dtype=torch.int64).reshape(len(part), self.layout.usage_dim)
            if self.layout.usage_dim
            else None,
        )
        return rows, after

    def num_rows(self, table: int) -> int:
        """See `Store.num_rows`."""
        return len(self._tables[table].rows)

    def set_learning_rate(self, table: int, learning_rate: float) -> None:
        """See `Store.set_learning_rate`."""
        checks.check_table(table, self.tables)
        self.tables = optimizer.with_learning_rate(self.tables, table, learning_rate)

    def advance(self, clock: Clock) -> None:
        """See `Store.advance`."""
        for table in self._tables:
            if table.advance(clock):
                self._version += 1
        self._step = max(self._step, clock.step)

    def num_candidates(self, table: int) -> int:
        """See `Store.num_candidates`."""
        return len(self._tables[table].candidates)

    def export_candidates(
        self, table: int, cursor: Cursor, max_keys: int
    ) -> tuple[Candidates, Cursor]:
        """See `Store.export_candidates`."""
        part, after = _export(self._tables[table].candidates, self._version, cursor, max_keys)
        keys = torch.tensor(list(part), dtype=torch.int64)
        return Candidates(keys, torch.tensor(list(part.values()), dtype=torch.int64)), after

    def import_candidates(self, table: int, candidates: Candidates) -> None:
        """See `Store.import_candidates`."""
        candidates = checks.checked_candidates(candidates, torch.device("cpu"))
        self._version += 1
        held = self._tables[table]
        if not isinstance(held.config.admission, AdmitFrequent):
            return
        for key, count in zip(candidates.keys.tolist(), candidates.counts.tolist(), strict=True):
            if key in held.rows:
                continue
            is_full = len(held.candidates) >= held.limits.max_candidates
            if is_full and key not in held.candidates:
                raise CapacityError(over_budget(held.config, held.limits))
            held.candidates[key] = count

    def counters(self) -> TableCounters:
        """See `Store.counters`."""
        return TableCounters(
            np.array([len(table.rows) for table in self._tables]),
            np.array([len(table.candidates) for table in self._tables]),
            np.array([[table.numbers[name] for name in NUMBERS] for table in self._tables]),
        )

    def retention_state(self, table: int) -> RetentionState:
        """See `Store.retention_state`."""
        held = self._tables[table]
        value = _stack([held.default.value], self.layout.dim)[0]
        state = _stack([held.default.state], self.layout.state_dim)[0]
        return RetentionState(value, state, dict(held.numbers))

    def set_retention_state(self, table: int, state: RetentionState) -> None:
        """See `Store.set_retention_state`."""
        state = checks.checked_state(state, self.layout, torch.device("cpu"))
        held = self._tables[table]
        value = state.default_value.to(self.layout.dtype).double()
        default_state = state.default_state.double()
        held.default = DictRow(value.numpy().copy(), default_state.numpy().copy())
        held.numbers = dict(state.numbers)
        self._step = max(self._step, held.numbers["step"])

    def pooled_lookup(
        self,
        plan: PoolingPlan,
        batch: KeyedJagged,
        *,
        insert: bool,
        out: Tensor,
        reads_vectors: bool = False,
    ) -> DictLookup:
        """See `Store.pooled_lookup`."""
        fit = {"dim": self.layout.dim, "num_tables": len(self.tables)}
        checks.check_lookup(plan, batch, out, device=torch.device("cpu"), **fit)
        checks.check_offsets(batch)
        checks.check_sequences(plan, batch)
        checks.check_finite_weights(batch)
        lookup = DictLookup(self, plan, batch)
        keys_of: dict[int, list[int]] = {feature.table: [] for feature in plan.features}
        for feature in plan.features:
            for _, keys, _ in _bags(plan, batch, feature):
                keys_of[feature.table] += keys.tolist()
        for table, all_keys in keys_of.items():
            if insert:
                self._insert(table, all_keys)
            absent = [key for key in all_keys if key not in self._tables[table].rows]
            lookup.num_missing += 0 if insert else len(absent)
            if refuses(self.tables[table]):
                lookup.on_default |= {(table, key) for key in absent}
        for feature in plan.features:
            for row_of_out, keys, factors in _bags(plan, batch, feature):
                rows = self._read(feature.table, keys.tolist())
                vectors = np.zeros((feature.max_keys or 1, self.layout.dim))
                for n, (row, factor) in enumerate(zip(rows, factors, strict=True)):
                    vectors[n if feature.max_keys else 0] += factor * row.value
                last = feature.column + vectors.size
                out[row_of_out, feature.column : last] = torch.from_numpy(vectors.reshape(-1))
        return lookup

    def check_gradients(self, plan: PoolingPlan, gradients: Sequence[PooledGradient]) -> None:
        """See `Store.check_gradients`."""
        checks.check_gradients(self, torch.device("cpu"), plan, gradients)

    def apply_gradients(
        self,
        plan: PoolingPlan,
        gradients: Sequence[PooledGradient],
        step: int,
        rate_factor: float = 1.0,
        defaults: DefaultGradients | None = None,
        *,
        skip: Tensor | None = None,
    ) -> int:
        """See `PartStore.apply_gradients`."""
        if skip is not None and bool(skip):
            self.check_gradients(plan, gradients)
            return 0
        sums = self._sums(plan, gradients)
        number = len(sums)
        if defaults is not None:
            sums = {name: total for name, total in sums.items() if name[1] is not None}
            number = len(sums)
            for table in defaults.touched.nonzero()[:, 0].tolist():
                sums[table, None] = defaults.sums[table].double().numpy()
        self._version += 1
        for gradient in gradients:
            cast("DictLookup", gradient.lookup).is_applied = True
        for (table, key), total in sums.items():
            held = self._tables[table]
            if key is not None and key not in held.rows:
                self._insert(table, [key])
            row = held.default if key is None else held.rows[key]
            rule = self.tables[table].optimizer
            value_type = self.layout.value_type
            optimizer.update_row(rule, row.value, row.state, total, step, rate_factor, value_type)
            if value_type != "float32":
                new = row.value.astype(np.float32)[None, :]
                row.value = round_update(new, value_type, step)[0].double().numpy()
            held.use(row)
        return number

    def read_looked_up(self, lookup: PooledLookup) -> Tensor:
        """See `Store.read_looked_up`."""
        batch = cast("DictLookup", lookup).batch
        vectors = torch.full((batch.values.numel(), self.layout.dim), torch.nan)
        for feature in lookup.plan.features:
            first = feature.packed_feature * batch.batch_size
            first, last = batch.offsets[[first, first + batch.batch_size]].tolist()
            rows = self._read(feature.table, batch.values[first:last].tolist())
            vectors[first:last] = _stack([row.value for row in rows], self.layout.dim)
        return vectors

    def gradient_norm(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient], norm_type: float
    ) -> float:
        """See `Store.gradient_norm`."""
        sums = self._sums(plan, gradients)
        columns = np.concatenate([np.zeros(1), *sums.values()])
        return float(np.linalg.norm(columns, norm_type))

    def _sums(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient]
    ) -> dict[tuple[int, int | None], FloatArray]:
        """Of each row its gradients; by (table, key), or (table, None) for the default row."""
        self.check_gradients(plan, gradients)
        sums: dict[tuple[int, int | None], FloatArray] = {}
        for gradient in gradients:
            for feature in gradient.lookup.plan.features:
                held = self._tables[feature.table]
                for key, share in _shares(held, feature, gradient):
                    name = (feature.table, key)
                    sums[name] = sums.get(name, 0.0) + share
        return sums

    def memory(self) -> StoreMemory:
        """See `Store.memory`; bytes are not counted."""
        rows = sum(len(table.rows) for table in self._tables)
        return StoreMemory(rows, 0, rows, 0, 0)

    def check_invariants(self) -> None:
        """See `Store.check_invariants`; a dictionary has none to check."""


def _export(
    held: dict[int, Item], version: int, cursor: Cursor, most: int
) -> tuple[dict[int, Item], Cursor]:
    """Up to `most` items from a cursor on, of a store of a version."""
    if cursor.version not in {None, version}:
        raise checks.stale_export("store")
    part = dict(list(held.items())[cursor.place : cursor.place + most])
    return part, Cursor(cursor.place + len(part), version)


def _shares(
    held: DictTable, feature: PooledFeature, gradient: PooledGradient
) -> Iterator[tuple[int | None, FloatArray]]:
    """Each key of a feature with its share of the gradient; None: the default row's."""
    lookup, _, grad = gradient
    assert isinstance(lookup, DictLookup)
    dim = held.config.dim
    last = feature.column + dim * (feature.max_keys or 1)
    part = grad[:, feature.column : last].double().numpy()
    part = part.reshape(len(part), feature.max_keys or 1, dim)
    for row, keys, factors in _bags(lookup.plan, lookup.batch, feature):
        for n, (key, factor) in enumerate(zip(keys.tolist(), factors, strict=True)):
            share = factor * part[row, n if feature.max_keys else 0]
            if (feature.table, key) in lookup.on_default:
                yield None, share
            elif key not in held.rows and retains(held.config):
                held.numbers["dropped"] += 1
            else:
                yield key, share


def _bags(
    plan: PoolingPlan, batch: KeyedJagged, feature: PooledFeature
) -> Iterator[tuple[int, Tensor, FloatArray]]:
    """Of each row of the output the keys [n], and by what factor each key's vector counts."""
    first_bag = feature.packed_feature * batch.batch_size
    offsets = batch.offsets[first_bag : first_bag + batch.batch_size + 1].tolist()
    first_row = 0
    if plan.is_by_key:
        first_row, offsets = offsets[0], list(range(offsets[0], offsets[1] + 1))
    for row, (first, last) in enumerate(pairwise(offsets), first_row):
        weights = np.ones(last - first)
        if batch.weights is not None:
            weights = batch.weights[first:last].double().numpy()
        divisor = 1.0
        if feature.pooling == "mean":
            divisor = sum(weights)
        elif feature.pooling == "sqrt_n":
            divisor = sum(weights * weights) ** 0.5
        is_zero = abs(divisor) < SMALLEST_DIVISOR
        yield row, batch.values[first:last], weights * 0.0 if is_zero else weights / divisor


def _stack(rows: list[FloatArray], width: int) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(rows), width))
