"""Deterministic mode on a GPU has the bits of the host store, given equal gradients."""

import numpy as np
import pytest
import torch

from penstock.config import TableConfig
from penstock.embedding.host_store import HostStore
from tests.contract.stores import ON_GPU, WITHOUT_TRITON, OnCpu
from tests.contract.test_store_contract import RULES, assert_equal_bits, permuted, random_batch
from tests.contract.test_weighted_lookups import FEATURES, mixed_plan, random_gradient, train

pytestmark = WITHOUT_TRITON
INTERPRETED = {
    ("adam", 3),
    ("bounded", 3),
    ("row_wise_adagrad", 16),
    ("lamb", 33),
}
CASES = [
    (rule, dim, dtype)
    for rule in RULES
    for dim, dtype in ([(1, "float32"), (3, "float16"), (16, "bfloat16"), (33, "float32")])
    # The interpreter takes its time.
    if ON_GPU or (rule, dim) in INTERPRETED
]


@pytest.mark.parametrize(("rule", "dim", "dtype"), CASES)
def test_updates_have_the_bits_of_the_host_store(rule, dim, dtype):
    tables = [TableConfig(name=name, dim=dim, dtype=dtype, optimizer=RULES[rule]) for name in "ab"]
    plan = mixed_plan(dim)
    host, other = (
        HostStore(tables, seed=5, deterministic=True),
        OnCpu(tables, seed=5, deterministic=True),
    )
    rng = np.random.default_rng(dim)
    for step in range(20 if ON_GPU else 4):
        size = [17, 0, 64, 300][step % 4] if ON_GPU else [17, 0, 40, 1][step % 4]
        batch = random_batch(rng, FEATURES, size, weighted=step % 3 == 0)
        grad = random_gradient(rng, size, plan)
        # One key in every bag of a feature: a long segment.
        batch.values[: len(batch.values) // 8] = 7
        _, rows = train(host, plan, batch, grad, step)
        order = torch.from_numpy(rng.permutation(size))
        shuffled = permuted(batch, order) if size else batch
        _, other_rows = train(other, plan, shuffled, grad[order].contiguous(), step)
        assert rows == other_rows
    keys = torch.cat([torch.arange(-40, 40), torch.tensor([-(2**63), 2**63 - 1])])
    for table in range(2):
        assert_equal_bits(host.find(table, keys), other.find(table, keys))
