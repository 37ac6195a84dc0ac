"""What a store over ranks makes of each call: who owns, what travels, what is refused before."""

import pytest
import torch

from penstock.config import SGD, Eviction
from penstock.embedding.host_store import HostStore
from penstock.embedding.sharded.exchange import alike_of, check_alike
from penstock.embedding.sharded.shard_map import ShardMap, bucket_of, table_words
from penstock.embedding.sharded.store import on_any_rank
from penstock.embedding.store import CURSOR_START, PooledGradient
from penstock.errors import ConfigError, GroupError
from penstock.types import KeyedJagged
from tests.contract.test_sharded_store import (
    NAMES,
    PLAN,
    dealt,
    packed,
    rows_of,
    samples,
    sharded,
    tables,
    train,
)
from tests.world.ranks import World

# The step shows in the rows as it is: Adagrad's first hides a factor of the gradient.
PLAIN = tables(SGD(learning_rate=0.5))
EVERY = torch.tensor([*range(-9, 9), 2**63 - 1, -(2**63)])


def look_up(store, part, *, insert=True, reads=False):
    """The look-up of a share of samples, and its gradient."""
    bags, weights, grad = part
    batch = packed(bags, weights)
    out = torch.empty(len(bags), PLAN.stride)
    lookup = store.pooled_lookup(PLAN, batch, insert=insert, out=out, reads_vectors=reads)
    return lookup, PooledGradient(lookup, batch, grad.contiguous())


def test_rows_live_with_the_owner_of_their_bucket():
    step = samples(40, 1, weighted=False)

    def of_rank(exchange):
        store = sharded(exchange, PLAIN)
        train(store, [[dealt(step, 3, exchange.rank)]])
        return [store.export_batch(t, CURSOR_START, 999)[0].keys for t in range(2)]

    owners = ShardMap.even(3).on(torch.device("cpu"))
    for rank, of_tables in enumerate(World(3).run(of_rank)):
        for name, keys in zip("ab", of_tables, strict=True):
            assert len(keys) > 1
            assert (owners[bucket_of(table_words([name]), keys)] == rank).all()


@pytest.mark.parametrize(
    ("deterministic", "fields", "once"),
    [(False, {}, True), (True, {}, False), (False, {"eviction": Eviction(ttl=9)}, False)],
)
def test_a_key_travels_once_unless_its_uses_are_counted(deterministic, fields, once):
    """A pair of table and key of the features that are read."""
    part = samples(30, 2, weighted=False)
    read = [
        (one.table, key)
        for one in PLAN.features
        for bag in part[0]
        for key in bag[one.packed_feature]
    ]
    assert len(set(read)) < len(read) / 2

    def of_rank(exchange):
        store = sharded(exchange, tables(SGD(), **fields), deterministic=deterministic)
        return sum(look_up(store, part)[0].sent)

    wanted = len(set(read)) if once else len(read)
    assert World(2).run(of_rank) == [wanted, wanted]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mean_divides_by_the_number_of_ranks(ranks):
    """A power of two: exact."""
    step = samples(12, 3, weighted=True)
    alone = HostStore(PLAIN, deterministic=True)
    train(alone, [[(*step[:2], step[2] / ranks)]])

    def of_rank(exchange):
        store = sharded(exchange, PLAIN, reduction="mean")
        train(store, [[dealt(step, ranks, exchange.rank)]])
        return store

    assert rows_of(World(ranks).run(of_rank), PLAIN) == rows_of([alone], PLAIN)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_norms_are_of_the_rows_of_all_ranks(norm_type):
    step = samples(12, 4, weighted=False)
    alone = HostStore(PLAIN, deterministic=True)
    wanted = float(alone.gradient_norm(PLAN, [look_up(alone, step)[1]], norm_type))

    def of_rank(exchange):
        store = sharded(exchange, PLAIN)
        _, gradient = look_up(store, dealt(step, 3, exchange.rank))
        return float(store.gradient_norm(PLAN, [gradient], norm_type))

    assert World(3).run(of_rank) == pytest.approx([wanted] * 3, rel=1e-6)


def test_rates_and_factors_reach_the_rows():
    step = samples(12, 5, weighted=False)

    def trained(store, part):
        store.set_learning_rate(0, 0.125)
        store.apply_gradients(PLAN, [look_up(store, part)[1]], 0, 0.25)
        return store

    alone = trained(HostStore(PLAIN, deterministic=True), step)
    made = World(2).run(lambda x: trained(sharded(x, PLAIN), dealt(step, 2, x.rank)))
    assert rows_of(made, PLAIN) == rows_of([alone], PLAIN)


@pytest.mark.parametrize("deterministic", [False, True])
def test_vectors_that_were_read_are_by_place(deterministic):
    step = samples(9, 6, weighted=True)
    alone = HostStore(PLAIN)
    read = alone.read_looked_up(look_up(alone, step)[0])
    place = torch.tensor([f in {0, 1, 2, 4} for f in range(len(NAMES))])
    batch = packed(*step[:2])
    is_read = place.repeat_interleave(batch.offsets[:: len(step[0])].diff())

    def of_rank(exchange):
        store = sharded(exchange, PLAIN, deterministic=deterministic)
        return store.read_looked_up(look_up(store, step, reads=True)[0])

    for found in World(2).run(of_rank):
        assert torch.equal(found[is_read], read[is_read])


