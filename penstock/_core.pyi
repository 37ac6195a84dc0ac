"""The C++ core. Arrays are contiguous numpy arrays of exactly the dtype named; nothing is converted."""

import numpy as np
from numpy.typing import NDArray

def xxh64(data: bytes, seed: int = 0) -> int:
    """XXH64 of `data`, unsigned."""

def hash_strings(
    offsets: NDArray[np.int32] | NDArray[np.int64],
    bytes: NDArray[np.uint8],
    seed: int = 0,
    buckets: int = 0,
) -> NDArray[np.int64]:
    """XXH64 of the n strings `bytes[offsets[i]:offsets[i + 1]]`, modulo `buckets` unless it is 0."""

def hash_integers(
    values: NDArray[np.int64] | NDArray[np.uint64], seed: int = 0, buckets: int = 0
) -> NDArray[np.int64]:
    """XXH64 of the decimal text of each value, modulo `buckets` unless it is 0."""

def parse_hex(
    offsets: NDArray[np.int32] | NDArray[np.int64], bytes: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], int]:
    """Keys of 1 to 16 hexadecimal digits, and the index of the first bad string (-1: none)."""

def jagged_select(
    values: NDArray[np.int64],
    offsets: NDArray[np.int64],
    features: int,
    width: int,
    rows: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Selects `rows` of every feature of a jagged array packed feature by feature.

    Args:
      values: [N] keys.
      offsets: [features * width + 1]; bag (f, r) begins at offsets[f * width + r].
      features: number of features.
      width: rows of each feature.
      rows: [b] rows to take, in order, repeats allowed.

    Returns:
      values and offsets [features * b + 1] of the selection.

    Raises:
      IndexError: a row lies outside [0, width).
    """

def count_newlines(bytes: NDArray[np.uint8]) -> int:
    """Number of bytes equal to 10."""
