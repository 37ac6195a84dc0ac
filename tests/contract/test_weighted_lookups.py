"""Weighted keys and sequences, on every store."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from penstock.config import SGD, Adagrad, Adam, Constant, RowWiseAdagrad, TableConfig
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan
from penstock.errors import ConfigError
from penstock.types import Jagged, KeyedJagged
from tests.contract.stores import OnCpu, skip_in_interpreter
from tests.contract.test_store_contract import (
    EDGES,
    assert_equal_bits,
    export,
    open_store,
    permuted,
    random_batch,
    two_tables,
)

__all__ = ["open_store"]
FEATURES = ["f0", "f1", "other", "f2", "f3", "f4"]
LENGTH = 5


def mixed_plan(dim):
    """All poolings, two of them sequences of one table; packed feature 2 is another store's."""
    columns = [0, dim, 2 * dim + 2, 3 * dim + 2, (3 + LENGTH) * dim + 2]
    return PoolingPlan(
        (
            PooledFeature(0, 0, "sum", columns[0]),
            PooledFeature(1, 1, "mean", columns[1]),
            PooledFeature(3, 0, "sequence", columns[3], LENGTH),
            PooledFeature(4, 1, "sequence", columns[4], LENGTH + 1),
            PooledFeature(5, 0, "sqrt_n", columns[2]),
        ),
        columns[4] + (LENGTH + 1) * dim,
    )


def train(store, plan, batch, grad, step, out=None):
    out = torch.full((batch.batch_size, plan.stride), 7.0) if out is None else out
    lookup = store.pooled_lookup(plan, batch, insert=True, out=out)
    rows = store.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], step)
    return out, rows


def random_gradient(rng, size, plan):
    return torch.from_numpy(rng.standard_normal((size, plan.stride)).astype(np.float32))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", [SGD(weight_decay=0.01), Adagrad(), Adam()])
@pytest.mark.parametrize("dim", [1, 3, 16, 33])
def test_mixed_poolings_agree_with_the_oracle(open_store, dim, rule, weighted):
    if dim != 3 or (isinstance(rule, SGD) and not weighted):
        skip_in_interpreter(open_store, f"{dim} columns")
    tables = two_tables(dim=dim, optimizer=rule)
    plan = mixed_plan(dim)
    store, oracle = open_store(tables, seed=5), DictStore(tables, seed=5)
    rng = np.random.default_rng(dim)
    for step in range(6):
        size = [0, 1, 17, 40][step % 4]
        batch = random_batch(rng, FEATURES, size, weighted=weighted)
        grad = random_gradient(rng, size, plan)
        (out, rows), (expected, expected_rows) = (
            train(each, plan, batch, grad, step) for each in (store, oracle)
        )
        # fp32 sums of up to 5 rows, divided by as little as 1, against float64
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        assert (out[:, 2 * dim : 2 * dim + 2] == 7.0).all()
        assert rows == expected_rows
    for table in range(2):
        keys = torch.cat([part.keys for part in export(oracle, table, 100)])
        got, want = store.find(table, keys), oracle.find(table, keys)
        # 6 steps in fp32 against float64; Adam's first steps are signs of sums near 0
        torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.state, want.state, rtol=1e-4, atol=1e-5)


def test_a_sequence_holds_the_vectors_of_its_keys_then_zeros(open_store):
    tables = two_tables(dim=3)[:1]
    plan = PoolingPlan((PooledFeature(0, 0, "sequence", 1, 3),), 11)
    store = open_store(tables)
    keys = torch.tensor([5, 6, 5, 7])
    rows = store.find(0, keys).values
    batch = KeyedJagged.pack({"f": Jagged(keys, torch.tensor([0, 3, 3, 4]))})
    for insert in (False, True):
        out = torch.full((3, 11), 7.0)
        lookup = store.pooled_lookup(plan, batch, insert=insert, out=out)
        assert lookup.num_missing == (0 if insert else 4)
        assert (out[:, [0, 10]] == 7.0).all()
        vectors = out[:, 1:10].reshape(3, 3, 3)
        assert torch.equal(vectors[0], rows[:3])
        assert (vectors[1] == 0).all()
        assert torch.equal(vectors[2, 0], rows[3])
        assert (vectors[2, 1:] == 0).all()


