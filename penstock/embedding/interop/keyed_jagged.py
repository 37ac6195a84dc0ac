"""TorchRec's KeyedJaggedTensor as a packed batch, and back."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from penstock.errors import ConfigError
from penstock.types import KeyedJagged, as_keys


def from_keyed_jagged_tensor(kjt: Any, features: Sequence[str] | None = None) -> KeyedJagged:
    """Makes a `KeyedJagged` of a torchrec KeyedJaggedTensor, on its device.

    Args:
      kjt: with or without weights, of one batch size for all its keys; it may be given by key.
      features: which of its keys, and in which order; None: all, as they are. Of a key that it has
        several times the last one, as in TorchRec.

    Raises:
      ConfigError: its batch sizes are unequal, its values are no integers, or it lacks a feature.
    """
    names = tuple(kjt.keys())
    lengths = kjt.lengths().to(torch.int64).reshape(-1)
    strides = list(kjt.stride_per_key()) if kjt.variable_stride_per_key() else []
    inverse = getattr(kjt, "inverse_indices_or_none", lambda: None)()
    if len(set(strides)) > 1 or inverse is not None or lengths.numel() % max(1, len(names)):
        sizes = f"batch sizes {strides}" if strides else f"{lengths.numel()} bags"
        raise ConfigError(
            f"the KeyedJaggedTensor has {sizes} for {len(names)} keys; every key needs the same "
            "batch size, and samples in their own order (no inverse indices)"
        )
    offsets = lengths.new_zeros(lengths.numel() + 1)
    torch.cumsum(lengths, 0, out=offsets[1:])
    weights = kjt.weights_or_none()
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    values = as_keys(kjt.values(), "the KeyedJaggedTensor") if names else lengths
    packed = KeyedJagged(names, values.contiguous(), offsets, weights)
    if features is None or tuple(features) == names:
        return packed
    missing = [feature for feature in features if feature not in names]
    if missing:
        raise ConfigError(f"no feature {missing[0]!r}; there are {', '.join(names)}")
    last = {name: number for number, name in enumerate(names)}
    return packed.select([last[feature] for feature in features])


def to_keyed_jagged_tensor(sparse: KeyedJagged) -> Any:
    """Makes a torchrec KeyedJaggedTensor of the same keys and weights.

    Raises:
      ConfigError: torchrec is not installed.
    """
    return torchrec_part("sparse.jagged_tensor", "a KeyedJaggedTensor").KeyedJaggedTensor(
        keys=list(sparse.features),
        values=sparse.values,
        lengths=sparse.offsets.diff(),
        weights=sparse.weights,
    )


def torchrec_part(name: str, what: str) -> Any:
    """A module of torchrec.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(f"torchrec.{name}")
    except ImportError as error:
        raise ConfigError(f"{what} needs torchrec: {error}") from None
