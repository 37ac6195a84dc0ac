"""Random operations on a HostStore and on the oracle, side by side.

    python tests/soak/random_operations.py --operations 10000000

One operation is one key of one call. Every answer is compared, and the invariants are checked
after each call.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from penstock.config import Adagrad, Normal, TableConfig, Uniform
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.store import CURSOR_START, TableRows

EDGE_KEYS = np.array([-(2**63), -1, 0, 1, 2**63 - 1], dtype=np.int64)


def random_keys(rng: np.random.Generator, count: int, span: int) -> torch.Tensor:
    """Keys with many repeats, over the whole range of int64, the edges among them."""
    with np.errstate(over="ignore"):
        keys = rng.integers(0, span, count) * np.int64(0x5851F42D4C957F2D) - np.int64(span)
    edges = rng.random(count) < 0.01
    keys[edges] = rng.choice(EDGE_KEYS, int(edges.sum()))
    return torch.from_numpy(keys)


def assert_same(host, oracle, what):
    # Values that were only ever stored or initialised are equal to the bit.
    for name, a, b in zip(host._fields, host, oracle, strict=True):
        assert torch.equal(a, b), f"{what}: {name} differ"


def compare_exports(host, oracle, table):
    for store in (host, oracle):
        cursor, parts = CURSOR_START, []
        while True:
            rows, cursor = store.export_batch(table, cursor, 1000)
            if not len(rows.keys):
                break
            parts.append(rows)
        keys = torch.cat([rows.keys for rows in parts]) if parts else torch.zeros(0)
        order = keys.argsort()
        exported = [torch.cat(columns)[order] for columns in zip(*parts, strict=True)]
        if store is host:
            first = exported
    assert all(torch.equal(a, b) for a, b in zip(first, exported, strict=True)), "exports differ"


def run(operations: int, seed: int, *, span: int = 20_000, report=lambda done: None) -> int:
    """Runs about `operations` of them; returns how many were done."""
    rng = np.random.default_rng(seed)
    optimizer = Adagrad(initial_accumulator=0.5)
    tables = [
        TableConfig(name="a", dim=3, optimizer=optimizer, initializer=Normal()),
        TableConfig(name="b", dim=3, optimizer=optimizer, initializer=Uniform()),
    ]
    host = HostStore(tables, seed=seed, num_threads=int(rng.integers(1, 5)))
    oracle = DictStore(tables, seed=seed)
    done = 0
    while done < operations:
        table = int(rng.integers(2))
        keys = random_keys(rng, int(rng.choice([0, 1, 7, 500, 5000])), span)
        verb = rng.choice(["find", "find_or_insert", "insert_or_assign", "erase", "export"])
        if verb in {"find", "find_or_insert"}:
            assert_same(getattr(host, verb)(table, keys), getattr(oracle, verb)(table, keys), verb)
        elif verb == "insert_or_assign":
            values = torch.from_numpy(rng.standard_normal((len(keys), 6)).astype(np.float32))
            rows = TableRows(keys, values[:, :3].contiguous(), values[:, 3:].contiguous())
            assert host.insert_or_assign(table, rows) == oracle.insert_or_assign(table, rows)
        elif verb == "erase":
            assert host.erase(table, keys) == oracle.erase(table, keys)
        elif rng.random() < 0.05:
            compare_exports(host, oracle, table)
        assert host.num_rows(table) == oracle.num_rows(table)
        host.check_invariants()
        done += len(keys)
        report(done)
    for table in range(2):
        compare_exports(host, oracle, table)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.monotonic()
    done = run(arguments.operations, arguments.seed)
    took = time.monotonic() - start
    print(f"{done} operations agree with the oracle (seed {arguments.seed}), {took:.0f} s")


if __name__ == "__main__":
    main()
