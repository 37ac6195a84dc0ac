"""Idioms of torch that would pass the tables by: refused with a remedy, or done for them too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from penstock.embedding.collection.table_state import TableKind
from penstock.embedding.retention import retains
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from penstock.embedding.collection.collection import EmbeddingCollection


def check_alone() -> None:
    """Refuses training in a process group of several ranks: each would train tables of its own.

    Raises:
      ConfigError: there is such a group.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return
    size = distributed.get_world_size()
    if size > 1:
        raise ConfigError(
            f"training in a process group of {size} ranks: each rank's tables would learn from its "
            "own batches alone and drift apart, whatever DistributedDataParallel does for the "
            "dense part. Give the collection the group, EmbeddingCollection(group=...), or train "
            "in one process (evaluation is allowed in any)"
        )


def check_averaged(collection: EmbeddingCollection) -> None:
    """Refuses a copy whose parameters were written since, and its tables were not.

    That is what AveragedModel.update_parameters does: it knows parameters alone.

    Raises:
      ConfigError: the copy is such a one.
    """
    if collection.copied_at is not None and collection.anchor._version != collection.copied_at:
        raise ConfigError(
            "the parameters of this copy were averaged or written since it was made, its tables "
            "were not: call penstock.average_tables(averaged, model, weight) after each "
            "update_parameters, or copy the model anew"
        )


@torch.no_grad()
def average_tables(averaged: nn.Module, model: nn.Module, weight: float) -> None:
    """Moves each row of `averaged` towards the same key's of `model`: row += weight * (new - row).

    To be called after `update_parameters` of torch's AveragedModel, which averages the dense part:
    with weight 1 / (n + 1) for a mean of n + 1 models, 1 - decay for an exponential one. A key that
    is new begins with its initial value. Optimizer states and the step are those of `model`. Rows
    that `model` does not have stay. Every row is read and written: as costly as a checkpoint.

    Args:
      averaged: a copy of `model`, or an AveragedModel of it.
      model: read, not changed.
      weight: 0 to 1.

    Raises:
      ConfigError: another weight, or the two have other tables.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight {weight} of new rows; expected 0 to 1")
    pairs = _collections(averaged), _collections(model)
    kinds = [
        [[(table.name, TableKind.of(table)) for table in each.tables] for each in part]
        for part in pairs
    ]
    if kinds[0] != kinds[1]:
        raise ConfigError("the averaged model has other tables than the model; make it as a copy")
    for old, new in zip(*pairs, strict=True):
        for table in new.tables:
            if retains(table):
                old.set_retention_state(table.name, new.retention_state(table.name))
            for rows in new.export_table(table.name):
                before = old.find(table.name, rows.keys).values
                values = torch.lerp(before, rows.values.to(torch.float32), weight)
                old.import_rows(table.name, rows._replace(values=values))
        old.step, old.seed = new.step, new.seed
        old.copied_at = old.anchor._version


def _collections(model: nn.Module) -> list[EmbeddingCollection]:
    from penstock.embedding.collection.collection import EmbeddingCollection

    return [module for module in model.modules() if isinstance(module, EmbeddingCollection)]
