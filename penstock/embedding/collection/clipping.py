"""Clips the gradients of dense parameters and tables by their norm, taken together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.embedding.collection.graph_operator import collections_by_anchor
from penstock.errors import ConfigError, NonFiniteError

Clipped = nn.Module | Tensor | Iterable[nn.Module | Tensor]


@torch.no_grad()
def clip_grad_norm_(
    models: Clipped,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_, with the tables, whether they are attached or not.

    All gradients are scaled, in place, by max_norm / (norm + 1e-6) where that is below 1.

    Args:
      models: modules, parameters, or a mixture. The tables of a collection count where the module
        that holds it, or its `anchor`, is among them.
      max_norm: at least 0.
      norm_type: p, above 0, or infinity. The tables' part is `EmbeddingCollection.gradient_norm`.
      error_if_nonfinite: whether a norm that is NaN or infinite is an error; else gradients become
        NaN or 0, and GradScaler or the next update deals with them.

    Returns:
      [] float32: norm of all gradients before.

    Raises:
      ConfigError: a number that is not possible, or something else than modules and parameters.
      NonFiniteError: see `error_if_nonfinite`; nothing is changed.
    """
    if not max_norm >= 0 or not norm_type > 0:
        raise ConfigError(
            f"max_norm {max_norm}, norm_type {norm_type}: expected a number of at least 0, and one "
            "above 0"
        )
    parameters, collections = _split(models)
    gradients = [each.grad for each in parameters if each.grad is not None]
    norms = [torch.nn.utils.get_total_norm(gradients, norm_type)] if gradients else []
    norms += [each.gradient_norm(norm_type) for each in collections]
    if not norms:
        return torch.zeros(())
    device = norms[0].device
    total: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(device, torch.float32) for norm in norms]), norm_type
    )
    if error_if_nonfinite and not math.isfinite(total):
        for each in collections:
            each.check_gradients()
        raise NonFiniteError(
            f"the norm of all gradients is {float(total)}: scaled by it they would be lost; lower "
            "the learning rates, or look for extreme inputs. Nothing was changed"
        )
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    # On a GPU that would wait for it.
    if factor.is_cuda or float(factor) != 1.0:
        for each in collections:
            each.scale_gradients(factor)
    return total


def _split(models: Clipped) -> tuple[list[Tensor], list[EmbeddingCollection]]:
    """Parameters but for anchors, and collections; each once."""
    anchors = collections_by_anchor()
    parameters: dict[int, Tensor] = {}
    collections: dict[int, EmbeddingCollection] = {}
    for each in _parameters(models):
        if id(each) in anchors:
            collections[id(each)] = anchors[id(each)]
        else:
            parameters[id(each)] = each
    return list(parameters.values()), list(collections.values())


def _parameters(models: Any) -> Iterator[Tensor]:
    if isinstance(models, Tensor):
        yield models
    elif isinstance(models, nn.Module):
        yield from models.parameters()
    elif isinstance(models, Iterable) and not isinstance(models, str | bytes):
        for each in models:
            yield from _parameters(each)
    else:
        raise ConfigError(
            f"gradients of a {type(models).__name__} cannot be clipped: expected modules and "
            "parameters"
        )
