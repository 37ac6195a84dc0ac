"""The rows of a collection's tables by key: find, assign, erase, export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import TableConfig
from penstock.embedding.collection.table_stores import TableStores
from penstock.embedding.rules.optimizer import initial_state
from penstock.embedding.sharded.shard_map import Plan, ShardMap
from penstock.embedding.sharded.store import ShardedStore
from penstock.embedding.store import CURSOR_START, FindResult, TableRows
from penstock.errors import ConfigError
from penstock.types import as_keys


def rows_of(table: TableConfig, keys: Tensor) -> Tensor:
    """The keys themselves; of a hash stack they must be numbers of its rows.

    Raises:
      ConfigError: it is one, and they are not.
    """
    stack = table.hash_stack
    if stack is not None and bool(((keys < 0) | (keys >= stack.rounds * stack.size)).any()):
        raise ConfigError(
            f"table {table.name!r} is a hash stack, whose rows are numbers below "
            f"{stack.rounds * stack.size} that keys share; stacked_rows(hash_stack, keys) has "
            "those of keys"
        )
    return keys


class RowsByKey(nn.Module):
    """What an `EmbeddingCollection` does to single rows, outside of batches.

    Rows of a table that is a hash stack are known by number; see `shapes.hash_stack.stacked_rows`.
    """

    device: torch.device
    _stores: TableStores

    def find(self, table: str, keys: Tensor) -> FindResult:
        """Reads the rows of keys, [n] int64 of any value; makes none.

        Returns:
          Values [n, D] and optimizer states [n, S] float32, where a key has no row those that it
          would read; and whether it has one. Copies, on the tables' device.
        """
        store, number = self._stores.find_table(table)
        return store.find(number, rows_of(store.tables[number], as_keys(keys)).to(self.device))

    def assign(self, table: str, keys: Tensor, values: Tensor) -> int:
        """Sets the values of keys, and makes rows of those that have none.

        Every key is admitted. Optimizer states of rows that there were stay; those of new rows
        begin. In a table with eviction it is a use, and other uses are forgotten.

        Args:
          table: its name.
          keys: [n] integers; of equal ones the last stays.
          values: [n, D], any float dtype, finite.

        Returns:
          How many keys were new.

        Raises:
          ConfigError: a wrong shape or dtype; a value that is not finite, by key.
          CapacityError: no memory, or `max_bytes` holds fewer rows.
        """
        store, number = self._stores.find_table(table)
        keys = rows_of(store.tables[number], as_keys(keys)).to(self.device)
        shape = (keys.numel(), store.layout.dim)
        if keys.dim() != 1 or values.shape != shape or not values.is_floating_point():
            raise ConfigError(
                f"values of table {table!r}: expected floats {list(shape)} for keys "
                f"{list(keys.shape)}, got {values.dtype} {list(values.shape)}"
            )
        values = values.detach().to(self.device, torch.float32)
        finite = values.isfinite().all(1)
        if not bool(finite.all()):
            key = int(keys[~finite][0])
            raise ConfigError(
                f"values of table {table!r}: those of key {key} are not finite; every look-up "
                "of it would fail"
            )
        before = store.find(number, keys)
        start = initial_state(store.tables[number].optimizer)
        state = torch.where(before.found[:, None], before.state, start)
        return store.insert_or_assign(number, TableRows(keys, values, state))

    def set_scores(self, table: str, keys: Tensor, scores: Tensor) -> int:
        """Sets the scores of rows, by which they leave a full table: the lowest first.

        It counts as a use now.

        Args:
          table: with eviction of the order `score`.
          keys: [n] integers, distinct; those without a row are left alone.
          scores: [n] integers, 0 to 2^32 - 1.

        Returns:
          How many of the keys have a row.

        Raises:
          ConfigError: another order; scores of another shape, or out of range.
        """
        store, number = self._stores.find_table(table)
        eviction = store.tables[number].eviction
        if eviction is None or eviction.order != "score":
            order = None if eviction is None else eviction.order
            raise ConfigError(f"scores of table {table!r}, whose eviction has order {order}: score")
        keys = rows_of(store.tables[number], as_keys(keys)).to(self.device)
        scores = as_keys(scores, "scores").to(self.device)
        if scores.shape != keys.shape:
            raise ConfigError(f"{list(scores.shape)} scores for keys {list(keys.shape)}")
        found = store.find(number, keys)
        now = torch.full_like(scores, store.retention_state(number).numbers["now"])
        rows = TableRows(keys, found.values, found.state, torch.stack([now, scores], 1))
        present = [None if part is None else part[found.found] for part in rows]
        store.insert_or_assign(number, TableRows(*present))  # type: ignore[arg-type]
        return int(found.found.sum())

    def erase(self, table: str, keys: Tensor) -> int:
        """Removes the rows of keys and returns how many there were; absent keys are no error.

        Gradients of them that are not applied yet are dropped in tables with rules; in others the
        next update makes the rows anew.
        """
        store, number = self._stores.find_table(table)
        return store.erase(number, rows_of(store.tables[number], as_keys(keys)).to(self.device))

    def export(
        self, table: str, *, keys: Tensor | None = None, since: int | None = None
    ) -> Iterator[TableRows]:
        """Copies some rows of a table to the CPU, in batches: as `export_table` does all of them.

        Args:
          table: its name.
          keys: [n] integers: the rows of these, in their order; absent ones are left out.
          since: the rows that training has updated at that time or later, in the unit of the
            table's eviction: the collection's `step`, or seconds since 1970.

        Raises:
          ConfigError: neither is given, or both; or a table that does not mark when rows are used.
          StaleExportError: as `export_table`, with `since`.
        """
        if (keys is None) == (since is None):
            raise ConfigError(
                f"export of table {table!r}: give keys or since; all rows come from export_table"
            )
        store, number = self._stores.find_table(table)
        if keys is not None:
            given = rows_of(store.tables[number], as_keys(keys)).to(self.device)
            found = store.find(number, given)
            rows = TableRows(given, found.values, found.state)
            return iter([_on_cpu(rows, found.found)])
        if not store.layout.usage_dim:
            raise ConfigError(
                f"export of table {table!r} since {since}: its rows have no time of use; give it "
                "an eviction, for instance with a ttl longer than you train"
            )
        assert since is not None
        return self._used_since(table, since)

    def _used_since(self, table: str, since: int) -> Iterator[TableRows]:
        for rows in self.export_table(table):
            assert rows.usage is not None
            is_recent = rows.usage[:, 0] >= since
            if bool(is_recent.any()):
                yield _on_cpu(rows, is_recent)

    def export_table(self, table: str, batch_rows: int = 1 << 18) -> Iterator[TableRows]:
        """Copies every row of a table once to the CPU, in batches, in no particular order.

        Raises:
          StaleExportError: a row was added, removed or changed meanwhile.
        """
        store, number = self._stores.find_table(table)
        cursor = CURSOR_START
        while True:
            rows, cursor = store.export_batch(number, cursor, batch_rows)
            if not len(rows.keys):
                return
            yield _on_cpu(rows)

    def own_places(self, table: str, keys: Tensor) -> Tensor:
        """[m] int64: which of the keys [n] int64 are of rows that live here; all, if not spread."""
        store, number = self._stores.find_table(table)
        if isinstance(store, ShardedStore):
            own = store.owners.places_of(store.ranks.rank, number, keys.to(self.device))
            return own.to(keys.device)
        return torch.arange(len(keys))

    def sources(self, table: str, num_ranks: int) -> tuple[int, ...]:
        """Which of so many ranks, over which a table was spread, had rows that live here now."""
        store, number = self._stores.find_table(table)
        if isinstance(store, ShardedStore):
            whole = store.owners.wholes[number]
            if whole >= 0:
                return tuple(range(num_ranks)) if whole == store.ranks.rank else ()
            before = ShardMap.even(num_ranks)
            return Plan.between(before, store.shard_map).sources(store.ranks.rank)
        return tuple(range(num_ranks))

    def import_rows(self, table: str, rows: TableRows) -> int:
        """Writes rows into a table; returns how many keys were new. Equal keys: the last stays."""
        store, number = self._stores.find_table(table)
        return store.insert_or_assign(number, rows)


def _on_cpu(rows: TableRows, chosen: Tensor | None = None) -> TableRows:
    parts: list[Any] = [
        None if part is None else (part if chosen is None else part[chosen]).cpu() for part in rows
    ]
    return TableRows(*parts)
