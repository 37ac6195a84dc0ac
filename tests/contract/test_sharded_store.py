"""A store over ranks against one store that sees all ranks' samples."""

import numpy as np
import pytest
import torch

from penstock.config import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    Eviction,
    RowWiseAdagrad,
    TableConfig,
)
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock
from penstock.embedding.sharded.bags import HostBags
from penstock.embedding.sharded.store import NO_TABLES, ShardedStore
from penstock.embedding.store import CURSOR_START, PooledFeature, PooledGradient, PoolingPlan
from penstock.errors import GroupError
from penstock.types import KeyedJagged
from tests.contract.stores import OnCpu
from tests.world.ranks import World

DIM = 5
NAMES = ("f", "g", "h", "other", "s")
PLAN = PoolingPlan(
    (
        PooledFeature(0, 0, "sum", 0),
        PooledFeature(1, 1, "mean", DIM),
        PooledFeature(2, 1, "sqrt_n", 2 * DIM),
        PooledFeature(4, 0, "sequence", 3 * DIM, 3),
    ),
    6 * DIM,
)


def tables(optimizer, **fields):
    return [TableConfig(name=name, dim=DIM, optimizer=optimizer, **fields) for name in "abc"]


def sharded(exchange, configs, *, deterministic=True, reduction="sum", wholes=NO_TABLES, **options):
    local = HostStore(configs, deterministic=deterministic, **options)
    return ShardedStore(
        local,
        HostBags(local.layout.dim, 2),
        exchange,
        device=torch.device("cpu"),
        deterministic=deterministic,
        reduction=reduction,
        wholes=wholes,
    )


def sharded_on_gpu(exchange, configs, **options):
    from penstock.embedding.gpu_store import GpuStore
    from penstock.embedding.sharded.device_bags import DeviceBags

    local = GpuStore(configs, deterministic=True, **options)
    bags = DeviceBags(local.layout.dim, local.device, deterministic=True)
    made = {"device": local.device, "deterministic": True, "reduction": "sum"}
    return OnCpu.around(ShardedStore(local, bags, exchange, **made))


def samples(size, seed, *, weighted):
    """Bags of each sample and feature, and the gradient of its output."""
    rng = np.random.default_rng(seed)
    edge = np.array([2**63 - 1, -(2**63), 0, -1])
    bags = [
        [
            np.where(rng.random(n) < 0.3, rng.choice(edge, n), rng.integers(-9, 9, n))
            for n in rng.integers(0, 4, len(NAMES))
        ]
        for _ in range(size)
    ]
    weights = [[rng.standard_normal(len(bag)).astype(np.float32) for bag in one] for one in bags]
    grad = torch.from_numpy(rng.standard_normal((size, PLAN.stride)).astype(np.float32))
    return bags, weights if weighted else None, grad


def packed(bags, weights):
    """Samples as a batch."""
    columns = [[one[f] for one in bags] for f in range(len(NAMES))]
    flat = [bag for column in columns for bag in column]
    lengths = [len(bag) for bag in flat]
    offsets = torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int64)
    if not bags:
        offsets = torch.zeros(1, dtype=torch.int64)
    keys = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *flat]).astype(np.int64))
    factors = None
    if weights is not None:
        of_bags = [one[f] for f in range(len(NAMES)) for one in weights]
        factors = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *of_bags]))
    return KeyedJagged(NAMES, keys, offsets, factors)


def train(store, shares, *, clock=True):
    """One look-up and update for each list of shares; outputs and norms."""
    outs, norms = [], []
    for step, parts in enumerate(shares):
        if clock:
            store.advance(Clock(step, 0))
        gradients = []
        for bags, weights, grad in parts:
            batch = packed(bags, weights)
            out = torch.full((len(bags), PLAN.stride), 7.0)
            lookup = store.pooled_lookup(PLAN, batch, insert=True, out=out)
            gradients.append(PooledGradient(lookup, batch, grad.contiguous()))
            outs.append(out)
        norms.append(float(store.gradient_norm(PLAN, gradients, 2.0)))
        store.apply_gradients(PLAN, gradients, step)
    return outs, norms


def dealt(samples_of_step, ranks, first):
    """The samples of rank `first` of `ranks`: every so many."""
    bags, weights, grad = samples_of_step
    return (
        bags[first::ranks],
        None if weights is None else weights[first::ranks],
        grad[first::ranks],
    )