def test_each_position_of_a_sequence_has_its_own_gradient(open_store):
    table = TableConfig(name="a", dim=2, optimizer=SGD(learning_rate=1.0), initializer=Constant())
    plan = PoolingPlan((PooledFeature(0, 0, "sequence", 0, 3),), 6)
    store = open_store([table])
    batch = KeyedJagged.pack({
        "f": Jagged(
            torch.tensor([5, 6, 5]), torch.tensor([0, 2, 3]), torch.tensor([1.0, 0.5, -2.0])
        )
    })
    grad = torch.arange(1.0, 13).reshape(2, 6)
    _, rows = train(store, plan, batch, grad, 0)
    assert rows == 2
    values = store.find(0, torch.tensor([5, 6])).values
    assert values.tolist() == [[-1 + 2 * 7, -2 + 2 * 8], [-0.5 * 3, -0.5 * 4]]


@pytest.mark.parametrize("pooling", ["mean", "sqrt_n"])
def test_weights_that_cancel_out_give_zeros_and_no_gradient(open_store, pooling):
    table = TableConfig(name="a", dim=2, optimizer=SGD(learning_rate=1.0))
    plan = PoolingPlan((PooledFeature(0, 0, pooling, 0),), 2)
    store = open_store([table])
    tiny = 1e-39  # its inverse is beyond float32
    weights = [1.0, 2.0, -3.0] if pooling == "mean" else [0.0, 0.0, 0.0]
    batch = KeyedJagged.pack({
        "f": Jagged(
            torch.tensor([1, 2, 3, 4, 5]),
            torch.tensor([0, 3, 4, 5]),
            torch.tensor([*weights, tiny, 2.0]),
        )
    })
    before = store.find(0, torch.arange(1, 6)).values
    out, rows = train(store, plan, batch, torch.ones(3, 2), 0)
    assert (out[:2] == 0).all()
    assert torch.equal(out[2], before[4])
    assert rows == 5  # touched all the same
    after = store.find(0, torch.arange(1, 6))
    assert after.found.all()
    assert torch.equal(after.values[:4], before[:4])
    assert torch.equal(after.values[4], before[4] - 1)


@pytest.mark.parametrize("pooling", ["sum", "mean", "sqrt_n"])
def test_weights_of_1_have_the_bits_of_no_weights(open_store, pooling):
    # The sum over the columns of a row-wise rule is a GPU's own affair but in deterministic mode.
    options = {"deterministic": True} if open_store is OnCpu else {}
    tables = two_tables(dim=5, optimizer=RowWiseAdagrad())
    plan = PoolingPlan((PooledFeature(0, 0, pooling, 0),), 5)
    rng = np.random.default_rng(0)
    stores = open_store(tables, **options), open_store(tables, **options)
    for step in range(3):
        batch = random_batch(rng, ["f"], 50)
        weighted = replace(batch, weights=torch.ones(len(batch.values)))
        grad = random_gradient(rng, 50, plan)
        one, other = (
            train(store, plan, each, grad, step)[0]
            for store, each in zip(stores, (batch, weighted), strict=True)
        )
        assert torch.equal(one, other)
    keys = torch.arange(-40, 40)
    assert_equal_bits(stores[0].find(0, keys), stores[1].find(0, keys))


