"""Tables read from files into a table that holds less, as where budgets came to count more."""

import numpy as np
import pytest
import torch

from penstock.config import SGD, AdmitFrequent, Eviction, FeatureConfig, TableConfig
from penstock.embedding import EmbeddingCollection, retention
from penstock.embedding.retention import RetentionState
from penstock.embedding.store import Candidates, RowLayout, TableRows


def collection(rows, eviction, counts=0):
    """A table that holds so many rows, and counts of so many keys."""
    ruled = TableConfig(
        name="t",
        dim=2,
        optimizer=SGD(),
        admission=AdmitFrequent(min_count=9) if counts else None,
        eviction=eviction,
        max_bytes=10**6,
    )
    row_bytes = RowLayout.of(ruled).row_bytes + retention.overhead_bytes(ruled)
    if counts:
        size = 8 * retention.COUNT_BYTES * counts
        rows = size * 7 // 8 // row_bytes
    else:
        size = rows * row_bytes
    table = ruled.model_copy(update={"max_bytes": size})
    limits = retention.limits_of(table, RowLayout.of(table).row_bytes)
    assert limits.max_rows == rows
    return EmbeddingCollection([table], [FeatureConfig(name="f", table="t")], num_threads=1)


@pytest.mark.parametrize(
    "eviction",
    [
        Eviction(),
        Eviction(order="lfu"),
        Eviction(order="lfu", half_life=10),
        Eviction(order="score"),
    ],
)
def test_rows_beyond_the_budget_leave_in_the_order_of_eviction(tmp_path, eviction, monkeypatch):
    monkeypatch.setattr("penstock.embedding.collection.table_files.SHARD_BYTES", 2048)
    before = collection(300, eviction)
    rng = np.random.default_rng(0)
    state = before.retention_state("t")
    state.numbers.update(now=100, step=100, swept=100, evicted=7, evicted_age=70)
    before.set_retention_state("t", state)
    keys = torch.arange(300) * 0x9E3779B97F4A7C
    # Many are used alike.
    usage = torch.from_numpy(rng.integers(50, 100, (300, RowLayout.of(before.tables[0]).usage_dim)))
    values = torch.from_numpy(rng.standard_normal((300, 2)).astype(np.float32))
    before.import_rows("t", TableRows(keys, values, torch.zeros(300, 0), usage))
    before.save_tables(tmp_path / "tables")

    after = collection(180, eviction)
    after.load_tables(tmp_path / "tables")
    after.check_invariants()
    # The oracle: rows one by one.
    rank = []
    for key, marks in zip(keys.tolist(), usage.tolist(), strict=True):
        uses = 0
        if eviction.order != "lru":
            uses = marks[1] >> (10 - marks[0] // 10 if eviction.half_life else 0)
        hashed = int(retention.precedence(np.array([key]))[0])
        rank.append((uses, marks[0], hashed, key, marks[0]))
    rank.sort()
    (rows,) = after.export_table("t")
    assert set(rows.keys.tolist()) == {one[3] for one in rank[120:]}
    place = {key: n for n, key in enumerate(keys.tolist())}
    of = [place[key] for key in rows.keys.tolist()]
    assert torch.equal(rows.values, values[of])
    assert torch.equal(rows.usage, usage[of])
    numbers = after.retention_state("t").numbers
    assert numbers["evicted"] == 7 + 120
    assert numbers["evicted_age"] == 70 + sum(100 - one[4] for one in rank[:120])


def test_counts_beyond_the_budget_are_forgotten_by_hash(tmp_path):
    before = collection(None, None, counts=60)
    keys = torch.arange(60) * 0x9E3779B97F4A7C
    before.import_candidates("t", Candidates(keys, torch.arange(60) % 7 + 1))
    before.save_tables(tmp_path / "tables")
    after = collection(None, None, counts=40)
    after.load_tables(tmp_path / "tables")
    after.check_invariants()
    order = np.argsort(retention.precedence(keys.numpy()))[:40]
    (counts,) = after.export_candidates("t")
    found = dict(zip(counts.keys.tolist(), counts.counts.tolist(), strict=True))
    assert found == {int(keys[n]): int(n) % 7 + 1 for n in order}
    # So that counts are halved, and others come in.
    assert after.retention_state("t").numbers["candidates_are_full"] == 1
    assert before.retention_state("t").numbers["candidates_are_full"] == 0


def test_numbers_of_before_are_read():
    numbers = torch.arange(9)
    tensors = {"default_value": torch.zeros(2), "default_state": torch.zeros(0)}
    state = RetentionState.from_tensors({**tensors, "retention": numbers})
    assert list(state.numbers.values()) == [*range(9), 0]
    assert list(state.numbers) == list(retention.NUMBERS)


def test_rows_of_a_time_to_come_are_of_no_age_and_not_halved():
    table = TableConfig(name="t", dim=1, eviction=Eviction(order="lfu", half_life=10), max_bytes=99)
    usage = torch.tensor([[300, 8], [95, 4], [95, 9]])
    for most, leaving, age in ((2, [1], 5), (1, [1, 2], 10), (0, [0, 1, 2], 10)):
        state = RetentionState(torch.zeros(1), torch.zeros(0))
        state.numbers.update(now=100)
        leaves = state.let_go(table, retention.Limits(most, 0), torch.arange(3), usage)
        assert leaves.nonzero()[:, 0].tolist() == leaving
        assert (state.numbers["evicted"], state.numbers["evicted_age"]) == (len(leaving), age)


@pytest.mark.parametrize(("count", "forgotten"), [(0, 0), (39, 0), (40, 0), (41, 1)])
def test_counts_that_fit_are_all_kept(count, forgotten):
    state = RetentionState(torch.zeros(1), torch.zeros(0))
    leaves = state.let_counts_go(retention.Limits(0, 40), torch.arange(count))
    assert int(leaves.sum()) == forgotten
    assert state.numbers["candidates_are_full"] == forgotten
