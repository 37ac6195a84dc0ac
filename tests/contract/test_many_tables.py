"""Eviction, expiry, counts and exports where a store has many tables: each as if it were alone."""

import numpy as np
import pytest
import torch

from penstock.config import SGD, AdmitFrequent, Constant, Eviction, TableConfig
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock, overhead_bytes, usage_dim
from penstock.embedding.store import (
    CURSOR_START,
    Candidates,
    PooledFeature,
    PooledGradient,
    PoolingPlan,
    TableRows,
)
from penstock.types import KeyedJagged
from tests.contract.stores import is_slow, open_store

__all__ = ["open_store"]


def rules(number):
    """Of many kinds, so that in each step some tables evict, some expire, some halve counts."""
    ruled = TableConfig(
        name=f"t{number}",
        dim=1,
        optimizer=SGD(learning_rate=1.0),
        initializer=Constant(value=1.0),
        admission=AdmitFrequent(min_count=2, half_life_steps=3 + number % 5)
        if number % 3 == 0
        else None,
        eviction=Eviction(
            order="lfu",
            half_life=5 + number % 4 if number % 2 else None,
            ttl=20 + 7 * number if number % 4 == 1 else None,
            unit="seconds" if number % 8 == 1 else "steps",
        ),
        max_bytes=10**6,
    )
    rows = 6 + 5 * (number % 7)
    row_bytes = 4 + 4 * usage_dim(ruled) + overhead_bytes(ruled)
    return ruled.model_copy(update={"max_bytes": rows * row_bytes + 8 * 32})


def keys_of(rng, tables, size, step):
    """[tables * size] int64 whose popular keys drift."""
    return torch.from_numpy((rng.zipf(1.3, tables * size) % 60 + step // 4).astype(np.int64))


def content(store, number):
    rows, _ = store.export_batch(number, CURSOR_START, 1 << 20)
    order = rows.keys.argsort()
    counts, _ = store.export_candidates(number, CURSOR_START, 1 << 20)
    by_key = counts.keys.argsort()
    return (
        *(column[order].tolist() for column in rows if column is not None),
        counts.keys[by_key].tolist(),
        counts.counts[by_key].tolist(),
        store.retention_state(number).numbers,
    )


def test_each_table_goes_the_way_of_the_oracle(open_store):
    tables = 9 if is_slow(open_store) and open_store is not DictStore else 24
    steps = 30 if tables == 9 else 60
    configs = [rules(number) for number in range(tables)]
    store, oracle = open_store(configs), DictStore(configs)
    features = tuple(PooledFeature(f, f, "sum", f) for f in range(tables))
    plan = PoolingPlan(features, tables)
    names = tuple(f"f{f}" for f in range(tables))
    rng = np.random.default_rng(0)
    size = 12
    for step in range(steps):
        keys = keys_of(rng, tables, size, step)
        if step % 10 == 9:  # now and then rows leave and come again by other ways
            for one in (store, oracle):
                one.erase(step % tables, torch.arange(0, 30, 3))
                again = torch.arange(0, 30, 6)
                rows = TableRows(again, torch.ones(5, 1), torch.zeros(5, 0))
                one.insert_or_assign(step % tables, rows)
        batch = KeyedJagged(names, keys, torch.arange(tables * size + 1))
        for one in (store, oracle):
            one.advance(Clock(step, 1_700_000_000 + 3 * step))
            out = torch.zeros(size, tables)
            lookup = one.pooled_lookup(plan, batch, insert=True, out=out)
            grad = torch.full((size, tables), 0.25)
            one.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], step)
        if step % 5 == 4:
            store.check_invariants()
        if step % 15 == 14:
            for number in range(tables):
                assert content(store, number) == content(oracle, number), (step, number)
    all_numbers = [store.retention_state(number).numbers for number in range(tables)]
    assert sum(each["evicted"] for each in all_numbers) > 10 * tables
    assert sum(each["refused"] for each in all_numbers) > tables


def test_full_tables_that_do_not_evict_take_the_keys_of_the_lowest_hash(open_store):
    configs = [
        TableConfig(name=f"t{n}", dim=1, optimizer=SGD(), max_bytes=(4 + 24) * (n + 1))
        for n in range(12)
    ]
    store, oracle = open_store(configs), DictStore(configs)
    plan = PoolingPlan(tuple(PooledFeature(f, f, "sum", f) for f in range(12)), 12)
    keys = torch.arange(12 * 40) * 0x9E3779B97F4A7C
    batch = KeyedJagged(tuple(f"f{f}" for f in range(12)), keys, torch.arange(12 * 40 + 1))
    for one in (store, oracle):
        one.pooled_lookup(plan, batch, insert=True, out=torch.zeros(40, 12))
    store.check_invariants()
    for number in range(12):
        assert content(store, number) == content(oracle, number)
        assert store.num_rows(number) == number + 1


