"""Batches of many keys, which the host store finds and copies in one pass, beside the oracle."""

import numpy as np
import pytest
import torch

from penstock.config import SGD, AdmitFrequent, Constant, TableConfig, Uniform
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import ISAS, HostStore
from penstock.embedding.store import PooledFeature, PoolingPlan, TableRows
from penstock.errors import ConfigError
from penstock.types import Jagged, KeyedJagged
from tests.contract.test_weighted_lookups import train

POOLINGS = ("sum", "mean", "sqrt_n")


def tables_of(dim, **fields):
    fields = {"initializer": Uniform(), **fields}
    return [
        TableConfig(name=name, dim=dim, optimizer=SGD(learning_rate=0.25), **fields)
        for name in "ab"
    ]


def plan_of(dim, features):
    """Feature f reads table f % 2."""
    return PoolingPlan(
        tuple(PooledFeature(f, f % 2, POOLINGS[f % 3], f * dim) for f in range(features)),
        features * dim,
    )


def batch_of(rng, features, size, keys):
    values = (torch.from_numpy(rng.choice(keys, size)) for _ in range(features))
    return KeyedJagged.pack({f"f{f}": Jagged.from_dense(v) for f, v in enumerate(values)})


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", [3, 8, 16, 24, 32, 64, 128])
def test_long_batches_read_and_update_what_the_oracle_does(dim, dtype, threads):
    """Some keys are new, in each batch; in the first all. Sizes leave a part of a group over."""
    tables = tables_of(dim, dtype=dtype, initializer=Constant(value=0.5))
    store, oracle = HostStore(tables, num_threads=threads), DictStore(tables)
    rng = np.random.default_rng(dim)
    keys = rng.integers(-(2**63), 2**63, 700)
    plan = plan_of(dim, 3)
    for step, size in enumerate([64, 71, 300, 65, 307]):
        batch = batch_of(rng, 3, size, keys[: 200 + 100 * step])
        unseen = batch_of(rng, 3, size, keys)
        for each in (batch, unseen):
            outs = [torch.full((size, plan.stride), np.nan) for _ in range(2)]
            for one, out in zip((store, oracle), outs, strict=True):
                one.pooled_lookup(plan, each, insert=False, out=out)
            assert torch.equal(*outs)
        grad = torch.from_numpy(rng.integers(-8, 9, (size, plan.stride)).astype(np.float32)) / 8
        outs, rows = zip(
            *(train(each, plan, batch, grad, step) for each in (store, oracle)), strict=True
        )
        assert torch.equal(*outs)
        assert rows[0] == rows[1]


def test_the_longest_probe_counts_the_entries_that_are_read():
    store = HostStore(tables_of(1), num_threads=1)
    assert store._core.longest_probe() == 0
    store.find_or_insert(0, torch.tensor([7]))
    assert store._core.longest_probe() == 1


@pytest.mark.parametrize("rows", [150, 3_000, 49 * 64 - 40, 200_000])
@pytest.mark.parametrize("dim", [16, 5])
def test_every_row_of_a_crowded_index_is_found(dim, rows):
    """Chains of lines that are full, and those that begin anew at the front of their shard."""
    store = HostStore(tables_of(dim), num_threads=2)
    rng = np.random.default_rng(rows)
    keys = torch.from_numpy(rng.permutation(2 * rows))
    values = torch.from_numpy(rng.standard_normal((rows, dim), dtype=np.float32))
    for table in range(2):
        part = slice(table * rows // 3, None)
        state = torch.empty(len(keys[:rows][part]), 0)
        store.insert_or_assign(table, TableRows(keys[:rows][part], values[part] + table, state))
    if rows > 100_000:
        assert store._core.longest_probe() > 12
    absent = store.find(1, keys)
    assert absent.found[rows // 3 : rows].all()
    assert not absent.found[rows:].any()
    assert not absent.found[: rows // 3].any()
    batch = KeyedJagged.pack({"f": Jagged.from_dense(keys), "g": Jagged.from_dense(keys)})
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0), PooledFeature(1, 1, "sum", dim)), 2 * dim)
    out = torch.empty(len(keys), 2 * dim)
    lookup = store.pooled_lookup(plan, batch, insert=False, out=out)
    assert lookup.num_missing == 2 * rows + rows // 3
    assert torch.equal(out[:rows, :dim], values)
    assert torch.equal(out[rows // 3 : rows, dim:], values[rows // 3 :] + 1)
    assert torch.equal(out[rows:, :dim], store.find(0, keys[rows:]).values)
    assert torch.equal(out[rows:, dim:], absent.values[rows:])


@pytest.mark.parametrize("size", [40, 400])
def test_keys_that_are_counted_have_no_row(size):
    """Their entries in the index name no slot."""
    tables = tables_of(16, admission=AdmitFrequent(min_count=3), initializer=Constant(value=0.5))
    store, oracle = HostStore(tables), DictStore(tables)
    rng = np.random.default_rng(0)
    plan = plan_of(16, 2)
    for step in range(6):
        batch = batch_of(rng, 2, size, np.arange(3 * size))
        grad = torch.from_numpy(rng.integers(-8, 9, (size, 32)).astype(np.float32)) / 8
        outs, _ = zip(
            *(train(each, plan, batch, grad, step) for each in (store, oracle)), strict=True
        )
        assert torch.equal(*outs)
        for table in range(2):
            assert store.num_rows(table) == oracle.num_rows(table)
            assert store.num_candidates(table) == oracle.num_candidates(table) > 0


def test_negative_zero_is_read_as_the_sum_of_a_bag():
    store = HostStore(tables_of(16)[:1])
    keys = torch.arange(100)
    store.insert_or_assign(0, TableRows(keys, torch.full((100, 16), -0.0), torch.empty(100, 0)))
    batch = KeyedJagged.pack({"f": Jagged.from_dense(keys)})
    out = torch.full((100, 16), np.nan)
    store.pooled_lookup(
        PoolingPlan((PooledFeature(0, 0, "sum", 0),), 16), batch, insert=False, out=out
    )
    assert (out.view(torch.int32) == 0).all()


@pytest.mark.parametrize("odd", [None, 1, 40_000, 70_000])
def test_bags_of_one_key_are_told_from_others(odd):
    """All bags hold one key, or all but two: one holds two and the next one none."""
    size = 70_002
    keys = torch.arange(size)
    offsets = torch.arange(size + 1)
    store = HostStore(tables_of(16, initializer=Constant(value=0.5))[:1])
    if odd is not None:
        offsets[odd] += 1
    batch = KeyedJagged(("f",), keys, offsets)
    out = torch.full((size, 16), np.nan)
    store.pooled_lookup(
        PoolingPlan((PooledFeature(0, 0, "sum", 0),), 16), batch, insert=False, out=out
    )
    sizes = offsets.diff().float()
    assert torch.equal(out, (0.5 * sizes)[:, None].expand(-1, 16))
    assert store.num_rows(0) == 0


def test_no_instruction_set_above_the_wanted_one_is_used():
    tables = [TableConfig(name="t", dim=4, optimizer=SGD())]
    best = HostStore(tables).isa
    for most in ISAS:
        expected = min(most, best, key=ISAS.index)
        assert HostStore(tables, most_isa=most).isa == expected
    with pytest.raises(ConfigError, match="most_isa: 'avx'; one of generic, avx2, avx512"):
        HostStore(tables, most_isa="avx")
