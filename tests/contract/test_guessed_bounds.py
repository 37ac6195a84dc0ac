"""Eviction from one long table of a host store, which guesses from a sample where its rows end."""

import pytest
import torch

from penstock.config import SGD, Constant, Eviction, TableConfig
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock, overhead_bytes
from penstock.embedding.store import CURSOR_START, TableRows

ROWS = 1 << 14
"""The fewest of which a sample is taken: every 16th of the list of the table's keys."""


@pytest.mark.parametrize("sampled_used", [1, 9], ids=["oldest", "newest"])
def test_a_sample_that_misleads_changes_no_row_that_leaves(sampled_used):
    rule = {"optimizer": SGD(), "initializer": Constant(value=1.0), "eviction": Eviction()}
    table = TableConfig(name="t", dim=1, max_bytes=10**9, **rule)
    table = table.model_copy(update={"max_bytes": ROWS * (8 + overhead_bytes(table))})
    store = HostStore([table])
    store.advance(Clock(10))
    keys = torch.arange(ROWS)
    for part in keys.split(16):  # in the list each is where the sample looks, and others follow
        store.find_or_insert(0, part[:1])
        store.find_or_insert(0, part[1:])
    usage = torch.where(keys % 16 == 0, sampled_used, 5)
    rows = TableRows(keys, torch.ones(ROWS, 1), torch.zeros(ROWS, 0), usage[:, None])
    store.insert_or_assign(0, rows)
    new = ROWS + torch.arange(1500)
    store.find_or_insert(0, new)
    store.check_invariants()
    gone = 1500 + ROWS // 32
    assert store.retention_state(0).numbers["evicted"] == gone
    rows, _ = store.export_batch(0, CURSOR_START, 2 * ROWS)
    assert bool(torch.isin(new, rows.keys).all())
    left = usage[~torch.isin(keys, rows.keys)].sort().values
    assert torch.equal(left, usage.sort().values[:gone])