@pytest.mark.parametrize("deterministic", [False, True])
def test_threads_do_not_change_a_bit(deterministic):
    dim = 16
    tables, plan = two_tables(dim=dim, optimizer=Adam()), mixed_plan(dim)
    results = []
    for threads in (1, 2, 5):
        rng = np.random.default_rng(0)
        store = HostStore(tables, num_threads=threads, deterministic=deterministic)
        for step in range(10):
            batch = random_batch(rng, FEATURES, 600, span=3000, weighted=step % 2 == 0)
            out, _ = train(store, plan, batch, random_gradient(rng, 600, plan), step)
        keys = torch.arange(-3000, 3000)
        results.append((out, *store.find(0, keys), *store.find(1, keys)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_deterministic_mode_has_the_same_bits_whatever_the_order():
    tables, plan = two_tables(dim=3, optimizer=Adam()), mixed_plan(3)
    results = []
    for threads in (1, 2, 4):
        rng = np.random.default_rng(0)
        store = HostStore(tables, num_threads=threads, deterministic=True)
        for step in range(50):
            batch = random_batch(rng, FEATURES, 40, weighted=True)
            grad = random_gradient(rng, 40, plan)
            if threads > 1:
                order = torch.from_numpy(np.random.default_rng(threads + step).permutation(40))
                batch, grad = permuted(batch, order), grad[order].contiguous()
            train(store, plan, batch, grad, step)
        results.append(store.find(0, torch.cat([torch.arange(-40, 40), EDGES])))
    for other in results[1:]:
        assert_equal_bits(results[0], other)


@pytest.mark.parametrize("dim", [16, 32])
def test_outputs_beyond_the_caches_are_whole(dim):
    """Large outputs are written past the caches; every column must arrive, zeros too."""
    tables, plan = two_tables(dim=dim), mixed_plan(dim)
    rng = np.random.default_rng(0)
    batch = random_batch(rng, FEATURES, 2000, span=500, weighted=True)
    outs = []
    for part in (2000, 50):
        store = HostStore(tables, num_threads=2)
        out = torch.full((2000, plan.stride), 7.0)
        for first in range(0, 2000, part):
            columns = {name: slice_of(batch[name], first, first + part) for name in FEATURES}
            small = KeyedJagged.pack(columns)
            store.pooled_lookup(plan, small, insert=True, out=out[first : first + part])
        outs.append(out)
    assert torch.equal(outs[0], outs[1])


def slice_of(column, first, last):
    offsets = column.offsets[first : last + 1]
    keys = slice(int(offsets[0]), int(offsets[-1]))
    return Jagged(column.values[keys], offsets - offsets[0], column.weights[keys])


BATCH = KeyedJagged.pack({
    "a": Jagged(torch.arange(4), torch.tensor([0, 1, 4]), torch.ones(4)),
    "b": Jagged(torch.arange(3), torch.tensor([0, 0, 3]), torch.ones(3)),
})


def with_weight(place, weight):
    weights = torch.ones(7)
    weights[place] = weight
    return replace(BATCH, weights=weights)


@pytest.mark.parametrize(
    ("batch", "max_keys", "message"),
    [
        (
            replace(BATCH, weights=torch.ones(7, dtype=torch.float64)),
            3,
            "weights of the batch: expected contiguous float32 [7] on the CPU, one a key, "
            "got torch.float64 [7] on cpu",
        ),
        (
            replace(BATCH, weights=torch.ones(6)),
            3,
            "weights of the batch: expected contiguous float32 [7] on the CPU, one a key, "
            "got torch.float32 [6] on cpu",
        ),
        (
            replace(BATCH, weights=torch.ones(14)[::2]),
            3,
            "weights of the batch: expected contiguous float32 [7] on the CPU, one a key, "
            "got torch.float32 [7] on cpu",
        ),
        (
            with_weight(4, float("nan")),
            3,
            "feature 'b', sample 1 of the batch: the weight of key 0 is nan; weights must be "
            "finite",
        ),
        (
            with_weight(0, float("-inf")),
            3,
            "feature 'a', sample 0 of the batch: the weight of key 0 is -inf; weights must be "
            "finite",
        ),
        (
            BATCH,
            2,
            "feature 'a', sample 1 of the batch: 3 keys for a sequence of 2 positions; "
            "raise max_keys, or cut the bags with Jagged.truncate",
        ),
    ],
)
def test_what_cannot_be_looked_up_is_named(open_store, batch, max_keys, message):
    plan = PoolingPlan(
        (PooledFeature(0, 0, "sequence", 0, max_keys), PooledFeature(1, 1, "sum", max_keys)),
        max_keys + 1,
    )
    store = open_store(two_tables(dim=1))
    with pytest.raises(ConfigError) as caught:
        store.pooled_lookup(plan, batch, insert=True, out=torch.empty(2, plan.stride))
    assert str(caught.value) == message
    assert store.num_rows(0) == store.num_rows(1) == 0
