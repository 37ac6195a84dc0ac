"""A row's gradients are added in the order of the batch, one at a time, however they are gathered.

Short ones are summed as they come, long ones row by row (`kMostSummedDim`), and so are those of a
unit too large for sums (`kMostSummed`): the bits must be those of plain fp32 additions in turn.
"""

import numpy as np
import pytest
import torch

from penstock.config import SGD, Constant, TableConfig
from penstock.embedding.host_store import ISAS, HostStore
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan
from penstock.types import Jagged, KeyedJagged

SUMMED = 32_768
"""Keys of a unit, at most, whose gradients are summed as they come."""


def jagged(keys, sizes):
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Jagged(torch.from_numpy(keys), torch.from_numpy(offsets))


def sums_in_turn(keys, sizes, grad):
    """{key: the fp32 sum of its shares, from the first to the last}, mean pooling."""
    bag = np.repeat(np.arange(len(sizes)), sizes)
    scale = np.float32(1) / sizes.astype(np.float32).clip(1)
    shares = scale[bag, None] * grad[bag]
    return {key: np.add.accumulate(shares[keys == key])[-1] for key in np.unique(keys)}


def update(store, keys, sizes, grad):
    """One step of SGD with a rate of 1, which from 0 leads to minus the sum."""
    dim = grad.shape[1]
    plan = PoolingPlan((PooledFeature(0, 0, "mean", 0),), dim)
    batch = KeyedJagged.pack({"f": jagged(keys, sizes)})
    lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(len(sizes), dim))
    store.apply_gradients(plan, [PooledGradient(lookup, batch, torch.from_numpy(grad))], 0)


def check(store, keys, sizes, grad):
    update(store, keys, sizes, grad)
    want = sums_in_turn(keys, sizes, grad)
    found = store.find(0, torch.tensor(list(want)))
    assert bool(found.found.all())
    np.testing.assert_array_equal(-found.values.numpy(), np.stack(list(want.values())))


def table(dim):
    optimizer = SGD(learning_rate=1.0)
    return TableConfig(name="t", dim=dim, optimizer=optimizer, initializer=Constant(value=0.0))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("is_one_hot", [True, False], ids=["one-hot", "bags"])
@pytest.mark.parametrize("dim", [1, 3, 8, 16, 20, 32, 33, 64])
def test_sums_are_those_of_additions_in_turn(dim, is_one_hot, isa):
    rng = np.random.default_rng(dim)
    for size, distinct in ((1, 1), (37, 1), (64, 200), (3000, 400), (9000, 9000)):
        sizes = np.ones(size, np.int64) if is_one_hot else rng.integers(0, 4, size)
        keys = rng.integers(-(2**63), 2**63, distinct)[rng.integers(0, distinct, sizes.sum())]
        grad = rng.standard_normal((size, dim), dtype=np.float32)
        store = HostStore([table(dim)], num_threads=3, most_isa=isa)
        check(store, keys, sizes, grad)


@pytest.mark.parametrize("count", [SUMMED - 1, SUMMED, SUMMED + 1, 3 * SUMMED])
def test_a_key_that_is_most_of_a_batch_is_summed_like_any_other(count):
    rng = np.random.default_rng(count)
    keys = np.full(count, -7)
    keys[rng.integers(0, count, 500)] = rng.integers(0, 50, 500)
    grad = rng.standard_normal((count, 16), dtype=np.float32)
    check(HostStore([table(16)], num_threads=2), keys, np.ones(count, np.int64), grad)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_store_takes_batches_of_any_size_in_turn(threads):
    """Its working memory is that of the largest so far; keys of a batch are new to it."""
    rng = np.random.default_rng(threads)
    store = HostStore([table(16)], num_threads=threads)
    for turn, size in enumerate((10, 20_000, 0, 3, 50_000, 700)):
        keys = rng.integers(0, 2000, size) + 10_000 * turn
        grad = rng.standard_normal((size, 16), dtype=np.float32)
        if size:
            check(store, keys, np.ones(size, np.int64), grad)
        else:
            update(store, keys, np.ones(0, np.int64), grad)
    store.check_invariants()
