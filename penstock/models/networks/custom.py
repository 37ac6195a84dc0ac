"""A user's own model: found by name, made, and tried on two samples before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import CustomModel
from penstock.config.users_code import USERS_CODE_ERRORS, described, find_named
from penstock.errors import ConfigError
from penstock.types import FeatureShape

_PROBE_SAMPLES = 2


def build_custom(
    config: CustomModel, num_numeric: int, features: Sequence[FeatureShape], num_tasks: int
) -> nn.Module:
    """Imports and calls `config.factory`, and checks what its module returns.

    Args:
      config: `module:name` and its arguments.
      num_numeric: passed on; columns of `dense`.
      features: their widths are passed on as `feature_dims`, and their sequences as `sequences`
        where there are any.
      num_tasks: passed on where it is more than 1.

    Returns:
      The module, tried on two samples of zeros in evaluation mode (which also gives lazy modules
      their shapes) and left in the mode in which the factory gave it.

    Raises:
      ConfigError: names the factory and what failed: import, look-up, call, or result.
    """
    factory = find_named("model.factory", config.factory)
    given: dict[str, Any] = {
        "num_numeric": num_numeric,
        "feature_dims": tuple(feature.width for feature in features),
    }
    sequences = {one.name: (one.length, one.dim) for one in features if one.length is not None}
    given |= {"sequences": sequences} if sequences else {}
    given |= {"num_tasks": num_tasks} if num_tasks > 1 else {}
    try:
        model = factory(**given, **config.arguments)
    except USERS_CODE_ERRORS as error:
        shown = ", ".join(
            f"{name}={value!r}" for name, value in {**given, **config.arguments}.items()
        )
        raise ConfigError(
            f"model.factory {config.factory!r}: calling it with {shown} failed: {described(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.factory {config.factory!r} returned {type(model).__name__}; "
            "it must return a torch.nn.Module"
        )
    inputs = {
        "dense": torch.zeros(_PROBE_SAMPLES, num_numeric),
        "embeddings": torch.zeros(_PROBE_SAMPLES, sum(feature.width for feature in features)),
    }
    if sequences:
        inputs["lengths"] = torch.zeros(_PROBE_SAMPLES, len(sequences), dtype=torch.int64)
    _probe(config.factory, model, inputs, num_tasks)
    return model


def _probe(name: str, model: nn.Module, inputs: Mapping[str, Tensor], num_tasks: int) -> None:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(*inputs.values())
    except USERS_CODE_ERRORS as error:
        shown = ", ".join(f"{what} {list(tensor.shape)}" for what, tensor in inputs.items())
        raise ConfigError(
            f"model.factory {name!r}: forward({shown}) failed: {described(error)}"
        ) from error
    model.train(was_training)
    wanted = [_PROBE_SAMPLES, num_tasks] if num_tasks > 1 else [_PROBE_SAMPLES]
    if not isinstance(logits, Tensor):
        got = type(logits).__name__
    elif not logits.is_floating_point() or list(logits.shape) != wanted:
        got = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
    else:
        return
    numbers = f"{num_tasks} numbers" if num_tasks > 1 else "one number"
    raise ConfigError(
        f"model.factory {name!r}: forward returned {got} for {_PROBE_SAMPLES} samples; "
        f"it must return logits {wanted}, {numbers} a sample"
    )
