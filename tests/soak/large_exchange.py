"""One exchange of more than 2^31 elements, and one of more than 2^32 bytes, to a single rank.

    python -m tests.soak.large_exchange

Two ranks of this machine (Gloo); needs about 10 GiB of memory. Each element has a value that its
place gives, and all of them are compared. Prints a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from penstock.embedding.sharded.exchange import Collective
from penstock.interruption import Interruption
from penstock.ranks.environment import end_with_launcher
from penstock.ranks.join import joined
from penstock.ranks.launch import launch

CHUNK = 1 << 26
SIZES = {torch.uint8: (2**31 + 1_000, 1), torch.float32: (2**30 // 16 + 77, 16)}
"""Rows and columns: 2^31 and some elements; 2^32 and some bytes."""


def chunks(total: int) -> Iterator[tuple[int, int]]:
    """Places from and to, of all."""
    for begin in range(0, total, CHUNK):
        yield begin, min(begin + CHUNK, total)


def wanted(begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Values of places: 251 and 8191 are prime, so that none is that of a wrapped place."""
    return (torch.arange(begin, end) % (251 if dtype == torch.uint8 else 8191)).to(dtype)


def exchanged() -> None:
    """What each rank does: the first one sends nearly all, the second one some rows."""
    with joined("cpu") as group:
        assert group.tables is not None
        exchange = Collective(group.tables.group, torch.device("cpu"))
        for dtype, (rows, columns) in SIZES.items():
            is_first = group.rank == 0
            sent = [3, rows] if is_first else [2, 1]
            came_from = [3, 2] if is_first else [rows, 1]
            mine = torch.zeros(sum(sent), columns, dtype=dtype)
            if is_first:
                flat = mine[3:].view(-1)
                for begin, end in chunks(flat.numel()):
                    flat[begin:end] = wanted(begin, end, dtype)
            came = exchange.to_all("look-up", mine, sent, came_from)
            del mine
            assert came.shape == (sum(came_from), columns)
            if not is_first:
                flat = came[:rows].view(-1)
                for begin, end in chunks(flat.numel()):
                    assert torch.equal(flat[begin:end], wanted(begin, end, dtype)), (dtype, begin)
            del came


def main() -> None:
    if "RANK" in os.environ:
        end_with_launcher()
        exchanged()
        return
    ended = launch([sys.executable, "-m", "tests.soak.large_exchange"], 2, Interruption())
    if ended.status:
        raise SystemExit(ended.words)
    sizes = {str(dtype): rows * columns for dtype, (rows, columns) in SIZES.items()}
    print(json.dumps({"soak": "large_exchange", "outcome": "all came", "elements": sizes}))


if __name__ == "__main__":
    main()
