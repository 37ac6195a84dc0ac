"""Stochastic rounding of updated row values to two bytes: a pure function, in numpy.

The C++ core (csrc/rows/narrow.h, csrc/rows/narrow_lanes.h) computes the same function bit for bit,
and so may any other store: the random bits depend on the number of the update, the column and the
exact float32 bits of the new value, on nothing else.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.config import ValueType
from penstock.embedding.rules.initializer import GOLDEN, mix64

DTYPES: dict[ValueType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# As in csrc/rows/narrow.h.
CODES: dict[ValueType, int] = {"float32": 0, "bfloat16": 1, "float16": 2}

_INFINITY = np.uint32(0x7F800000)
_SMALLEST_NORMAL_HALF = np.uint32(0x38800000)
_HALF_BIAS = np.uint32(112 << 23)


def round_update(values: NDArray[np.float32], dtype: ValueType, step: int) -> Tensor:
    """Rounds new values as the update number `step` stores them.

    Rounding is away from 0 with the probability that makes it right in the mean. Beyond the largest
    number lies infinity; any NaN becomes one NaN.

    Args:
      values: [n, D], the rows after the update.
      dtype: of the table; float32 stays as it is.
      step: counted from 0.

    Returns:
      [n, D] in the table's dtype.
    """
    if dtype == "float32":
        return torch.from_numpy(values)
    bits = np.ascontiguousarray(values).view(np.uint32)
    random = mix32(bits ^ column_keys(step, values.shape[1]))
    magnitude, sign = bits & np.uint32(0x7FFFFFFF), (bits >> np.uint32(16)) & np.uint32(0x8000)
    if dtype == "bfloat16":
        rounded = (magnitude + (random >> np.uint32(16))) >> np.uint32(16)
        rounded = np.where(magnitude >= _INFINITY, magnitude >> np.uint32(16), rounded)
        nan = np.uint32(0x7FC0)
    else:
        normal = (magnitude - _HALF_BIAS + (random >> np.uint32(19))) >> np.uint32(13)
        is_small = magnitude < _SMALLEST_NORMAL_HALF
        rounded = np.where(is_small, _subnormal_half(magnitude, random), normal)
        rounded = np.minimum(rounded, np.uint32(0x7C00))
        nan = np.uint32(0x7E00)
    rounded = np.where(magnitude > _INFINITY, nan, rounded | sign)
    return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(DTYPES[dtype])


def largest_within(bound: float, dtype: ValueType) -> float:
    """The largest number of a table's dtype that is not above `bound`, which is at least 2^-14."""
    nearest = torch.tensor(bound, dtype=torch.float64).to(DTYPES[dtype])
    if not nearest.double() <= bound:
        bits = torch.int32 if dtype == "float32" else torch.int16
        # Of positive numbers the next lower one.
        nearest = (nearest.view(bits) - 1).view(DTYPES[dtype])
    return float(nearest)


def _subnormal_half(
    magnitude: NDArray[np.uint32], random: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """Below 2^-14; elsewhere of no meaning. Numbers that are subnormal in float32 count as 0."""
    is_used = (magnitude < _SMALLEST_NORMAL_HALF) & (magnitude >= np.uint32(0x00800000))
    units = np.where(is_used, magnitude, np.uint32(0)).view(np.float32) * np.float32(2**24)
    whole = units.astype(np.uint32)
    fraction = (units - whole.astype(np.float32)) * np.float32(2**24)
    return whole + ((random >> np.uint32(8)).astype(np.float32) < fraction)


def mix32(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A bijection of 32-bit words (lowbias32), element by element. FORMAT: never change."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def column_keys(step: int, dim: int) -> NDArray[np.uint32]:
    """[D] what makes the random bits of a column differ. FORMAT: never change."""
    mixed = mix64(np.array([step], dtype=np.uint64) + GOLDEN)
    seed = (mixed >> np.uint64(32)).astype(np.uint32)
    return mix32(seed + np.arange(dim, dtype=np.uint32) * np.uint32(0x9E3779B9))
