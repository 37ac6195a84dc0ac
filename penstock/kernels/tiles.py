"""Sizes of tiles: how many vectors a program holds in registers at once."""

from __future__ import annotations

from functools import lru_cache

import torch

SMALLEST_COLUMNS = 16
ELEMENTS_PER_WARP = 1024
"""Floats of a tile: eight loads of 16 bytes a thread, none of which waits for another."""
REGISTERS = 80
"""Of a thread of updates, at most: so that enough warps wait for memory at once."""
WIDE_REGISTERS = 128
"""The same where a row has as much state as values, or more: what waits is larger then."""


def power_of_two(dim: int) -> int:
    """Columns of a tile for vectors of `dim`: a power of two, at least `SMALLEST_COLUMNS`."""
    return max(SMALLEST_COLUMNS, 1 << (dim - 1).bit_length())


@lru_cache(maxsize=16)
def full_device(device: torch.device) -> int:
    """Programs of one warp that run at once, at most."""
    if device.type != "cuda":
        return 4
    return 32 * torch.cuda.get_device_properties(device).multi_processor_count


def warp_tile(columns: int) -> tuple[int, int]:
    """Vectors of a tile, a power of two, and warps that hold it.

    One warp: many small programs hide the time that each waits for memory. More where a vector is
    larger than a tile.
    """
    return max(1, ELEMENTS_PER_WARP // columns), 1 if columns <= 2 * ELEMENTS_PER_WARP else 4
