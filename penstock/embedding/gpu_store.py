"""Rows in the memory of a GPU: Triton kernels behind the store contract."""

from __future__ import annotations

import threading
from collections.abc import Sequence
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
    held,
    keys_of,
)
from penstock.embedding.gpu.gradients import gradient_norm, step_defaults, without_defaults
from penstock.embedding.gpu.retained_rows import RetainedRows
from penstock.embedding.gpu.retention import Rules
from penstock.embedding.gpu.rows import KeyedRows, initial_of
from penstock.embedding.gpu.slots import SlotPool
from penstock.embedding.retention import (
    NUMBERS,
    Clock,
    RetentionState,
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
    DefaultGradients,
    FindResult,
    PooledGradient,
    PooledLookup,
    PoolingPlan,
    StoreMemory,
    TableCounters,
    TableRows,
)
from penstock.errors import CapacityError
from penstock.kernels.device import kernel_device
from penstock.kernels.index.index import KeyBatch
from penstock.kernels.index.reference import is_consistent
from penstock.kernels.plan import DevicePlan
from penstock.kernels.pool import pooled_forward
from penstock.kernels.update.occurrences import GradientPart, UpdateRules
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
        self._name = f"store on {self.device} of {checks.name_of(tables)}"
        self.layout = checks.layout_of(tables)
        self.tables: Sequence[TableConfig] = tuple(tables)
        self._limits = [limits_of(table, self.layout.row_bytes) for table in tables]
        self._hypers = HypersOnDevice(tables, self.device)
        self._piece_counters = Counters(self.device, 4, torch.int32)
        self._needs_tables = self.layout.usage_dim > 0 or not self._hypers.are_one
        self._plans = PlanCache(self.layout.dim, self.device)
        refusing = [number for number, table in enumerate(tables) if refuses(table)]
        absent = torch.full((len(tables),), -1, dtype=torch.int32)
        absent[refusing] = torch.arange(len(refusing), dtype=torch.int32)
        self._absent, self._num_defaults = absent.to(self.device), len(refusing)
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
        usage = None
        if self._rules is not None and self.layout.usage_dim:
            usage = self._rules.usage_rules
        self._update_rules = UpdateRules(
            optimizer.rule_of(tables[0].optimizer).code,
            clips=any(table.optimizer.clip_norm for table in tables),
            bounds=any(table.optimizer.weight_bound for table in tables),
            deterministic=deterministic,
            usage=usage,
        )
        self._retained = RetainedRows(self._keyed, self._absent, self._rules, self._name)

    @alone
    def find(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find`."""
        return self._retained.read(self._of_table(table, keys), table, insert=False)

    @alone
    def find_or_insert(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find_or_insert`."""
        return self._retained.read(self._of_table(table, keys), table, insert=True)

    @alone
    def insert_or_assign(self, table: int, rows: TableRows) -> int:
        """See `Store.insert_or_assign`."""
        checks.check_table(table, self.tables)
        keys, values, state, usage = checks.checked_rows(rows, self.layout, self.device)
        batch, count = KeyBatch.of_table(keys, table), len(keys)
        self._retained.changed()
        before = self.num_rows(table)
        left = 0 if self._rules is None else self._rules.evicted(table)
        slots, misses = self._keyed.index.find(batch, self._retained.none_absent)
        self._retained.insert(batch, slots, misses, explicit=True)
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
        return self._retained.erase(keys, torch.full_like(keys, table))

    @alone
    def export_batch(self, table: int, cursor: Cursor, max_rows: int) -> tuple[TableRows, Cursor]:
        """See `Store.export_batch`."""
        checks.check_table(table, self.tables)
        return self._retained.export_rows(table, cursor, max_rows)

    @alone
    def num_rows(self, table: int) -> int:
        """See `Store.num_rows`."""
        checks.check_table(table, self.tables)
        return int(self._keyed.of_table[table])

    @alone
    def advance(self, clock: Clock) -> None:
        """See `Store.advance`."""
        if self._rules is not None and self._rules.advance(self._retained.access, clock):
            self._retained.changed()

    @alone
    def set_learning_rate(self, table: int, learning_rate: float) -> None:
        """See `Store.set_learning_rate`."""
        checks.check_table(table, self.tables)
        self.tables = optimizer.with_learning_rate(self.tables, table, learning_rate)
        self._hypers = HypersOnDevice(self.tables, self.device)
        self._needs_tables = self.layout.usage_dim > 0 or not self._hypers.are_one

    @alone
    def num_candidates(self, table: int) -> int:
        """See `Store.num_candidates`."""
        checks.check_table(table, self.tables)
        return 0 if self._rules is None else self._rules.num_candidates(table)

    @alone
    def export_candidates(
        self, table: int, cursor: Cursor, max_keys: int
    ) -> tuple[Candidates, Cursor]:
        """See `Store.export_candidates`."""
        checks.check_table(table, self.tables)
        return self._retained.export_counts(table, cursor, max_keys)

    @alone
    def import_candidates(self, table: int, candidates: Candidates) -> None:
        """See `Store.import_candidates`."""
        checks.check_table(table, self.tables)
        keys, counts = checks.checked_candidates(candidates, self.device)
        if self._rules is not None:
            batch = KeyBatch.of_table(keys, table)
            self._retained.changed()
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
        checks.check_table(table, self.tables)
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
        checks.check_table(table, self.tables)
        state = checks.checked_state(state, self.layout, self.device)
        slot = int(self._absent[table])
        if slot >= 0:
            self._rows.values[slot] = state.default_value.to(self.layout.dtype)
            self._rows.state[slot] = state.default_state
        if self._rules is not None:
            self._rules.set_numbers(table, dict(state.numbers))

    @alone
    def pooled_lookup(
        self,
        plan: PoolingPlan,
        batch: KeyedJagged,
        *,
        insert: bool,
        out: Tensor,
        reads_vectors: bool = False,
    ) -> GpuLookup:
        """See `Store.pooled_lookup`."""
        fit = {"dim": self.layout.dim, "num_tables": len(self.tables)}
        checks.check_lookup(plan, batch, out, device=self.device, **fit)
        checks.check_batch(plan, batch)
        on_gpu = self._plans.get(plan, len(batch.features))
        batch = held(batch, self.device, on_gpu, keys=self._rules is not None)
        if insert and self._rules is None and self._keyed.has_room(batch.values.numel()):
            slots = self._keyed.find_or_make(on_gpu, batch, self._absent)
            lookup = GpuLookup(self, plan, batch, slots, self._retained.erase_version)
        else:
            slots, misses = self._keyed.find(on_gpu, batch, self._absent)
            lookup = GpuLookup(self, plan, batch, slots, self._retained.erase_version)
            if insert:
                self._retained.insert(keys_of(on_gpu, batch), slots, misses)
                lookup.erase_version = self._retained.erase_version
        lookup.num_defaults = self._num_defaults
        if insert:
            most, counts = self._slots.most_slots, self._piece_counters.take()
            lookup.group_ahead(on_gpu, most, counts, needs_tables=self._needs_tables)
        else:
            lookup.misses = misses
            self._keyed.lend(keys_of(on_gpu, batch), slots, misses, lookup.num_missing)
            if lookup.num_missing:
                lookup.own_keys()
        if plan.is_by_key:
            # As the sum of a bag of one: 0 + -0 is 0.
            torch.add(self._rows.values[slots.clamp(min=0).long()], 0.0, out=out)
            out.masked_fill_(slots[:, None] < 0, 0.0)
        else:
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
        defaults: DefaultGradients | None = None,
        *,
        skip: Tensor | None = None,
    ) -> Tensor:
        """See `PartStore.apply_gradients`."""
        on_gpu, parts = self._parts_of(plan, gradients)
        if on_gpu is None:
            return torch.zeros((), dtype=torch.int32, device=self.device)
        self._retained.changed()
        hypers, rules = self._hypers.at(step, rate_factor), self._update_rules
        if defaults is not None:
            parts = [without_defaults(part, self._num_defaults) for part in parts]
        skip = None if skip is None else skip.to(self.device)
        updated = apply_gradients(self._rows, on_gpu, parts, hypers, step, rules, skip)
        if defaults is not None:
            tables = len(self.tables)
            by_table = self._plans.get(PoolingPlan.by_key(tables, self.layout.dim), tables)
            of_step = hypers, step, rules, skip
            step_defaults(self._rows, by_table, self._absent, defaults, *of_step)
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
        return gradient_norm(
            on_gpu, parts, norm_type, deterministic=self._update_rules.deterministic
        )

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
            self._retained.refresh(on_gpu, lookup)
            # One made before a table's rate was another's may not know the tables.
            usable = grouped and (lookup.knows_tables or not self._needs_tables)
            is_grouped = usable and len(gradients) == 1 and lookup.grouping is not None
            batch = lookup.batch if is_grouped else lookup.batch_again(keys=False)
            grouping = lookup.grouped() if usable else None
            parts.append(GradientPart(batch, lookup.slots, grad.to(self.device), grouping, own))
        return (on_gpu if plan.features else None), parts

    @alone
    def memory(self) -> StoreMemory:
        """See `Store.memory`."""
        rows, capacity = self._slots.num_rows(), self._slots.capacity
        index_bytes = self._keyed.index.num_bytes
        if self._rules is not None:
            index_bytes += self._rules.counts.index.num_bytes
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

    def _of_table(self, table: int, keys: Tensor) -> KeyBatch:
        checks.check_table(table, self.tables)
        return KeyBatch.of_table(checks.checked_keys(keys, self.device), table)
