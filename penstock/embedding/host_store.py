"""Rows in this machine's memory: the C++ core (csrc/store) behind the store contract."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock import _core
from penstock.config import TableConfig
from penstock.embedding import checks
from penstock.embedding.retention import (
    NUMBERS,
    Clock,
    RetentionState,
    default_of,
    limits_of,
    over_budget,
    policy_of,
)
from penstock.embedding.rules import initializer, optimizer
from penstock.embedding.rules.rounding import CODES
from penstock.embedding.store import (
    Candidates,
    Cursor,
    DefaultGradients,
    FindResult,
    PooledGradient,
    PooledLookup,
    PoolingPlan,
    RowLayout,
    StoreMemory,
    TableCounters,
    TableRows,
)
from penstock.errors import CapacityError, ConfigError, PartialUpdateError
from penstock.types import KeyedJagged

_CPU = torch.device("cpu")
# As in csrc/rows/row_kernels.h.
POOLING_CODES = {"sum": 0, "mean": 1, "sqrt_n": 2, "sequence": 3}


_EXPORTED = 2**64 - 1
"""Place of a cursor behind the last row, as in csrc/store/row_access.h."""
ISAS = ("generic", "avx2", "avx512")
"""Instruction sets that kernels are compiled for, each above the one before."""


class HostLookup(PooledLookup):
    """A look-up of a host store."""

    __slots__ = ("core",)

    def __init__(self, store: HostStore, plan: PoolingPlan, batch: KeyedJagged) -> None:
        """Not looked up yet."""
        super().__init__(store, plan, batch)
        self.core = _core.Lookup()
        """Its copies, in the C++ core."""

    @property
    def num_missing(self) -> int:
        """See `PooledLookup`."""
        return self.core.num_missing

    @property
    def is_applied(self) -> bool:
        """See `PooledLookup`."""
        return self.core.is_applied

    def reads_default(self) -> Tensor:
        """See `PooledLookup`."""
        reads = np.empty(self.num_keys, dtype=np.bool_)
        self.core.reads_default(reads)
        return torch.from_numpy(reads)


class HostStore:
    """Satisfies `Store`. All tables must have one row layout."""

    def __init__(
        self,
        tables: Sequence[TableConfig],
        *,
        seed: int = 0,
        num_threads: int = 1,
        max_bytes: int = 0,
        deterministic: bool = False,
        most_isa: Literal["generic", "avx2", "avx512"] | None = None,
        scan_from: int = 1 << 20,
    ) -> None:
        """Opens an empty store.

        Args:
          tables: of one row layout, with distinct names.
          seed: of the initial values.
          num_threads: threads of one call, the caller's included.
          max_bytes: most bytes of rows; 0: twice the machine's memory.
          deterministic: gradients are summed in fixed point, so that the bits of an update do not
            depend on the order of the samples either (on the number of threads they never do).
          most_isa: no instruction set above it is used, to test the others; None: the best.
          scan_from: entries of the index from which on a table that is much of it is looked
            through there, and has no list of its keys; fewer to test it.
        """
        if most_isa not in (None, *ISAS):
            raise ConfigError(f"most_isa: {most_isa!r}; one of {', '.join(ISAS)}")
        self.layout = checks.layout_of(tables)
        self.tables = tuple(tables)
        self._fit = {"dim": self.layout.dim, "num_tables": len(tables)}
        self._hypers = optimizer.Hypers(tables)
        self._deterministic = deterministic
        try:
            self._core = _opened(
                self,
                seed,
                num_threads=num_threads,
                max_bytes=max_bytes,
                most_isa=most_isa or "",
                scan_from=scan_from,
            )
        except MemoryError:
            raise CapacityError(
                "no address space for a host store; raise the limit on virtual memory (ulimit -v)"
            ) from None

    @property
    def isa(self) -> str:
        """Instruction set of the kernels in use: generic, avx2 or avx512."""
        return self._core.isa

    def find(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find`."""
        return self._find(table, keys, insert=False)

    def find_or_insert(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find_or_insert`."""
        return self._find(table, keys, insert=True)

    def _find(self, table: int, keys: Tensor, *, insert: bool) -> FindResult:
        checks.check_table(table, self.tables)
        keys = checks.checked_keys(keys, _CPU)
        values = np.empty((len(keys), self.layout.dim), dtype=np.float32)
        state = np.empty((len(keys), self.layout.state_dim), dtype=np.float32)
        found = np.empty(len(keys), dtype=np.bool_)
        status = self._core.find(table, keys.numpy(), insert, values, state, found)
        raise_for(self, status, f"finding {len(keys)} keys")
        return FindResult(
            torch.from_numpy(values), torch.from_numpy(state), torch.from_numpy(found)
        )

    def insert_or_assign(self, table: int, rows: TableRows) -> int:
        """See `Store.insert_or_assign`."""
        checks.check_table(table, self.tables)
        rows = checks.checked_rows(rows, self.layout, _CPU)
        usage = None if rows.usage is None else rows.usage.flatten().numpy()
        status, inserted = self._core.insert_or_assign(
            table, rows.keys.numpy(), _bits(rows.values), rows.state.numpy(), usage
        )
        raise_for(self, status, f"writing {len(rows.keys)} rows", table)
        return int(inserted)

    def erase(self, table: int, keys: Tensor) -> int:
        """See `Store.erase`."""
        checks.check_table(table, self.tables)
        keys = checks.checked_keys(keys, _CPU)
        status, erased = self._core.erase(table, keys.numpy())
        raise_for(self, status, f"erasing {len(keys)} rows")
        return int(erased)

    def export_batch(self, table: int, cursor: Cursor, max_rows: int) -> tuple[TableRows, Cursor]:
        """See `Store.export_batch`."""
        checks.check_table(table, self.tables)
        current = self._core.content_version
        if cursor.place == _EXPORTED and cursor.version == current:
            # With many small tables, calls are most of an export.
            return _no_rows(self.layout), cursor
        version = current if cursor.version is None else cursor.version
        size = min(max_rows, int(self._core.num_rows(table)))
        words = self.layout.usage_dim
        keys = np.empty(size, dtype=np.int64)
        # numpy has no bfloat16, but arrays are made in a fifth of a tensor's time.
        is_wide = self.layout.dtype == torch.float32
        values = np.empty((size, self.layout.dim), dtype=np.float32 if is_wide else np.int16)
        state = np.empty((size, self.layout.state_dim), dtype=np.float32)
        usage = np.empty(size * words, dtype=np.int64)
        status, count, place = self._core.export_batch(
            table, cursor.place, version, keys, values, state, usage
        )
        if status != _core.Status.OK:
            raise_for(self, status, f"exporting {size} rows")
        if count < size:
            keys, values, state = keys[:count], values[:count], state[:count]
        rows = TableRows(
            torch.from_numpy(keys),
            torch.from_numpy(values)
            if is_wide
            else torch.from_numpy(values).view(self.layout.dtype),
            torch.from_numpy(state),
            torch.from_numpy(usage.reshape(-1, words)[:count]) if words else None,
        )
        return rows, Cursor(place, version)

    def num_rows(self, table: int) -> int:
        """See `Store.num_rows`."""
        checks.check_table(table, self.tables)
        return int(self._core.num_rows(table))

    def set_learning_rate(self, table: int, learning_rate: float) -> None:
        """See `Store.set_learning_rate`."""
        checks.check_table(table, self.tables)
        self.tables = optimizer.with_learning_rate(self.tables, table, learning_rate)
        self._hypers = optimizer.Hypers(self.tables)

    def advance(self, clock: Clock) -> None:
        """See `Store.advance`."""
        raise_for(self, self._core.advance(clock.step, clock.seconds), "evicting rows")

    def num_candidates(self, table: int) -> int:
        """See `Store.num_candidates`."""
        checks.check_table(table, self.tables)
        return int(self._core.num_candidates(table))

    def export_candidates(
        self, table: int, cursor: Cursor, max_keys: int
    ) -> tuple[Candidates, Cursor]:
        """See `Store.export_candidates`."""
        checks.check_table(table, self.tables)
        version = self._core.content_version if cursor.version is None else cursor.version
        max_keys = min(max_keys, self.num_candidates(table))
        keys, counts = np.empty((2, max_keys), dtype=np.int64)
        status, exported, place = self._core.export_candidates(
            table, cursor.place, version, keys, counts
        )
        raise_for(self, status, f"exporting {max_keys} counts")
        part = Candidates(torch.from_numpy(keys[:exported]), torch.from_numpy(counts[:exported]))
        return part, Cursor(place, version)

    def import_candidates(self, table: int, candidates: Candidates) -> None:
        """See `Store.import_candidates`."""
        checks.check_table(table, self.tables)
        keys, counts = checks.checked_candidates(candidates, _CPU)
        status = self._core.import_candidates(table, keys.numpy(), counts.numpy())
        raise_for(self, status, f"counting {len(keys)} keys", table)

    def counters(self) -> TableCounters:
        """See `Store.counters`."""
        tables = len(self.tables)
        rows, candidates = np.empty((2, tables), dtype=np.int64)
        numbers = np.empty((tables, len(NUMBERS)), dtype=np.int64)
        self._core.counters(rows, candidates, numbers.reshape(-1))
        return TableCounters(rows, candidates, numbers)

    def retention_state(self, table: int) -> RetentionState:
        """See `Store.retention_state`."""
        checks.check_table(table, self.tables)
        value = np.full(self.layout.dim, default_of(self.tables[table]), dtype=np.float32)
        initial = optimizer.initial_state(self.tables[table].optimizer)
        state = np.full(self.layout.state_dim, initial, dtype=np.float32)
        numbers = np.empty(len(NUMBERS), dtype=np.int64)
        self._core.retention(table, value, state, numbers)
        named = dict(zip(NUMBERS, numbers.tolist(), strict=True))
        return RetentionState(torch.from_numpy(value), torch.from_numpy(state), named)

    def set_retention_state(self, table: int, state: RetentionState) -> None:
        """See `Store.set_retention_state`."""
        checks.check_table(table, self.tables)
        given = checks.checked_state(state, self.layout, _CPU)
        numbers = np.array([given.numbers[name] for name in NUMBERS], dtype=np.int64)
        value, of_rule = given.default_value.numpy(), given.default_state.numpy()
        self._core.set_retention(table, value, of_rule, numbers)

    def pooled_lookup(
        self,
        plan: PoolingPlan,
        batch: KeyedJagged,
        *,
        insert: bool,
        out: Tensor,
        reads_vectors: bool = False,
    ) -> HostLookup:
        """See `Store.pooled_lookup`."""
        lookup = HostLookup(self, plan, batch)
        try:
            if plan.is_by_key:
                # The core knows tables alone, not what else the batch may have.
                checks.check_lookup(plan, batch, out, device=_CPU, **self._fit)
                keys, offsets = batch.values.numpy(), batch.offsets.numpy()
                status = self._core.look_up_keys(keys, offsets, insert, out.numpy(), lookup.core)
            else:
                status = self._core.pooled_lookup(
                    core_plan(plan),
                    batch.values.numpy(),
                    batch.offsets.numpy(),
                    None if batch.weights is None else batch.weights.numpy(),
                    lookup.batch_size,
                    insert,
                    out.numpy(),
                    lookup.core,
                )
        except (TypeError, ValueError):
            # The core has checked all arrays; this says what is wrong with them.
            checks.check_lookup(plan, batch, out, device=_CPU, **self._fit)
            raise
        if status == _core.Status.BAD_OFFSETS:
            ends = int(batch.offsets[0]), int(batch.offsets[-1])
            raise checks.bad_offsets(*ends, batch.values.numel())
        if status in {_core.Status.BAD_WEIGHTS, _core.Status.BAG_TOO_LONG}:
            checks.check_sequences(plan, batch)
            checks.check_finite_weights(batch)
            raise ConfigError("the batch changed while it was looked up")
        raise_for(self, status, f"looking up {batch.values.numel()} keys")
        return lookup

    def read_looked_up(self, lookup: PooledLookup) -> Tensor:
        """See `Store.read_looked_up`."""
        assert isinstance(lookup, HostLookup)
        vectors = np.empty((lookup.num_keys, self.layout.dim), dtype=np.float32)
        raise_for(self, self._core.read_looked_up(lookup.core, vectors), "reading vectors")
        return torch.from_numpy(vectors)

    def check_gradients(self, plan: PoolingPlan, gradients: Sequence[PooledGradient]) -> None:
        """See `Store.check_gradients`."""
        checks.check_gradients(self, _CPU, plan, gradients)

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
        hypers = self._hypers.at(step, rate_factor)
        given = (None, None) if defaults is None else [part.numpy() for part in defaults]
        options = hypers, step, self._deterministic, *given
        return int(self._of_gradients("apply_gradients", plan, gradients, *options))

    def gradient_norm(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient], norm_type: float
    ) -> float:
        """See `Store.gradient_norm`."""
        options = norm_type, self._deterministic
        total: float = self._of_gradients("gradient_norm", plan, gradients, *options)
        return total if norm_type == math.inf else total ** (1 / norm_type)

    def _of_gradients(
        self, verb: str, plan: PoolingPlan, gradients: Sequence[PooledGradient], *given: Any
    ) -> Any:
        try:
            for part in gradients:
                if part.batch is not None:
                    checks.check_same(part.lookup, part.batch)
            parts = [(part.lookup.core, part.grad.detach().numpy()) for part in gradients]  # type: ignore[attr-defined]
            call = getattr(self._core, verb)
            status, result = call(core_plan(plan), parts, *given)
        except (AttributeError, TypeError, ValueError):
            # As in `pooled_lookup`; a look-up of another kind of store has no core.
            self.check_gradients(plan, gradients)
            raise
        if status != _core.Status.OK:
            num_keys = sum(part.lookup.num_keys for part in gradients)
            raise_for(self, status, f"an update of {num_keys} keys")
        return result

    def memory(self) -> StoreMemory:
        """See `Store.memory`."""
        return StoreMemory(*self._core.memory())

    def check_invariants(self) -> None:
        """See `Store.check_invariants`."""
        problem = self._core.check_invariants()
        if problem:
            raise AssertionError(problem)
        memory = self.memory()
        assert memory.rows + memory.free_slots == memory.slot_capacity, memory


def raise_for(store: HostStore, status: _core.Status, of: str, table: int = 0) -> None:
    """Raises what a status of a store says.

    Args:
      store: whose call it was.
      status: it returned.
      of: what was done.
      table: of it.
    """
    if status == _core.Status.OK:
        return
    if status == _core.Status.OVER_BUDGET:
        limits = limits_of(store.tables[table], store.layout.row_bytes)
        raise CapacityError(over_budget(store.tables[table], limits))
    where = f"host store of {checks.name_of(store.tables)}"
    if status == _core.Status.STALE_CURSOR:
        raise checks.stale_export(where)
    if status == _core.Status.HALF_UPDATED:
        raise PartialUpdateError(
            f"{where}: no working memory in the middle of {of}: some rows have taken the step, "
            "others have not; go on from a checkpoint, with smaller batches or more memory"
        )
    if status == _core.Status.NO_WORKING_MEMORY:
        raise CapacityError(
            f"{where}: no working memory for {of}; use smaller batches or more memory"
        )
    if status == _core.Status.NO_THREADS:
        raise CapacityError(
            f"{where}: the system starts no more threads; use fewer (threads, num_threads)"
        )
    rows = store.memory().rows
    if status == _core.Status.TOO_MANY_ROWS:
        raise CapacityError(
            f"{where} holds {rows} rows, and a store takes 2^32 - 1; "
            "give some of the tables another dim"
        )
    raise CapacityError(
        f"{where} cannot grow beyond {rows} rows: no memory; use a machine with more memory or "
        "smaller tables"
    )


def _opened(store: HostStore, seed: int, **options: Any) -> _core.HostStore:
    return _core.HostStore(
        dim=store.layout.dim,
        value_type=CODES[store.layout.value_type],
        state_dim=store.layout.state_dim,
        usage_dim=store.layout.usage_dim,
        optimizer=optimizer.rule_of(store.tables[0].optimizer).code,
        tables=[
            (
                initializer.KINDS[type(table.initializer)],
                initializer.scale_of(table.initializer),
                optimizer.initial_state(table.optimizer),
                initializer.table_seed(seed, table.name),
                _core.RetentionPolicy(
                    **policy_of(table, seed, limits_of(table, store.layout.row_bytes))
                ),
            )
            for table in store.tables
        ],
        **options,
    )


@lru_cache(maxsize=256)
def _no_rows(layout: RowLayout) -> TableRows:
    return TableRows(
        torch.empty(0, dtype=torch.int64),
        torch.empty(0, layout.dim, dtype=layout.dtype),
        torch.empty(0, layout.state_dim),
        torch.empty(0, layout.usage_dim, dtype=torch.int64) if layout.usage_dim else None,
    )


@lru_cache(maxsize=256)
def core_plan(plan: PoolingPlan) -> _core.PoolingPlan:
    """A plan as the core takes it."""
    features = plan.features
    if plan.is_by_key:
        return _core.PoolingPlan.by_key(len(features), plan.stride)
    return _core.PoolingPlan(
        packed_feature=[feature.packed_feature for feature in features],
        table=[feature.table for feature in features],
        pooling=[POOLING_CODES[feature.pooling] for feature in features],
        max_keys=[feature.max_keys or 0 for feature in features],
        column=[feature.column for feature in features],
        stride=plan.stride,
    )


def _bits(values: Tensor) -> NDArray[Any]:
    """The same memory as numpy knows it: it has no bfloat16."""
    return (values if values.dtype == torch.float32 else values.view(torch.int16)).numpy()
