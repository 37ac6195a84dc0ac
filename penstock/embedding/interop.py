"""In and out of other libraries: TorchRec's KeyedJaggedTensor, weights trained elsewhere.

Reading needs nothing installed; making a KeyedJaggedTensor needs torchrec.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.embedding.rules.optimizer import initial_state
from penstock.embedding.store import RowLayout, TableRows
from penstock.errors import ConfigError
from penstock.types import KeyedJagged, as_keys

_ROWS_AT_ONCE = 1 << 18


def from_keyed_jagged_tensor(kjt: Any, features: Sequence[str] | None = None) -> KeyedJagged:
    """Makes a `KeyedJagged` of a torchrec KeyedJaggedTensor.

    Args:
      kjt: with or without weights, of one batch size for all its keys.
      features: which of its keys, and in which order; None: all, as they are.

    Raises:
      ConfigError: its batch sizes are unequal, its values are no integers, or it lacks a feature.
    """
    names = tuple(kjt.keys())
    lengths = kjt.lengths().to(torch.int64).cpu()
    if not names or lengths.numel() % len(names) or kjt.variable_stride_per_key():
        raise ConfigError(
            f"the KeyedJaggedTensor has {lengths.numel()} bags for {len(names)} keys; "
            "every key needs the same batch size"
        )
    offsets = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    weights = kjt.weights_or_none()
    if weights is not None:
        weights = weights.detach().to(torch.float32).cpu().contiguous()
    packed = KeyedJagged(
        names, as_keys(kjt.values(), "the KeyedJaggedTensor").cpu().contiguous(), offsets, weights
    )
    if features is None or tuple(features) == names:
        return packed
    return KeyedJagged.pack({feature: packed[feature] for feature in features})


def to_keyed_jagged_tensor(sparse: KeyedJagged) -> Any:
    """Makes a torchrec KeyedJaggedTensor of the same keys and weights.

    Raises:
      ConfigError: torchrec is not installed.
    """
    try:
        jagged = importlib.import_module("torchrec.sparse.jagged_tensor")
    except ImportError as error:
        raise ConfigError(f"a KeyedJaggedTensor needs torchrec: {error}") from None
    return jagged.KeyedJaggedTensor(
        keys=list(sparse.features),
        values=sparse.values,
        lengths=sparse.offsets.diff(),
        weights=sparse.weights,
    )


def import_weights(
    collection: EmbeddingCollection, table: str, weight: Tensor, keys: Tensor | None = None
) -> None:
    """Writes the rows of an embedding matrix into a table; optimizer states begin anew.

    Args:
      collection: where the table is.
      table: its name.
      weight: [n, dim], any float dtype, for instance of nn.EmbeddingBag.
      keys: [n] int64, the key of each row; None: the row's number, 0 to n - 1.

    Raises:
      ConfigError: no such table, or a wrong shape.
    """
    config = next((each for each in collection.tables if each.name == table), None)
    if config is None:
        known = ", ".join(each.name for each in collection.tables)
        raise ConfigError(f"no table {table!r}; there are {known}")
    if weight.dim() != 2 or weight.shape[1] != config.dim:
        raise ConfigError(
            f"weight of table {table!r}: expected [n, {config.dim}], got {list(weight.shape)}"
        )
    if keys is None:
        keys = torch.arange(weight.shape[0], dtype=torch.int64)
    if keys.shape != weight.shape[:1]:
        raise ConfigError(
            f"keys of table {table!r}: {list(keys.shape)} for a weight of {list(weight.shape)}"
        )
    state_dim = RowLayout.of(config).state_dim
    start = initial_state(config.optimizer)
    rows = weight.detach().cpu()
    for first in range(0, len(keys), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        values = rows[part].to(torch.float32)
        state = torch.full((len(values), state_dim), start, dtype=torch.float32)
        collection.import_rows(table, TableRows(keys[part].to(torch.int64), values, state))


def import_state_dict(collection: EmbeddingCollection, state_dict: Mapping[str, Tensor]) -> None:
    """Writes the tables found in a model's state_dict; row numbers become keys.

    An entry belongs to table t if its name is `t.weight` or ends with `.t.weight`, as in
    TorchRec's `embedding_bags.t.weight`.

    Raises:
      ConfigError: a table of the collection has no entry, or more than one, or a wrong shape.
    """
    found = {}
    for table in collection.tables:
        ending = f"{table.name}.weight"
        names = [name for name in state_dict if name == ending or name.endswith(f".{ending}")]
        if len(names) != 1:
            what = "no entry" if not names else f"{len(names)} entries ({', '.join(names)})"
            raise ConfigError(
                f"table {table.name!r}: {what} named {ending} in the state_dict; "
                "use import_weights for tables of other names"
            )
        found[table.name] = state_dict[names[0]]
    for name, weight in found.items():
        import_weights(collection, name, weight)
