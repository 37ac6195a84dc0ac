"""What stands for the tables' gradients where torch asks for the gradient of a parameter.

The `grad` of an attached collection's anchor is a tensor without memory. Its value, one number, is
the norm of the tables' gradients, computed when somebody reads it; what multiplies it in place
multiplies them. So GradScaler and clip_grad_norm_, which know parameters alone, do the tables too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.embedding.sharded.store import on_any_rank
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from penstock.embedding.collection.attachment import Attachment
    from penstock.embedding.collection.collection import EmbeddingCollection

_aten = torch.ops.aten


class AnchorGradient(torch.Tensor):
    """The gradients of tables that wait for the optimizer's step, as one number, [1]."""

    attachment: weakref.ref[Attachment]
    zeros_to_come: int
    """Of compiled graphs, whose backward adds a 0 for each look-up."""

    @classmethod
    def of(cls, attachment: Attachment, anchor: Tensor) -> AnchorGradient:
        """As wide as the anchor, on its device, of its dtype."""
        made: AnchorGradient = torch.Tensor._make_wrapper_subclass(
            cls, anchor.shape, dtype=anchor.dtype, device=anchor.device, requires_grad=False
        )
        made.attachment = weakref.ref(attachment)
        made.zeros_to_come = 0
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Not the norm: that would be computed for it."""
        return f"AnchorGradient(of tables, {self.dtype}, {self.device})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operator of torch on it."""
        kwargs = kwargs or {}
        special = _SPECIAL.get(func.overloadpacket)
        if special is not None:
            return special(func, args, kwargs)
        changed = [
            argument
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for each in pytree.tree_leaves(given)
            if isinstance(each, cls)
        ]
        if changed:
            raise ConfigError(
                f"{func} on the gradient that stands for the tables (of the collection's anchor): "
                "it can be scaled (mul_, div_, GradScaler), clipped by norm and set to zero; "
                "change gradients of embeddings in a hook of the output (register_hook). "
                "DistributedDataParallel, which copies gradients, must leave the anchor out "
                "(docs/torch.md, Several processes)"
            )
        args, kwargs = pytree.tree_map_only(cls, AnchorGradient.norm, (args, kwargs))
        return func(*args, **kwargs)

    def norm_of(self, norm_type: float) -> Tensor:
        """Norm of the tables' gradients, [] of its dtype, on its device."""
        collection = self._collection
        norm = 0.0 if collection is None else collection.gradient_norm(norm_type)
        return torch.as_tensor(norm, dtype=self.dtype, device=self.device)

    def norm(self) -> Tensor:  # type: ignore[override]
        """Its value, [1]: the L2 norm."""
        return self.norm_of(2.0).reshape(1)

    def scale(self, factor: Tensor | float) -> None:
        """Multiplies the tables' gradients."""
        if self._collection is not None:
            self._collection.pending.scale(factor)

    def drop(self) -> None:
        """Forgets the tables' gradients."""
        if self._collection is not None:
            self._collection.pending.clear()

    def check_finite(self, found_inf: Tensor) -> None:
        """Sets `found_inf`, [1], if the tables' gradients are NaN or infinite, on any rank."""
        collection = self._collection
        if collection is None:
            return
        is_bad = collection.pending.first_non_finite() is not None
        # All ranks skip a step or none does: it is made of the gradients of all.
        if on_any_rank([store for store, _ in collection.trained], is_bad):
            found_inf.fill_(1.0)

    @property
    def _collection(self) -> EmbeddingCollection | None:
        """Whose gradients it stands for; None: they are applied or dropped."""
        attachment = self.attachment()
        if attachment is None or not attachment.stands_for(self):
            return None
        return attachment.collection


def _split(tensors: Sequence[Tensor]) -> tuple[list[AnchorGradient], list[Tensor]]:
    ours = [each for each in tensors if isinstance(each, AnchorGradient)]
    return ours, [each for each in tensors if not isinstance(each, AnchorGradient)]


def _scale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """mul_ and div_ by a number or a tensor of one element."""
    gradient, factor = args[0], args[1]
    is_one = not isinstance(factor, Tensor) or factor.numel() == 1
    if not isinstance(gradient, AnchorGradient) or not is_one or len(args) > 2 or kwargs:
        raise ConfigError(
            "the gradient that stands for the tables (of the collection's anchor) is scaled by one "
            f"number; got {func} with {args[1:]}"
        )
    if isinstance(factor, AnchorGradient):
        factor = factor.norm()
    gradient.scale(1.0 / factor if func.overloadpacket is _aten.div_ else factor)
    return gradient


def _scale_each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """_foreach_mul_ and _foreach_div_: those of dense parameters together, as without tables."""
    tensors, factors = args[0], args[1]
    is_div = func.overloadpacket is _aten._foreach_div_
    by_each = isinstance(factors, list | tuple)
    ours = [n for n, each in enumerate(tensors) if isinstance(each, AnchorGradient)]
    dense = [n for n in range(len(tensors)) if n not in set(ours)]
    for n in ours:
        factor = factors[n] if by_each else factors
        tensors[n].scale(1.0 / factor if is_div else factor)
    if dense:
        theirs = [factors[n] for n in dense] if by_each else factors
        func([tensors[n] for n in dense], theirs, **kwargs)


def _norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    gradient = args[0]
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    assert isinstance(gradient, AnchorGradient)
    return gradient.norm_of(float(order))


def _norm_of_each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    tensors = args[0]
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    _, dense = _split(tensors)
    norms = iter(func(dense, *args[1:], **kwargs) if dense else ())
    return [
        each.norm_of(float(order)) if isinstance(each, AnchorGradient) else next(norms)
        for each in tensors
    ]


def _zero(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    ours, dense = _split(args[0] if isinstance(args[0], list | tuple) else [args[0]])
    for each in ours:
        each.drop()
    if dense:
        func(dense, **kwargs)
    return args[0] if isinstance(args[0], Tensor) else None


def _unscale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What GradScaler does: notes whether any element is not finite, and divides by the scale."""
    tensors, found_inf, inverse_scale = args
    ours, dense = _split(tensors)
    for each in ours:
        each.check_finite(found_inf)
        each.scale(inverse_scale)
    if dense:
        func(dense, found_inf, inverse_scale, **kwargs)


def _add(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The 0 that the backward of a compiled graph adds."""
    gradient = args[0]
    if not isinstance(gradient, AnchorGradient) or not gradient.zeros_to_come:
        raise ConfigError(
            "add_ to the gradient that stands for the tables (of the collection's anchor); change "
            "gradients of embeddings in a hook of the output (register_hook)"
        )
    gradient.zeros_to_come -= 1
    return gradient


_SPECIAL: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    _aten.mul_: _scale,
    _aten.div_: _scale,
    _aten._foreach_mul_: _scale_each,
    _aten._foreach_div_: _scale_each,
    _aten.linalg_vector_norm: _norm,
    _aten._foreach_norm: _norm_of_each,
    _aten.zero_: _zero,
    _aten._foreach_zero_: _zero,
    _aten._amp_foreach_non_finite_check_and_unscale_: _unscale,
    _aten.add_: _add,
}
