"""The C++ core. Arrays are contiguous numpy arrays of exactly the dtype named."""

from collections.abc import Sequence

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
    """XXH64 of the strings `bytes[offsets[i]:offsets[i + 1]]`, modulo `buckets` unless it is 0."""

def hash_integers(
    values: NDArray[np.int64] | NDArray[np.uint64], seed: int = 0, buckets: int = 0
) -> NDArray[np.int64]:
    """XXH64 of the decimal text of each value, modulo `buckets` unless it is 0."""

def parse_hex(
    offsets: NDArray[np.int32] | NDArray[np.int64], bytes: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], int]:
    """Keys of 1 to 16 hexadecimal digits, and the index of the first bad string (-1: none)."""

class JaggedWindow:
    """The jagged columns of a window of rows that lies in several chunks; copies none of them."""

    def __init__(
        self,
        columns: Sequence[tuple[NDArray[np.int64], NDArray[np.int64] | None]],
        starts: Sequence[int],
        stops: Sequence[int],
    ) -> None:
        """Joins rows [starts[p], stops[p]) of the chunks p, in order.

        Args:
          columns: [parts * features], part by part: values and offsets [rows + 1] of each feature;
            no offsets: one key a row. They must not change while the window lives.
          starts: [parts]
          stops: [parts]
        """

    def select(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Copies the bags of `rows` [n], packed feature by feature.

        Returns:
          values and offsets [features * n + 1].

        Raises:
          IndexError: a row lies outside the window.
        """

def count_newlines(bytes: NDArray[np.uint8]) -> int:
    """Number of bytes equal to 10."""
