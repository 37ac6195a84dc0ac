"""Rows whose values take two bytes, on every store."""

import numpy as np
import pytest
import torch

from penstock.config import (
    SGD,
    Adam,
    AdmitFrequent,
    Constant,
    FeatureConfig,
    Normal,
    TableConfig,
    Uniform,
)
from penstock.embedding import EmbeddingCollection
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.rules.rounding import DTYPES, round_update
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan, TableRows
from penstock.errors import ConfigError
from penstock.types import Jagged, KeyedJagged
from tests.contract.stores import skip_in_interpreter
from tests.contract.test_store_contract import (
    EDGES,
    RULES,
    assert_equal_bits,
    export,
    open_store,
    permuted,
    random_batch,
)
from tests.contract.test_weighted_lookups import FEATURES, mixed_plan, random_gradient, train

__all__ = ["open_store"]
NARROW = ["bfloat16", "float16"]


def tables_of(dtype, dim=4, optimizer=None, **fields):
    rule = optimizer or SGD(learning_rate=0.25)
    return [TableConfig(name=name, dim=dim, dtype=dtype, optimizer=rule, **fields) for name in "ab"]


def exported_bits(store, table):
    """By key: keys [n], bits of the values [n, D]."""
    parts = export(store, table, 100)
    keys = torch.cat([part.keys for part in parts])
    values = torch.cat([part.values for part in parts])
    assert values.dtype == store.layout.dtype
    order = keys.argsort()
    return keys[order], values[order].view(torch.int16)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dim", [1, 3, 16, 33])
def test_an_update_is_rounded_by_the_documented_function(open_store, dtype, dim):
    """Any fp32 number there is becomes the new value: 0 - 1 * -x."""
    if dim not in {3, 16}:
        skip_in_interpreter(open_store, f"{dim} columns")
    rule = SGD(learning_rate=1.0)
    store = open_store(tables_of(dtype, dim, rule, initializer=Constant(value=0.0))[:1])
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), dim)
    rng = np.random.default_rng(dim)
    for step in (0, 1, 2**40 + 7):
        bits = rng.integers(0, 2**32, (300, dim), dtype=np.uint32)
        # Numbers around all edges of half precision, too.
        bits[:100] = (bits[:100] & 0x807FFFFF) + (rng.integers(98, 146, (100, dim)) << 23)
        new = np.where(bits == 0x80000000, 0, bits).astype(np.uint32).view(np.float32)
        keys = torch.arange(300) + 1000 * step
        batch = KeyedJagged.pack({"f": Jagged.from_dense(keys)})
        train(store, plan, batch, torch.from_numpy(-new), step, torch.empty(300, dim))
        got_keys, got = exported_bits(store, 0)
        want = round_update(new, dtype, step)
        got = got[torch.isin(got_keys, keys)]
        assert torch.equal(got.view(DTYPES[dtype]).isnan(), want.isnan())
        # What says NaN in the oracle is torch's affair.
        is_same = (got == want.view(torch.int16)) | (want.isnan() & isinstance(store, DictStore))
        assert is_same.all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("dim", [1, 16, 33])
