"""Starts kernels with less work for the host than Triton's own launch.

Triton works out anew at every launch which compiled form fits the arguments, and asks the driver
about every pointer, in more time than a small kernel runs. Here a form is compiled and first
started by Triton; from then on `_core.KernelLauncher` finds it by what it depends on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from penstock import _core

_numbers: dict[tuple[Any, ...], int] = {}
"""Of kernels, by identity, device and constants: kernels are never freed."""


@lru_cache(maxsize=1)
def _launcher() -> _core.KernelLauncher:
    return _core.KernelLauncher()


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Tensor | int, ...], **constants: Any
) -> None:
    """Starts a kernel on the current stream of the device of its first argument.

    Args:
      kernel: made by `triton.jit`; its constants come last. A parameter whose annotation is a
        NamedTuple takes as many of the arguments as that has fields.
      grid: numbers of programs, none 0.
      arguments: all that are no constants, in order, those of groups one by one; the first is a
        tensor.
      constants: by name, and options of the compiler.
    """
    if not isinstance(kernel, JITFunction):
        kernel[grid](*nested(kernel, arguments), **constants)
        return
    first = arguments[0]
    assert isinstance(first, Tensor)
    device = first.device.index
    name = (id(kernel), device, *constants.values())
    number = _numbers.get(name)
    if number is None:
        number = _numbers[name] = len(_numbers)
    stream = torch._C._cuda_getCurrentRawStream(device)
    if not _launcher().launch(number, stream, grid, arguments):
        _start_first(kernel, grid, arguments, constants, number)


def nested(kernel: Any, arguments: tuple[Tensor | int, ...]) -> list[Any]:
    """The arguments as a kernel takes them: those of its named groups together."""
    left, taken = iter(arguments), []
    for group in _groups(kernel.fn):
        taken.append(next(left) if group is None else group(*islice(left, len(group._fields))))
    return [*taken, *left]


@lru_cache(maxsize=256)
def _groups(function: Any) -> tuple[Any, ...]:
    """Of each parameter up to the last group: its class, or None."""
    found = [
        function.__globals__.get(parameter.annotation)
        for parameter in inspect.signature(function).parameters.values()
    ]
    groups = [each if hasattr(each, "_fields") else None for each in found]
    while groups and groups[-1] is None:
        groups.pop()
    return tuple(groups)


def _flat(types: Iterable[Any]) -> Iterator[str]:
    for each in types:
        if isinstance(each, tuple):
            yield from _flat(each)
        else:
            yield each


def _start_first(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Tensor | int, ...],
    constants: dict[str, Any],
    number: int,
) -> None:
    """Compiles the form for these arguments, starts it, and notes it where it is a plain one."""
    made = kernel[grid](*nested(kernel, arguments), **constants)
    metadata = made.metadata
    scratch = metadata.global_scratch_size + getattr(metadata, "profile_scratch_size", 0)
    if scratch or metadata.num_ctas != 1:
        return
    types = list(_flat(made.src.signature.values()))[: len(arguments)]
    threads = metadata.num_warps * metadata.target.warp_size
    _launcher().add(number, arguments, types, made.function, threads, metadata.shared)
