"""Rows in the memory of a GPU: Triton kernels behind the store contract."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor

from penstock.config import TableConfig
from penstock.embedding import checks
from penstock.embedding.gpu.alone import alone
from penstock.embedding.gpu.batches import (
    Counters,
    GpuLookup,
    HypersOnDevice,
    PlanCache,
    given,
    held,
    keys_of,
)
from penstock.embedding.gpu.export import ExportOrder
from penstock.embedding.gpu.gradients import gradient_norm
from penstock.embedding.gpu.retention import Access, Rules
from penstock.embedding.gpu.rows import KeyedRows, initial_of
from penstock.embedding.gpu.slots import SlotPool
from penstock.embedding.retention import (
    NUMBERS,
    Clock,
    RetentionState,
    check_usage,
    checked_numbers,
    default_of,
    limits_of,
    over_budget,
    refuses,
    retains,
)
from penstock.embedding.rules import optimizer
from penstock.embedding.store import (
    Candidates,
    Cursor,
    FindResult,
    PooledGradient,
    PooledLookup,
    PoolingPlan,
    StoreMemory,
    TableCounters,
    TableRows,
)
from penstock.errors import CapacityError, ConfigError
from penstock.kernels.device import kernel_device
from penstock.kernels.index.index import Index, KeyBatch, Misses
from penstock.kernels.index.reference import is_consistent
from penstock.kernels.index.rows import read_initial
from penstock.kernels.plan import DevicePlan
from penstock.kernels.pool import pooled_forward
from penstock.kernels.update.occurrences import GradientPart
from penstock.kernels.update.update import apply_gradients
from penstock.types import KeyedJagged


class GpuStore:
    """Satisfies `Store`. All tables must have one row layout.

    Keys, rows and batches may be given on the CPU or on the store's device; what comes back is on
    the store's device. Kernels run on torch's current stream.
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        *,
        seed: int = 0,
        device: str | torch.device = "cuda",
        max_bytes: int = 0,
        deterministic: bool = False,
        poison: bool = False,
    ) -> None:
        """Opens an empty store.

        Args:
          tables: of one row layout, with distinct names.
          seed: of the initial values.
          device: a GPU; `cpu` in Triton's interpreter alone.
          max_bytes: most bytes of rows; 0: all memory of the GPU.
          deterministic: gradients are summed in fixed point: the bits of an update are those of the
            host store in this mode, whatever the order of the samples.
          poison: memory that nobody has written reads as NaN: for tests.

        Raises:
          ConfigError: no such GPU, no Triton, or tables of several layouts.
          CapacityError: the GPU has no memory left.
        """
        self.device = kernel_device(device)
        self._lock = threading.RLock()
        self.layout = checks.layout_of(tables)
        self.tables: Sequence[TableConfig] = tuple(tables)
        self._limits = [limits_of(table, self.layout.row_bytes) for table in tables]
        self._hypers = HypersOnDevice(tables, self.device)
        self._piece_counters = Counters(self.device, 4, torch.int32)
        self._rule = optimizer.rule_of(tables[0].optimizer).code
        self._needs_tables = self.layout.usage_dim > 0 or not self._hypers.are_one
        self._clips = any(table.optimizer.clip_norm for table in tables)
        self._deterministic = deterministic
        self._plans = PlanCache(self.layout.dim, self.device)
        self._content_version = self._erase_version = 0
        self._row_order, self._count_order = ExportOrder(), ExportOrder()
        refusing = [number for number, table in enumerate(tables) if refuses(table)]
        absent = torch.full((len(tables),), -1, dtype=torch.int32)
        absent[refusing] = torch.arange(len(refusing), dtype=torch.int32)
        self._absent = absent.to(self.device)
        initial = initial_of(tables, seed, self.device)
        try:
            self._slots = SlotPool(
                self.layout, len(refusing), self.device, max_bytes=max_bytes, poison=poison
            )
            self._keyed = KeyedRows(self._slots, initial, len(tables), self._name, self.device)
        except MemoryError:
            raise CapacityError(f"no memory for a store on {self.device}; free some") from None
        self._rows = self._slots.rows
        for slot, number in enumerate(refusing):
            self._rows.values[slot] = default_of(tables[number])
            self._rows.state[slot] = optimizer.initial_state(tables[number].optimizer)
            self._rows.usage[slot] = 0
        self._rules = None
        if any(retains(table) for table in tables):
            self._rules = Rules(self.tables, self._limits, seed, initial.now)

    @alone
    def find(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find`."""
        return self._find(table, keys, insert=False)

    @alone
    def find_or_insert(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find_or_insert`."""
        return self._find(table, keys, insert=True)

    def _find(self, table: int, keys: Tensor, *, insert: bool) -> FindResult:
        batch = self._of_table(table, keys)
        slots, misses = self._keyed.index.find(batch, self._absent)
        absent = misses.places[: int(misses.number)]
        found = torch.ones(len(keys), dtype=torch.bool, device=self.device)
        found[absent] = False
        if insert:
            self._insert(batch, slots, misses)
        values, state = (part[slots.long().clamp(min=0)] for part in self._rows[:2])
        values = values.float()
        initial = (slots < 0).nonzero()[:, 0]
        if len(initial):
            first = read_initial(batch.keys[initial], table, self._keyed.initial, self._rows.values)
            values[initial] = first.float()
            state[initial] = self._keyed.initial.state[table]
        return FindResult(values, state, found)

    @alone
    def insert_or_assign(self, table: int, rows: TableRows) -> int:
        """See `Store.insert_or_assign`."""
        batch, count = self._of_table(table, rows.keys), len(rows.keys)
        values = given(
            self.device, rows.values, self.layout.dtype, self.layout.dim, count, "values"
        )
        state = given(self.device, rows.state, torch.float32, self.layout.state_dim, count, "state")
        usage = None
        if rows.usage is not None:
            check_usage(rows.usage)
            words = self.layout.usage_dim
            usage = given(self.device, rows.usage, torch.int64, words, count, "usage")
        self._content_version += 1
        before = self.num_rows(table)
        left = 0 if self._rules is None else self._rules.evicted(table)
        slots, misses = self._keyed.index.find(batch, self._none_absent)
        self._insert(batch, slots, misses, explicit=True)
        if self._rules is not None:
            left = self._rules.evicted(table) - left
        # Of equal keys the last one stays; those without a row are left out.
        taken, which = torch.unique(slots, return_inverse=True)
        last = torch.zeros_like(taken, dtype=torch.int64).scatter_reduce(
            0, which, torch.arange(count, device=self.device), "amax"
        )
        last = last[taken >= 0]
        taken = taken[taken >= 0].long()
        self._rows.values[taken] = values[last].to(self.layout.dtype)
        self._rows.state[taken] = state[last]
        if self.layout.usage_dim:
            assert self._rules is not None
            now = self._keyed.initial.now[table]
            if usage is None:
                usage = torch.zeros(
                    count, self.layout.usage_dim, dtype=torch.int64, device=self.device
                )
                usage[:, 0] = now
            self._rules.note_ahead(table, int(((usage[:, 0] > now) & (slots >= 0)).sum()))
            usage = torch.cat([torch.minimum(usage[:, :1], now), usage[:, 1:]], 1)
            self._rows.usage[taken] = usage[last].to(torch.int32)
        if bool((slots < 0).any()):
            raise CapacityError(over_budget(self.tables[table], self._limits[table]))
        return self.num_rows(table) - before + left

    @alone
    def erase(self, table: int, keys: Tensor) -> int:
        """See `Store.erase`."""
        keys = self._of_table(table, keys).keys
        return self._erase(keys, torch.full_like(keys, table))

    def _erase(self, keys: Tensor, tables: Tensor) -> int:
        self._content_version += 1
        self._erase_version += 1
        self._row_order.drop()
        return self._keyed.erase(keys, tables)

    @alone
    def export_batch(self, table: int, cursor: Cursor, max_rows: int) -> tuple[TableRows, Cursor]:
        """See `Store.export_batch`."""
        self._check_table(table)
        index, sizes = self._keyed.index, self._keyed.of_table.cpu().numpy()
        cursor = self._current(cursor)
        keys, slots, after = self._row_order.read(index, table, sizes, cursor, max_rows)
        usage = None
        if self.layout.usage_dim:
            usage = self._rows.usage[slots].long() & 0xFFFFFFFF
        rows = TableRows(keys, self._rows.values[slots], self._rows.state[slots], usage)
        return rows, after

    @alone
    def num_rows(self, table: int) -> int:
        """See `Store.num_rows`."""
        self._check_table(table)
        return int(self._keyed.of_table[table])

    @alone
    def advance(self, clock: Clock) -> None:
        """See `Store.advance`."""
        if self._rules is not None and self._rules.advance(self._access, clock):
            self._content_version += 1

    @alone
    def num_candidates(self, table: int) -> int:
        """See `Store.num_candidates`."""
        self._check_table(table)
        return 0 if self._rules is None else self._rules.num_candidates(table)

    @alone
    def export_candidates(
        self, table: int, cursor: Cursor, max_keys: int
    ) -> tuple[Candidates, Cursor]:
        """See `Store.export_candidates`."""
        self._check_table(table)
        counts, sizes = self._empty, np.zeros(len(self.tables), dtype=np.int64)
        if self._rules is not None:
            counts, (sizes, _) = self._rules.counts, self._rules.all_numbers()
        cursor = self._current(cursor)
        keys, numbers, after = self._count_order.read(counts, table, sizes, cursor, max_keys)
        return Candidates(keys, numbers), after

    @alone
    def import_candidates(self, table: int, candidates: Candidates) -> None:
        """See `Store.import_candidates`."""
        self._check_table(table)
        checks.check_candidates(candidates)
        batch = self._of_table(table, candidates.keys)
        counts = candidates.counts.to(self.device)
        if self._rules is not None:
            self._content_version += 1
            _, misses = self._keyed.index.find(batch, self._absent)
            self._rules.import_counts(batch, counts, misses, table)

    @alone
    def counters(self) -> TableCounters:
        """See `Store.counters`; waits for the device once."""
        rows, tables = self._keyed.of_table.cpu().numpy(), len(self.tables)
        if self._rules is None:
            nothing = np.zeros((tables, len(NUMBERS)), dtype=np.int64)
            return TableCounters(rows, nothing[:, 0].copy(), nothing)
        return TableCounters(rows, *self._rules.all_numbers())

    @alone
    def retention_state(self, table: int) -> RetentionState:
        """See `Store.retention_state`."""
        self._check_table(table)
        slot = int(self._absent[table])
        if slot < 0:
            first = default_of(self.tables[table])
            value = torch.full((self.layout.dim,), first).to(self.layout.dtype).float()
            initial = optimizer.initial_state(self.tables[table].optimizer)
            state = torch.full((self.layout.state_dim,), initial, dtype=torch.float32)
        else:
            value = self._rows.values[slot].float().cpu()
            state = self._rows.state[slot].cpu()
        if self._rules is None:
            return RetentionState(value, state)
        return RetentionState(value, state, self._rules.numbers_of(table))

    @alone
    def set_retention_state(self, table: int, state: RetentionState) -> None:
        """See `Store.set_retention_state`."""
        self._check_table(table)
        slot = int(self._absent[table])
        if slot >= 0:
            self._rows.values[slot] = state.default_value.to(self.layout.dtype).to(self.device)
            self._rows.state[slot] = state.default_state.to(self.device)
        if self._rules is not None:
            self._rules.set_numbers(table, checked_numbers(state.numbers))

    @alone
    def pooled_lookup(
        self, plan: PoolingPlan, batch: KeyedJagged, *, insert: bool, out: Tensor
    ) -> GpuLookup:
        """See `Store.pooled_lookup`."""
        fit = {"dim": self.layout.dim, "num_tables": len(self.tables)}
        checks.check_lookup(plan, batch, out, device=self.device, **fit)
        checks.check_batch(plan, batch)
        on_gpu = self._plans.get(plan, len(batch.features))
        batch = held(batch, self.device, on_gpu, keys=self._rules is not None)
        if insert and self._rules is None and self._keyed.has_room(batch.values.numel()):
            slots = self._keyed.find_or_make(on_gpu, batch, self._absent)
            lookup = GpuLookup(self, plan, batch, slots, self._erase_version)
        else:
            slots, misses = self._keyed.find(on_gpu, batch, self._absent)
            lookup = GpuLookup(self, plan, batch, slots, self._erase_version)
            if insert:
                self._insert(keys_of(on_gpu, batch), slots, misses)
                lookup.erase_version = self._erase_version
        if insert:
            most, counts = self._slots.most_slots, self._piece_counters.take()
            lookup.group_ahead(on_gpu, most, counts, needs_tables=self._needs_tables)
        else:
            lookup.misses = misses
            self._keyed.lend(keys_of(on_gpu, batch), slots, misses, lookup.num_missing)
            if lookup.num_missing:
                lookup.own_keys()
        pooled_forward(self._rows.values, on_gpu, batch, slots, out, one_hot=batch.is_one_hot)
        return lookup

    @alone
    def read_looked_up(self, lookup: PooledLookup) -> Tensor:
        """See `Store.read_looked_up`."""
        found = cast("GpuLookup", lookup)
        on_gpu = self._plans.get(lookup.plan, len(found.batch.features))
        return self._rows.values[found.slots_of_plan(on_gpu)].float()

    def check_gradients(self, plan: PoolingPlan, gradients: Sequence[PooledGradient]) -> None:
        """See `Store.check_gradients`."""
        checks.check_gradients(self, self.device, plan, gradients)

    @alone
    def apply_gradients(
        self,
        plan: PoolingPlan,
        gradients: Sequence[PooledGradient],
        step: int,
        rate_factor: float = 1.0,
    ) -> Tensor:
        """See `Store.apply_gradients`."""
        on_gpu, parts = self._parts_of(plan, gradients)
        if on_gpu is None:
            return torch.zeros((), dtype=torch.int32, device=self.device)
        self._content_version += 1
        usage = None if self._rules is None else self._rules.usage_rules
        updated = apply_gradients(
            self._rows,
            on_gpu,
            parts,
            self._hypers.at(step, rate_factor),
            rule=self._rule,
            step=step,
            clips=self._clips,
            deterministic=self._deterministic,
            usage_rules=usage if self.layout.usage_dim else None,
        )
        for gradient in gradients:
            cast("GpuLookup", gradient.lookup).is_applied = True
        return updated

    @alone
    def gradient_norm(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient], norm_type: float
    ) -> Tensor:
        """See `Store.gradient_norm`."""
        on_gpu, parts = self._parts_of(plan, gradients, grouped=False)
        if on_gpu is None:
            return torch.zeros((), device=self.device)
        return gradient_norm(on_gpu, parts, norm_type, deterministic=self._deterministic)

    def _parts_of(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient], *, grouped: bool = True
    ) -> tuple[DevicePlan | None, list[GradientPart]]:
        """Checked gradients on the device with the rows that they are of; no plan: no rows."""
        self.check_gradients(plan, gradients)
        parts = []
        on_gpu = None
        for found, _, grad in gradients:
            lookup = cast("GpuLookup", found)
            num_packed = len(lookup.batch.features)
            on_gpu = self._plans.get(plan, num_packed)
            own = None if lookup.plan == plan else self._plans.get(lookup.plan, num_packed)
            self._refresh(on_gpu, lookup)
            is_grouped = grouped and len(gradients) == 1 and lookup.grouping is not None
            batch = lookup.batch if is_grouped else lookup.batch_again(keys=False)
            grouping = lookup.grouped() if grouped else None
            parts.append(GradientPart(batch, lookup.slots, grad.to(self.device), grouping, own))
        return (on_gpu if plan.features else None), parts

    def _refresh(self, plan: DevicePlan, lookup: GpuLookup) -> None:
        """Finds rows again if some were erased since; such a key gets a new row, or none."""
        if lookup.erase_version == self._erase_version and lookup.num_missing == 0:
            return
        batch = lookup.batch_again(keys=True)
        keys = keys_of(plan, batch)
        slots, misses = self._keyed.find(plan, batch, self._none_absent)
        if self._rules is not None:
            misses = self._rules.stay_away(keys, slots, lookup.slots, misses, self._absent)
        self._insert(keys, slots, misses)
        lookup.found_again(slots, self._erase_version)

    def _insert(
        self, batch: KeyBatch, slots: Tensor, misses: Misses, *, explicit: bool = False
    ) -> None:
        """Gives rows to missing keys, where admitted, and writes their slots."""
        if self._rules is not None:
            if not int(misses.number):
                return
            self._content_version += 1
            misses = self._rules.admit(self._access, batch, slots, misses, explicit=explicit)
        if misses.places.numel():
            self._keyed.make(batch, slots, misses)

    @alone
    def memory(self) -> StoreMemory:
        """See `Store.memory`."""
        rows, capacity = self._slots.num_rows(), self._slots.capacity
        index_bytes = self._keyed.index.num_bytes
        if self._rules is not None:
            index_bytes += self._rules.counts.num_bytes
        row_bytes = capacity * self.layout.row_bytes
        return StoreMemory(rows, capacity - rows, capacity, index_bytes, row_bytes)

    @alone
    def check_invariants(self) -> None:
        """See `Store.check_invariants`."""
        index = self._keyed.index
        assert is_consistent(index.entries, index.salt), "an entry is not found where it is"
        meta = index.entries[:, 1]
        live = meta[meta > 1]
        self._slots.check(live & ((1 << 40) - 1))
        rows = torch.bincount((live >> 40) - 1, minlength=len(self.tables))
        assert torch.equal(rows, self._keyed.of_table), "the row count of a table is wrong"
        for number, limits in enumerate(self._limits):
            assert int(rows[number]) <= limits.max_rows, "a table is beyond its budget"
            assert self.num_candidates(number) <= limits.max_candidates, "too many are counted"
        memory = self.memory()
        assert memory.rows + memory.free_slots == memory.slot_capacity, memory

    @property
    def _name(self) -> str:
        names = ", ".join(table.name for table in self.tables[:4])
        more = ", ..." if len(self.tables) > 4 else ""
        return f"store on {self.device} of {len(self.tables)} tables ({names}{more})"

    @cached_property
    def _none_absent(self) -> Tensor:
        return torch.full_like(self._absent, -1)

    @cached_property
    def _empty(self) -> Index:
        return Index(self.device)

    @property
    def _access(self) -> Access:
        return Access(
            self._keyed.index, self._rows.usage, self._keyed.of_table, self._absent, self._erase
        )

    @property
    def _version(self) -> int:
        """Rises whenever rows come or go; waits for the device."""
        return (self._content_version << 40) + int(self._slots.allocated)

    def _current(self, cursor: Cursor) -> Cursor:
        if cursor.version not in {None, self._version}:
            raise checks.stale_export(self._name)
        return replace(cursor, version=self._version)

    def _of_table(self, table: int, keys: Tensor) -> KeyBatch:
        self._check_table(table)
        if keys.dtype != torch.int64 or keys.dim() != 1:
            raise ConfigError(
                f"keys: expected torch.int64 of shape ['n'], got {keys.dtype} {list(keys.shape)}"
            )
        return KeyBatch.of_table(keys.to(self.device).contiguous(), table)

    def _check_table(self, table: int) -> None:
        if not 0 <= table < len(self.tables):
            raise ConfigError(f"table number {table} of a store with {len(self.tables)} tables")
