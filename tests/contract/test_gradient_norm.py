"""The norm of gradients summed by row, and the factor of learning rates, on every store."""

import math

import numpy as np
import pytest
import torch

from penstock.config import SGD, Adagrad, Adam, AdmitFrequent, TableConfig
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan
from penstock.errors import ConfigError
from tests.contract.stores import skip_in_interpreter
from tests.contract.test_store_contract import (
    export,
    open_store,
    random_batch,
    two_tables,
)
from tests.contract.test_weighted_lookups import FEATURES, mixed_plan, random_gradient, train

__all__ = ["open_store"]


def values_of(store, table):
    """Of each key the value of its row."""
    parts = export(store, table, 1000)
    return {
        key: value
        for part in parts
        for key, value in zip(part.keys.tolist(), part.values, strict=True)
    }


def parts_of(store, plan, batches, gradients):
    parts = []
    for batch, grad in zip(batches, gradients, strict=True):
        out = torch.empty(batch.batch_size, plan.stride)
        lookup = store.pooled_lookup(plan, batch, insert=True, out=out)
        parts.append(PooledGradient(lookup, batch, grad))
    return parts


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.5])
@pytest.mark.parametrize("dim", [1, 3, 16, 33])
def test_norms_agree_with_the_oracle(open_store, dim, norm_type):
    if dim != 3 or norm_type != 2.0:
        skip_in_interpreter(open_store, f"{dim} columns, norm of {norm_type}")
    tables = two_tables(dim=dim, optimizer=SGD())
    plan = mixed_plan(dim)
    store, oracle = open_store(tables, seed=5), DictStore(tables, seed=5)
    rng = np.random.default_rng(dim)
    for sizes in ([0], [1], [17, 40]):
        batches = [random_batch(rng, FEATURES, size, weighted=True) for size in sizes]
        gradients = [random_gradient(rng, size, plan) for size in sizes]
        found = parts_of(store, plan, batches, gradients)
        expected = parts_of(oracle, plan, batches, gradients)
        before = values_of(store, 0)
        norm = float(store.gradient_norm(plan, found, norm_type))
        # float32 sums of a row's gradients, and of its squares
        assert norm == pytest.approx(oracle.gradient_norm(plan, expected, norm_type), rel=1e-5)
        for key, value in values_of(store, 0).items():
            assert torch.equal(value, before[key])
        assert store.apply_gradients(plan, found, 0) == oracle.apply_gradients(plan, expected, 0)


def test_no_gradients_have_the_norm_0(open_store):
    store = open_store(two_tables(dim=3, optimizer=SGD()))
    assert float(store.gradient_norm(mixed_plan(3), [], 2.0)) == 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_threads_and_instruction_sets_change_no_bit(deterministic):
    tables = two_tables(dim=5, optimizer=SGD())
    plan = mixed_plan(5)
    rng = np.random.default_rng(0)
    batch = random_batch(rng, FEATURES, 3000, weighted=True)
    grad = random_gradient(rng, 3000, plan)
    norms = set()
    for threads in (1, 2, 5):
        for isa in ("generic", "avx2", None):
            store = HostStore(
                tables, num_threads=threads, most_isa=isa, deterministic=deterministic
            )
            norms.add(store.gradient_norm(plan, parts_of(store, plan, [batch], [grad]), 2.0))
    assert len(norms) == 1


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_what_is_not_finite_has_no_finite_norm(open_store, value, norm_type):
    store = open_store(two_tables(dim=3, optimizer=SGD()))
    plan = mixed_plan(3)
    rng = np.random.default_rng(0)
    batch, grad = random_batch(rng, FEATURES, 4), random_gradient(rng, 4, plan)
    grad[:, 0] = value
    norm = float(store.gradient_norm(plan, parts_of(store, plan, [batch], [grad]), norm_type))
    assert not math.isfinite(norm)


def test_keys_that_were_refused_count_as_one_row(open_store):
    table = TableConfig(name="t", dim=2, optimizer=SGD(), admission=AdmitFrequent(min_count=9))
    store, oracle = open_store([table]), DictStore([table])
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 2)
    batch = random_batch(np.random.default_rng(0), ["f"], 20)
    grad = torch.ones(20, 2)
    norms = [
        float(each.gradient_norm(plan, parts_of(each, plan, [batch], [grad]), 2.0))
        for each in (store, oracle)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    keys = batch.values.numel()
    assert norms[1] == pytest.approx(keys * 2**0.5)


def test_rows_erased_since_the_look_up_count(open_store):
    store = open_store(two_tables(dim=3, optimizer=SGD()))
    plan = mixed_plan(3)
    rng = np.random.default_rng(0)
    batch, grad = random_batch(rng, FEATURES, 9), random_gradient(rng, 9, plan)
    parts = parts_of(store, plan, [batch], [grad])
    before = float(store.gradient_norm(plan, parts, 2.0))
    store.erase(0, batch["f0"].values)
    assert float(store.gradient_norm(plan, parts, 2.0)) == pytest.approx(before, rel=1e-6)


def test_what_does_not_belong_is_refused(open_store):
    store = open_store(two_tables(dim=3, optimizer=SGD()))
    plan = mixed_plan(3)
    rng = np.random.default_rng(0)
    batch, grad = random_batch(rng, FEATURES, 9), random_gradient(rng, 9, plan)
    parts = parts_of(store, plan, [batch], [grad])
    with pytest.raises(ConfigError, match="given twice"):
        store.gradient_norm(plan, parts * 2, 2.0)
    store.apply_gradients(plan, parts, 0)
    with pytest.raises(ConfigError, match="applied before"):
        store.gradient_norm(plan, parts, 2.0)


@pytest.mark.parametrize("rule", [SGD(weight_decay=0.01), Adagrad(), Adam()])
def test_a_rate_factor_is_another_learning_rate(open_store, rule):
    """Constant or not, back and forth: what is kept of the settings is that of the factor."""
    if not isinstance(rule, Adam):
        skip_in_interpreter(open_store, "rules without a schedule")
    factors = [1.0, 0.5, 0.5, 1.0]
    plan = mixed_plan(3)
    rng = np.random.default_rng(0)
    batch, grad = random_batch(rng, FEATURES, 9), random_gradient(rng, 9, plan)
    tables = two_tables(dim=3, optimizer=rule)
    store, oracle = open_store(tables), DictStore(tables)
    for step, factor in enumerate(factors):
        for each in (store, oracle):
            each.apply_gradients(plan, parts_of(each, plan, [batch], [grad]), step, factor)
    for number in range(2):
        found, expected = values_of(store, number), values_of(oracle, number)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
    half = open_store(
        two_tables(
            dim=3, optimizer=rule.model_copy(update={"learning_rate": rule.learning_rate / 2})
        )
    )
    whole = open_store(tables)
    train(half, plan, batch, grad, 0)
    whole.apply_gradients(plan, parts_of(whole, plan, [batch], [grad]), 0, 0.5)
    expected = values_of(half, 0)
    for key, value in values_of(whole, 0).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=0)
