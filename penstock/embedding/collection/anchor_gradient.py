"""What stands for the tables' gradients where torch asks for the gradient of a parameter.

The `grad` of a collection's anchor is a tensor without memory. Its value, one number, is the norm
of the tables' gradients, computed when somebody reads it; what multiplies it in place multiplies
them. So GradScaler and clip_grad_norm_, which know parameters alone, do the tables too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from penstock.embedding.sharded.store import on_any_rank
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from penstock.embedding.collection.collection import EmbeddingCollection

_aten = torch.ops.aten


class ShowsGradient(Protocol):
    """Who puts an `AnchorGradient` where torch looks for the gradient of a collection's anchor."""

    @property
    def collection(self) -> EmbeddingCollection:
        """Whose gradients are shown."""

    def stands_for(self, gradient: AnchorGradient) -> bool:
        """Whether it is that of the gradients there are, not of some applied or dropped before."""

    def set_to_zero(self) -> None:
        """Somebody has set the gradient to zero."""

    def show_anew(self) -> None:
        """The anchor has changed device or dtype, and its gradient must be as it is."""


class AnchorGradient(torch.Tensor):
    """The gradients of tables that wait for their update, as one number, [1]."""

    shown_by: weakref.ref[ShowsGradient]
    original: AnchorGradient | None
    """Of a view of it, as `detach` and `.data` give: scaling one scales the tables, too."""

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def of(cls, shown_by: ShowsGradient, anchor: Tensor) -> AnchorGradient:
        """As wide as the anchor, on its device, of its dtype."""
        return cls._made(weakref.ref(shown_by), None, anchor.shape, anchor)

    @classmethod
    def _made(
        cls,
        shown_by: weakref.ref[ShowsGradient],
        original: AnchorGradient | None,
        shape: torch.Size,
        like: Tensor,
    ) -> AnchorGradient:
        made: AnchorGradient = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        made.shown_by, made.original = shown_by, original
        return made

    def view_of(self, shape: torch.Size) -> AnchorGradient:
        """The same gradients in another shape of one element."""
        return self._made(self.shown_by, self.original or self, shape, self)

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
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [
            (each, kwargs[each.name]) for each in func._schema.arguments if each.name in kwargs
        ]
        aliased = [
            argument.alias_info
            for argument, value in given
            if argument.alias_info is not None
            for each in pytree.tree_leaves(value)
            if isinstance(each, cls)
        ]
        if any(alias.is_write for alias in aliased):
            raise ConfigError(
                f"{func} on the gradient that stands for the tables (of the collection's anchor): "
                "it can be scaled (mul_, div_, GradScaler), clipped by norm and set to zero; "
                "change gradients of embeddings in a hook of the output (register_hook). "
                "DistributedDataParallel, which copies gradients, must leave the anchor out "
                "(docs/torch.md, Several processes)"
            )
        if aliased:
            view = _view(func, args, kwargs)
            if view is not None:
                return view
        args, kwargs = pytree.tree_map_only(cls, AnchorGradient.number, (args, kwargs))
        return func(*args, **kwargs)

    def norm_of(self, norm_type: float) -> Tensor:
        """Norm of the tables' gradients, [] of its dtype, on its device."""
        collection = self._collection
        norm = 0.0 if collection is None else collection.gradient_norm(norm_type)
        return torch.as_tensor(norm, dtype=self.dtype, device=self.device)

    def number(self) -> Tensor:
        """Its value, of its shape: the L2 norm; a plain tensor."""
        return self.norm_of(2.0).reshape(self.shape)

    # What torch does not do by operators, or refuses to do for a tensor without memory.

    def numpy(self, *, force: bool = False) -> Any:
        """Its value."""
        return self.number().numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        """Its value."""
        number = self.number().numpy()
        return number if dtype is None else number.astype(dtype)

    def tolist(self) -> Any:
        """Its value."""
        return self.number().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A plain tensor: the copy scales nothing."""
        return self.number()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of a plain tensor."""
        return self.number().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def scale(self, factor: Tensor | float) -> None:
        """Multiplies the tables' gradients."""
        if self._collection is not None:
            self._collection.pending.scale(factor)

    def unscale(self, inverse_scale: Tensor) -> None:
        """What a GradScaler does, to those that were not unscaled as they came."""
        if self._collection is not None:
            self._collection.pending.unscale(inverse_scale)

    def set_to_zero(self) -> None:
        """Forgets them as far as torch can see; attached, for good."""
        shown_by = self.shown_by()
        if shown_by is not None and shown_by.stands_for(self):
            shown_by.set_to_zero()

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
        shown_by = self.shown_by()
        if shown_by is None or not shown_by.stands_for(self):
            return None
        return shown_by.collection


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AnchorGradient | None:
    """Of one, if `func` gives one of as many elements: who scales a view scales what it is of."""
    gradient = args[0] if args else None
    if not isinstance(gradient, AnchorGradient):
        return None
    like = func(torch.empty(gradient.shape, device="meta"), *args[1:], **kwargs)
    if isinstance(like, Tensor) and like.numel() == 1:
        return gradient.view_of(like.shape)
    return None


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
        factor = factor.number()
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
        each.set_to_zero()
    if dense:
        func(dense, **kwargs)
    return args[0] if isinstance(args[0], Tensor) else None


def _unscale(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What GradScaler does: notes whether any element is not finite, and divides by the scale."""
    tensors, found_inf, inverse_scale = args
    ours, dense = _split(tensors)
    for each in ours:
        each.check_finite(found_inf)
        each.unscale(inverse_scale)
    if dense:
        func(dense, found_inf, inverse_scale, **kwargs)


def _add(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What autograd adds: of a compiled graph, or of a penalty on all parameters.

    It is a gradient of the anchor itself, whose value means nothing.
    """
    gradient = args[0]
    if not isinstance(gradient, AnchorGradient) or not is_in_backward():
        raise ConfigError(
            "add_ to the gradient that stands for the tables (of the collection's anchor); change "
            "gradients of embeddings in a hook of the output (register_hook)"
        )
    return gradient


def is_in_backward() -> bool:
    """Whether autograd runs in this thread."""
    return torch._C._current_graph_task_id() != -1


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