def test_exports_in_small_parts_and_in_turn(open_store):
    """Each table's rows once, whatever other exports run beside."""
    tables = 5
    configs = [TableConfig(name=f"t{n}", dim=1, optimizer=SGD()) for n in range(tables)]
    store = open_store(configs)
    sizes = [0, 300, 1, 70, 33]
    for number, size in enumerate(sizes):
        store.find_or_insert(number, torch.arange(size) * 0x9E3779B97F4A7C)
    order = [3, 0, 4, 1, 2]
    cursors, found = dict.fromkeys(order, CURSOR_START), {number: [] for number in order}
    open_ones = list(order)
    while open_ones:
        for number in list(open_ones):
            rows, cursors[number] = store.export_batch(number, cursors[number], 37)
            found[number] += rows.keys.tolist()
            if not len(rows.keys):
                open_ones.remove(number)
    for number, size in enumerate(sizes):
        assert sorted(found[number]) == sorted((torch.arange(size) * 0x9E3779B97F4A7C).tolist())
    # What comes after an export is in the next one, and a former cursor says so.
    _, cursor = store.export_batch(1, CURSOR_START, 10)
    store.find_or_insert(2, torch.tensor([-5]))
    with pytest.raises(RuntimeError, match="changed while it was exported"):
        store.export_batch(1, cursor, 10)
    assert set(store.export_batch(2, CURSOR_START, 10)[0].keys.tolist()) == {0, -5}


def test_a_table_that_is_most_of_a_store_is_exported_beside_small_ones(monkeypatch):
    """Beyond the number of places that are kept, entry by entry."""
    configs = [TableConfig(name=f"t{n}", dim=1, optimizer=SGD()) for n in range(3)]
    store = HostStore(configs, num_threads=1)
    large = (1 << 21) + 1000
    for number, size in enumerate([100, large, 7]):
        store.find_or_insert(number, torch.arange(size))
    for number, size in [(1, large), (0, 100), (2, 7), (1, large)]:
        keys, cursor = [], CURSOR_START
        while True:
            rows, cursor = store.export_batch(number, cursor, 1 << 19)
            if not len(rows.keys):
                break
            keys.append(rows.keys)
        assert torch.equal(torch.cat(keys).sort().values, torch.arange(size))


def test_a_list_of_keys_does_not_grow_with_what_has_left():
    """Keys that are erased, or counted and then admitted, for ever."""
    evicting = TableConfig(name="t", dim=1, optimizer=SGD(), eviction=Eviction(ttl=10**6))
    counting = TableConfig(name="t", dim=1, optimizer=SGD(), admission=AdmitFrequent(min_count=2))
    for config in (evicting, counting):
        store = HostStore([config], num_threads=2)
        keys = torch.arange(2000)
        for _ in range(30):
            store.find_or_insert(0, keys)
            store.find_or_insert(0, keys)
            store.check_invariants()
            assert store.erase(0, keys) == len(keys)
            store.check_invariants()
        index_bytes = store.memory().index_bytes
        # The index takes 24 bytes a key at most, but no less than its first size.
        assert index_bytes < 16 * 64 * 64 + 2 * 30 * len(keys)


