"""Plain Python rows in a dictionary: the oracle that the contract suite compares every store with.

Slow and obvious on purpose. Pooling and updates run in numpy, one row after the other; sums are in
float64, so that
fused kernels are compared with something better than themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.config import TableConfig
from penstock.embedding import optimizer
from penstock.embedding.initializer import initial_values
from penstock.embedding.store import (
    Cursor,
    FindResult,
    PooledFeature,
    PooledGradient,
    PoolingPlan,
    RowLayout,
    StoreMemory,
    TableRows,
    check_finite_weights,
    check_sequences,
    check_weights,
)
from penstock.types import KeyedJagged

FloatArray = NDArray[np.float64]
SMALLEST_DIVISOR = np.finfo(np.float32).tiny
"""A smaller sum of weights counts as 0: its inverse is beyond float32."""


@dataclass
class _Row:
    value: FloatArray
    state: FloatArray


@dataclass(frozen=True)
class DictLookup:
    """What a look-up leaves for the update: nothing, keys are looked up again."""

    num_missing: int


class DictStore:
    """Satisfies `Store`; rows are kept in float64."""

    def __init__(self, tables: Sequence[TableConfig], *, seed: int = 0) -> None:
        self.tables = tuple(tables)
        self.layout = RowLayout.of(tables[0])
        self._seed = seed
        self._rows: list[dict[int, _Row]] = [{} for _ in tables]
        self._version = 0

    def _initial(self, table: int, keys: Tensor) -> list[_Row]:
        config = self.tables[table]
        values = initial_values(
            config.initializer, self._seed, config.name, keys.numpy(), config.dim
        ).astype(np.float64)
        state = optimizer.initial_state(config.optimizer)
        return [_Row(value, np.full(self.layout.state_dim, state)) for value in values]

    def _locate(self, table: int, keys: Tensor, *, insert: bool) -> list[_Row]:
        held = self._rows[table]
        absent = [key for key in dict.fromkeys(keys.tolist()) if key not in held]
        initial = self._initial(table, torch.tensor(absent, dtype=torch.int64))
        new = dict(zip(absent, initial, strict=True))
        if insert and new:
            held.update(new)
            self._version += 1
        return [held[key] if key in held else new[key] for key in keys.tolist()]

    def find(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find`."""
        return self._find(table, keys, insert=False)

    def find_or_insert(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find_or_insert`."""
        return self._find(table, keys, insert=True)

    def _find(self, table: int, keys: Tensor, *, insert: bool) -> FindResult:
        found = [key in self._rows[table] for key in keys.tolist()]
        rows = self._locate(table, keys, insert=insert)
        return FindResult(
            _stack([row.value for row in rows], self.layout.dim),
            _stack([row.state for row in rows], self.layout.state_dim),
            torch.tensor(found, dtype=torch.bool),
        )

    def insert_or_assign(self, table: int, rows: TableRows) -> int:
        """See `Store.insert_or_assign`."""
        before = len(self._rows[table])
        values, state = rows.values.double().numpy(), rows.state.double().numpy()
        for i, key in enumerate(rows.keys.tolist()):
            self._rows[table][key] = _Row(values[i].copy(), state[i].copy())
        self._version += 1
        return len(self._rows[table]) - before

    def erase(self, table: int, keys: Tensor) -> int:
        """See `Store.erase`."""
        self._version += 1
        return sum(self._rows[table].pop(key, None) is not None for key in keys.tolist())

    def export_batch(self, table: int, cursor: Cursor, max_rows: int) -> tuple[TableRows, Cursor]:
        """See `Store.export_batch`."""
        version = self._version if cursor.version is None else cursor.version
        if version != self._version:
            raise RuntimeError("store changed while it was exported; begin the export again")
        part = list(self._rows[table].items())[cursor.position : cursor.position + max_rows]
        rows = TableRows(
            torch.tensor([key for key, _ in part], dtype=torch.int64),
            _stack([row.value for _, row in part], self.layout.dim),
            _stack([row.state for _, row in part], self.layout.state_dim),
        )
        return rows, Cursor(cursor.position + len(part), version)

    def num_rows(self, table: int) -> int:
        """See `Store.num_rows`."""
        return len(self._rows[table])

    def pooled_lookup(
        self, plan: PoolingPlan, batch: KeyedJagged, *, insert: bool, out: Tensor
    ) -> DictLookup:
        """See `Store.pooled_lookup`."""
        check_weights(batch)
        check_sequences(plan, batch)
        check_finite_weights(batch)
        missing = 0
        for feature in plan.features:
            for sample, (keys, factors) in enumerate(_bags(batch, feature)):
                missing += sum(key not in self._rows[feature.table] for key in keys.tolist())
                rows = self._locate(feature.table, keys, insert=insert)
                vectors = np.zeros((feature.max_keys or 1, self.layout.dim))
                for n, (row, factor) in enumerate(zip(rows, factors, strict=True)):
                    vectors[n if feature.max_keys else 0] += factor * row.value
                last = feature.column + vectors.size
                out[sample, feature.column : last] = torch.from_numpy(vectors.reshape(-1))
        return DictLookup(0 if insert else missing)

    def apply_gradients(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient], step: int
    ) -> int:
        """See `Store.apply_gradients`."""
        sums: dict[tuple[int, int], FloatArray] = {}
        for _, batch, grad in gradients:
            for feature in plan.features:
                last = feature.column + self.layout.dim * (feature.max_keys or 1)
                part = grad[:, feature.column : last].double().numpy()
                part = part.reshape(len(part), feature.max_keys or 1, self.layout.dim)
                for sample, (keys, factors) in enumerate(_bags(batch, feature)):
                    for n, (key, factor) in enumerate(zip(keys.tolist(), factors, strict=True)):
                        share = factor * part[sample, n if feature.max_keys else 0]
                        name = (feature.table, key)
                        sums[name] = sums.get(name, 0.0) + share
        for (table, key), total in sums.items():
            (row,) = self._locate(table, torch.tensor([key]), insert=True)
            optimizer.update_row(self.tables[table].optimizer, row.value, row.state, total, step)
        return len(sums)

    def memory(self) -> StoreMemory:
        """See `Store.memory`; bytes are not counted."""
        rows = sum(len(rows) for rows in self._rows)
        return StoreMemory(rows, 0, rows, 0, 0)

    def check_invariants(self) -> None:
        """See `Store.check_invariants`; a dictionary has none to check."""


def _bags(batch: KeyedJagged, feature: PooledFeature) -> Iterator[tuple[Tensor, FloatArray]]:
    """Of each sample the keys [n], and by what factor each key's vector counts."""
    first_bag = feature.packed_feature * batch.batch_size
    offsets = batch.offsets[first_bag : first_bag + batch.batch_size + 1].tolist()
    for first, last in pairwise(offsets):
        weights = np.ones(last - first)
        if batch.weights is not None:
            weights = batch.weights[first:last].double().numpy()
        divisor = 1.0
        if feature.pooling == "mean":
            divisor = sum(weights)
        elif feature.pooling == "sqrt_n":
            divisor = sum(weights * weights) ** 0.5
        is_zero = abs(divisor) < SMALLEST_DIVISOR
        yield batch.values[first:last], weights * 0.0 if is_zero else weights / divisor


def _stack(rows: list[FloatArray], width: int) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(rows), width))
