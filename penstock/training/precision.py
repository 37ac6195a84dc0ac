"""Computes a model in bfloat16 where that is safe (torch.autocast), whoever calls it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn

from penstock.models import TwoTower

Method = Callable[..., Tensor]


def autocast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Makes every call of a model compute under autocast and return float32.

    Parameters, inputs, gradients and what is made of the outputs stay float32.

    Effects: replaces the methods of this instance that training, evaluation and prediction call.
    """
    names = ("forward", "users", "items") if isinstance(model, TwoTower) else ("forward",)
    for name in names:
        setattr(model, name, _autocast(getattr(model, name), device.type, dtype))


def _autocast(method: Method, device_type: str, dtype: torch.dtype) -> Method:
    @wraps(method)
    def call(*arguments: Tensor) -> Tensor:
        with torch.autocast(device_type, dtype):
            outputs = method(*arguments)
        # Of a user's model, what is no tensor is refused by who asked for outputs.
        return outputs.float() if isinstance(outputs, Tensor) else outputs

    return call
