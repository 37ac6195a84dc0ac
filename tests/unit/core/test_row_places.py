"""Where rows lie in memory: those of a shard together, whatever has come and gone.

A look-up among rows in random places spends most of its time on address translation, so a table
whose rows come and go would grow slower for as long as it is used (tests/soak/budget.py measures
it).
"""

import numpy as np
import pytest
import torch

from penstock.config import SGD, Eviction, TableConfig
from penstock.embedding import retention
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock
from penstock.embedding.store import CURSOR_START, PooledFeature, PoolingPlan, RowLayout, TableRows
from penstock.types import Jagged, KeyedJagged

SHARDS = 64
EXTENT = 16
"""Slots that a shard of a small store takes at a time."""
ROWS = 1 << 16
SCATTER = 0x5851F42D4C957F2D
PLAN = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 4)


def extents_of_a_shard(store):
    """How many extents the rows of a shard are spread over, on average."""
    slots = np.empty(store.num_rows(0), np.uint32)
    store._core.row_slots(0, slots)
    return np.mean([len(np.unique(part // EXTENT)) for part in np.array_split(slots, SHARDS)])


def insert(store, first, last):
    keys = torch.arange(first, last) * SCATTER
    rows = TableRows(keys, torch.zeros(len(keys), 4), torch.zeros(len(keys), 0))
    assert store.insert_or_assign(0, rows) == len(keys)


def some_keys(store, count):
    rows, _ = store.export_batch(0, CURSOR_START, count)
    return rows.keys


@pytest.mark.parametrize("threads", [1, 3])
def test_evicted_rows_leave_their_places_to_rows_of_their_shard(threads):
    unbounded = TableConfig(name="t", dim=4, optimizer=SGD(), eviction=Eviction(ttl=100))
    row_bytes = RowLayout.of(unbounded).row_bytes + retention.overhead_bytes(unbounded)
    table = unbounded.model_copy(update={"max_bytes": ROWS * row_bytes})
    store = HostStore([table], num_threads=threads)
    size = 1 << 12
    for step in range(4 * ROWS // size):
        batch = KeyedJagged.pack({
            "f": Jagged.from_dense(torch.arange(step * size, (step + 1) * size) * SCATTER)
        })
        store.advance(Clock(step))
        store.pooled_lookup(PLAN, batch, insert=True, out=torch.empty(size, 4))
    store.check_invariants()
    assert store.retention_state(0).numbers["evicted"] > 2 * ROWS
    # 64 hold the rows. A shard that has more rows than it ever had borrows. With one list of free
    # slots for all it were more than 350, in random places 880.
    assert extents_of_a_shard(store) <= 200


def test_erased_rows_do_so_too():
    store = HostStore([TableConfig(name="t", dim=4, optimizer=SGD())], num_threads=2)
    insert(store, 0, ROWS)
    before = extents_of_a_shard(store)
    assert before < 150
    generator = torch.Generator().manual_seed(0)
    for turn in range(1, 5):
        held = some_keys(store, ROWS)
        gone = held[torch.randperm(len(held), generator=generator)[: ROWS // 2]]
        assert store.erase(0, gone) == ROWS // 2
        insert(store, turn * ROWS, turn * ROWS + ROWS // 2)
        store.check_invariants()
    assert extents_of_a_shard(store) <= before + 136
    assert store.memory().slot_capacity <= 1.02 * ROWS + SHARDS * 2 * EXTENT


def test_what_one_shard_has_too_many_of_the_others_take():
    store = HostStore([TableConfig(name="t", dim=4, optimizer=SGD())], num_threads=2)
    insert(store, 0, ROWS)
    capacity = store.memory().slot_capacity
    for turn in range(1, 20):
        # The first of the index: those of the first shard.
        one_shard = some_keys(store, ROWS // SHARDS)
        assert store.erase(0, one_shard) == len(one_shard)
        insert(store, turn * ROWS, turn * ROWS + len(one_shard))
        store.check_invariants()
    assert store.memory().slot_capacity <= capacity + SHARDS * EXTENT
