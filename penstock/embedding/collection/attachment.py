"""What torch sees of a collection's gradients, attached to an optimizer of torch or not.

Attached, one `step()` updates dense part and tables. Unattached, `apply_gradients` updates the
tables; but who clips the gradients of all parameters means those of the tables, too. So the anchor
has an `AnchorGradient` from the end of a backward pass on. Optimizers that hold the anchor do not
see it in their step: they would train the anchor.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from penstock.config import FTRL
from penstock.embedding.collection.anchor_gradient import AnchorGradient, is_in_backward
from penstock.embedding.collection.graph_operator import collections_by_anchor
from penstock.embedding.collection.loss_scale import watch_scalers
from penstock.embedding.collection.torch_idioms import check_optimizer
from penstock.errors import ConfigError, PenstockError

if TYPE_CHECKING:
    from penstock.embedding.collection.collection import EmbeddingCollection


Closure = Callable[[], Any]
# Look-ups: more than anybody means to wait for a first step.
_MANY_PENDING = 1000
_WATCHED = "_penstock_takes_back"
Hook = tuple[tuple[Any, ...], dict[str, Any]] | None


class Attachment:
    """The bond of a collection and its optimizer.

    The optimizer has a group of its own for the tables, with the collection's anchor as its only
    parameter. The anchor's gradient is an `AnchorGradient` while there are gradients to apply, and
    None otherwise: whoever sets it to None, as `zero_grad` does, drops them.
    """

    def __init__(self, collection: EmbeddingCollection, optimizer: torch.optim.Optimizer) -> None:
        """Makes the group, or takes the one there is, of a copy; and registers the hooks.

        Raises:
          ConfigError: see `TableModule.attach`.
        """
        check_optimizer(optimizer)
        _watch_step(type(optimizer))
        self._collection = weakref.ref(collection)
        self._optimizer = weakref.ref(optimizer)
        self._gradient: AnchorGradient | None = None
        self._is_stepping = self._is_skipped = False
        rules = [table.optimizer for table in collection.tables if table.trainable]
        self._rate = max((rule.learning_rate for rule in rules), default=1.0)
        self._has_ftrl = any(isinstance(rule, FTRL) for rule in rules)
        self._factor = 1.0
        self._scale: Tensor | None = None
        if self._find_group(optimizer) is None:
            _add_group(collection, optimizer, self._rate)
        self._hooks = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    @property
    def collection(self) -> EmbeddingCollection:
        """That is attached."""
        collection = self._collection()
        assert collection is not None
        return collection

    @property
    def is_alive(self) -> bool:
        """Whether the optimizer is still there."""
        return self._optimizer() is not None

    def end(self) -> None:
        """Takes group and hooks from the optimizer."""
        optimizer = self._optimizer()
        if optimizer is not None:
            for hook in self._hooks:
                hook.remove()
            group = self._find_group(optimizer)
            optimizer.param_groups = [each for each in optimizer.param_groups if each is not group]
        self.collection.anchor.grad = self._gradient = None

    def settle(self) -> bool:
        """Learns what became of the anchor's gradient; False: the tables' gradients are dropped.

        Raises:
          ConfigError: it is another tensor, or the last step of the optimizer has raised.
        """
        if self._is_stepping:
            raise ConfigError(
                "the last optimizer.step() raised an error before the tables took their part of "
                "it: call step() again, or discard_gradients() and go on"
            )
        grad = self.collection.anchor.grad
        if grad is None:
            self._gradient = None
            return False
        if not isinstance(grad, AnchorGradient) or not self.stands_for(grad):
            raise ConfigError(
                "the gradient of the collection's anchor, which stands for those of the tables, "
                f"was replaced by a {type(grad).__name__} ({grad.dtype}, {grad.device}): scale it "
                "in place; zero_grad() drops it"
            )
        return True

    def show(self) -> None:
        """Shows torch that there are gradients of tables."""
        if self._gradient is None:
            anchor = self.collection.anchor
            self._gradient = AnchorGradient.of(self, anchor)
            anchor.grad = self._gradient

    def show_anew(self) -> None:
        """After the anchor has changed device or dtype."""
        self._gradient = None
        self.show()

    def stands_for(self, gradient: AnchorGradient) -> bool:
        """Whether it is that of the gradients there are."""
        return (gradient.original or gradient) is self._gradient

    def set_to_zero(self) -> None:
        """Drops the tables' gradients."""
        self.collection.pending.clear()

    def hide(self) -> None:
        """Shows torch that there are none."""
        self._is_stepping = False
        self.collection.anchor.grad = self._gradient = None

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Hook:
        if self._collection() is None:
            return None
        step = with_closure(args, kwargs, lambda closure: self._begin_after(closure, optimizer))
        if step is None:
            self._begin(optimizer)
        return step

    def _begin_after(self, closure: Closure, optimizer: torch.optim.Optimizer) -> Closure:
        has_run = False

        def once() -> Any:
            nonlocal has_run
            if has_run:
                raise ConfigError(
                    f"{type(optimizer).__name__} calls its closure more than once a step: tables "
                    "cannot be moved back and forth. Train them without attach, by apply_gradients"
                )
            has_run = True
            loss = closure()
            self._begin(optimizer)
            return loss

        return once

    def _begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Checks the tables' gradients before anything is updated, and hides them meanwhile."""
        collection = self.collection
        if not collection.pending:
            # Perhaps there is one of the anchor itself, which stands for none of tables.
            self._is_stepping, self._is_skipped = True, False
            collection.anchor.grad = self._gradient = None
            return
        if not self._is_stepping and not self.settle():
            collection.pending.clear()
        scale, found_inf = (getattr(optimizer, name, None) for name in ("grad_scale", "found_inf"))
        self._is_skipped = found_inf is not None and float(found_inf) > 0
        # A fused optimizer divides by it itself.
        self._scale = scale if isinstance(scale, Tensor) else None
        if not self._is_skipped:
            try:
                collection.refuse_non_finite()
                self._factor = self._rate_factor(optimizer)
            except PenstockError:
                _take_back_step(optimizer)
                raise
        self._is_stepping = True
        collection.anchor.grad = None

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        collection = self._collection()
        if collection is None:
            return
        if not self._is_stepping:  # it did not call its closure
            self._begin(optimizer)
        self._is_stepping = False
        if self._is_skipped:
            self._gradient = None
            collection.pending.clear()
        elif not collection.pending:
            self._gradient = None
        else:
            if self._scale is not None:
                collection.pending.unscale(self._scale.double().reciprocal())
            try:
                collection.update(self._factor)
            finally:
                # They are still there if there was no memory for them.
                if not collection.pending:
                    self._gradient = None
                collection.anchor.grad = self._gradient

    def _rate_factor(self, optimizer: torch.optim.Optimizer) -> float:
        group = self._find_group(optimizer)
        if group is None:
            raise ConfigError(
                "the tables' group is gone from the optimizer's param_groups: attach them anew"
            )
        rate = float(group["lr"])
        if not 0 <= rate < math.inf or (rate == 0 and self._has_ftrl):
            least = "above 0, as FTRL divides by it," if self._has_ftrl else "at least 0"
            raise ConfigError(
                f"the learning rate of the tables' group is {rate}; expected a number {least} and "
                "finite"
            )
        return rate / self._rate

    def _find_group(self, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        anchor = self.collection.anchor
        for group in optimizer.param_groups:
            parameters: list[Tensor] = group["params"]
            if "tables" in group and len(parameters) == 1 and parameters[0] is anchor:
                found: dict[str, Any] = group
                return found
        return None


def _take_back_step(optimizer: torch.optim.Optimizer) -> None:
    """Shows again what was hidden for a step that is not taken, as torch leaves gradients then."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        attached = getattr(hook, "__self__", None)
        if isinstance(attached, Attachment) and attached._is_stepping:
            attached._is_stepping = False
            attached.collection.anchor.grad = attached._gradient
    for each in _held_by(optimizer):
        each.show_again()


def _watch_step(kind: type[torch.optim.Optimizer]) -> None:
    """Wraps a class's `step` to take back one that raises: no hook of torch is called after it."""
    step: Any = kind.step
    if hasattr(step, _WATCHED):
        return

    @functools.wraps(step)
    def watched(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        is_taken = False
        try:
            result = step(optimizer, *args, **kwargs)
            is_taken = True
            return result
        finally:
            if not is_taken:
                _take_back_step(optimizer)

    setattr(watched, _WATCHED, True)
    kind.step = watched  # type: ignore[assignment,method-assign]


def _add_group(
    collection: EmbeddingCollection, optimizer: torch.optim.Optimizer, rate: float
) -> None:
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ConfigError(
            "the optimizer has a learning-rate scheduler already, which would not know the tables' "
            "group: attach first, then make the scheduler"
        )
    anchor = collection.anchor
    for group in optimizer.param_groups:
        kept = [n for n, each in enumerate(group["params"]) if each is not anchor]
        if len(kept) < len(group["params"]):
            for name in ("params", "param_names"):
                if name in group:
                    group[name] = [group[name][n] for n in kept]
    optimizer.state.pop(anchor, None)
    has_names = any("param_names" in group for group in optimizer.param_groups)
    optimizer.add_param_group({
        "params": [("anchor", anchor)] if has_names else [anchor],
        "lr": rate,
        "tables": [table.name for table in collection.tables],
    })


class Unattached:
    """Shows that there are gradients; what torch sees never drops them, as `zero_grad` would."""

    def __init__(self, collection: EmbeddingCollection) -> None:
        """Of a collection; nothing is shown yet."""
        watch_scalers()
        self._collection = weakref.ref(collection)
        self._gradient: AnchorGradient | None = None
        self._backward: int | None = None
        self._passed_by: str | None = None

    @property
    def collection(self) -> EmbeddingCollection:
        """That is not attached."""
        collection = self._collection()
        assert collection is not None
        return collection

    def check_applied(self) -> None:
        """Refuses to add to gradients that should have been applied, or never are.

        Raises:
          ConfigError: an optimizer that was given the anchor has stepped since they came.
        """
        collection = self.collection
        if not collection.pending:
            self._passed_by = None
        elif self._passed_by is not None:
            raise ConfigError(
                f"{self._passed_by} was given the parameters of an EmbeddingCollection and has "
                "stepped, but the gradients of the tables before were not applied: call "
                "collection.attach(optimizer), and its step() updates them, or "
                "collection.apply_gradients() after each step; where tables are to step less "
                "often than the optimizer, leave their anchor out of it"
            )
        elif len(collection.pending) == _MANY_PENDING and not collection.step:
            warnings.warn(
                f"gradients of {_MANY_PENDING} look-ups of an EmbeddingCollection wait, and none "
                "was ever applied: call apply_gradients() after each step of the optimizer, or "
                "attach(optimizer)",
                stacklevel=2,
            )

    def show(self) -> None:
        """Shows torch that there are gradients, at the end of the backward pass where it is in one.

        Until then there are none: DistributedDataParallel would send them and write others, and a
        compiled graph adds zeros.
        """
        if not is_in_backward():
            self._show()
            return
        backward = torch._C._current_graph_task_id()
        if backward == self._backward:
            return
        self._backward = backward
        self.hide()
        engine: Any = torch.autograd.Variable._execution_engine
        # Behind all that is queued by then, as what DistributedDataParallel does at the end is.
        engine.queue_callback(lambda: engine.queue_callback(self._show))

    def show_anew(self) -> None:
        """After the anchor has changed device or dtype."""
        self._gradient = None
        self._show()

    def hide(self) -> None:
        """Shows torch that there are none."""
        if self._gradient is not None:
            self.collection.anchor.grad = self._gradient = None

    def settle(self) -> None:
        """Looks at what became of the anchor's gradient.

        Raises:
          ConfigError: it is another tensor, whose scaling would not be that of the tables'.
        """
        collection = self.collection
        grad = collection.anchor.grad
        if grad is None or isinstance(grad, AnchorGradient) or not collection.pending:
            return
        raise ConfigError(
            "the gradient of the collection's anchor, which stands for those of the tables, was "
            f"replaced by a {type(grad).__name__} ({grad.dtype}, {grad.device}): scale it in "
            "place; or set it to None, and clip by penstock.clip_grad_norm_, which does without"
        )

    def stands_for(self, gradient: AnchorGradient) -> bool:
        """Whether it is that of the gradients there are."""
        return (gradient.original or gradient) is self._gradient

    def set_to_zero(self) -> None:
        """As where `zero_grad` sets it to None: `apply_gradients` applies them all the same."""
        self._gradient = None

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before an optimizer that holds the anchor reads the gradients."""
        collection = self.collection
        if not collection.pending:
            # Perhaps there is one of the anchor itself, which stands for none of tables.
            collection.anchor.grad = None
        if self._gradient is None:
            return
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor) and collection.anchor.grad is not None:
            # A fused optimizer divides by GradScaler's scale itself.
            collection.pending.unscale(scale.double().reciprocal())
        self.hide()

    def show_again(self) -> None:
        """They are there still."""
        if self._gradient is None:
            self._show()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """They are there still, and should be applied by now."""
        self.show_again()
        if self._gradient is not None:
            self._passed_by = type(optimizer).__name__

    def _show(self) -> None:
        collection = self._collection()
        if collection is not None and collection.pending and not collection.is_attached:
            anchor = collection.anchor
            anchor.grad = self._gradient = AnchorGradient.of(self, anchor)


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Closure], Closure]
) -> Hook:
    """What a hook before a step returns to change the step's closure; None: it has none."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None
    if len(args) > 1:
        return (args[0], wrap(closure), *args[2:]), kwargs
    return args, {**kwargs, "closure": wrap(closure)}


def _held_by(optimizer: torch.optim.Optimizer) -> list[Unattached]:
    anchors = collections_by_anchor()
    return [
        anchors[id(each)].unattached
        for group in optimizer.param_groups
        for each in group["params"]
        if id(each) in anchors and not anchors[id(each)].is_attached
    ]


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Hook:
    if torch.compiler.is_compiling():
        return None
    held = _held_by(optimizer)
    if not held:
        return None
    _watch_step(type(optimizer))
    for each in held:
        each.before_step(optimizer)

    def wrap(closure: Closure) -> Closure:
        def hiding() -> Any:
            loss = closure()
            for each in held:
                each.before_step(optimizer)
            return loss

        return hiding

    return with_closure(args, kwargs, wrap)


def _after_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if not torch.compiler.is_compiling():
        for each in _held_by(optimizer):
            each.after_step(optimizer)


# Of all optimizers: a collection does not know those that hold its anchor.
register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
