"""A million random look-ups among 20 million rows, beside a bare gather of as many rows.

    python benchmarks/bench_random_lookups.py [--json] [--check]

The gather knows where its rows are; a look-up must find out, which takes one more cache line from
memory (of the index) than the row's own. Both take turns on other random keys each time, with all
cores, into an output that is written around the caches. Needs a C++ compiler (`c++`) on x86-64.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from circumstances import commit, end_check, hardware

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


def compile_gather() -> ctypes.CDLL:
    """gather.cc, compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "gather.so"
        source = Path(__file__).with_name("gather.cc")
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-std=c++17", "-pthread"]
        subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.allocate.restype = ctypes.c_void_p
    return loaded


def run_case(library: ctypes.CDLL, dim: int, rows: int, threads: int, turns: int) -> dict:
    """Milliseconds of both, turn by turn."""
    table = TableConfig(name="t", dim=dim, optimizer=SGD())
    store = HostStore([table], num_threads=threads)
    for part in torch.arange(rows).split(1 << 18):
        batch = KeyedJagged.pack({"f": Jagged.from_dense(part * SCATTER)})
        plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), dim)
        store.pooled_lookup(plan, batch, insert=True, out=torch.empty(len(part), dim))
    bare = library.allocate(ctypes.c_int64(rows * dim))
    if not bare:
        raise MemoryError(f"no memory for {rows} rows of {dim} floats; use --rows")
    generator = torch.Generator().manual_seed(0)
    out = torch.zeros(LOOKUPS, dim)
    times: dict[str, list[float]] = {"lookup": [], "gather": []}
    for turn in range(turns + 1):
        numbers = torch.randint(rows, (LOOKUPS,), generator=generator)
        batch = KeyedJagged.pack({"f": Jagged.from_dense(numbers * SCATTER)})
        places = numbers.numpy().astype(np.uint32)
        begin = time.perf_counter()
        lookup = store.pooled_lookup(plan, batch, insert=False, out=out)
        middle = time.perf_counter()
        library.gather(
            ctypes.c_void_p(bare),
            ctypes.c_int64(dim),
            places.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(LOOKUPS),
            ctypes.c_int64(threads),
            ctypes.c_void_p(out.data_ptr()),
        )
        end = time.perf_counter()
        assert lookup.num_missing == 0
        if turn:  # the first one warms up
            times["lookup"].append((middle - begin) * 1e3)
            times["gather"].append((end - middle) * 1e3)
    library.release(ctypes.c_void_p(bare), ctypes.c_int64(rows * dim))
    shares = [g / k for g, k in zip(times["gather"], times["lookup"], strict=True)]
    result = {"case": f"D{dim}, {rows / 1e6:g} M rows", "share_of_gather": np.median(shares)}
    result["share_range"] = [min(shares), max(shares)]
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
    library = compile_gather()
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
            missed.append(f"{result['case']}: {result['share_of_gather']:.2f}, goal {GOAL}")
    if arguments.check:
        end_check(missed)


if __name__ == "__main__":
    main()
