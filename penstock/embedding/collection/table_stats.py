"""Sizes of tables, and what their rules have done."""

from __future__ import annotations

import math
from typing import NamedTuple

from penstock.embedding.retention import COUNT_BYTES, NUMBERS, overhead_bytes
from penstock.embedding.store import Store, TableCounters


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


def retention_stats(store: Store, number: int, counters: TableCounters) -> RetentionStats:
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