def test_lists_of_many_small_tables_are_small():
    bytes_of = {}
    for tables in (1, 500):
        configs = [
            TableConfig(name=f"t{n}", dim=1, optimizer=SGD(), eviction=Eviction(ttl=10**6))
            for n in range(tables)
        ]
        store = HostStore(configs, num_threads=1)
        for number in range(tables):
            store.find_or_insert(number, torch.arange(15_000 // tables))
        assert store.memory().rows == 15_000
        bytes_of[tables] = store.memory().index_bytes
    # 8 bytes a row in each; a list that grows has a quarter more than it needs.
    assert bytes_of[500] - bytes_of[1] < 0.3 * 8 * 15_000


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("scan_from", [0, 1 << 20])
def test_a_table_grows_to_most_of_a_store_and_shrinks_again(threads, scan_from):
    """Beyond a share of the index it has no list of its keys; the same rows leave all the same."""
    small = rules(1)
    large = small.model_copy(
        update={
            "name": "large",
            "max_bytes": 1500 * (4 + 4 * usage_dim(small) + overhead_bytes(small)) + 8 * 32 * 900,
            "admission": AdmitFrequent(min_count=2, half_life_steps=7),
            "eviction": Eviction(order="lfu", half_life=9, ttl=40),
        }
    )
    configs = [small, large]
    store = HostStore(configs, num_threads=threads, scan_from=scan_from)
    oracle = DictStore(configs)
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0), PooledFeature(1, 1, "sum", 1)), 2)
    rng = np.random.default_rng(4)
    size = 300
    evicted = []
    for step in range(126):
        low, high = (step * 40, step * 40 + 900) if step < 60 else (2400 + step, 2430 + step)
        keys = np.concatenate([rng.integers(0, 60, size), rng.integers(low, high, size)])
        batch = KeyedJagged(("a", "b"), torch.from_numpy(keys), torch.arange(2 * size + 1))
        gone = torch.arange(1000 + 25 * step, 1015 + 25 * step)
        for one in (store, oracle):
            one.advance(Clock(step, 1_700_000_000 + 3 * step))
            if step % 3 == 2:
                one.erase(1, gone)
            lookup = one.pooled_lookup(plan, batch, insert=True, out=torch.zeros(size, 2))
            grad = torch.full((size, 2), 0.25)
            one.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], step)
        if step % 9 == 8:
            store.check_invariants()
            assert content(store, 1) == content(oracle, 1), step
            assert content(store, 0) == content(oracle, 0), step
            evicted.append(store.retention_state(1).numbers["evicted"])
    assert evicted[-1] > evicted[5] > 300
    assert store.num_rows(1) < 200


def test_a_cursor_ends_where_a_list_is_dropped_or_made():
    """Positions in a list and in the index are not the same, though no key came or went."""
    rule = TableConfig(
        name="t",
        dim=1,
        optimizer=SGD(),
        admission=AdmitFrequent(min_count=2),
        eviction=Eviction(ttl=1000),
    )
    store = HostStore([rule], num_threads=2, scan_from=0)
    store.import_candidates(0, Candidates(torch.arange(2000), torch.ones(2000, dtype=torch.int64)))
    for step in (100, 200):
        before = store.memory().index_bytes
        counts, cursor = store.export_candidates(0, CURSOR_START, 37)
        assert len(counts.keys) == 37
        store.advance(Clock(step))  # a sweep, by which nothing leaves
        with pytest.raises(RuntimeError, match="changed while it was exported"):
            store.export_candidates(0, cursor, 37)
        assert (store.memory().index_bytes < before) is (step == 100)  # dropped, then made again
        store.check_invariants()
        assert sorted(content(store, 0)[-3]) == list(range(store.num_candidates(0)))
        store.find_or_insert(0, torch.arange(100, 2000))  # they get rows
        store.erase(0, torch.arange(100, 2000))


def test_a_large_table_has_no_list():
    small = TableConfig(name="t", dim=1, optimizer=SGD(), eviction=Eviction(ttl=16))
    large = small.model_copy(update={"name": "large", "admission": AdmitFrequent(min_count=2)})
    others = [small.model_copy(update={"name": f"t{n}"}) for n in range(3)]
    store = HostStore([large, *others], num_threads=1, scan_from=1 << 18)
    rows = 200_000
    for first in range(0, rows, 50_000):
        for _ in range(2):
            store.find_or_insert(0, torch.arange(first, first + 50_000))
    for number in range(1, 4):
        store.find_or_insert(number, torch.arange(1000))
    store.find_or_insert(0, torch.arange(rows, rows + 3000))  # counted
    before = store.memory().index_bytes
    store.advance(Clock(1))  # a sweep
    assert before - store.memory().index_bytes >= 8 * rows
    store.check_invariants()
    # Most of it leaves: from then on it has one, of rows and counts.
    store.erase(0, torch.arange(5_000, rows))
    after = store.memory().index_bytes
    store.advance(Clock(2))
    assert 8 * 8_000 <= store.memory().index_bytes - after <= 8 * 10_000
    store.check_invariants()
    store.advance(Clock(40))
    assert [store.num_rows(number) for number in range(4)] == [0] * 4
    assert store.num_candidates(0) == 3000
    store.check_invariants()
