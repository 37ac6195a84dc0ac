"""Tables out of and into states of other libraries: weights and what their optimizers know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from penstock.config import TableConfig
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.embedding.rules.optimizer import initial_state
from penstock.embedding.store import RowLayout, TableRows
from penstock.errors import ConfigError

_ROWS_AT_ONCE = 1 << 18


def import_weights(
    collection: EmbeddingCollection,
    table: str,
    weight: Tensor,
    keys: Tensor | None = None,
    state: Tensor | None = None,
) -> None:
    """Writes the rows of an embedding matrix into a table.

    Args:
      collection: where the table is.
      table: its name.
      weight: [n, dim], any float dtype, for instance of nn.EmbeddingBag.
      keys: [n] int64, the key of each row; None: the row's number, 0 to n - 1.
      state: [n, S], of the table's optimizer (docs/optimizers.md); None: it begins anew.

    Raises:
      ConfigError: no such table, or a wrong shape.
    """
    config = _config_of(collection, table)
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
    if state is None:
        start = torch.tensor(initial_state(config.optimizer), dtype=torch.float32)
        state = start.expand(len(keys), state_dim)
    if state.shape != (len(keys), state_dim):
        raise ConfigError(
            f"state of table {table!r}: expected {[len(keys), state_dim]} for optimizer "
            f"{config.optimizer.kind}, got {list(state.shape)}"
        )
    rows, states = weight.detach().cpu(), state.detach().cpu()
    for first in range(0, len(keys), _ROWS_AT_ONCE):
        part = slice(first, first + _ROWS_AT_ONCE)
        values, of_part = rows[part].to(torch.float32), states[part].to(torch.float32)
        collection.import_rows(
            table, TableRows(keys[part].to(torch.int64), values, of_part.contiguous())
        )


def import_state_dict(
    collection: EmbeddingCollection,
    state_dict: Mapping[str, Any],
    optimizer_state: Mapping[str, Any] | None = None,
) -> None:
    """Writes the tables found in a model's state_dict; row numbers become keys.

    An entry belongs to table t if its name is `t.weight` or ends with `.t.weight`, as in
    TorchRec's `embedding_bags.t.weight`. Sharded tensors are taken where this process has all of
    them.

    Args:
      collection: where the tables are.
      state_dict: of a model.
      optimizer_state: of its optimizer, by names of parameters, as TorchRec's KeyedOptimizer and
        fused optimizers give it: `{"state": {"...t.weight": {"sum": ...}}}`, or `t.momentum1`.
        None: optimizer states begin anew. A step there becomes the collection's.

    Raises:
      ConfigError: a table of the collection has no entry, or more than one, or a wrong shape; the
        optimizer's state is not that of the table's optimizer.
    """
    found = {
        table.name: _entry_of(table.name, state_dict, "state_dict") for table in collection.tables
    }
    states: dict[str, Tensor] = {}
    steps = set()
    if optimizer_state is not None:
        by_parameter = optimizer_state.get("state", optimizer_state)
        for table in collection.tables:
            of_table = _entry_of(table.name, by_parameter, "optimizer's state")
            states[table.name], step = _state_of(table, of_table, len(found[table.name]))
            steps |= {step} - {None}
    if len(steps) > 1:
        raise ConfigError(
            f"the optimizer's state has tables at different steps: {sorted(map(str, steps))}; a "
            "collection has one for all: train on from one step, or import the weights alone"
        )
    for name, weight in found.items():
        import_weights(collection, name, weight, state=states.get(name))
    for step in steps:
        collection.step = int(step or 0)


def export_state_dict(
    collection: EmbeddingCollection,
    sizes: Mapping[str, int],
    *,
    prefix: str = "embedding_bags.",
    naming: Literal["fused", "torch"] = "fused",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tables as matrices and their optimizers' states, as TorchRec has them.

    Args:
      collection: with keys from 0 on, as `import_state_dict` makes them.
      sizes: rows of each table's matrix, `num_embeddings`; keys without a row read as they would.
      prefix: of the names.
      naming: of the states: `t.momentum1` of fused optimizers, or `sum` of torch's.

    Returns:
      `{prefix + "t.weight": [n, D]}`, and `{"state": {prefix + "t.weight": {...}},
      "param_groups": []}`.

    Raises:
      ConfigError: a table has no size, or rows of keys that a matrix of that size has not; an
        optimizer that TorchRec does not know.
    """
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    rows_of = {stats.name: stats.rows for stats in collection.table_stats()}
    for table in collection.tables:
        if table.name not in sizes:
            raise ConfigError(f"sizes has no table {table.name!r}: give its num_embeddings")
        parts = [
            collection.find(table.name, keys)
            for keys in torch.split(torch.arange(sizes[table.name]), _ROWS_AT_ONCE)
        ]
        found = sum(int(part.found.sum()) for part in parts)
        if found < rows_of[table.name]:
            raise ConfigError(
                f"table {table.name!r}: {rows_of[table.name] - found} of its rows have keys beyond "
                f"0 to {sizes[table.name] - 1}, and a matrix has no place for them; raise sizes, "
                "or use export_table, which gives keys"
            )
        name = f"{prefix}{table.name}.weight"
        weights[name] = torch.cat([part.values for part in parts])
        state = torch.cat([part.state for part in parts])
        states[name], first = {}, 0
        for number, width in enumerate(_widths_of(table)):
            columns = state[:, first : first + width]
            fused, plain = f"{table.name}.momentum{number + 1}", _plain_name(table, number)
            is_row_wise = naming == "fused" and width == 1
            states[name][fused if naming == "fused" else plain] = (
                columns[:, 0] if is_row_wise else columns
            ).clone()
            first += width
        if naming == "torch":
            states[name]["step"] = torch.tensor(float(collection.step))
    return weights, {"state": states, "param_groups": []}


