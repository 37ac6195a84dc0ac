"""Rows beyond 2^31 elements; on a GPU alone."""

import numpy as np
import pytest
import torch

from penstock.config import SGD, TableConfig, Uniform
from penstock.embedding.rules.initializer import initial_values
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan
from penstock.types import Jagged, KeyedJagged

pytest.importorskip("triton")


@pytest.mark.gpu
def test_rows_beyond_2_to_the_31_elements():
    from penstock.embedding.gpu_store import GpuStore

    table = TableConfig(name="a", dim=128, optimizer=SGD(learning_rate=1.0))
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 128)
    store = GpuStore([table], seed=3)
    count, part = 20_000_000, 1 << 20
    for first in range(0, count, part):
        keys = torch.arange(first, min(first + part, count), device="cuda")
        batch = KeyedJagged.pack({"f": Jagged.from_dense(keys.cpu())})
        store.pooled_lookup(
            plan, batch, insert=True, out=torch.empty(len(keys), 128, device="cuda")
        )
    assert store.num_rows(0) == count
    assert store._rows.values.data_ptr() % 16 == 0
    chosen = torch.cat([torch.arange(1000), torch.arange(count - 1000, count)])
    expected = torch.from_numpy(
        initial_values(Uniform(), 3, "a", chosen.numpy().astype(np.int64), 128)
    )
    assert torch.equal(store.find(0, chosen).values.cpu(), expected)
    batch = KeyedJagged.pack({"f": Jagged.from_dense(chosen)})
    out = torch.full((2000, 128), float("nan"), device="cuda")
    lookup = store.pooled_lookup(plan, batch, insert=True, out=out)
    assert torch.equal(out.cpu(), expected)
    assert int(lookup.slots.max()) * 128 > 2**31
    gradient = PooledGradient(lookup, batch, torch.ones(2000, 128, device="cuda"))
    assert int(store.apply_gradients(plan, [gradient], 0)) == 2000
    assert torch.equal(store.find(0, chosen).values.cpu(), expected - 1)
    between = store.find(0, torch.arange(5_000_000, 5_000_100))
    assert between.found.all()
    assert float(between.values.abs().max()) <= 0.05
