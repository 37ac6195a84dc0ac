"""By how much a loss was scaled whose backward pass runs: what a GradScaler tells optimizers alone.

A scaler unscales the gradients of parameters that its optimizer holds. Gradients of a collection
that no optimizer holds are out of its sight, and torch tells nobody that a loss was scaled. So
`GradScaler.scale` is wrapped, once there is a collection: what it returns remembers the scale.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from penstock.errors import ConfigError

_MARK = "_penstock_sees_scales"


class _ScaledPass:
    """A backward pass of a loss that was scaled; lives as long as the pass, raise as it may."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale


# By the number of autograd's graph task, which no two have.
_PASSES: weakref.WeakValueDictionary[int, _ScaledPass] = weakref.WeakValueDictionary()
_LAST_WITHOUT = [-1]
"""The last pass whose gradients were taken to be of no scaled loss."""


def watch_scalers() -> None:
    """Wraps `scale` of GradScaler, and of what is derived from it by now; does so once."""
    for kind in _with_subclasses(torch.amp.GradScaler):
        scale = vars(kind).get("scale")
        if scale is not None and not hasattr(scale, _MARK):
            kind.scale = _watched(scale)


def scale_of_this_pass() -> Tensor | None:
    """The scale of the loss whose backward pass runs in this thread, [1]; None: it has none.

    Raises:
      ConfigError: the pass of another loss, which was scaled, runs as well: as of the loss around
        it, where `torch.utils.checkpoint(use_reentrant=True)` begins a pass within one.
    """
    task = torch._C._current_graph_task_id()
    found = _PASSES.get(task)
    if found is not None:
        return found.scale
    if _PASSES:
        raise ConfigError(
            "a backward pass within that of a loss that a GradScaler has scaled, or beside it in "
            "another thread: whether the tables' gradients are scaled cannot be told. Give "
            "torch.utils.checkpoint use_reentrant=False, or attach the collection to the optimizer"
        )
    _LAST_WITHOUT[0] = task
    return None


def _with_subclasses(kind: Any) -> Iterator[Any]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _with_subclasses(derived)


def _watched(scale: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scale)
    def watched(scaler: torch.amp.GradScaler, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        return _remember(scaled, scaler) if scaler.is_enabled() else scaled

    # Not in a compiled graph, which holds tensors alone.
    apart = torch.compiler.disable(watched, reason="penstock notes the loss scale")  # type: ignore[no-untyped-call]
    setattr(apart, _MARK, True)
    return apart  # type: ignore[no-any-return]


def _remember(scaled: Any, scaler: torch.amp.GradScaler) -> Any:
    """The same outputs, as `scale` gives them: a tensor, or an iterable of such."""
    if isinstance(scaled, Tensor):
        if scaled.requires_grad:
            # A copy: update() writes into the scaler's own.
            begin = functools.partial(_begin_pass, _scale_of(scaler))
            scaled.register_hook(begin)  # type: ignore[no-untyped-call]
        return scaled
    if isinstance(scaled, list | tuple):
        for each in scaled:
            _remember(each, scaler)
        return scaled
    assert isinstance(scaled, Iterable)
    return (_remember(each, scaler) for each in scaled)


def _scale_of(scaler: torch.amp.GradScaler) -> Tensor:
    scale: Any = scaler._scale
    copied: Tensor = scale.detach().to(torch.float64, copy=True).reshape(1)
    return copied


def _begin_pass(scale: Tensor, _: Tensor) -> None:
    """A hook of a scaled output: it runs before the gradients of all that the output is made of."""
    task = torch._C._current_graph_task_id()
    before = _PASSES.get(task)
    if before is not None and before.scale is not scale and not torch.equal(before.scale, scale):
        raise ConfigError(
            f"a backward pass of losses that were scaled by {float(before.scale)} and by "
            f"{float(scale)}: the tables' gradients of both cannot be unscaled by one; run a pass "
            "for each"
        )
    if task == _LAST_WITHOUT[0]:
        raise ConfigError(
            "a backward pass of a loss that a GradScaler has scaled and of one that it has not: "
            "the tables' gradients of both cannot be unscaled by one; scale the sum of the losses"
        )
    if before is None:
        begun = _PASSES[task] = _ScaledPass(scale)
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: begun)  # which holds it while the pass lasts
