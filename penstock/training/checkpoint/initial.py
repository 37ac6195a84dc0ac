"""Begins a run with what another one has learnt: rows of tables and weights of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from penstock.config import InitFrom, TableConfig
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.embedding.collection.table_files import TableRecord, import_tables, set_row_clock
from penstock.embedding.durable_files import read_tensors
from penstock.embedding.retention import limits_of
from penstock.embedding.rules.optimizer import initial_state
from penstock.embedding.store import RowLayout, TableRows
from penstock.errors import ConfigError
from penstock.training.checkpoint.checkpoint import DENSE, OPTIMIZER, TrainState
from penstock.training.checkpoint.files import Manifest, verify
from penstock.training.checkpoint.state import load_optimizer


def initialise(path: Path, config: InitFrom, state: TrainState) -> list[str]:
    """Puts rows and weights of a checkpoint into a run that begins.

    Every check comes before the first change.

    Args:
      path: the checkpoint.
      config: what is taken.
      state: newly built; its step, position and random generators stay.

    Returns:
      One line for each table and parameter that is not taken since it does not match.

    Raises:
      CheckpointError: damaged.
      ConfigError: something does not match, and `config.unmatched` is `fail`, or nothing does.
    """
    manifest = verify(path)
    tables = {table.name: table for table in state.collection.tables}
    wanted = [name for name in tables if any(fnmatchcase(name, one) for one in config.tables)]
    if config.tables and not wanted:
        raise ConfigError(
            f"training.init_from.tables: {', '.join(config.tables)} matches no table; there are "
            f"{', '.join(tables)}"
        )
    records = {record.name: record for record in manifest.tables}
    rules = {one["name"]: one for one in manifest.resolved["tables"]}
    lines = []
    taken = []
    for name in wanted:
        reasons = list(_table_differs(records.get(name), rules.get(name), tables[name], config))
        lines += [f"table {name}: {reason}" for reason in reasons]
        taken += [] if reasons else [records[name]]
    own = state.model.state_dict() if config.dense else {}
    saved = read_tensors(path / DENSE) if config.dense else {}
    differing = dict(_dense_differs(saved, own))
    lines += [f"{name}: {reason}" for name, reason in differing.items()]
    weights = {name: saved[name] for name in own if name not in differing}
    kinds = _kind_of(manifest), _kind_in(state)
    goes_on = config.optimizer_state and bool(weights) and kinds[0] == kinds[1]
    if config.optimizer_state and weights and not goes_on:
        lines.append(f"training.optimizer: {kinds[0]} in that run, {kinds[1]} in the job")
    if lines and (config.unmatched == "fail" or not (taken or weights)):
        raise ConfigError(
            "\n".join([
                f"training.init_from: not all of {path} matches this job:",
                *(f"  {line}" for line in lines),
                "take less (tables, dense, optimizer_state), or set unmatched: skip, which begins "
                "these anew",
            ])
        )
    if config.optimizer_state:
        import_tables(path, taken, state.collection)
        set_row_clock(state.collection, manifest.row_clock)
        state.collection.step = manifest.collection_step
    else:
        for record in taken:
            _import_values(path, record, tables[record.name], state.collection)
    if weights:
        state.model.load_state_dict({**own, **weights})
    if goes_on:
        _load_optimizer(path, manifest, state, weights)
    return lines


def _table_differs(
    record: TableRecord | None,
    before: Mapping[str, Any] | None,
    table: TableConfig,
    config: InitFrom,
) -> Iterator[str]:
    """Why the rows of a table cannot be taken."""
    if record is None or before is None:
        yield "not in that run"
        return
    if record.dim != table.dim:
        yield f"dim {record.dim} in that run, {table.dim} in the job"
    if before.get("hash_stack") != table.model_dump(mode="json")["hash_stack"]:
        yield "hash_stack is another than in that run"
    if config.optimizer_state:
        yield from _rules_differ(record, before, table)
        return
    if table.eviction is not None and table.eviction.unit == "seconds":
        yield (
            "its eviction goes by the times at which rows were used; optimizer_state: true takes "
            "them over"
        )
    most = limits_of(table, RowLayout.of(table).row_bytes).max_rows
    if record.rows > most:
        yield f"{record.rows:,} rows in that run, and max_bytes holds {most:,}"


def _rules_differ(
    record: TableRecord, before: Mapping[str, Any], table: TableConfig
) -> Iterator[str]:
    now = table.model_dump(mode="json")
    kinds = before["optimizer"]["kind"], table.optimizer.kind
    if kinds[0] != kinds[1]:
        yield f"optimizer {kinds[0]} in that run, {kinds[1]} in the job"
    if record.dtype != table.dtype:
        yield f"dtype {record.dtype} in that run, {table.dtype} in the job"
    for field in ("admission", "eviction", "max_bytes"):
        if before.get(field) != now[field]:
            yield f"{field} is another than in that run"


def _dense_differs(
    saved: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    """Parameters and buffers by name, and why each cannot be taken."""
    for name in {**own, **saved}:
        if name not in saved or name not in own:
            yield name, "only in the job" if name not in saved else "only in that run"
            continue
        before, now = saved[name], own[name]
        if (before.shape, before.dtype) != (now.shape, now.dtype):
            yield (
                name,
                (
                    f"{before.dtype} {list(before.shape)} in that run, "
                    f"{now.dtype} {list(now.shape)} in the job"
                ),
            )


def _import_values(
    path: Path, record: TableRecord, table: TableConfig, collection: EmbeddingCollection
) -> None:
    """Rows whose optimizer state begins anew."""
    start, state_dim = initial_state(table.optimizer), RowLayout.of(table).state_dim
    for shard in record.with_rows_of(collection).shards:
        with safetensors.safe_open(path / shard, framework="pt") as file:
            keys, values = file.get_tensor("keys"), file.get_tensor("values")
        state = torch.full((len(keys), state_dim), start, dtype=torch.float32)
        collection.import_rows(record.name, TableRows(keys, values.to(torch.float32), state))


def _kind_of(manifest: Manifest) -> str | None:
    return None if manifest.optimizer is None else str(manifest.optimizer["kind"])


def _kind_in(state: TrainState) -> str | None:
    return None if state.optimizer is None else type(state.optimizer).__name__


def _load_optimizer(
    path: Path, manifest: Manifest, state: TrainState, weights: Mapping[str, Tensor]
) -> None:
    """Takes the optimizer state of the parameters that are taken."""
    saved, optimizer = manifest.optimizer, state.optimizer
    if saved is None or optimizer is None:
        return
    trained = {name for name, one in state.model.named_parameters() if one.requires_grad}
    kept = {
        name: one for name, one in saved["state"].items() if name in weights and name in trained
    }
    tensors = read_tensors(path / OPTIMIZER)
    load_optimizer(optimizer, state.model, {**saved, "state": kept}, tensors)
