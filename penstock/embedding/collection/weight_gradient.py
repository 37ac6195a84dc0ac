"""The gradient of the weights that a batch gives its keys, as of nn.EmbeddingBag's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from penstock.embedding.collection.torch_idioms import is_asked_for
from penstock.embedding.store import PoolingPlan
from penstock.types import KeyedJagged

if TYPE_CHECKING:
    from penstock.embedding.collection.collection import EmbeddingCollection
    from penstock.embedding.shapes.arrangement import Arranged

_SUM, _MEAN, _SQRT_N = range(3)
_SMALLEST_DIVISOR = 2.0**-126
"""As in csrc/rows/row_kernels.h: a smaller one counts as 0, and the bag is zeros."""


@dataclass(frozen=True, slots=True)
class ReadVectors:
    """What the weights' gradient needs of a look-up: copies."""

    sparse: KeyedJagged
    """The batch, its offsets and weights copied."""
    plans: Sequence[PoolingPlan]
    """Of each store."""
    vectors: Sequence[Tensor]
    """Of each store, [N, D]: that of each key."""

    @classmethod
    def of(
        cls, sparse: KeyedJagged, plans: Sequence[PoolingPlan], vectors: Sequence[Tensor]
    ) -> ReadVectors:
        """Of a batch that was just looked up."""
        assert sparse.weights is not None
        copied = KeyedJagged(
            sparse.features, sparse.values, sparse.offsets.clone(), sparse.weights.clone()
        )
        return cls(copied, plans, vectors)

    def gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the weights.

        Args:
          grad: of the output, [B, W].

        Returns:
          [N] float32, on the tables' device. Of a bag whose divisor is 0 it is 0, as its output is.
        """
        weights, offsets = self.sparse.weights, self.sparse.offsets
        assert weights is not None
        device, keys = weights.device, weights.numel()
        size, bags = self.sparse.batch_size, offsets.numel() - 1
        bag = torch.repeat_interleave(
            torch.arange(bags, device=device), offsets.diff(), output_size=keys
        )
        feature = bag // max(1, size)
        position = torch.arange(keys, device=device) - offsets[bag]
        layout = self._layout(device)
        start = (bag - feature * size) * grad.shape[1] + layout.column[feature]
        start += layout.step[feature] * position
        flat = grad.contiguous().view(-1).float()
        alike = torch.zeros(keys, dtype=torch.float32, device=device)
        for number, vectors in enumerate(self.vectors):
            is_aligned = layout.is_aligned[number]
            if len(self.vectors) == 1:
                alike = _dot(flat, start, vectors, is_aligned)
            else:
                mine = (layout.store[feature] == number).nonzero()[:, 0]
                alike[mine] = _dot(flat, start[mine], vectors[mine], is_aligned)
        return self._divided(alike.double(), bag, layout.pooling[feature], layout.divides).float()

    def _layout(self, device: torch.device) -> _Layout:
        dims = tuple(vectors.shape[1] for vectors in self.vectors)
        return _layout_of(tuple(self.plans), dims, len(self.sparse.features), device)

    def _divided(self, alike: Tensor, bag: Tensor, pooling: Tensor, divides: bool) -> Tensor:
        """From how alike gradient and vector are, <g, x>, to the gradient through the pooling.

        The output is sum(w x) / d, of d = 1, sum(w) or sqrt(sum(w w)); so the weight's gradient is
        <g, x> / d - <g, sum(w x)> d' / (d d), of d' = 0, 1 or w / d.
        """
        if not divides:
            return alike
        assert self.sparse.weights is not None
        weights = self.sparse.weights.double()
        is_root, is_sum = pooling == _SQRT_N, pooling == _SUM
        total = self._sum(torch.where(is_root, weights * weights, weights))[bag]
        divisor = torch.where(is_root, total.sqrt(), total)
        inverse = torch.where(divisor.abs() < _SMALLEST_DIVISOR, 0.0, 1.0 / divisor)
        slope = torch.where(is_root, weights * inverse, 1.0)
        through = (alike - self._sum(weights * alike)[bag] * slope * inverse) * inverse
        return torch.where(is_sum, alike, through)

    def _sum(self, values: Tensor) -> Tensor:
        """By bag, [F * B]."""
        summed: Tensor = torch.segment_reduce(
            values, "sum", offsets=self.sparse.offsets, initial=0.0, unsafe=True
        )
        return summed


class _Layout(NamedTuple):
    """Where the features of a packed batch are in the output; [F] int64 tensors by feature."""

    column: Tensor
    """The first one."""
    step: Tensor
    """Columns from one position of a sequence to the next; 0 of other features."""
    store: Tensor
    """Number of the store."""
    pooling: Tensor
    """_SUM (sequences too), _MEAN or _SQRT_N."""
    divides: bool
    """Whether there is another pooling than _SUM."""
    is_aligned: list[bool]
    """Of each store: its vectors begin at multiples of their columns."""


@lru_cache(maxsize=64)
def _layout_of(
    plans: tuple[PoolingPlan, ...], dims: tuple[int, ...], features: int, device: torch.device
) -> _Layout:
    numbers = torch.zeros(4, features, dtype=torch.int64)
    for number, plan in enumerate(plans):
        for each in plan.features:
            step = 0 if each.max_keys is None else dims[number]
            pooling = {"mean": _MEAN, "sqrt_n": _SQRT_N}.get(each.pooling, _SUM)
            of_feature = torch.tensor([each.column, step, number, pooling])
            numbers[:, each.packed_feature] = of_feature
    column, step_of, store, pooling_of = numbers.to(device)
    aligned = [
        plan.stride % dim == 0 and all(each.column % dim == 0 for each in plan.features)
        for plan, dim in zip(plans, dims, strict=True)
    ]
    return _Layout(column, step_of, store, pooling_of, bool(numbers[3].any()), aligned)


def _dot(flat: Tensor, start: Tensor, vectors: Tensor, is_aligned: bool) -> Tensor:
    """[n] products of flat[start[i] : start[i] + D] and vectors [n, D]."""
    dim = vectors.shape[1]
    if is_aligned:
        part = flat.view(-1, dim)[start // dim]
    else:
        part = flat[start[:, None] + torch.arange(dim, device=start.device)]
    alike: Tensor = torch.linalg.vecdot(part, vectors)
    return alike


class WeightedLookup(torch.autograd.Function):
    """As `_PooledLookup`, where the batch's weights require a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        weights: Tensor,
        collection: EmbeddingCollection,
        arranged: Arranged,
        trains: bool,
    ) -> Tensor:
        """Looks up, and keeps what the weights' gradient needs."""
        found = collection.look_up(arranged, trains=trains, reads_vectors=True)
        ctx.collection, ctx.found, ctx.trains = collection, found, trains
        ctx.weights = weights.device, weights.dtype
        return found.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Keeps the rows' gradient, and gives that of the weights."""
        (grad,) = grads
        if ctx.trains and is_asked_for(ctx.next_functions[0][0]):
            ctx.collection.keep_gradient(ctx.found.lookups, ctx.found.plans, grad)
        gradient = ctx.found.vectors.gradient(grad.to(ctx.collection.device))
        return None, gradient.to(*ctx.weights), None, None, None
