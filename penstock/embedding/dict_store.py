"""Plain Python rows in a dictionary: the oracle that the contract suite compares every store with.

Slow and obvious on purpose. Pooling and updates run in numpy, one row after the other; sums are in
float64, so that
fused kernels are compared with something better than themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.config import AdmitAtRandom, AdmitFrequent, TableConfig
from penstock.embedding import checks
from penstock.embedding.rules import optimizer
from penstock.embedding.rules.initializer import initial_values
from penstock.embedding.rules.retention import (
    EVICTED_BEYOND_NEED,
    MAX_COUNT,
    MAX_TIME,
    MAX_USES,
    NUMBERS,
    Clock,
    Limits,
    RetentionState,
    admission_bits,
    admission_seed,
    admission_threshold,
    check_usage,
    checked_numbers,
    default_of,
    limits_of,
    over_budget,
    precedence,
    refuses,
    retains,
    sweep_period,
)
from penstock.embedding.rules.rounding import round_update
from penstock.embedding.store import (
    Candidates,
    Cursor,
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

FloatArray = NDArray[np.float64]
Item = TypeVar("Item")
SMALLEST_DIVISOR = np.finfo(np.float32).tiny
"""A smaller sum of weights counts as 0: its inverse is beyond float32."""


@dataclass
class _Row:
    value: FloatArray
    state: FloatArray
    last_use: int = 0
    uses: int = 0


@dataclass
class _Table:
    """One table: rows, counted keys, default row, counters; and its rules, applied one by one."""

    config: TableConfig
    limits: Limits
    seed: int
    default: _Row
    rows: dict[int, _Row] = field(default_factory=dict)
    candidates: dict[int, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NUMBERS, 0))

    def aged_uses(self, row: _Row) -> int:
        half_life = self.config.eviction.half_life if self.config.eviction else None
        if half_life is None:
            return row.uses
        return row.uses >> max(0, self.numbers["now"] // half_life - row.last_use // half_life)

    def use(self, row: _Row) -> None:
        if self.config.eviction is not None:
            if self.config.eviction.order == "lfu":
                row.uses = min(self.aged_uses(row) + 1, MAX_USES)
            row.last_use = self.numbers["now"]

    def advance(self, clock: Clock) -> bool:
        """Whether rows left."""
        eviction, admission, numbers = self.config.eviction, self.config.admission, self.numbers
        in_seconds = eviction is not None and eviction.unit == "seconds"
        now = max(numbers["now"], min(clock.seconds if in_seconds else clock.step, MAX_TIME))
        numbers["now"] = now
        gone = []
        if eviction is not None and eviction.ttl is not None:
            period = sweep_period(eviction.ttl)
            if now // period != numbers["swept"] // period:
                numbers["swept"] = now
                gone = [k for k, row in self.rows.items() if now - row.last_use > eviction.ttl]
                self._evict(gone)
        if isinstance(admission, AdmitFrequent) and clock.step > numbers["step"]:
            half_life = admission.half_life_steps
            halvings = numbers["candidates_are_full"]
            if half_life is not None:
                passed = clock.step // half_life - numbers["step"] // half_life
                halvings = max(halvings, min(passed, 16))
            halved = {key: count >> halvings for key, count in self.candidates.items()}
            self.candidates = {key: count for key, count in halved.items() if count}
            numbers["candidates_are_full"] = 0
        numbers["step"] = max(numbers["step"], clock.step)
        return bool(gone)

    def admit(self, keys: list[int], step: int, *, explicit: bool) -> list[int]:
        """The absent keys that get rows; counts the others, and makes room. Not order-bound."""
        absent = Counter(key for key in keys if key not in self.rows)
        admission = self.config.admission
        wanted, uncounted = [], []
        for key, count in absent.items():
            if explicit or admission is None:
                wanted.append(key)
            elif isinstance(admission, AdmitAtRandom):
                draw = admission_bits(self.seed, np.array([key]), step)[0]
                if int(draw) < admission_threshold(admission):
                    wanted.append(key)
            else:
                total = min(self.candidates.get(key, 0) + count, MAX_COUNT)
                if key in self.candidates:
                    self.candidates[key] = total
                if total >= admission.min_count:
                    wanted.append(key)
                elif key not in self.candidates:
                    uncounted.append(key)
        room = self._make_room(len(wanted), set(keys))
        wanted = sorted(wanted, key=_precedence)[:room]
        for key in wanted:
            self.candidates.pop(key, None)
        # Before those admitted now gave up their places.
        self._count(uncounted, absent)
        if not explicit:
            self.numbers["admitted"] += len(wanted)
            given = set(wanted)
            self.numbers["refused"] += sum(n for key, n in absent.items() if key not in given)
        return wanted

    def _count(self, keys: list[int], counts: Counter[int]) -> None:
        room = self.limits.max_candidates - len(self.candidates)
        if len(keys) > room:
            self.numbers["candidates_are_full"] = 1
        for key in sorted(keys, key=_precedence)[:room]:
            self.candidates[key] = min(counts[key], MAX_COUNT)

    def _make_room(self, wanted: int, protected: set[int]) -> int:
        missing = wanted - (self.limits.max_rows - len(self.rows))
        if missing > 0 and self.config.eviction is not None:
            leaving = sorted(
                (self._rank(key, row), key)
                for key, row in self.rows.items()
                if key not in protected
            )
            count = missing + self.limits.max_rows // EVICTED_BEYOND_NEED
            self._evict([key for _, key in leaving[:count]])
        return self.limits.max_rows - len(self.rows)

    def _rank(self, key: int, row: _Row) -> tuple[int, int, int]:
        assert self.config.eviction is not None
        uses = self.aged_uses(row) if self.config.eviction.order == "lfu" else 0
        return uses, row.last_use, _precedence(key)

    def _evict(self, keys: list[int]) -> None:
        for key in keys:
            age = self.numbers["now"] - self.rows.pop(key).last_use
            self.numbers["evicted_age"] += max(0, age)
        self.numbers["evicted"] += len(keys)


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
            default = _Row(
                value.double().numpy(),
                np.full(self.layout.state_dim, optimizer.initial_state(table.optimizer)),
            )
            limits = limits_of(table, self.layout.row_bytes)
            draws = admission_seed(seed, table.name)
            self._tables.append(_Table(table, limits, draws, default))

    def _initial(self, table: int, keys: list[int]) -> list[_Row]:
        config = self.tables[table]
        first = initial_values(
            config.initializer, self._seed, config.name, np.array(keys, np.int64), config.dim
        )
        values = torch.from_numpy(first).to(self.layout.dtype).double().numpy()
        state = optimizer.initial_state(config.optimizer)
        now = self._tables[table].numbers["now"]
        return [_Row(value, np.full(self.layout.state_dim, state), now) for value in values]

    def _insert(self, table: int, keys: list[int], *, explicit: bool = False) -> None:
        """Gives rows to the absent keys, where admitted."""
        held = self._tables[table]
        absent = held.admit(keys, self._step, explicit=explicit)
        if any(key not in held.rows for key in keys):
            self._version += 1
        held.rows.update(zip(absent, self._initial(table, absent), strict=True))

    def _read(self, table: int, keys: list[int]) -> list[_Row]:
        held = self._tables[table]
        absent = [key for key in dict.fromkeys(keys) if key not in held.rows]
        if refuses(held.config):
            return [held.rows.get(key, held.default) for key in keys]
        initial = dict(zip(absent, self._initial(table, absent), strict=True))
        return [held.rows[key] if key in held.rows else initial[key] for key in keys]

    def find(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find`."""
        return self._find(table, keys.tolist(), insert=False)

    def find_or_insert(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find_or_insert`."""
        return self._find(table, keys.tolist(), insert=True)

    def _find(self, table: int, keys: list[int], *, insert: bool) -> FindResult:
        found = [key in self._tables[table].rows for key in keys]
        if insert:
            self._insert(table, keys)
        rows = self._read(table, keys)
        return FindResult(
            _stack([row.value for row in rows], self.layout.dim),
            _stack([row.state for row in rows], self.layout.state_dim),
            torch.tensor(found, dtype=torch.bool),
        )

    def insert_or_assign(self, table: int, rows: TableRows) -> int:
        """See `Store.insert_or_assign`."""
        held, keys = self._tables[table], rows.keys.tolist()
        if rows.usage is not None:
            check_usage(rows.usage)
        before = set(held.rows)
        self._insert(table, keys, explicit=True)
        self._version += 1
        values = rows.values.to(self.layout.dtype).double().numpy()
        state = rows.state.double().numpy()
        for i, key in enumerate(keys):
            if key in held.rows:
                row = held.rows[key] = _Row(values[i].copy(), state[i].copy())
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
        part, after = self._export(self._tables[table].rows, cursor, max_rows)
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

    def _export(
        self, held: dict[int, Item], cursor: Cursor, most: int
    ) -> tuple[dict[int, Item], Cursor]:
        version = self._version if cursor.version is None else cursor.version
        if version != self._version:
            raise checks.stale_export("store")
        part = dict(list(held.items())[cursor.position : cursor.position + most])
        return part, Cursor(cursor.position + len(part), version)

    def num_rows(self, table: int) -> int:
        """See `Store.num_rows`."""
        return len(self._tables[table].rows)

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
        part, after = self._export(self._tables[table].candidates, cursor, max_keys)
        keys = torch.tensor(list(part), dtype=torch.int64)
        return Candidates(keys, torch.tensor(list(part.values()), dtype=torch.int64)), after

    def import_candidates(self, table: int, candidates: Candidates) -> None:
        """See `Store.import_candidates`."""
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
        held = self._tables[table]
        value = state.default_value.to(self.layout.dtype).double()
        default_state = state.default_state.double()
        held.default = _Row(value.numpy().copy(), default_state.numpy().copy())
        held.numbers = checked_numbers(state.numbers)
        self._step = max(self._step, held.numbers["step"])

    def pooled_lookup(
        self, plan: PoolingPlan, batch: KeyedJagged, *, insert: bool, out: Tensor
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
            for keys, _ in _bags(batch, feature):
                keys_of[feature.table] += keys.tolist()
        for table, all_keys in keys_of.items():
            if insert:
                self._insert(table, all_keys)
            absent = [key for key in all_keys if key not in self._tables[table].rows]
            lookup.num_missing += 0 if insert else len(absent)
            if refuses(self.tables[table]):
                lookup.on_default |= {(table, key) for key in absent}
        for feature in plan.features:
            for sample, (keys, factors) in enumerate(_bags(batch, feature)):
                rows = self._read(feature.table, keys.tolist())
                vectors = np.zeros((feature.max_keys or 1, self.layout.dim))
                for n, (row, factor) in enumerate(zip(rows, factors, strict=True)):
                    vectors[n if feature.max_keys else 0] += factor * row.value
                last = feature.column + vectors.size
                out[sample, feature.column : last] = torch.from_numpy(vectors.reshape(-1))
        return lookup

    def check_gradients(self, plan: PoolingPlan, gradients: Sequence[PooledGradient]) -> None:
        """See `Store.check_gradients`."""
        checks.check_gradients(self, torch.device("cpu"), plan, gradients)

    def apply_gradients(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient], step: int
    ) -> int:
        """See `Store.apply_gradients`."""
        self.check_gradients(plan, gradients)
        self._version += 1
        # By (table, key), or by (table, None) for the default row.
        sums: dict[tuple[int, int | None], FloatArray] = {}
        for gradient in gradients:
            cast("DictLookup", gradient.lookup).is_applied = True
            for feature in plan.features:
                for key, share in self._shares(feature, gradient):
                    name = (feature.table, key)
                    sums[name] = sums.get(name, 0.0) + share
        for (table, key), total in sums.items():
            held = self._tables[table]
            if key is not None and key not in held.rows:
                self._insert(table, [key])
            row = held.default if key is None else held.rows[key]
            optimizer.update_row(self.tables[table].optimizer, row.value, row.state, total, step)
            if self.layout.value_type != "float32":
                new = row.value.astype(np.float32)[None, :]
                row.value = round_update(new, self.layout.value_type, step)[0].double().numpy()
            held.use(row)
        return len(sums)

    def _shares(
        self, feature: PooledFeature, gradient: PooledGradient
    ) -> Iterator[tuple[int | None, FloatArray]]:
        """Each key of a feature with its share of the gradient; None: the default row's."""
        lookup, _, grad = gradient
        assert isinstance(lookup, DictLookup)
        held = self._tables[feature.table]
        last = feature.column + self.layout.dim * (feature.max_keys or 1)
        part = grad[:, feature.column : last].double().numpy()
        part = part.reshape(len(part), feature.max_keys or 1, self.layout.dim)
        for sample, (keys, factors) in enumerate(_bags(lookup.batch, feature)):
            for n, (key, factor) in enumerate(zip(keys.tolist(), factors, strict=True)):
                share = factor * part[sample, n if feature.max_keys else 0]
                if (feature.table, key) in lookup.on_default:
                    yield None, share
                elif key not in held.rows and retains(held.config):
                    held.numbers["dropped"] += 1
                else:
                    yield key, share

    def memory(self) -> StoreMemory:
        """See `Store.memory`; bytes are not counted."""
        rows = sum(len(table.rows) for table in self._tables)
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


def _precedence(key: int) -> int:
    return int(precedence(np.array([key], np.int64))[0])


def _stack(rows: list[FloatArray], width: int) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(rows), width))
