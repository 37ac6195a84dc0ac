"""Random operations on a HostStore and on the oracle, side by side.

    python tests/soak/random_operations.py --operations 10000000

One operation is one key of one call. Every answer is compared, and the invariants are checked
after each call. The seed also picks the type of the rows' values and the number of threads.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from penstock.config import (
    SGD,
    Adagrad,
    AdmitAtRandom,
    AdmitFrequent,
    Constant,
    Eviction,
    Normal,
    TableConfig,
    Uniform,
)
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock, retains
from penstock.embedding.store import (
    CURSOR_START,
    PooledFeature,
    PooledGradient,
    PoolingPlan,
    TableRows,
)
from penstock.errors import CapacityError
from penstock.types import Jagged, KeyedJagged

VALUE_TYPES = ("float32", "bfloat16", "float16")
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


def export_all(export, table):
    """All parts of an export, joined and in the order of the keys; Nones stay out."""
    cursor, parts = CURSOR_START, []
    while True:
        part, cursor = export(table, cursor, 1000)
        if not len(part.keys):
            break
        parts.append([column for column in part if column is not None])
    if not parts:
        return []
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return [column[columns[0].argsort()] for column in columns]


def compare_exports(host, oracle, table):
    for verb in ("export_batch", "export_candidates"):
        pair = [export_all(getattr(store, verb), table) for store in (host, oracle)]
        for a, b in zip(*pair, strict=True):
            assert torch.equal(a, b), f"{verb} of table {table}: exports differ"


def compare_retention(host, oracle, table):
    one, other = host.retention_state(table), oracle.retention_state(table)
    if retains(host.tables[table]):
        assert one.numbers == other.numbers, f"{one.numbers} != {other.numbers}"
    assert torch.equal(one.default_value, other.default_value), "default rows differ"
    assert host.num_candidates(table) == oracle.num_candidates(table)


# Sums of its numbers are exact in fp32 as in fp64: rows are equal to the bit after updates, too.
EXACT = SGD(learning_rate=0.25)
BUDGETED = 24 + 4 * (3 + 2)
RULES = {
    "none": {},
    "probability": {"admission": AdmitAtRandom(probability=0.3)},
    "min_count": {"admission": AdmitFrequent(min_count=4, half_life_steps=7)},
    "full": {"max_bytes": 900 * BUDGETED},
    "lru": {"max_bytes": 900 * BUDGETED, "eviction": Eviction()},
    "lru, ttl": {"max_bytes": 2500 * BUDGETED, "eviction": Eviction(ttl=20)},
    "score": {"max_bytes": 900 * BUDGETED, "eviction": Eviction(order="score")},
    "lfu": {"max_bytes": 900 * BUDGETED, "eviction": Eviction(order="lfu")},
    "lfu, aged": {
        "admission": AdmitFrequent(min_count=2),
        "max_bytes": 1200 * BUDGETED,
        "eviction": Eviction(order="lfu", half_life=5, ttl=60),
    },
    "ttl": {"eviction": Eviction(ttl=9, unit="seconds")},
}


def tables_with(rule: str, dtype: str) -> list[TableConfig]:
    """Two tables of one layout: the first has the rule, the second another of its kind, or none."""
    fields = {"optimizer": EXACT, "dtype": dtype, **RULES[rule]}
    other = dict(fields)
    if "max_bytes" in fields:
        other["max_bytes"] = 64 * BUDGETED * 9
    return [
        TableConfig(name="a", dim=3, initializer=Constant(value=0.5), **fields),
        TableConfig(name="b", dim=3, initializer=Constant(value=-2), **other),
    ]


def train_step(stores, rng, span, step):
    """Look-ups of both tables, an evaluation between, and an update; returns the keys."""
    size = int(rng.choice([1, 16, 300]))
    columns = {}
    for name in ("f0", "f1", "f2"):
        lengths = rng.integers(0, 4, size)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        columns[name] = Jagged(random_keys(rng, int(lengths.sum()), span), offsets)
    batch = KeyedJagged.pack(columns)
    plan = PoolingPlan(
        (
            PooledFeature(0, 0, "sum", 0),
            PooledFeature(1, 1, "sum", 3),
            PooledFeature(2, 0, "sum", 6),
        ),
        9,
    )
    insert = rng.random() < 0.8
    outs = [torch.empty(size, 9) for _ in stores]
    lookups = [
        store.pooled_lookup(plan, batch, insert=insert, out=out)
        for store, out in zip(stores, outs, strict=True)
    ]
    assert torch.equal(*outs), "pooled values differ"
    assert lookups[0].num_missing == lookups[1].num_missing
    if insert:
        if rng.random() < 0.1:  # a row erased, perhaps evicted, before the update
            for store in stores:
                store.find_or_insert(1, torch.arange(400) * 77_777_777)
                store.erase(0, batch.values[:5])
        grad = torch.from_numpy(rng.integers(-4, 5, (size, 9)).astype(np.float32))
        rows = [
            store.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], step)
            for store, lookup in zip(stores, lookups, strict=True)
        ]
        assert rows[0] == rows[1], "numbers of rows updated differ"
    return len(batch.values)


def open_host_store(tables, *, seed):
    """With one to four threads."""
    return HostStore(tables, seed=seed, num_threads=1 + seed % 4)


def run_with_rules(
    operations: int,
    seed: int,
    rule: str,
    *,
    span: int = 3000,
    report=lambda done: None,
    open_store=open_host_store,
) -> int:
    """As `run`, on tables with admission, eviction and budgets, and with training steps."""
    rng = np.random.default_rng(seed)
    tables = tables_with(rule, VALUE_TYPES[seed % len(VALUE_TYPES)])
    host = open_store(tables, seed=seed)
    oracle = DictStore(tables, seed=seed)
    stores = (host, oracle)
    done = step = 0
    while done < operations:
        table = int(rng.integers(2))
        verb = rng.choice(["train", "train", "find", "find_or_insert", "assign", "erase", "export"])
        if verb == "train":
            step += int(rng.integers(1, 3))
            for store in stores:
                store.advance(Clock(step, 1_700_000_000 + step))
            done += train_step(stores, rng, span, step)
        elif verb == "export":
            if rng.random() < 0.2:
                compare_exports(host, oracle, table)
        else:
            keys = random_keys(rng, int(rng.choice([0, 1, 7, 200])), span)
            if verb == "erase":
                assert host.erase(table, keys) == oracle.erase(table, keys)
            elif verb == "assign":
                values = torch.from_numpy(rng.integers(-9, 9, (len(keys), 3)).astype(np.float32))
                rows = TableRows(keys, values, torch.zeros(len(keys), 0))
                assert assigned(host, table, rows) == assigned(oracle, table, rows)
            else:
                pair = [getattr(store, verb)(table, keys) for store in stores]
                assert_same(*pair, verb)
            done += len(keys)
        for table in range(2):
            assert host.num_rows(table) == oracle.num_rows(table)
            compare_retention(host, oracle, table)
        # Budgets, too.
        host.check_invariants()
        report(done)
    for table in range(2):
        compare_exports(host, oracle, table)
    return done


def assigned(store, table, rows):
    """What `insert_or_assign` returns or raises."""
    try:
        return store.insert_or_assign(table, rows)
    except CapacityError as error:
        return str(error)


def run(
    operations: int,
    seed: int,
    *,
    span: int = 20_000,
    report=lambda done: None,
    open_store=open_host_store,
) -> int:
    """Runs about `operations` of them; returns how many were done."""
    rng = np.random.default_rng(seed)
    optimizer = Adagrad(initial_accumulator=0.5)
    dtype = VALUE_TYPES[seed % len(VALUE_TYPES)]
    tables = [
        TableConfig(name="a", dim=3, optimizer=optimizer, dtype=dtype, initializer=Normal()),
        TableConfig(name="b", dim=3, optimizer=optimizer, dtype=dtype, initializer=Uniform()),
    ]
    host = open_store(tables, seed=seed)
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
    parser.add_argument(
        "--rules", action="store_true", help="tables with admission, eviction and budgets"
    )
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.rules:
        each = arguments.operations // len(RULES)
        done = sum(run_with_rules(each, arguments.seed, rule) for rule in RULES)
    else:
        done = run(arguments.operations, arguments.seed)
    took = time.monotonic() - start
    print(f"{done} operations agree with the oracle (seed {arguments.seed}), {took:.0f} s")


if __name__ == "__main__":
    main()
