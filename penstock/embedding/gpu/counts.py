"""Counts of keys that have no row yet, in a GPU store."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.index.find import Misses
from penstock.kernels.index.index import Index, KeyBatch
from penstock.kernels.index.reference import find

_WORD = 0xFFFFFFFF


class KeyCounts:
    """(table, key) -> count, of keys without a row."""

    def __init__(self, num_tables: int, device: torch.device) -> None:
        """Nothing is counted."""
        self.index = Index(device)
        self.of_table = np.zeros(num_tables, dtype=np.int64)
        """[T] keys that are counted."""

    def of(self, keys: Tensor, tables: Tensor) -> Tensor:
        """[n] int64 counts; -1: not counted."""
        if not self.of_table.any():
            return torch.full_like(keys, -1)
        return find(self.index.entries, self.index.salt, keys, tables)[0]

    def set(self, keys: Tensor, tables: Tensor, counts: Tensor) -> None:
        """Sets the counts of keys that are counted."""
        if not len(keys):
            return
        _, entry = find(self.index.entries, self.index.salt, keys, tables)
        meta = self.index.entries[:, 1]
        meta[entry] = (meta[entry] >> 40 << 40) | counts

    def add(self, keys: Tensor, tables: Tensor, counts: Tensor) -> None:
        """Counts keys that are not counted, and differ."""
        if not len(keys):
            return
        self.index.reserve(int(self.of_table.sum()) + len(keys))
        # One packed feature a table; keys come in its order.
        order = tables.argsort(stable=True)
        number = len(self.of_table)
        ends = torch.bincount(tables, minlength=number).cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        numbers = torch.arange(number, dtype=torch.int32, device=keys.device)
        batch = KeyBatch(keys[order], offsets, numbers, 1)
        everything = torch.arange(len(keys), device=keys.device)
        misses = Misses(everything, torch.tensor([len(keys)], device=keys.device))
        found = torch.empty(len(keys), dtype=torch.int32, device=keys.device)
        claims = self.index.claim(batch, misses, found, keys.new_zeros(1))
        self.index.settle(batch, misses, claims, counts[order])
        self.of_table += by_table(tables, number)

    def forget(self, keys: Tensor, tables: Tensor) -> None:
        """Counts keys no more, which were."""
        self.index.erase(keys, tables)
        self.of_table -= by_table(tables, len(self.of_table))

    def halve(self, halvings: np.ndarray) -> None:
        """Counts become 2^-n of what they were, by table; those that become 0 are forgotten."""
        entries = self.index.entries
        keys, meta = entries[entries[:, 1] > 1].unbind(1)
        tables = (meta >> 40) - 1
        counts = (meta & _WORD) >> torch.from_numpy(halvings).to(keys.device)[tables]
        left = counts > 0
        self.index = Index(keys.device)
        self.of_table[:] = 0
        self.add(keys[left], tables[left], counts[left])


def by_table(tables: Tensor, number: int) -> np.ndarray:
    """[number] int64: how many of `tables` [n] int64 are which."""
    found: np.ndarray = torch.bincount(tables, minlength=number).cpu().numpy()
    return found