def rows_of(stores, configs):
    """Every row of stores by (table, key), bits and all."""
    found = {}
    for store in stores:
        for table in range(len(configs)):
            rows, _ = store.export_batch(table, CURSOR_START, 1 << 20)
            usage = rows.usage.tolist() if rows.usage is not None else [None] * len(rows.keys)
            for key, value, state, used in zip(
                rows.keys.tolist(), rows.values, rows.state, usage, strict=True
            ):
                assert (table, key) not in found, "two ranks have one row"
                bits = value.float().numpy().tobytes() + state.numpy().tobytes()
                found[table, key] = bits, used
    return found


CASES = {
    "sgd": (SGD(learning_rate=0.5), {}, False),
    "adagrad, weighted": (Adagrad(), {}, True),
    "row-wise adagrad, bf16": (RowWiseAdagrad(), {"dtype": "bfloat16"}, True),
    "adam, ttl": (Adam(), {"eviction": Eviction(ttl=2)}, False),
    "lamb": (LAMB(), {}, True),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_rows_and_outputs_have_the_bits_of_one_store(name, ranks):
    optimizer, fields, weighted = CASES[name]
    configs = tables(optimizer, **fields)
    steps = [samples(n, 31 * n, weighted=weighted) for n in (9, 2, 0, 14, 1)]
    alone = HostStore(configs, seed=3, deterministic=True)
    outs, norms = train(alone, [[step] for step in steps])

    def of_rank(exchange):
        store = sharded(exchange, configs, seed=3)
        mine = train(store, [[dealt(step, ranks, exchange.rank)] for step in steps])
        store.check_invariants()
        return store, *mine

    made = World(ranks).run(of_rank)
    for step, out in enumerate(outs):
        for rank, (_, of_rank_outs, _) in enumerate(made):
            assert torch.equal(of_rank_outs[step], out[rank::ranks])
    for _, _, of_rank_norms in made:
        np.testing.assert_allclose(of_rank_norms, norms, rtol=1e-6)
    rows = rows_of([alone], configs)
    assert len(rows) > 10
    assert rows_of([store for store, *_ in made], configs) == rows
    if ranks > 1:
        shares = [sum(store.num_rows(table) for table in range(3)) for store, *_ in made]
        assert min(shares) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_has_the_bits_of_the_host(name, ranks):
    optimizer, fields, weighted = CASES[name]
    configs = tables(optimizer, **fields)
    steps = [samples(n, 31 * n, weighted=weighted) for n in (9, 2, 0, 14, 1)]
    alone = HostStore(configs, seed=3, deterministic=True)
    outs, norms = train(alone, [[step] for step in steps])

    def of_rank(exchange):
        store = sharded_on_gpu(exchange, configs, seed=3)
        mine = train(store, [[dealt(step, ranks, exchange.rank)] for step in steps])
        return store, *mine

    made = World(ranks).run(of_rank)
    for step, out in enumerate(outs):
        for rank, (_, of_rank_outs, _) in enumerate(made):
            # Weighted sums fuse multiply and add on a GPU; rows are exact all the same.
            torch.testing.assert_close(of_rank_outs[step], out[rank::ranks], rtol=1e-6, atol=1e-7)
    for _, _, of_rank_norms in made:
        np.testing.assert_allclose(of_rank_norms, norms, rtol=1e-6)
    assert rows_of([store for store, *_ in made], configs) == rows_of([alone], configs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_keys_travel_once_where_order_is_free(ranks, reduction):
    """Float sums differ in their order alone: a few units in the last place of each."""
    configs = tables(Adagrad(learning_rate=0.1))
    steps = [samples(n, n, weighted=True) for n in (8, 3, 12)]
    alone = HostStore(configs, seed=3)
    share = 1 / ranks if reduction == "mean" else 1.0
    scaled = [(bags, weights, grad * share) for bags, weights, grad in steps]
    outs, _ = train(alone, [[step] for step in scaled])

    def of_rank(exchange):
        store = sharded(exchange, configs, deterministic=False, reduction=reduction, seed=3)
        of_rank_outs, _ = train(store, [[dealt(step, ranks, exchange.rank)] for step in steps])
        found = store.find(0, torch.tensor([2**63 - 1, 5 + exchange.rank, 10**15]))
        return of_rank_outs, found, store

    made = World(ranks).run(of_rank)
    for step, out in enumerate(outs):
        for rank, (of_rank_outs, *_) in enumerate(made):
            torch.testing.assert_close(of_rank_outs[step], out[rank::ranks], rtol=1e-5, atol=1e-6)
    for rank, (_, found, _) in enumerate(made):
        wanted = alone.find(0, torch.tensor([2**63 - 1, 5 + rank, 10**15]))
        torch.testing.assert_close(found.values, wanted.values, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.found, wanted.found)


def test_several_lookups_wait_for_one_update():
    configs = tables(Adagrad())
    steps = [[samples(5, 1, weighted=False), samples(7, 2, weighted=False)]]
    alone = HostStore(configs, deterministic=True)
    train(alone, steps)

    def of_rank(exchange):
        store = sharded(exchange, configs)
        train(store, [[dealt(part, 2, exchange.rank) for part in step] for step in steps])
        return store

    assert rows_of(World(2).run(of_rank), configs) == rows_of([alone], configs)


@pytest.mark.parametrize("empty", range(3))
def test_a_rank_without_samples_takes_part(empty):
    configs = tables(Adam())
    steps = [samples(6, n, weighted=True) for n in range(3)]
    alone = HostStore(configs, deterministic=True)
    train(alone, [[step] for step in steps])

    def of_rank(exchange):
        store = sharded(exchange, configs)
        busy = [rank for rank in range(3) if rank != empty]
        nothing = ([], [], torch.zeros(0, PLAN.stride))
        shares = [
            nothing if exchange.rank == empty else dealt(step, 2, busy.index(exchange.rank))
            for step in steps
        ]
        train(store, [[share] for share in shares])
        return store, exchange.calls

    made = World(3).run(of_rank)
    assert rows_of([store for store, _ in made], configs) == rows_of([alone], configs)
    assert made[0][1] == made[1][1] == made[2][1]


def test_evaluation_makes_no_rows():
    configs = tables(SGD())
    bags, weights, _ = samples(4, 0, weighted=False)

    def of_rank(exchange):
        store = sharded(exchange, configs)
        out = torch.empty(4, PLAN.stride)
        lookup = store.pooled_lookup(PLAN, packed(bags, weights), insert=False, out=out)
        rows = sum(store.num_rows(table) for table in range(3))
        return rows, lookup.num_missing, out

    made = World(2).run(of_rank)
    alone = HostStore(configs)
    out = torch.empty(4, PLAN.stride)
    missing = alone.pooled_lookup(PLAN, packed(bags, weights), insert=False, out=out).num_missing
    assert [rows for rows, *_ in made] == [0, 0]
    assert sum(number for _, number, _ in made) == 2 * missing
    assert all(torch.equal(of_rank_out, out) for *_, of_rank_out in made)


def test_rows_are_given_to_all_and_kept_by_one():
    configs = tables(Adagrad())
    alone = HostStore(configs)
    train(alone, [[samples(20, 5, weighted=False)]])

    def of_rank(exchange):
        store = sharded(exchange, configs)
        for table in range(3):
            rows, _ = alone.export_batch(table, CURSOR_START, 1 << 20)
            store.insert_or_assign(table, rows)
        erased = store.erase(0, torch.tensor([exchange.rank - 1, 77]))
        return store, erased

    made = World(3).run(of_rank)
    assert {erased for _, erased in made} == {3}
    alone.erase(0, torch.tensor([-1, 0, 1]))
    assert rows_of([store for store, _ in made], configs) == rows_of([alone], configs)


def test_ranks_at_different_calls_are_named():
    configs = tables(SGD())
    step = samples(3, 0, weighted=False)

    def of_rank(exchange):
        store = sharded(exchange, configs)
        if exchange.rank == 1:
            store.find(0, torch.arange(3))
        else:
            train(store, [[step]])

    with pytest.raises(GroupError, match=r"rank . at call 1 .*(look-up.*find|find.*look-up)"):
        World(2).run(of_rank)


def test_an_update_of_unlike_steps_is_refused():
    configs = tables(SGD())

    def of_rank(exchange):
        store = sharded(exchange, configs)
        store.apply_gradients(PLAN, [], exchange.rank)

    with pytest.raises(GroupError, match="update"):
        World(2).run(of_rank)


@pytest.mark.parametrize("seed", range(20))
def test_random_schedules_agree_with_one_store(seed):
    """Ten thousand of them: tests/soak/random_ranks.py."""
    from tests.soak import random_ranks

    random_ranks.run(seed)
