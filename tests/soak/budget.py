"""A table of 20 M rows whose keys drift: memory against the budget, time of look-ups.

    python tests/soak/budget.py

Keys come from a window that moves on, so that most keys of a batch are known, some are new for
ever and old ones are never seen again. The table has a budget, LRU and a TTL. Reported, every
tenth of the run: resident memory of rows and index against what the budget promises, and the time
of look-up with insertion and of update. It fails where memory is more than 5 % above the budget, or
look-ups in the second half of the run take a fifth more time than in the first: give it a quiet
machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from penstock.config import Eviction, RowWiseAdagrad, TableConfig
from penstock.embedding import retention
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan, RowLayout
from penstock.types import Jagged, KeyedJagged

BATCH = 65_536


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def open_table(rows: int, dim: int, ttl: int) -> TableConfig:
    """A table whose budget is `rows` rows."""
    rules = {"eviction": Eviction(ttl=ttl), "optimizer": RowWiseAdagrad()}
    unbounded = TableConfig(name="t", dim=dim, **rules)
    row_bytes = RowLayout.of(unbounded).row_bytes + retention.overhead_bytes(unbounded)
    return TableConfig(name="t", dim=dim, max_bytes=rows * row_bytes, **rules)


def keys_of(step: int, rows: int, rng: np.random.Generator) -> torch.Tensor:
    """Keys of a window of 1.2 * rows that moves by an eighth of a batch a step; most are recent."""
    newest = int(1.2 * rows) + step * (BATCH // 8)
    back = (rng.random(BATCH) ** 2 * 1.2 * rows).astype(np.int64)
    with np.errstate(over="ignore"):
        return torch.from_numpy((newest - back) * np.int64(0x5851F42D4C957F2D))


def run(lookups: int, rows: int, dim: int, threads: int) -> dict[str, float]:
    """Fills the table, then looks up and updates; returns figures of the tenths."""
    steps = max(20, lookups // BATCH)
    ttl = max(16, steps // 3)
    table = open_table(rows, dim, ttl)
    store = HostStore([table], num_threads=threads)
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), dim)
    rng = np.random.default_rng(0)
    out, grad = torch.zeros(BATCH, dim), torch.ones(BATCH, dim)
    # Threads, libraries and the buffers of a batch are no part of a table.
    other = HostStore([open_table(BATCH, dim, ttl)], num_threads=threads)
    for step in range(1, 5):
        batch = KeyedJagged.pack({"f": Jagged.from_dense(keys_of(step, rows, rng))})
        lookup = other.pooled_lookup(plan, batch, insert=True, out=out)
        other.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], step)
    before = resident_bytes()
    for first in range(int(0.2 * rows), int(1.2 * rows), BATCH):
        part = torch.arange(first, min(first + BATCH, int(1.2 * rows)))
        store.find_or_insert(0, part * 0x5851F42D4C957F2D)
    tenths = []
    print(f"budget {int(table.max_bytes):,} bytes; ttl {ttl} of {steps} steps")
    print("  step        rows   resident/budget   look-up ns/key   update ns/key   slowest step ms")
    spent = np.zeros(2)
    slowest = 0.0
    for step in range(1, steps + 1):
        batch = KeyedJagged.pack({"f": Jagged.from_dense(keys_of(step, rows, rng))})
        begin = time.perf_counter()
        store.advance(Clock(step))
        lookup = store.pooled_lookup(plan, batch, insert=True, out=out)
        middle = time.perf_counter()
        store.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], step)
        end = time.perf_counter()
        spent += (middle - begin, end - middle)
        slowest = max(slowest, end - begin)
        assert store.num_rows(0) <= rows
        if step % (steps // 10) == 0:
            part = steps // 10
            resident = (resident_bytes() - before) / int(table.max_bytes)
            nanoseconds = spent / part / BATCH * 1e9
            tenths.append((resident, *nanoseconds, slowest * 1e3))
            print(
                f"{step:6d} {store.num_rows(0):11,d} {resident:17.3f} {nanoseconds[0]:16.0f} "
                f"{nanoseconds[1]:15.0f} {slowest * 1e3:17.0f}",
                flush=True,
            )
            spent[:] = 0
            slowest = 0.0
    numbers = store.retention_state(0).numbers
    print(f"evicted {numbers['evicted']:,}, admitted {numbers['admitted']:,}")
    figures = np.array(tenths)
    return {
        "resident_least": figures[1:, 0].min(),
        "resident_most": figures[:, 0].max(),
        # Flat: the second half against the first.
        "lookup_growth": figures[5:, 1].mean() / figures[:5, 1].mean(),
        "lookup_ns": figures[:, 1].mean(),
        "update_ns": figures[:, 2].mean(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lookups", type=int, default=200_000_000)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    figures = run(arguments.lookups, arguments.rows, arguments.dim, arguments.threads)
    print({name: round(float(value), 3) for name, value in figures.items()})
    if figures["resident_most"] > 1.05:
        sys.exit("resident memory is more than 5 % above the budget")
    if figures["lookup_growth"] > 1.2:
        sys.exit("look-ups grow slower with use, or the machine had other work")


if __name__ == "__main__":
    main()