def test_a_batch_may_be_used_again_before_its_update():
    step = samples(9, 7, weighted=True)
    alone = HostStore(PLAIN, deterministic=True)
    train(alone, [[step]])

    def of_rank(exchange):
        store = sharded(exchange, PLAIN)
        lookup, gradient = look_up(store, dealt(step, 2, exchange.rank))
        for part in (gradient.batch.values, gradient.batch.offsets, gradient.batch.weights):
            part.zero_()
        store.apply_gradients(PLAN, [PooledGradient(lookup, None, gradient.grad)], 0)
        return store

    assert rows_of(World(2).run(of_rank), PLAIN) == rows_of([alone], PLAIN)


def unlike_insert(store, rank):
    look_up(store, samples(2, 0, weighted=False), insert=rank == 0)


def unlike_numbers_of_gradients(store, rank):
    gradients = [look_up(store, samples(2, n, weighted=False))[1] for n in range(2)]
    store.apply_gradients(PLAN, gradients[rank:], 0)


def unlike_tables(store, rank):
    store.find(rank, EVERY)


def norm_and_update(store, rank):
    gradient = look_up(store, samples(2, 0, weighted=False))[1]
    if rank:
        store.gradient_norm(PLAN, [gradient], 2.0)
    store.apply_gradients(PLAN, [gradient], 0)


@pytest.mark.parametrize(
    "calls", [unlike_insert, unlike_numbers_of_gradients, unlike_tables, norm_and_update]
)
def test_unlike_calls_are_refused_on_every_rank(calls):
    def of_rank(exchange):
        with pytest.raises(GroupError, match=f"rank {exchange.rank} at call"):
            calls(sharded(exchange, PLAIN), exchange.rank)

    World(2).run(of_rank)


def test_calls_are_told_apart_by_their_number():
    mine, other = alike_of(3, "look-up", 1, 2), alike_of(4, "look-up", 1, 2)
    check_alike(0, mine, torch.stack([mine, mine]))
    with pytest.raises(GroupError, match=r"rank 0 at call 3 .*, rank 1 at call 4 "):
        check_alike(0, mine, torch.stack([mine, other]))


def falling_offsets(store, part):
    batch = packed(*part[:2])
    offsets = batch.offsets.flip(0)
    store.pooled_lookup(
        PLAN,
        KeyedJagged(NAMES, batch.values, offsets),
        insert=True,
        out=torch.empty(len(part[0]), PLAN.stride),
    )


def short_gradient(store, part):
    lookup, gradient = look_up(store, part)
    store.apply_gradients(PLAN, [PooledGradient(lookup, None, gradient.grad[1:])], 0)


def applied_twice(store, part):
    gradient = look_up(store, part)[1]
    store.apply_gradients(PLAN, [gradient], 0)
    store.apply_gradients(PLAN, [gradient], 1)


def no_such_table(store, _):
    store.erase(-1, EVERY)


@pytest.mark.parametrize(
    ("call", "calls_before"),
    [(falling_offsets, 0), (short_gradient, 1), (applied_twice, 2), (no_such_table, 0)],
)
def test_what_is_wrong_here_is_refused_before_anything_travels(call, calls_before):
    def of_rank(exchange):
        with pytest.raises(ConfigError):
            call(sharded(exchange, PLAIN), samples(4, 8, weighted=False))
        return len(exchange.calls)

    assert World(2).run(of_rank) == [calls_before] * 2


@pytest.mark.parametrize("odd", range(3))
def test_what_is_so_on_one_rank_is_known_to_all(odd):
    def of_rank(exchange):
        store = sharded(exchange, PLAIN)
        return on_any_rank([store], False), on_any_rank([store], exchange.rank == odd)

    assert World(3).run(of_rank) == [(False, True)] * 3
    assert not on_any_rank([], False)
    assert on_any_rank([HostStore(PLAIN)], True)


@pytest.mark.parametrize("through", ["table", "factor"])
def test_unlike_learning_rates_are_refused_on_every_rank(through):
    def of_rank(exchange):
        store = sharded(exchange, PLAIN)
        gradient = look_up(store, samples(4, 9, weighted=False))[1]
        before = rows_of([store], PLAIN)
        odd = exchange.rank == 1
        if through == "table" and odd:
            store.set_learning_rate(1, 0.25)
        factor = 0.5 if through == "factor" and odd else 1.0
        mine = (0.25 if odd else 0.5, "rank 0" if odd else "rank 1")
        wanted = f"the rate {mine[0]} on rank {exchange.rank} and .* on {mine[1]}"
        with pytest.raises(GroupError, match=wanted):
            store.apply_gradients(PLAN, [gradient], 0, factor)
        assert rows_of([store], PLAIN) == before

    World(3).run(of_rank)