_PLAIN_NAMES = {
    "sgd": (),
    "momentum_sgd": ("momentum_buffer",),
    "adagrad": ("sum",),
    "row_wise_adagrad": ("sum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "row_wise_adam": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
}
"""Parts of a row's state in order, as torch's optimizers name them; fused ones count `momentum`."""


def _names_of(table: TableConfig) -> tuple[str, ...]:
    kind = table.optimizer.kind
    if kind not in _PLAIN_NAMES:
        raise ConfigError(
            f"table {table.name!r}: TorchRec has no optimizer state for {kind}; it has "
            f"{', '.join(_PLAIN_NAMES)}"
        )
    return _PLAIN_NAMES[kind]


def _plain_name(table: TableConfig, number: int) -> str:
    return _names_of(table)[number]


def _widths_of(table: TableConfig) -> list[int]:
    """Columns of each part of a row's state."""
    number = len(_names_of(table))
    total = RowLayout.of(table).state_dim
    return [total] if number == 1 else [table.dim, total - table.dim][:number]


def _state_of(table: TableConfig, given: Any, rows: int) -> tuple[Tensor, int | None]:
    """States [n, S] of a table, and the step that they are at."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"the optimizer's state of table {table.name!r} is no dict of tensors")
    by_name = {name.rsplit(".", 1)[-1]: value for name, value in given.items()}
    parts = []
    for number, (name, width) in enumerate(zip(_names_of(table), _widths_of(table), strict=True)):
        value = by_name.get(name, by_name.get(f"momentum{number + 1}"))
        if value is None:
            raise ConfigError(
                f"the optimizer's state of table {table.name!r} has "
                f"{', '.join(by_name) or 'none'}, not the {name} of its optimizer, "
                f"{table.optimizer.kind}"
            )
        part = _whole(value, f"{name} of table {table.name!r}")
        if part.numel() != rows * width:
            raise ConfigError(
                f"{name} of table {table.name!r}: {list(part.shape)} for {rows} rows of "
                f"{table.optimizer.kind}, which has {width} a row"
            )
        parts.append(part.reshape(rows, width).to(torch.float32).cpu())
    step = by_name.get("step", by_name.get("iter"))
    state = torch.cat(parts, 1) if parts else torch.empty(rows, 0)
    return state, None if step is None else int(step)


def _entry_of(table: str, entries: Mapping[str, Any], what: str) -> Any:
    ending = f"{table}.weight"
    names = [name for name in entries if name == ending or name.endswith(f".{ending}")]
    if len(names) != 1:
        found = "no entry" if not names else f"{len(names)} entries ({', '.join(names)})"
        raise ConfigError(
            f"table {table!r}: {found} named {ending} in the {what}; "
            "use import_weights for tables of other names"
        )
    entry = entries[names[0]]
    return entry if isinstance(entry, Mapping) else _whole(entry, names[0])


def _whole(tensor: Any, name: str) -> Tensor:
    """A tensor, or a sharded one all of which is here."""
    if hasattr(tensor, "local_shards"):
        whole, filled = torch.empty(tensor.size()), 0
        for shard in tensor.local_shards():
            sizes = zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
            whole[tuple(slice(start, start + size) for start, size in sizes)] = (
                shard.tensor.detach()
            )
            filled += shard.tensor.numel()
        if filled != whole.numel():
            raise ConfigError(
                f"{name} is sharded, and this process has {filled} of its {whole.numel()} numbers: "
                "gather the state_dict on one rank first"
            )
        return whole
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"{name} is a {type(tensor).__name__}, no tensor")
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _config_of(collection: EmbeddingCollection, name: str) -> TableConfig:
    for table in collection.tables:
        if table.name == name:
            return table
    known = ", ".join(each.name for each in collection.tables)
    raise ConfigError(f"no table {name!r}; there are {known}")
