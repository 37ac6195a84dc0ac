"""Where the keys of a table are in an index of a GPU store, for exports of many tables.

An index is not sorted by table, so that finding the keys of one takes a pass over all entries. Here
a pass finds those of as many tables as fit into a bounded list.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.embedding.store import Cursor
from penstock.kernels.index.index import Index

_ENTRIES_AT_ONCE = 1 << 22
_FEWEST_KEPT = 1 << 21
"""Places that are kept, of 8 bytes each; with a large index a 16th of its entries."""


class ExportOrder:
    """Places of the keys of some tables, one table after the other."""

    def __init__(self) -> None:
        self._of: tuple[Index, int] | None = None
        """The index, and the version of its content."""
        self._first = 0
        self._begin = np.zeros(1, dtype=np.int64)
        self._places = torch.empty(0, dtype=torch.int64)

    def places(
        self, index: Index, version: int, table: int, sizes: NDArray[np.int64]
    ) -> Tensor | None:
        """[sizes[table]] int64, in their order; None: too many to be kept.

        Args:
          index: whose keys.
          version: another one whenever keys come or go.
          table: whose keys.
          sizes: [T] keys of each table.
        """
        most = max(_FEWEST_KEPT, index.capacity // 16)
        if sizes[table] > most:
            return None
        number = (table - self._first) % len(sizes)
        if self._of != (index, version) or number + 1 >= len(self._begin):
            self._fill(index, table, sizes, most)
            self._of = index, version
            number = 0
        return self._places[self._begin[number] : self._begin[number + 1]]

    def read(
        self, index: Index, table: int, sizes: NDArray[np.int64], cursor: Cursor, most: int
    ) -> tuple[Tensor, Tensor, Cursor]:
        """Keys and payloads of a table, up to `most`, from the place of a cursor of now on."""
        assert cursor.version is not None
        places = self.places(index, cursor.version, table, sizes)
        if places is not None:
            after = min(cursor.place + most, len(places))
            found = index.at(places[cursor.place : after])
            return *found, Cursor(after, cursor.version)
        # A table that is much of the index: by the place in it.
        parts = [torch.empty(0, dtype=torch.int64, device=index.entries.device)]
        place, number = cursor.place, 0
        while place < index.capacity and number < most:
            last = min(place + min(_ENTRIES_AT_ONCE, most - number), index.capacity)
            part = (index.tables_at(place, last) == table).nonzero()[:, 0] + place
            parts.append(part)
            place, number = last, number + len(part)
        return *index.at(torch.cat(parts)), Cursor(place, cursor.version)

    def drop(self) -> None:
        """Gives the memory back."""
        self._of = None
        self._places = torch.empty(0, dtype=torch.int64)

    def _fill(self, index: Index, table: int, sizes: NDArray[np.int64], most: int) -> None:
        """Tables from `table` on, after the last one the first, as long as there is room."""
        ends = np.roll(sizes, -table).cumsum()
        ends = ends[ends <= most]
        self._first, self._begin = table, np.concatenate([[0], ends])
        wanted = torch.zeros(len(sizes), dtype=torch.bool)
        wanted[(torch.arange(len(ends)) + table) % len(sizes)] = True
        places = index.places_of(wanted.to(index.entries.device))
        tables = (index.entries[places, 1] >> 40) - 1
        self._places = places[((tables - table) % len(sizes)).argsort(stable=True)]
