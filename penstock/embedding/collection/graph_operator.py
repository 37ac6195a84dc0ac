"""The look-up as an operator of torch, so that torch.compile keeps a model's graph in one piece.

A graph holds tensors and numbers alone: a collection is known to it by a number, and a look-up, on
its way from forward to backward, by a ticket, a tensor. Where nothing is compiled, the collection
works without it.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from penstock.embedding.collection.torch_idioms import is_asked_for
from penstock.errors import ConfigError
from penstock.types import KeyedJagged

if TYPE_CHECKING:
    from penstock.embedding.collection.collection import EmbeddingCollection, LookUp

# Numbers are never used again, nor by another process that loads a graph, so that none reaches
# another collection.
_NUMBERS = itertools.count(secrets.randbits(62))
_COLLECTIONS: weakref.WeakValueDictionary[int, EmbeddingCollection] = weakref.WeakValueDictionary()
# Look-ups of collections whose ticket is alive: a graph saves it for its backward pass.
_LOOKUPS: dict[int, LookUp] = {}


def register(collection: EmbeddingCollection) -> int:
    """Gives a collection its number; it is forgotten with the collection."""
    number = next(_NUMBERS)
    _COLLECTIONS[number] = collection
    return number


_TO_BE_TRAINED = (
    "torch.export of a collection that is to be trained: the graph has no update; call eval() "
    "first, and give weights that require no gradient"
)


def _collection_of(number: int) -> EmbeddingCollection:
    collection = _COLLECTIONS.get(number)
    if collection is None:
        raise ConfigError(
            "a compiled or exported graph looks up an EmbeddingCollection that is not in this "
            "process: the graph does not hold the tables; export the model again where they are, "
            "and keep it alive"
        )
    return collection


def collections_by_anchor() -> dict[int, EmbeddingCollection]:
    """All collections there are, by the `id` of their anchors."""
    return {id(collection.anchor): collection for collection in _COLLECTIONS.values()}


def check_features(sparse: KeyedJagged, inputs: tuple[str, ...]) -> None:
    """Raises ConfigError if a batch has other columns, or in another order."""
    if sparse.features != inputs:
        raise ConfigError(
            f"the batch has features {list(sparse.features)}, this collection {list(inputs)}, in "
            "this order"
        )


def is_exported() -> bool:
    """Whether torch.export traces; before torch 2.13 a compiler would say so of itself, too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def look_up_in_graph(collection: EmbeddingCollection, sparse: KeyedJagged) -> Tensor:
    """As `EmbeddingCollection.forward`, where batches are read as they are; to be traced.

    Raises:
      ConfigError: other columns; an export of the training form.
    """
    check_features(sparse, collection.inputs)
    trains = collection.training and torch.is_grad_enabled() and collection.anchor.requires_grad
    weights = sparse.weights
    if is_exported() and (trains or (weights is not None and weights.requires_grad)):
        raise ConfigError(_TO_BE_TRAINED)
    learns_weights = weights is not None and weights.requires_grad and torch.is_grad_enabled()
    out: Tensor
    out, _ = _pooled_lookup(
        collection.anchor,
        sparse.values,
        sparse.offsets,
        weights,
        collection.number,
        [trains, learns_weights, sparse.is_checked, sparse.is_one_hot],
    )
    return out


@torch.library.custom_op("penstock::pooled_lookup", mutates_args=())
def _pooled_lookup(
    anchor: Tensor,
    values: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    number: int,
    flags: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    trains, learns_weights, is_checked, is_one_hot = flags
    collection = _collection_of(number)
    sparse = KeyedJagged(collection.inputs, values, offsets, weights, is_checked, is_one_hot)
    collection.check_batch(sparse)
    arranged = collection.arrangement.arrange(sparse)
    found = collection.look_up(arranged, trains=trains, reads_vectors=learns_weights)
    ticket = np.array([next(_NUMBERS)], dtype=np.int64)
    if trains or learns_weights:
        _LOOKUPS[int(ticket[0])] = found
        weakref.finalize(ticket, _LOOKUPS.pop, int(ticket[0]), None)
    return found.out.to(anchor), torch.from_numpy(ticket)


@_pooled_lookup.register_fake
def _(
    anchor: Tensor,
    values: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    number: int,
    flags: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    if any(flags[:2]) and torch.compiler.is_exporting():
        raise ConfigError(_TO_BE_TRAINED)  # where a compiler traces for an export
    collection = _collection_of(number)
    size = (offsets.numel() - 1) // max(1, len(collection.inputs))
    return anchor.new_empty(size, collection.width), torch.empty(1, dtype=torch.int64)


@torch.library.custom_op("penstock::keep_gradient", mutates_args=())
def _keep_gradient(grad: Tensor, ticket: Tensor, number: int) -> Tensor:
    found, collection = _LOOKUPS[int(ticket)], _collection_of(number)
    # It runs within the one node that a compiled graph is to autograd.
    edges = torch._C._current_autograd_node().next_functions
    of_anchor = [node for node, _ in edges if getattr(node, "variable", None) is collection.anchor]
    if all(map(is_asked_for, of_anchor)):
        # A copy: a compiler uses the memory of what an operator was given again.
        collection.keep_gradient(found.lookups, found.plans, grad.clone())
    # That of the anchor: an output, so that no compiler takes the operator for needless.
    return grad.new_zeros(1)


@_keep_gradient.register_fake
def _(grad: Tensor, ticket: Tensor, number: int) -> Tensor:
    return grad.new_empty(1)


@torch.library.custom_op("penstock::weight_gradient", mutates_args=())
def _weight_gradient(grad: Tensor, ticket: Tensor, weights: Tensor, number: int) -> Tensor:
    vectors = _LOOKUPS[int(ticket)].vectors
    assert vectors is not None
    return vectors.gradient(grad.to(_collection_of(number).device)).to(weights)


@_weight_gradient.register_fake
def _(grad: Tensor, ticket: Tensor, weights: Tensor, number: int) -> Tensor:
    return torch.empty_like(weights)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.number, (ctx.trains, ctx.learns_weights, *_) = inputs[4:]
    weights = [inputs[3]] if ctx.learns_weights else []
    ctx.save_for_backward(output[1], *weights)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    ticket, *weights = ctx.saved_tensors
    of_anchor = _keep_gradient(grad, ticket, ctx.number) if ctx.trains else None
    of_weights = None
    if ctx.learns_weights:
        of_weights = _weight_gradient(grad, ticket, *weights, ctx.number)
    return of_anchor, None, None, of_weights, None, None


_pooled_lookup.register_autograd(_backward, setup_context=_setup_context)