def test_exact_updates_agree_with_the_oracle_to_the_bit(open_store, dtype, dim):
    """Sums of multiples of 2^-5 are exact in fp32 as in fp64, so the same bits are rounded."""
    if dim != 33:
        skip_in_interpreter(open_store, f"{dim} columns")
    tables = tables_of(dtype, dim, initializer=Constant(value=0.5))
    plan = mixed_plan(dim)
    served = tuple(each for each in plan.features if each.pooling in {"sum", "sequence"})
    plan = PoolingPlan(served, plan.stride)
    store, oracle = open_store(tables), DictStore(tables)
    rng = np.random.default_rng(dim)
    for step in range(10):
        batch = random_batch(rng, FEATURES, 30, weighted=step % 2 == 0)
        grad = torch.from_numpy(rng.integers(-20, 21, (30, plan.stride)).astype(np.float32)) / 8
        outs, rows = zip(
            *(train(each, plan, batch, grad, step) for each in (store, oracle)), strict=True
        )
        assert torch.equal(*outs)
        assert rows[0] == rows[1]
    for table in range(2):
        for got, want in zip(
            *(exported_bits(each, table) for each in (store, oracle)), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", NARROW)
def test_every_rule_agrees_with_the_oracle_within_a_unit_in_the_last_place(open_store, rule, dtype):
    tables = tables_of(dtype, 5, RULES[rule], initializer=Uniform(bound=0.5))
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0), PooledFeature(1, 0, "mean", 5)), 10)
    store, oracle = open_store(tables, seed=3), DictStore(tables, seed=3)
    rng = np.random.default_rng(0)
    batch, grad = random_batch(rng, ["f0", "f1"], 60), random_gradient(rng, 60, plan)
    keys = torch.cat([torch.arange(-40, 40), EDGES])
    assert torch.equal(store.find(0, keys).values, oracle.find(0, keys).values)
    for each in (store, oracle):
        train(each, plan, batch, grad, 0, torch.empty(60, 10))
    got, want = store.find(0, keys), oracle.find(0, keys)
    # The fp32 and the fp64 result may differ in their last bits, so be rounded to two neighbours.
    place = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    torch.testing.assert_close(got.values, want.values, rtol=place, atol=2.0**-24)
    torch.testing.assert_close(got.state, want.state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("initializer", [Uniform(bound=1e-6), Normal(std=0.1), Constant(value=0.3)])
def test_initial_values_are_rounded_to_nearest(open_store, dtype, initializer):
    store = open_store(tables_of(dtype, 33, initializer=initializer), seed=1)
    exact = open_store(tables_of("float32", 33, initializer=initializer), seed=1)
    want = exact.find(0, EDGES).values.to(DTYPES[dtype]).float()
    absent = store.find(0, EDGES)
    assert absent.values.dtype == torch.float32
    assert torch.equal(absent.values, want)
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0), PooledFeature(1, 0, "sequence", 33, 1)), 66)
    batch = KeyedJagged.pack({name: Jagged.from_dense(EDGES) for name in ("f", "g")})
    for insert in (False, True):
        out = torch.empty(5, 66)
        store.pooled_lookup(plan, batch, insert=insert, out=out)
        assert torch.equal(out, want.repeat(1, 2))
    assert torch.equal(store.find(0, EDGES).values, want)
    assert torch.equal(exported_bits(store, 0)[1].view(DTYPES[dtype]).float(), want)


@pytest.mark.parametrize("dtype", NARROW)
def test_rows_come_in_rounded_or_as_they_are(open_store, dtype):
    store = open_store(tables_of(dtype, 16))
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(-1, 16)  # every one there is
    keys = torch.arange(len(numbers))
    nothing = torch.zeros(len(keys), 0)
    store.insert_or_assign(0, TableRows(keys, numbers.view(DTYPES[dtype]), nothing))
    if not isinstance(store, DictStore):  # whose float64 does not keep what a NaN says
        assert torch.equal(exported_bits(store, 0)[1], numbers)
    read = store.find(0, keys).values
    want = numbers.view(DTYPES[dtype]).float()
    assert torch.equal(read.isnan(), want.isnan())
    assert torch.equal(read.nan_to_num(1.0), want.nan_to_num(1.0))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(keys), 16, generator=generator) * torch.logspace(-9, 6, 16)
    store.insert_or_assign(0, TableRows(keys, values, nothing))
    assert torch.equal(exported_bits(store, 0)[1], values.to(DTYPES[dtype]).view(torch.int16))


def test_rows_of_another_type_are_refused():
    store = HostStore(tables_of("bfloat16", 2))
    rows = TableRows(torch.arange(3), torch.zeros(3, 2).half(), torch.zeros(3, 0))
    with pytest.raises(ConfigError) as caught:
        store.insert_or_assign(0, rows)
    assert str(caught.value) == (
        "values: expected torch.bfloat16 or torch.float32 of shape [3, 2] on the CPU, "
        "got torch.float16 [3, 2] on cpu"
    )


def test_half_precision_overflows_to_infinity_which_stays_visible(open_store):
    table = tables_of("float16", 1, SGD(learning_rate=1.0))[0]
    store = open_store([table])
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 1)
    batch = KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor([1, 2]))})
    train(store, plan, batch, torch.tensor([[70_000.0], [-70_000.0]]), 0)
    out = torch.empty(2, 1)
    store.pooled_lookup(plan, batch, insert=False, out=out)
    assert out[:, 0].tolist() == [float("-inf"), float("inf")]


