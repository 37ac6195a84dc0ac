"""Turns the parts of training that are not rows into tensors and JSON, and back.

Dense optimizer, random number generators; no pickle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penstock.errors import CheckpointError


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Takes the state of an optimizer apart.

    Hyper-parameters are not part of it: a resumed run has those of its job.

    Returns:
      `{"kind": class, "state": {parameter: {name: value}}}`, where the value is plain JSON or
      `{"tensor": key}`; and the tensors by key, `<parameter>/<name>`.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    for parameter, values in optimizer.state.items():
        name = names[id(parameter)]
        state[name] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
                state[name][key] = {"tensor": f"{name}/{key}"}
            else:
                assert value is None or isinstance(value, bool | int | float | str)
                state[name][key] = value
    return {"kind": type(optimizer).__name__, "state": state}, tensors


def check_optimizer(
    saved: Mapping[str, Any] | None, optimizer: torch.optim.Optimizer | None, model: nn.Module
) -> None:
    """Checks that `load_optimizer` would succeed; changes nothing.

    Raises:
      CheckpointError: another kind of optimizer, or state of a parameter that it does not train.
    """
    before = saved["kind"] if saved is not None else "no optimizer"
    after = type(optimizer).__name__ if optimizer is not None else "no optimizer"
    if before != after:
        raise CheckpointError(f"the checkpoint holds the state of {before}, the job has {after}")
    if saved is None or optimizer is None:
        return
    foreign = set(saved["state"]) - set(_places(optimizer, model))
    if foreign:
        raise CheckpointError(
            f"the checkpoint has optimizer state of {', '.join(sorted(foreign))}, "
            "which the model does not train"
        )


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Inverse of `optimizer_state`; hyper-parameters stay those of `optimizer`."""
    places = _places(optimizer, model)
    state = {
        places[name]: {
            key: tensors[value["tensor"]] if isinstance(value, Mapping) else value
            for key, value in values.items()
        }
        for name, values in saved["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _places(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, int]:
    """Number of each parameter in the order of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [item for group in optimizer.param_groups for item in group["params"]]
    return {names[id(parameter)]: place for place, parameter in enumerate(parameters)}


def check_model(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Checks that the saved parameters and buffers are those of `model`; changes nothing.

    Raises:
      CheckpointError: one line for each that is missing, unknown, or of another shape or type.
    """
    own = model.state_dict()
    lines = []
    for name in {**saved, **own}:
        before = _describe(saved[name]) if name in saved else "absent"
        after = _describe(own[name]) if name in own else "absent"
        if before != after:
            lines.append(f"  {name}: {before} in the checkpoint, {after} in the model")
    if lines:
        raise CheckpointError("the model is not the one of the checkpoint:\n" + "\n".join(lines))


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def random_state(device: torch.device) -> bytes:
    """State of the global generators of torch, numpy and Python, as JSON.

    Of the GPU that `device` is, too, which dropout there draws from.
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}
    content = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": {**numpy_state, "state": inner},
        "python": [version, list(words), gauss],
    }
    if device.type == "cuda":
        content["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return json.dumps(content).encode() + b"\n"


def set_random_state(raw: bytes, device: torch.device) -> None:
    """Inverse of `random_state`; the state of a GPU is that of `device`, if it is one."""
    content = json.loads(raw)
    state = bytearray.fromhex(content["torch"])
    torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))
    if "cuda" in content and device.type == "cuda":
        state = bytearray.fromhex(content["cuda"])
        torch.cuda.set_rng_state(torch.frombuffer(state, dtype=torch.uint8), device)
    inner = content["numpy"]["state"]
    key = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state({**content["numpy"], "state": {**inner, "key": key}})
    version, words, gauss = content["python"]
    random.setstate((version, tuple(words), gauss))
