"""Idioms of torch that would pass the tables by: refused with a remedy, or done for them too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn
from torch.distributed.algorithms.join import Joinable

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


def check_traced() -> None:
    """Refuses what would write down this look-up's rows, or look through the tables.

    Raises:
      ConfigError: torch.jit.trace (as older ONNX exports call it), or a transform of torch.func.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise ConfigError(
            "torch.jit.trace, or an export that calls it, of an EmbeddingCollection would write "
            "down the rows of this batch as constants: use torch.export.export of the eval form, "
            "torch.compile, or trace the model behind its vectors"
        )
    if torch._C._are_functorch_transforms_active():
        raise ConfigError(
            "a transform of torch.func (grad, vmap, jvp, jacrev ...) over an EmbeddingCollection, "
            "whose tables are no argument of a function: look the vectors up outside, and "
            "transform the function of the vectors"
        )


def is_asked_for(node: Any) -> bool:
    """Whether the backward pass that runs adds to the gradients of tables.

    It does not where torch.autograd.grad, or `backward(inputs=)`, asks for those of others.

    Args:
      node: that accumulates the gradient of the anchor in this pass.

    Raises:
      ConfigError: torch.autograd.grad asks for the anchor's.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError as error:
        raise ConfigError(
            "torch.autograd.grad asks for the gradient of a collection's anchor, which stands for "
            "those of its tables: they are kept for an update by backward() alone; leave the "
            "anchor out of its inputs, or ask for the gradient of the collection's output"
        ) from error


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuses an optimizer that tables cannot be attached to.

    Raises:
      ConfigError: it is one.
    """
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if not isinstance(optimizer, torch.optim.Optimizer) or hooks is None:
        raise ConfigError(
            f"attach to a {type(optimizer).__name__}: expected a torch.optim.Optimizer that was "
            "not wrapped; attach before accelerator.prepare, or to its `.optimizer`"
        )
    if isinstance(optimizer, Joinable):  # ZeroRedundancyOptimizer
        raise ConfigError(
            f"{type(optimizer).__name__} gives each rank other parameters to update, which tables "
            "over ranks divide by themselves: train them without attach, by apply_gradients"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS moves all parameters back and forth in one step, which tables cannot: train "
            "them without attach, by apply_gradients, or take another optimizer"
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