@pytest.mark.parametrize("dtype", NARROW)
def test_default_rows_are_narrow_too(open_store, dtype):
    rules = {"admission": AdmitFrequent(min_count=5), "initializer": Constant(value=0.3)}
    store = open_store(tables_of(dtype, 4, **rules))
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 4)
    batch = KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor([1, 2]))})
    out, rows = train(store, plan, batch, torch.full((2, 4), 0.01), 3)
    first = torch.tensor(0.3).to(DTYPES[dtype]).float()
    assert (out == first).all()
    assert rows == 1
    new = torch.full((1, 4), float(first) - 0.25 * (torch.tensor(0.01) + 0.01).item())
    state = store.retention_state(0)
    assert torch.equal(state.default_value, round_update(new.numpy(), dtype, 3)[0].float())
    other = open_store(tables_of(dtype, 4, **rules))
    other.set_retention_state(0, state)
    assert torch.equal(other.retention_state(0).default_value, state.default_value)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("deterministic", [False, True])
def test_threads_do_not_change_a_bit(dtype, deterministic):
    dim = 16
    tables, plan = tables_of(dtype, dim, Adam()), mixed_plan(dim)
    results = []
    for threads in (1, 2, 5):
        rng = np.random.default_rng(0)
        store = HostStore(tables, num_threads=threads, deterministic=deterministic)
        for step in range(20):
            batch = random_batch(rng, FEATURES, 200, span=3000)
            grad = random_gradient(rng, 200, plan)
            if deterministic and threads > 1:
                order = torch.from_numpy(np.random.default_rng(threads + step).permutation(200))
                batch, grad = permuted(batch, order), grad[order].contiguous()
            train(store, plan, batch, grad, step)
        results.append(store.find(0, torch.arange(-3000, 3000)))
    for other in results[1:]:
        assert_equal_bits(results[0], other)


@pytest.mark.parametrize("dtype", NARROW)
def test_values_take_half_the_memory(dtype):
    bytes_of = {}
    for each in ("float32", dtype):
        table = TableConfig(name="a", dim=64, dtype=each, optimizer=SGD())
        embeddings = EmbeddingCollection([table], [FeatureConfig(name="f", table="a")])
        embeddings(KeyedJagged.pack({"f": Jagged.from_dense(torch.arange(10_000))}))
        (stats,) = embeddings.table_stats()
        memory = embeddings._stores.groups[0].store.memory()
        bytes_of[each] = stats.bytes, memory.row_bytes / memory.slot_capacity
    assert bytes_of["float32"] == (10_000 * 256, 256)
    assert bytes_of[dtype] == (10_000 * 128, 128)


def test_tables_of_different_types_do_not_share_a_store():
    tables = [tables_of("float32")[0], tables_of("bfloat16")[1]]
    features = [FeatureConfig(name=name, table=name) for name in "ab"]
    embeddings = EmbeddingCollection(tables, features)
    assert len(embeddings._stores.groups) == 2
    batch = KeyedJagged.pack({name: Jagged.from_dense(torch.arange(3)) for name in "ab"})
    embeddings(batch).sum().backward()
    embeddings.apply_gradients()
    kinds = [rows.values.dtype for name in "ab" for rows in embeddings.export_table(name)]
    assert kinds == [torch.float32, torch.bfloat16]
    other = EmbeddingCollection(tables, features)
    for name in "ab":
        for rows in embeddings.export_table(name):
            other.import_rows(name, rows)
    assert torch.equal(other(batch), embeddings(batch))


@pytest.mark.parametrize("dtype", NARROW)
def test_small_steps_are_not_lost(dtype):
    """Steps of a hundredth of the last place: rounded to nearest, no row would ever move."""
    table = tables_of(dtype, 64, SGD(learning_rate=1.0), initializer=Constant(value=1.0))[0]
    store = HostStore([table])
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 64)
    batch = KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor([1]))})
    step = 2.0**-7 / 100 if dtype == "bfloat16" else 2.0**-10 / 100
    for number in range(1000):
        lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(1, 64))
        grad = torch.full((1, 64), -step)
        store.apply_gradients(plan, [PooledGradient(lookup, batch, grad)], number)
    moved = (store.find(0, torch.tensor([1])).values - 1.0).double()
    # 1000 roundings, each a Bernoulli draw of 1 in 100 of a place of 100 steps.
    sigma = 100 * step * (1000 * 0.01 * 0.99) ** 0.5
    assert abs(float(moved.mean()) - 1000 * step) < 4 * sigma / 64**0.5
    assert moved.std() > 0.5 * sigma
