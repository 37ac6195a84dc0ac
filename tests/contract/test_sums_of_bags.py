"""Sums of bags that travel between ranks, against one store that sees all ranks' samples.

Float sums differ from one store's in their order alone: parts by owner, and by rank in an update.
Of the few dozen shares a row or bag has here, that is a few units in the last place of each, which
Adagrad's division may double.
"""

import numpy as np
import pytest
import torch

from penstock.config import SGD, Adagrad, Adam, RowWiseAdagrad, TableConfig
from penstock.embedding.host_store import HostStore
from penstock.embedding.sharded import bag_parts, lookups, store, ways
from penstock.embedding.sharded.bags import HostBags
from penstock.embedding.sharded.routes import Owners
from penstock.embedding.sharded.shard_map import ShardMap
from penstock.embedding.store import CURSOR_START, PooledFeature, PooledGradient, PoolingPlan
from penstock.types import KeyedJagged
from tests.contract.stores import OnCpu
from tests.world.ranks import World

DIM, TABLES = 4, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EDGES = np.array([2**63 - 1, -(2**63), 0, -1])


def plan_of(rng):
    """Several features a table, in any order of columns, with columns of others between."""
    served = rng.permutation(6)[: rng.integers(1, 6)]
    gap = int(rng.integers(0, 2))
    columns = rng.permutation(len(served)) * (DIM + gap) if gap else np.arange(len(served)) * DIM
    poolings = rng.choice(["sum", "mean", "sqrt_n"], len(served))
    features = [
        PooledFeature(int(f), int(f) % TABLES, str(pooling), int(column))
        for f, pooling, column in zip(served, poolings, columns, strict=True)
    ]
    return PoolingPlan(tuple(features), len(served) * (DIM + gap))


def batch_of(rng, size, *, weighted, longest=9, edges=0.1):
    """Few keys: most come several times, in one bag and in several; some bags are empty."""
    lengths = rng.integers(0, longest + 1, 6 * size) * (rng.random(6 * size) < 0.8)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    some = rng.random(total) < edges
    keys = np.where(some, rng.choice(EDGES, total), rng.integers(-20, 20, total))
    weights = torch.from_numpy(rng.uniform(0.5, 2, total).astype(np.float32)) if weighted else None
    names = tuple("abcdef")
    return KeyedJagged(names, torch.from_numpy(keys), torch.from_numpy(offsets), weights)


def dealt(batch, grad, owners, rank):
    """The samples of a rank."""
    mine = np.flatnonzero(owners == rank)
    bags = (np.arange(6)[:, None] * len(owners) + mine).ravel()
    starts, ends = batch.offsets[:-1].numpy()[bags], batch.offsets[1:].numpy()[bags]
    places = np.concatenate([
        np.zeros(0, np.int64),
        *(np.arange(a, b) for a, b in zip(starts, ends, strict=True)),
    ])
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64))
    places = torch.from_numpy(places.astype(np.int64))
    weights = None if batch.weights is None else batch.weights[places]
    part = KeyedJagged(batch.features, batch.values[places], offsets, weights)
    return part, grad[torch.from_numpy(mine)].contiguous()


def configs_of(rule, dtype="float32"):
    return [TableConfig(name=name, dim=DIM, optimizer=rule, dtype=dtype) for name in "abc"]


def sharded(exchange, configs, *, on_gpu=False, reduction="sum", wholes=store.NO_TABLES):
    if on_gpu:
        from penstock.embedding.gpu_store import GpuStore
        from penstock.embedding.sharded.device_bags import DeviceBags

        local = GpuStore(configs, seed=3)
        bags = DeviceBags(DIM, local.device, deterministic=False)
    else:
        local, bags = HostStore(configs, seed=3), HostBags(DIM, 2)
    device = local.device if on_gpu else torch.device("cpu")
    made = {"device": device, "deterministic": False, "reduction": reduction, "wholes": wholes}
    return store.ShardedStore(local, bags, exchange, **made)


WAYS = {
    "sums": lambda sizes, dim, way: ways.SUMS,
    "rows": lambda sizes, dim, way: ways.ROWS,
    # By what the headers of all ranks say, so alike on all; look-ups of one update differ.
    "both": lambda sizes, dim, way: int(sizes[:, 0].sum()) % 2,
}


def one_step(of_store, plan, parts, number):
    gradients, outs = [], []
    for batch, grad in parts:
        out = torch.full((batch.batch_size, plan.stride), 7.0)
        lookup = of_store.pooled_lookup(plan, batch, insert=True, out=out)
        gradients.append(PooledGradient(lookup, batch, grad))
        outs.append(out)
    norm = float(of_store.gradient_norm(plan, gradients, 2.0))
    of_store.apply_gradients(plan, gradients, number)
    return outs, norm


def rows_of(stores):
    found = {}
    for one in stores:
        for table in range(TABLES):
            rows, _ = one.export_batch(table, CURSOR_START, 1 << 20)
            for key, value, state in zip(rows.keys.tolist(), rows.values, rows.state, strict=True):
                assert (table, key) not in found, "two ranks have one row"
                found[table, key] = torch.cat([value.float(), state]).cpu()
    return found


