"""Sums of very many shares, and what is beyond float32: nothing wraps, nothing is hidden."""

import numpy as np
import pytest
import torch

from penstock.config import SGD, Constant, TableConfig
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan, TableRows
from penstock.types import Jagged, KeyedJagged
from tests.contract.stores import WITHOUT_TRITON, OnCpu, open_store, skip_in_interpreter
from tests.contract.test_store_contract import RULES

__all__ = ["open_store"]


def test_a_row_that_occurs_more_than_2_to_the_23_times():
    """In fixed point of 40 bits the sum would need 63 and a sign."""
    count = (1 << 23) + (1 << 10)
    table = TableConfig(name="a", dim=1, optimizer=SGD(learning_rate=1.0), initializer=Constant())
    store = HostStore([table], deterministic=True)
    store.find_or_insert(0, torch.tensor([0]))
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 1)
    batch = KeyedJagged(("f",), torch.zeros(count, dtype=torch.int64), torch.tensor([0, count]))
    lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(1, 1))
    grad = torch.tensor([[0.9999]])
    store.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], 0)
    got = -float(store.find(0, torch.tensor([0])).values)
    # One rounding to fp32.
    assert got == pytest.approx(count * float(grad), rel=1e-7)


@WITHOUT_TRITON
@pytest.mark.parametrize(
    ("keys", "bits"),
    [(1, 40), (2**22, 40), (2**22 + 1, 39), (2**23, 39), (2**23 + 1, 38), (2**31 - 1, 31)],
)
def test_sums_in_fixed_point_fit_63_bits(keys, bits):
    from penstock.kernels.update.occurrences import sum_bits

    assert sum_bits(keys) == bits
    assert keys * 2**bits <= 2**62


@WITHOUT_TRITON
@pytest.mark.parametrize("bits", [18, 40])
def test_kernels_sum_in_the_bits_they_are_given(monkeypatch, bits):
    """As for an update of more keys than a test can have: long segments and short ones."""
    from penstock.kernels.update import update

    monkeypatch.setattr(update, "sum_bits", lambda _: bits)
    table = TableConfig(name="a", dim=2, optimizer=SGD(learning_rate=1.0), initializer=Constant())
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 2)
    store = OnCpu([table], deterministic=True)
    batch = KeyedJagged.pack({"f": Jagged.from_dense(torch.cat([torch.zeros(70), KEYS]).long())})
    grad = torch.randn(72, 2, generator=torch.Generator().manual_seed(1)) * 1e-3
    lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(72, 2))
    store.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], 0)
    got = -store.find(0, torch.tensor([0, 1])).values
    for row, shares in ((0, grad[:-1]), (1, grad[-1:])):
        shares = shares.double().numpy()
        unit = 2.0 ** (np.frexp(np.abs(shares).max())[1] - bits)
        total = (np.rint(shares / unit).sum(0) * unit).astype(np.float32)
        assert got[row].tolist() == total.tolist()


KEYS = torch.tensor([0, 1])
OVERFLOWING = {name: rule for name, rule in RULES.items() if name not in {"sgd", "momentum_sgd"}}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("rule", OVERFLOWING)
@pytest.mark.parametrize("dim", [3, 16])
def test_a_state_beyond_float32_is_seen_in_the_value(open_store, rule, dim):
    """Its square divides the step: without a sign the row would be frozen, or read 0."""
    if open_store is DictStore:
        pytest.skip("the oracle's float64 holds the square")
    if dim == 16 or rule not in {"ftrl", "row_wise_adagrad", "lamb"}:
        skip_in_interpreter(open_store, rule)
    table = TableConfig(name="a", dim=dim, optimizer=RULES[rule], initializer=Constant(value=1.0))
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), dim)
    store = open_store([table])
    batch = KeyedJagged.pack({"f": Jagged.from_dense(KEYS)})
    for step, size in enumerate((0.1, 3e19, 0.1)):
        lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(2, dim))
        grad = torch.full((2, dim), 0.1)
        grad[0] = size
        store.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], step)
        values = store.find(0, KEYS).values
        assert not values[0].isfinite().any() if step else values[0].isfinite().all()
        assert values[1].isfinite().all()
    out = torch.empty(2, dim)
    store.pooled_lookup(plan, batch, insert=False, out=out)
    assert not out[0].isfinite().any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_is_seen_in_the_value(rule, bad):
    for deterministic in (False, True):
        table = TableConfig(name="a", dim=3, optimizer=RULES[rule])
        plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 3)
        store = HostStore([table], deterministic=deterministic)
        batch = KeyedJagged.pack({"f": Jagged.from_dense(KEYS)})
        grad = torch.full((2, 3), 0.1)
        grad[0, 1] = bad
        for step in range(2):
            lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(2, 3))
            store.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], step)
            grad = torch.full((2, 3), 0.1)
            values = store.find(0, KEYS).values
            assert not values[0, 1].isfinite()
            assert values[1].isfinite().all()


# --- weighted means ------------------------------------------------------------------------------

DIVIDED = {
    # Weights of both signs that nearly cancel out: in fp32 nothing of the small one is left.
    "mean": ([1e8, 1.0, -1e8], 1.0),
    # Squares of which each is lost in an fp32 sum that begins with the first.
    "sqrt_n": ([4096.0] + [1.0] * 64, (2**24 + 64) ** 0.5),
}


@pytest.mark.parametrize("pooling", DIVIDED)
def test_divisors_of_weighted_bags_are_summed_in_double(open_store, pooling):
    """In look-ups and in updates. All rows hold 2, but the first and the last 0."""
    weights, divisor = DIVIDED[pooling]
    count = len(weights)
    plan = PoolingPlan((PooledFeature(0, 0, pooling, 0),), 1)
    store = open_store([TableConfig(name="a", dim=1, optimizer=SGD(learning_rate=1.0))])
    values = torch.full((count, 1), 2.0)
    values[[0, -1]] = 0.0
    keys = torch.arange(count)
    store.insert_or_assign(0, TableRows(keys, values, torch.zeros(count, 0)))
    batch = KeyedJagged(("f",), keys, torch.tensor([0, count]), torch.tensor(weights))
    out = torch.empty(1, 1)
    lookup = store.pooled_lookup(plan, batch, insert=True, out=out)
    # fp32 has 6e-8 of a number; a divisor in fp32 is off by 2e-6 at least.
    assert float(out) == pytest.approx(2 * sum(weights[1:-1]) / divisor, rel=3e-7)
    store.apply_gradients(plan, [PooledGradient(lookup, batch, torch.ones(1, 1))], 0)
    moved = -store.find(0, keys[:1]).values
    assert float(moved) == pytest.approx(weights[0] / divisor, rel=3e-7)
