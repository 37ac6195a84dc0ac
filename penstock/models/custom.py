"""A user's own model: found by name, made, and tried on two samples before training starts."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import CustomModel
from penstock.errors import ConfigError

# What a user's code raises when it is wrong. Interrupts, exits and lack of memory pass through.
_USER_CODE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
_PROBE_SAMPLES = 2


def build_custom(config: CustomModel, num_numeric: int, feature_dims: tuple[int, ...]) -> nn.Module:
    """Imports and calls `config.factory`, and checks what its module returns.

    Args:
      config: `module:name` and its arguments.
      num_numeric: passed on; columns of `dense`.
      feature_dims: passed on; [F] columns of each feature.

    Returns:
      The module, tried on two samples of zeros in evaluation mode (which also gives lazy modules
      their shapes) and left in the mode in which the factory gave it.

    Raises:
      ConfigError: names the factory and what failed: import, look-up, call, or result.
    """
    factory = _find(config.factory)
    try:
        model = factory(num_numeric=num_numeric, feature_dims=feature_dims, **config.arguments)
    except _USER_CODE_ERRORS as error:
        arguments = "".join(f", {name}={value!r}" for name, value in config.arguments.items())
        raise ConfigError(
            f"model.factory {config.factory!r}: calling it with num_numeric={num_numeric}, "
            f"feature_dims={feature_dims}{arguments} failed: {_describe(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory {config.factory!r} returned {type(model).__name__}; "
            "it must return a torch.nn.Module"
        )
    _probe(config.factory, model, num_numeric, sum(feature_dims))
    return model


def _find(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except _USER_CODE_ERRORS as error:
        raise ConfigError(
            f"model.factory {name!r}: cannot import {module_name!r}: {_describe(error)}; "
            "is its folder on PYTHONPATH?"
        ) from error
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        raise ConfigError(
            f"model.factory {name!r}: module {module_name!r} has no {attribute!r}"
        ) from error


def _probe(name: str, model: nn.Module, num_numeric: int, embedding_columns: int) -> None:
    dense = torch.zeros(_PROBE_SAMPLES, num_numeric)
    embeddings = torch.zeros(_PROBE_SAMPLES, embedding_columns)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(dense, embeddings)
    except _USER_CODE_ERRORS as error:
        raise ConfigError(
            f"model.factory {name!r}: forward(dense {list(dense.shape)}, "
            f"embeddings {list(embeddings.shape)}) failed: {_describe(error)}"
        ) from error
    model.train(was_training)
    if not isinstance(logits, Tensor):
        got = type(logits).__name__
    elif not logits.is_floating_point() or logits.shape != (_PROBE_SAMPLES,):
        got = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
    else:
        return
    raise ConfigError(
        f"model.factory {name!r}: forward returned {got} for {_PROBE_SAMPLES} samples; "
        f"it must return logits [{_PROBE_SAMPLES}], one number a sample"
    )


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
