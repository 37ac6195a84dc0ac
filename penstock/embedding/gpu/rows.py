"""The rows of a GPU store by key: the index, the slots, and what new rows begin with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.config import TableConfig
from penstock.embedding.gpu.batches import MANY_KEYS, Counters, keys_of
from penstock.embedding.gpu.slots import SlotPool
from penstock.embedding.rules import initializer, optimizer
from penstock.errors import CapacityError
from penstock.kernels.index.claim import find_or_claim
from penstock.kernels.index.find import Misses, find_slots
from penstock.kernels.index.index import Claims, Index, KeyBatch
from penstock.kernels.index.rows import Count, Destination, Initial, lend_rows, make_rows
from penstock.kernels.plan import DevicePlan
from penstock.types import KeyedJagged


def initial_of(tables: Sequence[TableConfig], seed: int, device: torch.device) -> Initial:
    """What the rows of each table begin with, on the device."""
    kinds, scales, states, seeds = [], [], [], []
    for table in tables:
        kinds.append(initializer.KINDS[type(table.initializer)])
        scales.append(initializer.scale_of(table.initializer))
        states.append(optimizer.initial_state(table.optimizer))
        seeds.append(initializer.table_seed(seed, table.name))
    arrays = (
        torch.tensor(kinds, dtype=torch.int32),
        torch.tensor(scales, dtype=torch.float32),
        torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64)),
        torch.tensor(states, dtype=torch.float32),
        torch.zeros(len(tables), dtype=torch.int64),
    )
    return Initial(*(array.to(device) for array in arrays))


class KeyedRows:
    """Finds the rows of keys, and makes them."""

    def __init__(
        self, slots: SlotPool, initial: Initial, num_tables: int, name: str, device: torch.device
    ) -> None:
        """No rows yet.

        Args:
          slots: where rows go.
          initial: what they begin with.
          num_tables: of the store.
          name: of the store, for messages.
          device: of all arrays.
        """
        self.device = device
        self.slots = slots
        self.index = Index(device)
        self.initial = initial
        self.of_table = torch.zeros(num_tables, dtype=torch.int64, device=device)
        """[T] int64 rows of each table."""
        self._name = name
        self._miss_counters = Counters(device, 1, torch.int64)

    def has_room(self, rows: int) -> bool:
        """Whether so many more rows fit for sure; may wait for an insertion before."""
        return self.slots.has_room(rows, self.index.room())

    def find(self, plan: DevicePlan, batch: KeyedJagged, absent: Tensor) -> tuple[Tensor, Misses]:
        """[N] int32 slots of a batch's keys, undefined for those of other stores; and misses.

        Args:
          plan: features and tables.
          batch: keys and offsets.
          absent: [T] int32, what a missing key of each table gets.
        """
        slots, misses = self._nothing_found(batch)
        find_slots(self.index.view, plan, batch, absent, slots, misses)
        return slots, misses

    def find_or_make(self, plan: DevicePlan, batch: KeyedJagged, absent: Tensor) -> Tensor:
        """[N] int32 slots of a batch's keys; missing ones get rows. There must be room for all."""
        slots, misses = self._nothing_found(batch)
        values = batch.values
        keys = keys_of(plan, batch)
        allocated = self.slots.allocated
        if values.numel() < MANY_KEYS:
            # One launch less; but many keys, most of which are there, are found faster alone.
            claims = Claims(values.new_empty(3, values.numel()))
            find_or_claim(self.index.view, plan, batch, absent, slots, misses, *claims, allocated)
        else:
            find_slots(self.index.view, plan, batch, absent, slots, misses)
            claims = self.index.claim(keys, misses, slots, allocated)
        self._make(keys, slots, misses, claims, values.numel())
        return slots

    def make(self, keys: KeyBatch, slots: Tensor, misses: Misses) -> None:
        """Gives rows to missing keys and writes their slots; waits where room may be short.

        Raises:
          CapacityError: there is no memory. Nothing changed.
        """
        most = misses.places.numel()
        if not self.has_room(most):
            most = int(misses.number)
            self._make_room(keys, misses, most, 4 * keys.keys.numel())
        claims = self.index.claim(keys, misses, slots, self.slots.allocated)
        self._make(keys, slots, misses, claims, most)

    def lend(self, keys: KeyBatch, slots: Tensor, misses: Misses, number: int) -> None:
        """Lets `number` missing keys read their initial values, from slots that are nobody's.

        Raises:
          CapacityError: there is no memory.
        """
        if not number:
            return
        try:
            first = self.slots.borrow(number)
        except MemoryError:
            raise CapacityError(
                f"{self._name}: no memory on {self.device} for the initial values of {number} "
                "keys; use smaller batches"
            ) from None
        lend_rows(keys, misses, first, slots, self.slots.rows.values, self.initial)

    def erase(self, keys: Tensor, tables: Tensor) -> int:
        """Removes rows of keys [n] of tables [n] int64; waits for the device. Returns how many."""
        freed = self.index.erase(keys, tables)
        is_there = freed >= 0
        self.of_table -= torch.bincount(tables[is_there], minlength=len(self.of_table))
        freed = freed[is_there]
        self.slots.release(freed)
        return len(freed)

    def _nothing_found(self, batch: KeyedJagged) -> tuple[Tensor, Misses]:
        values = batch.values
        slots = torch.empty_like(values, dtype=torch.int32)
        return slots, Misses(torch.empty_like(values), self._miss_counters.take())

    def _make(
        self, keys: KeyBatch, slots: Tensor, misses: Misses, claims: Claims, most: int
    ) -> None:
        if not keys.keys.numel():
            return  # no kernel runs that could report
        count = Count(self.slots.allocated, self.slots.message, self.slots.num_insertions + 1)
        to = Destination(self.slots.slots, self.slots.rows, self.of_table, count)
        make_rows(self.index, keys, misses, claims, slots, to, self.initial)
        self.slots.take(most)

    def _make_room(self, keys: KeyBatch, misses: Misses, most: int, wish: int) -> None:
        """Makes room for `most` rows, and for `wish` if memory is plenty, so as not to ask again.

        Raises:
          CapacityError: there is none, not even for the different keys alone.
        """
        bytes_each = self.slots.row_bytes + 32
        if self.device.type == "cuda":
            wish = min(wish, torch.cuda.mem_get_info(self.device)[0] // 4 // bytes_each)
        for wanted in (max(most, wish), most, None):
            if wanted is None:
                places = misses.places[: int(misses.number)]
                pairs = torch.stack([keys.keys[places], keys.tables_of(places)], 1)
                wanted = len(torch.unique(pairs, dim=0))
            try:
                self.slots.reserve(wanted)
                self.index.reserve(self.slots.most_rows + wanted)
            except MemoryError:
                continue
            return
        raise CapacityError(
            f"{self._name} cannot grow beyond {self.slots.num_rows()} rows: no memory on "
            f"{self.device}; use a GPU with more memory, smaller tables or max_bytes with eviction"
        )
