"""Rows by key, below pooling: a block of keys of several tables reads and trains as bags of one."""

import pytest
import torch

from penstock.config import (
    Adagrad,
    Adam,
    AdmitFrequent,
    Constant,
    Eviction,
    RowWiseAdagrad,
    TableConfig,
)
from penstock.embedding.retention import Clock
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan
from penstock.errors import ConfigError
from penstock.types import KeyedJagged
from tests.contract.stores import ON_GPU, OnCpu, open_store

__all__ = ["open_store"]
DIM = 3
TABLES = 3
BY_KEY = PoolingPlan.by_key(TABLES, DIM)
BAGS = PoolingPlan(
    tuple(PooledFeature(table, table, "sum", table * DIM) for table in range(TABLES)), TABLES * DIM
)
NAMES = ("a", "b", "c")
RULES = {
    "plain": {},
    "counted": {"admission": AdmitFrequent(min_count=2)},
    "aged": {"eviction": Eviction(ttl=3)},
}


def tables(optimizer, **fields):
    return [TableConfig(name=name, dim=DIM, optimizer=optimizer, **fields) for name in NAMES]


def block(sizes, seed, high=12):
    """Keys of each table, full-range ones among them."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-high, high, (sum(sizes),), generator=generator)
    keys = torch.where(keys == high - 1, 2**63 - 1, torch.where(keys == -high, -(2**63), keys))
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return KeyedJagged(NAMES, keys, offsets)


def as_bags(keys):
    """The same keys as bags of one: of the shorter tables some are empty."""
    lengths = keys.offsets.diff()
    size = max(1, int(lengths.max()))
    is_there = torch.arange(size) < lengths[:, None]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), is_there.flatten().cumsum(0)])
    return KeyedJagged(NAMES, keys.values, offsets), is_there


def spread(rows, is_there):
    """[N, D] by key as [B, T * D]."""
    wide = torch.zeros(TABLES, is_there.shape[1], DIM)
    wide[is_there] = rows
    return wide.transpose(0, 1).reshape(-1, TABLES * DIM).contiguous()


def step_by_key(store, blocks, grads, step):
    outs, gradients = [], []
    for keys, grad in zip(blocks, grads, strict=True):
        out = torch.empty(keys.values.numel(), DIM)
        lookup = store.pooled_lookup(BY_KEY, keys, insert=True, out=out)
        gradients.append(PooledGradient(lookup, keys, grad))
        outs.append(out)
    norm = float(store.gradient_norm(BY_KEY, gradients, 2.0))
    return outs, norm, int(store.apply_gradients(BY_KEY, gradients, step))


def step_by_bag(store, blocks, grads, step):
    outs, gradients = [], []
    for keys, grad in zip(blocks, grads, strict=True):
        batch, is_there = as_bags(keys)
        out = torch.empty(is_there.shape[1], TABLES * DIM)
        lookup = store.pooled_lookup(BAGS, batch, insert=True, out=out)
        gradients.append(PooledGradient(lookup, batch, spread(grad, is_there)))
        outs.append(out.view(-1, TABLES, DIM).transpose(0, 1)[is_there])
    norm = float(store.gradient_norm(BAGS, gradients, 2.0))
    return outs, norm, int(store.apply_gradients(BAGS, gradients, step))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [(Adagrad(), "float32"), (Adam(), "bfloat16"), (RowWiseAdagrad(), "float16")],
    ids=["adagrad", "adam-bf16", "row-wise-f16"],
)
def test_a_block_reads_and_trains_as_bags_of_one(open_store, optimizer, dtype, rules):
    if open_store is OnCpu and not ON_GPU and (dtype != "float32" or rules == "aged"):
        pytest.skip("on a GPU alone, Triton's interpreter takes long")
    options = {"deterministic": True} if open_store is OnCpu else {}
    made = [
        open_store(tables(optimizer, dtype=dtype, **RULES[rules]), seed=5, **options)
        for _ in range(2)
    ]
    sizes = [[(5, 0, 40)], [(0, 0, 0)], [(1, 1, 1), (7, 30, 0)], [(0, 9, 2)]]
    for step, of_step in enumerate(sizes):
        blocks = [block(each, 10 * step + n) for n, each in enumerate(of_step)]
        grads = [
            torch.randn(
                keys.values.numel(), DIM, generator=torch.Generator().manual_seed(step + 7 * n)
            )
            for n, keys in enumerate(blocks)
        ]
        for store in made:
            store.advance(Clock(2 * step, 0))
        by_key = step_by_key(made[0], blocks, grads, step)
        by_bag = step_by_bag(made[1], blocks, grads, step)
        # A norm adds up in the order of the slots, which is the hardware's on a GPU.
        assert by_key[1] == pytest.approx(by_bag[1], rel=1e-6)
        assert by_key[2] == by_bag[2]
        for one, other in zip(by_key[0], by_bag[0], strict=True):
            assert torch.equal(one, other)
    wanted = torch.tensor([*range(-12, 12), 2**63 - 1, -(2**63)])
    for table in range(TABLES):
        assert made[0].num_rows(table) == made[1].num_rows(table)
        for one, other in zip(*(store.find(table, wanted) for store in made), strict=True):
            assert torch.equal(one, other)
    assert sum(made[0].num_rows(table) for table in range(TABLES)) > 0
    made[0].check_invariants()


def test_without_rows_initial_values_are_read(open_store):
    store = open_store(tables(Adagrad(), initializer=Constant(value=2.5)))
    keys = block((2, 0, 3), 0)
    out = torch.empty(5, DIM)
    lookup = store.pooled_lookup(BY_KEY, keys, insert=False, out=out)
    assert (out == 2.5).all()
    assert lookup.num_missing == 5
    assert store.num_rows(0) == store.num_rows(2) == 0
    read = store.read_looked_up(lookup)
    assert torch.equal(read.cpu(), out)
    gradient = PooledGradient(lookup, None, torch.ones(5, DIM))
    assert int(store.apply_gradients(BY_KEY, [gradient], 0)) == store.num_rows(0) + store.num_rows(
        2
    )


def test_rows_erased_before_the_update_begin_anew(open_store):
    store, other = (open_store(tables(Adagrad()), seed=1) for _ in range(2))
    keys, grad = block((4, 3, 0), 2, high=3), torch.ones(7, DIM)
    out = torch.empty(7, DIM)
    lookup = store.pooled_lookup(BY_KEY, keys, insert=True, out=out)
    store.erase(0, keys.values[:2])
    store.apply_gradients(BY_KEY, [PooledGradient(lookup, keys, grad)], 0)
    step_by_key(other, [keys], [grad], 0)
    for one, same in zip(store.find(0, keys.values), other.find(0, keys.values), strict=True):
        assert torch.equal(one, same)


WRONG = {
    "two tables": (
        KeyedJagged(("a", "b"), torch.arange(2), torch.arange(3)),
        "batch of 2 features and a store of 3",
    ),
    "two samples": (KeyedJagged(NAMES, torch.arange(6), torch.arange(7)), "3 features, 6 bags"),
    "weights": (
        KeyedJagged(NAMES, torch.arange(3), torch.arange(4), torch.ones(3)),
        "with weights",
    ),
    "falling": (KeyedJagged(NAMES, torch.arange(3), torch.tensor([0, 2, 1, 3])), "must rise"),
    "short": (KeyedJagged(NAMES, torch.arange(3), torch.tensor([0, 1, 1, 2])), "must rise"),
}


@pytest.mark.parametrize("name", WRONG)
def test_blocks_that_do_not_fit_are_refused(open_store, name):
    batch, message = WRONG[name]
    store = open_store(tables(Adagrad()))
    with pytest.raises(ConfigError, match=message):
        out = torch.empty(batch.values.numel(), DIM)
        store.pooled_lookup(BY_KEY, batch, insert=True, out=out)
    assert sum(store.num_rows(table) for table in range(TABLES)) == 0


def test_what_does_not_belong_to_a_block_is_refused(open_store):
    store = open_store(tables(Adagrad()))
    keys = block((2, 1, 1), 3)
    with pytest.raises(ConfigError, match="out: expected"):
        store.pooled_lookup(BY_KEY, keys, insert=True, out=torch.empty(4, TABLES * DIM))
    lookup = store.pooled_lookup(BY_KEY, keys, insert=True, out=torch.empty(4, DIM))
    with pytest.raises(ConfigError, match=r"expected float32 \[4, 3\]"):
        store.apply_gradients(BY_KEY, [PooledGradient(lookup, None, torch.ones(1, DIM))], 0)
    with pytest.raises(ConfigError, match="another plan"):
        store.apply_gradients(BAGS, [PooledGradient(lookup, None, torch.ones(4, DIM))], 0)
    store.apply_gradients(BY_KEY, [PooledGradient(lookup, None, torch.ones(4, DIM))], 0)
    with pytest.raises(ConfigError, match="applied before"):
        store.apply_gradients(BY_KEY, [PooledGradient(lookup, None, torch.ones(4, DIM))], 1)
