"""First values of rows: a pure function of (seed, table, key, column), in numpy.

The C++ core (csrc/index/hashing.h) computes the same function bit for bit. FORMAT: never change:
the rows that a checkpoint does not hold are this function.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from penstock.config import Constant, Initializer, Normal, Uniform

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
KINDS: dict[type, int] = {Uniform: 0, Normal: 1, Constant: 2}


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of MurmurHash3, element by element."""
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def table_seed(seed: int, table: str) -> int:
    """64-bit hash of (seed, table name)."""
    key = (seed % 2**64).to_bytes(8, "little")
    return int.from_bytes(
        hashlib.blake2b(table.encode(), key=key, digest_size=8).digest(), "little"
    )


def scale_of(initializer: Initializer) -> float:
    """The one parameter: bound, standard deviation or value."""
    match initializer:
        case Uniform():
            return initializer.bound
        case Normal():
            return initializer.std
        case Constant():
            return initializer.value


def initial_values(
    initializer: Initializer, seed: int, table: str, keys: NDArray[np.int64], dim: int
) -> NDArray[np.float32]:
    """First values of the rows of `keys`.

    Args:
      initializer: kind and scale.
      seed: the collection's seed.
      table: name of the table.
      keys: [n] int64.
      dim: columns.

    Returns:
      [n, dim] float32.
    """
    scale = np.float32(scale_of(initializer))
    if isinstance(initializer, Constant):
        return np.full((len(keys), dim), scale, dtype=np.float32)
    rows = mix64(keys.view(np.uint64) ^ np.uint64(table_seed(seed, table)))[:, None]
    columns = np.arange(dim, dtype=np.uint64)[None, :]
    if isinstance(initializer, Uniform):
        bits = mix64(rows + (columns + np.uint64(1)) * GOLDEN) >> np.uint64(40)
        centred = bits.astype(np.int32) - np.int32(1 << 23)
        return centred.astype(np.float32) * (scale * np.float32(2**-23))
    total = np.full((len(keys), dim), -393210, dtype=np.int32)
    for draw in (1, 2, 3):
        bits = mix64(rows + (columns * np.uint64(3) + np.uint64(draw)) * GOLDEN)
        for shift in (0, 16, 32, 48):
            total += ((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int32)
    return total.astype(np.float32) * (scale * np.float32(2**-16))
