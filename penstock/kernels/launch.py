"""Starts kernels with less work for the host than Triton's own launch.

Triton works out anew at every launch which compiled form fits the arguments, in more time than a
small kernel runs. Here that is one look-up by what it depends on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
_INT32 = 1 << 31


def _kind(argument: Tensor | int) -> object:
    """What the compiled form depends on: see Triton's specialization of arguments."""
    if isinstance(argument, int):
        is_wide = not -_INT32 <= argument < _INT32
        return (argument == 1) + 2 * (argument % 16 == 0) + 4 * is_wide
    return argument.dtype, argument.data_ptr() % 16 == 0


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Tensor | int, ...], **constants: Any
) -> None:
    """Starts a kernel on the current stream of the device of its first argument.

    Args:
      kernel: made by `triton.jit`; its constants come last.
      grid: numbers of programs.
      arguments: all that are no constants, in order; the first is a tensor.
      constants: by name, and options of the compiler.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](*arguments, **constants)
        return
    first = arguments[0]
    assert isinstance(first, Tensor)
    device = first.device.index
    name = (kernel, device, *constants.values(), *map(_kind, arguments))
    known = _compiled.get(name)
    if known is None:
        made = kernel[grid](*arguments, **constants)
        tail = tuple(constants[each] for each in kernel.arg_names[len(arguments) :])
        _compiled[name] = made, tail
        return
    made, tail = known
    stream = torch._C._cuda_getCurrentRawStream(device)
    made[(*grid, 1, 1)[:3]](*arguments, *tail, stream=stream)