def wholes_of(rng, ranks):
    """Some tables whole, or all on one rank, or none."""
    kept = {0: [], 1: list("b"), 2: list("ac"), 3: list("abc")}[int(rng.integers(4))]
    return {name: int(rng.integers(ranks)) for name in kept}


def check_against_one(seed, ranks, *, on_gpu=False, waiting=1, reduction="sum"):
    """Random plans, batches, deals and placements; returns the calls of each rank."""
    rng = np.random.default_rng(seed)
    plan, weighted = plan_of(rng), bool(seed % 2)
    rule = (SGD(), Adagrad(), RowWiseAdagrad(), Adam())[seed // 2 % 4]
    configs = configs_of(rule)
    share = 1 / ranks if reduction == "mean" else 1.0
    steps = []
    for _ in range(3):
        parts = []
        for _ in range(waiting):
            size = int(rng.integers(1, 14))
            batch = batch_of(rng, size, weighted=weighted)
            grad = torch.from_numpy(rng.standard_normal((size, plan.stride)).astype(np.float32))
            # Some ranks often have no sample.
            owners = rng.integers(0, int(rng.integers(1, ranks + 1)), size)
            parts.append((batch, grad, owners))
        steps.append(parts)
    wholes = wholes_of(rng, ranks)
    alone = HostStore(configs, seed=3)
    wanted = [
        one_step(alone, plan, [(batch, grad * share) for batch, grad, _ in parts], number)
        for number, parts in enumerate(steps)
    ]
    columns = [each.column + c for each in plan.features for c in range(DIM)]

    def of_rank(exchange):
        made = sharded(exchange, configs, on_gpu=on_gpu, reduction=reduction, wholes=wholes)
        made = OnCpu.around(made) if on_gpu else made
        for number, parts in enumerate(steps):
            mine = [dealt(*part, exchange.rank) for part in parts]
            outs, norm = one_step(made, plan, mine, number)
            assert norm == pytest.approx(wanted[number][1], rel=1e-4)
            for out, full, (_, _, owners) in zip(outs, wanted[number][0], parts, strict=True):
                same = full[owners == exchange.rank]
                torch.testing.assert_close(out[:, columns], same[:, columns], **CLOSE)
                others = [column for column in range(plan.stride) if column not in columns]
                assert (out[:, others] == 7).all()
        made.check_invariants()
        return made, exchange.calls

    made = World(ranks, seed=seed).run(of_rank)
    for rank, (one, _) in enumerate(made):
        for table, config in enumerate(configs):
            assert not one.num_rows(table) or wholes.get(config.name, rank) == rank
    rows, same = rows_of([one for one, _ in made]), rows_of([alone])
    assert rows.keys() == same.keys()
    assert len(rows) > 3
    for key, row in rows.items():
        torch.testing.assert_close(row, same[key], **CLOSE)
    calls = [of_rank_calls for _, of_rank_calls in made]
    assert all(each == calls[0] for each in calls), "ranks chose differently"
    return calls[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_outputs_and_rows_are_those_of_one_store(monkeypatch, seed, ranks, way):
    monkeypatch.setattr(lookups, "way_of", WAYS[way])
    check_against_one(100 * ranks + seed, ranks, reduction=("sum", "mean")[seed % 2])


@pytest.mark.parametrize("seed", range(12))
def test_lookups_of_both_ways_wait_for_one_update(monkeypatch, seed):
    monkeypatch.setattr(lookups, "way_of", WAYS["both"])
    check_against_one(seed, 2 + seed % 2, waiting=3)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(4))
def test_a_gpu_sums_bags_for_others(monkeypatch, seed, way):
    monkeypatch.setattr(lookups, "way_of", WAYS[way])
    check_against_one(seed, 3, on_gpu=True, waiting=2)


def read_once(size, longest, *, deterministic=False, weighted=False, reads=False, keys=20):
    """Whether two ranks send sums at their third look-up of one batch each."""
    plan = PoolingPlan(tuple(PooledFeature(f, f % TABLES, "sum", f * DIM) for f in range(6)), 24)
    configs = configs_of(SGD())

    def of_rank(exchange):
        rng = np.random.default_rng(exchange.rank)
        lengths = np.full(6 * size, longest)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        values = torch.from_numpy(rng.integers(0, keys, int(offsets[-1])))
        weights = torch.ones(len(values)) if weighted else None
        batch = KeyedJagged(tuple("abcdef"), values, offsets, weights)
        local = HostStore(configs, seed=3, deterministic=deterministic)
        made = store.ShardedStore(
            local,
            HostBags(DIM, 1),
            exchange,
            device=torch.device("cpu"),
            deterministic=deterministic,
            reduction="sum",
        )
        for _ in range(3):
            out = torch.empty(size, 24)
            reading = reads and exchange.rank == 1
            options = {"reads_vectors": True} if reading else {}
            lookup = made.pooled_lookup(plan, batch, insert=True, out=out, **options)
            if reading:
                vectors = made.read_looked_up(lookup)
                sums = vectors.view(6, size, longest, DIM).sum(2).transpose(0, 1).reshape(size, 24)
                torch.testing.assert_close(sums, out, **CLOSE)
        return lookup.sums_plan is not None

    made = World(2).run(of_rank)
    assert made[0] == made[1]
    return made[0]


def test_the_fewer_bytes_travel():
    # Hundreds of keys a bag, most of them different: a sum is much less.
    assert read_once(20, 100, keys=2**40)
    assert read_once(20, 100, keys=2**40, weighted=True)
    # One key a bag; or the same few keys all the time.
    assert not read_once(20, 1, keys=2**40)
    assert not read_once(50, 100, keys=5)


def test_bits_and_vectors_of_keys_need_rows():
    assert not read_once(20, 100, keys=2**40, deterministic=True)
    # One rank alone asks for them.
    assert not read_once(20, 100, keys=2**40, weighted=True, reads=True)


def test_a_way_is_kept_where_both_are_nearly_as_good():
    dim = 16
    row, summed = 8 + 8 * dim, 1 + 8 * dim
    keys = 1000
    even = round((1000 * row - 4 * keys) / summed / 2)
    for bags, way in ((even, None), (even // 2, ways.SUMS), (even * 2, ways.ROWS)):
        sizes = torch.tensor([[keys, 1000, bags, 0]] * 2)
        for before in (ways.ROWS, ways.SUMS):
            assert ways.way_of(sizes, dim, before) == (before if way is None else way)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("longest", [9, 300, 70_000])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("kept", [{}, {"b": 0}, {"a": 1, "b": 0, "c": 1}])
def test_bags_are_split_alike_on_a_host_and_a_device(ranks, longest, weighted, kept):
    """Lengths of one, two and four bytes; what is joined again is what was split."""
    if max(kept.values(), default=0) >= ranks:
        return
    rng = np.random.default_rng(ranks)
    plan = plan_of(rng)
    sizes = [3 + rank if longest > 1000 else 11 - rank for rank in range(ranks)]
    batches = [batch_of(rng, size, weighted=weighted, longest=longest) for size in sizes]
    owners = Owners.by(ShardMap.even(ranks), list("abc"), kept, torch.device("cpu"))
    served = owners.served(plan)
    on_host = [HostBags(DIM, 2).split(plan, b, owners, rank) for rank, b in enumerate(batches)]
    on_device = [bag_parts.split_on_device(plan, b, owners, rank) for rank, b in enumerate(batches)]
    for made, same in zip(on_host, on_device, strict=True):
        assert made.form == same.form
        assert made.different == same.different
        assert torch.equal(made.counts, same.counts)
        assert made.message.numel() == same.message.numel()
        assert_same(made.own, same.own)
        assert (made.scales is None) == (same.scales is None)
    for rank in range(ranks) if ranks > 1 else ():
        mine = list(served.features[rank])
        one, other = (joined_at(rank, made, sizes, served, plan) for made in (on_host, on_device))
        assert_same(one, other)
        place = 0
        for feature in mine:
            for sender, batch in enumerate(batches):
                for sample in range(sizes[sender]) if sender != rank else ():
                    bag = plan.features[feature].packed_feature * sizes[sender] + sample
                    keys = batch.values[int(batch.offsets[bag]) : int(batch.offsets[bag + 1])]
                    table = torch.full_like(keys, plan.features[feature].table)
                    keys = keys[owners.of(table, keys) == rank]
                    here = slice(int(one.offsets[place]), int(one.offsets[place + 1]))
                    assert torch.equal(one.values[here], keys)
                    place += 1
        assert place == len(one.offsets) - 1


def joined_at(rank, made, sizes, served, plan):
    """What comes to a rank of what all have split, joined."""
    messages, came = [], []
    for sender, parts in enumerate(made):
        told = torch.tensor([[sizes[sender], parts.form]] * len(made))
        counts = torch.cat([parts.counts, told], 1)
        of_each = bag_parts.message_bytes(
            parts.counts.sum(1), counts[:, -2] * served.counts, counts[:, -1]
        )
        of_each[sender] = 0
        messages.append(torch.split(parts.message, of_each.tolist())[rank])
        came.append(counts[rank, [*served.features[rank], -2, -1]])
    some = tuple(
        PooledFeature(n, plan.features[f].table, "sum", n * DIM)
        for n, f in enumerate(served.features[rank])
    )
    of_rank = PoolingPlan(some, DIM * len(some))
    return bag_parts.joined(of_rank, torch.cat(messages), torch.stack(came), rank)[0]


def assert_same(one, other):
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.offsets, other.offsets)
    assert (one.weights is None) == (other.weights is None)
    assert one.weights is None or torch.equal(one.weights, other.weights)
