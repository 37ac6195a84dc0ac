"""The vectors that a look-up read, key by key, on every store."""

import numpy as np
import pytest
import torch

from penstock.config import SGD, AdmitFrequent, TableConfig
from penstock.embedding.store import PooledFeature, PoolingPlan
from tests.contract.stores import skip_in_interpreter
from tests.contract.test_store_contract import open_store, random_batch, two_tables
from tests.contract.test_weighted_lookups import FEATURES, mixed_plan, random_gradient, train

__all__ = ["open_store"]


@pytest.mark.parametrize("insert", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [3, 16])
def test_they_are_the_rows(open_store, dim, dtype, insert):
    if dim != 3 or dtype != "float32":
        skip_in_interpreter(open_store, f"{dim} columns of {dtype}")
    plan = mixed_plan(dim)
    store = open_store([
        table.model_copy(update={"dtype": dtype})
        for table in two_tables(dim=dim, optimizer=SGD(learning_rate=0.5))
    ])
    rng = np.random.default_rng(0)
    known = random_batch(rng, FEATURES, 20, weighted=True)
    train(store, plan, known, random_gradient(rng, 20, plan), 0)
    for size in (0, 1, 30):
        batch = random_batch(rng, FEATURES, size, weighted=True)
        out = torch.empty(size, plan.stride)
        lookup = store.pooled_lookup(plan, batch, insert=insert, out=out)
        vectors = store.read_looked_up(lookup).cpu()
        assert vectors.shape == (batch.values.numel(), dim)
        for feature in plan.features:
            first = int(batch.offsets[feature.packed_feature * size])
            last = int(batch.offsets[(feature.packed_feature + 1) * size])
            expected = store.find(feature.table, batch.values[first:last]).values
            torch.testing.assert_close(vectors[first:last], expected, rtol=1e-6, atol=0)


def test_of_keys_that_were_refused_it_is_the_default_row(open_store):
    table = TableConfig(name="t", dim=2, optimizer=SGD(), admission=AdmitFrequent(min_count=9))
    store = open_store([table])
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 2)
    state = store.retention_state(0)
    state.default_value.copy_(torch.tensor([3.0, 4.0]))
    store.set_retention_state(0, state)
    batch = random_batch(np.random.default_rng(0), ["f"], 20)
    lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(20, 2))
    vectors = store.read_looked_up(lookup).cpu()
    assert torch.equal(vectors, torch.tensor([[3.0, 4.0]]).expand_as(vectors))
