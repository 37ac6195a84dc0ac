"""A million random look-ups among 20 million rows, beside a bare gather of as many rows.

    python benchmarks/bench_random_lookups.py [--json] [--check]

The gather knows where its rows are; a look-up must find out, which takes one more cache line from
memory (of the index) than the row's own. `two_lines` is the machine's limit for that: a loop that
reads each row's place from a random line of another array, as large as the index, without a key to
hash or to compare. `key_and_row` is that for a store that would keep each key in front of its row:
it knows the rows' places, and reads 8 bytes more of each. All take turns on other random keys each
time, with all cores, into an output that is written around the caches. Needs a C++ compiler (`c++`)
on x86-64.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from itertools import pairwise

import numpy as np
import torch
from circumstances import commit, end_check, hardware
from native import compile_library

from penstock.config import SGD, TableConfig
from penstock.embedding.host_store import HostStore
from penstock.embedding.store import PooledFeature, PoolingPlan
from penstock.types import Jagged, KeyedJagged

ROWS = 20_000_000
LOOKUPS = 1_000_000
GOAL = 0.7
"""Speed over the bare gather's, at least."""
SCATTER = 0x5851F42D4C957F2D
"""Odd, so that its multiples are distinct 64-bit keys."""
LINE_BYTES = 64
CONTESTANTS = ("lookup", "gather", "two_lines", "key_and_row")


class Machine:
    """What the machine can do with so many rows, and an index of so many bytes, in its memory."""

    def __init__(self, library: ctypes.CDLL, dim: int, rows: int, index_bytes: int) -> None:
        self._library = library
        self._dim = dim
        self.num_lines = index_bytes // LINE_BYTES
        sizes = (rows * (dim + 2), self.num_lines * (LINE_BYTES // 4))
        self._rows, self._index = (library.allocate(ctypes.c_int64(size)) for size in sizes)
        if not self._rows or not self._index:
            raise MemoryError(f"no memory for {rows} rows of {dim} floats; use --rows")
        self._sizes = ((self._rows, sizes[0]), (self._index, sizes[1]))

    def gather(self, places: np.ndarray, threads: int, out: torch.Tensor) -> None:
        self._call(self._library.gather, (places,), threads, out)

    def key_and_row(self, places: np.ndarray, threads: int, out: torch.Tensor) -> None:
        self._call(self._library.key_and_row, (places,), threads, out)

    def two_lines(
        self, lines: np.ndarray, places: np.ndarray, threads: int, out: torch.Tensor
    ) -> None:
        index = ctypes.c_void_p(self._index)
        self._call(self._library.two_lines, (index, lines, places), threads, out)

    def close(self) -> None:
        for address, size in self._sizes:
            self._library.release(ctypes.c_void_p(address), ctypes.c_int64(size))

    def _call(self, function, arrays: tuple, threads: int, out: torch.Tensor) -> None:
        addresses = [
            array.ctypes.data_as(ctypes.c_void_p) if isinstance(array, np.ndarray) else array
            for array in arrays
        ]
        function(
            ctypes.c_void_p(self._rows),
            ctypes.c_int64(self._dim),
            *addresses,
            ctypes.c_int64(len(out)),
            ctypes.c_int64(threads),
            ctypes.c_void_p(out.data_ptr()),
        )


def random_numbers(end: int, generator: torch.Generator) -> np.ndarray:
    """[LOOKUPS] uint32 in [0, end)."""
    return torch.randint(end, (LOOKUPS,), generator=generator).numpy().astype(np.uint32)


def run_case(library: ctypes.CDLL, dim: int, rows: int, threads: int, turns: int) -> dict:
    """Milliseconds of all, turn by turn."""
    table = TableConfig(name="t", dim=dim, optimizer=SGD())
    store = HostStore([table], num_threads=threads)
    for part in torch.arange(rows).split(1 << 18):
        batch = KeyedJagged.pack({"f": Jagged.from_dense(part * SCATTER)})
        plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), dim)
        store.pooled_lookup(plan, batch, insert=True, out=torch.empty(len(part), dim))
    machine = Machine(library, dim, rows, store.memory().index_bytes)
    generator = torch.Generator().manual_seed(0)
    out = torch.zeros(LOOKUPS, dim)
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for turn in range(turns + 1):
        numbers = torch.randint(rows, (LOOKUPS,), generator=generator)
        batch = KeyedJagged.pack({"f": Jagged.from_dense(numbers * SCATTER)})
        # None finds rows in the caches that the one before has read.
        places = [random_numbers(rows, generator) for _ in range(3)]
        lines = random_numbers(machine.num_lines, generator)
        begin = time.perf_counter()
        lookup = store.pooled_lookup(plan, batch, insert=False, out=out)
        looked_up = time.perf_counter()
        machine.gather(places[0], threads, out)
        gathered = time.perf_counter()
        machine.two_lines(lines, places[1], threads, out)
        two_lines_read = time.perf_counter()
        machine.key_and_row(places[2], threads, out)
        end = time.perf_counter()
        assert lookup.num_missing == 0
        if turn:  # the first one warms up
            moments = (begin, looked_up, gathered, two_lines_read, end)
            for name, (start, stop) in zip(CONTESTANTS, pairwise(moments), strict=True):
                times[name].append((stop - start) * 1e3)
    machine.close()
    result = {"case": f"D{dim}, {rows / 1e6:g} M rows"}
    for limit in ("gather", "two_lines"):
        shares = [k / t for k, t in zip(times[limit], times["lookup"], strict=True)]
        result[f"share_of_{limit}"] = np.median(shares)
        result[f"share_of_{limit}_range"] = [min(shares), max(shares)]
    for limit in ("two_lines", "key_and_row"):
        of_gather = [g / t for g, t in zip(times["gather"], times[limit], strict=True)]
        result[f"{limit}_share_of_gather"] = np.median(of_gather)
    for name, each in times.items():
        result[f"{name}_ms"] = np.median(each)
        result[f"{name}_ns_a_row"] = np.median(each) * 1e6 / LOOKUPS
    return {
        name: np.round(value, 3).tolist() if name != "case" else value
        for name, value in result.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a case")
    parser.add_argument("--check", action="store_true", help="exit 1 if a case misses its goal")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rows", type=int, help="where 20 M rows of the case do not fit twice")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    library = compile_library("gather.cc")
    library.allocate.restype = ctypes.c_void_p
    machine = hardware(f"torch {torch.__version__}")
    missed = []
    for dim in arguments.dims:
        rows = arguments.rows or ROWS
        result = run_case(library, dim, rows, arguments.threads, arguments.turns)
        if arguments.json:
            print(json.dumps({**result, "commit": commit(), "hardware": machine}), flush=True)
        else:
            print(result, flush=True)
        if result["share_of_gather"] < GOAL:
            limits = ", ".join(
                f"{limit} alone {result[f'{limit}_share_of_gather']:.2f}"
                for limit in ("two_lines", "key_and_row")
            )
            missed.append(
                f"{result['case']}: {result['share_of_gather']:.2f}, goal {GOAL}; {limits}"
            )
    if arguments.check:
        end_check(missed)


if __name__ == "__main__":
    main()
