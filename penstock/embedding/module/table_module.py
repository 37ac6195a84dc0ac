"""What torch asks of a module that has state, for one whose state is tables."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from penstock.embedding.module.table_files import load_tables, save_tables
from penstock.embedding.module.table_state import copy_tables, pack_tables, unpack_tables

if TYPE_CHECKING:
    from penstock.embedding.module.collection import EmbeddingCollection

# Attributes that belong to one process and one collection.
_OF_PROCESS = frozenset({"_groups", "_outputs", "_pending"})


class TableModule(nn.Module):
    """Saving, loading and copying of an `EmbeddingCollection`, its only subclass."""

    anchor: nn.Parameter
    """Stands for the tables where torch asks for parameters; its value means nothing."""
    copied_at: int | None
    """Of a copy that is not trained: the anchor's version when it was made."""
    tables_in_state: bool
    """Whether `state_dict` holds the tables. False, for tables too large for that: it holds their
    step alone, and `load_state_dict` wants `load_tables` to have been called before.
    """

    def _open(self, state: dict[str, Any]) -> None:
        """Takes attributes from `_state_but_tables` of another module; tables are empty."""
        raise NotImplementedError

    @property
    def _collection(self) -> EmbeddingCollection:
        return cast("EmbeddingCollection", self)

    def get_extra_state(self) -> Tensor:
        """All that the tables hold, for `state_dict`: [n] uint8, a copy; see `table_state`."""
        return pack_tables(self._collection, rows=self.tables_in_state)

    def set_extra_state(self, state: Any) -> None:
        """Inverse of `get_extra_state`, for `load_state_dict`: replaces everything there was.

        Raises:
          CheckpointError: of other tables, or changed since; nothing has changed then.
        """
        unpack_tables(state, self._collection)

    def save_tables(self, path: str | os.PathLike[str]) -> None:
        """Writes the tables as a directory of files; needs little memory of its own.

        Returns once the disk has everything. A directory that it wrote before is replaced, whole.

        Raises:
          CheckpointError: the disk is full or fails, or something else is at `path`; what was
            there stays.
        """
        save_tables(path, self._collection)

    def load_tables(self, path: str | os.PathLike[str]) -> None:
        """Reads what `save_tables` wrote, or the tables of a run's checkpoint: replaces them all.

        Raises:
          CheckpointError: missing, damaged, or of other tables; nothing has changed then.
          CapacityError: no memory: rows there were and those read are there together for a while.
        """
        load_tables(path, self._collection)

    def __getstate__(self) -> dict[str, Any]:
        return {**self._state_but_tables(), "_packed": pack_tables(self._collection)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        packed = state.pop("_packed")
        self._open(state)
        unpack_tables(packed, self._collection)

    def __deepcopy__(self, memo: dict[int, Any]) -> TableModule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin._open(copy.deepcopy(self._state_but_tables(), memo))
        copy_tables(self._collection, twin._collection)
        twin.copied_at = twin.anchor._version
        return twin

    def _state_but_tables(self) -> dict[str, Any]:
        """Attributes that can be copied: gradients that are not applied yet stay behind."""
        return {name: value for name, value in vars(self).items() if name not in _OF_PROCESS}
