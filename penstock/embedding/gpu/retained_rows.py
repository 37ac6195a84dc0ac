"""Rows of a GPU store with the rules of who gets one: inserted, erased, found again, exported."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from penstock.embedding import checks
from penstock.embedding.gpu.batches import GpuLookup, keys_of
from penstock.embedding.gpu.export import ExportOrder
from penstock.embedding.gpu.retention import Access, Rules
from penstock.embedding.gpu.rows import KeyedRows
from penstock.embedding.store import Candidates, Cursor, FindResult, TableRows
from penstock.kernels.index.find import Misses
from penstock.kernels.index.index import Index, KeyBatch
from penstock.kernels.index.rows import read_initial
from penstock.kernels.plan import DevicePlan

_WORD = 0xFFFFFFFF


class RetainedRows:
    """Rows by key, and what is asked of them between a look-up and its update."""

    def __init__(self, keyed: KeyedRows, absent: Tensor, rules: Rules | None, name: str) -> None:
        """No rows yet.

        Args:
          keyed: index and slots.
          absent: [T] int32 slots of default rows; -1: the table refuses no key.
          rules: of the tables; None: every key gets a row, which stays.
          name: of the store, for messages.
        """
        self.keyed = keyed
        self.absent = absent
        self.rules = rules
        self.erase_version = 0
        """Slots hold as long as no row was erased since."""
        self._content_version = 0
        self._row_order, self._count_order = ExportOrder(), ExportOrder()
        self._name = name

    def changed(self) -> None:
        """Notes that rows or counts come, go or change, by other means than an insertion."""
        self._content_version += 1

    @cached_property
    def none_absent(self) -> Tensor:
        """[T] int32 as `absent`, of no default rows."""
        return torch.full_like(self.absent, -1)

    @property
    def access(self) -> Access:
        """What the rules need."""
        rows = self.keyed.slots.rows
        return Access(self.keyed.index, rows.usage, self.keyed.of_table, self.absent, self.erase)

    def read(self, batch: KeyBatch, table: int, *, insert: bool) -> FindResult:
        """See `Store.find`: of the keys of one table; with `insert` they get rows, if admitted."""
        slots, misses = self.keyed.index.find(batch, self.absent)
        absent = misses.places[: int(misses.number)]
        found = torch.ones(len(batch.keys), dtype=torch.bool, device=slots.device)
        found[absent] = False
        if insert:
            self.insert(batch, slots, misses)
        rows = self.keyed.slots.rows
        values, state = (part[slots.long().clamp(min=0)] for part in rows[:2])
        values = values.float()
        initial = (slots < 0).nonzero()[:, 0]
        if len(initial):
            first = read_initial(batch.keys[initial], table, self.keyed.initial, rows.values)
            values[initial] = first.float()
            state[initial] = self.keyed.initial.state[table]
        return FindResult(values, state, found)

    def insert(
        self, batch: KeyBatch, slots: Tensor, misses: Misses, *, explicit: bool = False
    ) -> None:
        """Gives rows to missing keys, where admitted, and writes their slots."""
        if self.rules is not None:
            if not int(misses.number):
                return
            self._content_version += 1
            misses = self.rules.admit(self.access, batch, slots, misses, explicit=explicit)
        if misses.places.numel():
            self.keyed.make(batch, slots, misses)

    def erase(self, keys: Tensor, tables: Tensor) -> int:
        """Removes rows of keys [n] of tables [n] int64, and returns how many there were."""
        self._content_version += 1
        self.erase_version += 1
        self._row_order.drop()
        return self.keyed.erase(keys, tables)

    def refresh(self, plan: DevicePlan, lookup: GpuLookup) -> None:
        """Finds rows again if some were erased since; such a key gets a new row, or none."""
        if lookup.erase_version == self.erase_version and lookup.num_missing == 0:
            return
        batch = lookup.batch_again(keys=True)
        keys = keys_of(plan, batch)
        slots, misses = self.keyed.find(plan, batch, self.none_absent)
        if self.rules is not None:
            misses = self.rules.stay_away(keys, slots, lookup.slots, misses, self.absent)
        self.insert(keys, slots, misses)
        lookup.found_again(slots, self.erase_version)

    def export_rows(self, table: int, cursor: Cursor, most: int) -> tuple[TableRows, Cursor]:
        """See `Store.export_batch`."""
        index, sizes = self.keyed.index, self.keyed.of_table.cpu().numpy()
        cursor = self._current(cursor)
        keys, slots, after = self._row_order.read(index, table, sizes, cursor, most)
        rows = self.keyed.slots.rows
        usage = rows.usage[slots].long() & _WORD if rows.usage.shape[1] else None
        return TableRows(keys, rows.values[slots], rows.state[slots], usage), after

    def export_counts(self, table: int, cursor: Cursor, most: int) -> tuple[Candidates, Cursor]:
        """See `Store.export_candidates`."""
        counts, sizes = self._no_counts, np.zeros(len(self.absent), dtype=np.int64)
        if self.rules is not None:
            counts, sizes = self.rules.counts.index, self.rules.counts.of_table
        cursor = self._current(cursor)
        keys, numbers, after = self._count_order.read(counts, table, sizes, cursor, most)
        return Candidates(keys, numbers), after

    @cached_property
    def _no_counts(self) -> Index:
        return Index(self.keyed.device)

    def _current(self, cursor: Cursor) -> Cursor:
        """A cursor of now; waits for the device.

        Raises:
          StaleExportError: rows have come or gone since it was another's.
        """
        version = (self._content_version << 40) + int(self.keyed.slots.allocated)
        if cursor.version not in {None, version}:
            raise checks.stale_export(self._name)
        return replace(cursor, version=version)
