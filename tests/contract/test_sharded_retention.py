"""Tables over ranks that refuse keys: one default row, counted keys, rows that leave."""

import numpy as np
import pytest
import torch

from penstock.config import (
    FTRL,
    LAMB,
    SGD,
    Adagrad,
    Adam,
    AdmitAtRandom,
    AdmitFrequent,
    Constant,
    Eviction,
    RowWiseAdagrad,
)
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import NUMBERS, Clock, share_of
from penstock.embedding.store import (
    CURSOR_START,
    Candidates,
    DefaultGradients,
    PooledGradient,
    PoolingPlan,
)
from penstock.types import KeyedJagged
from tests.contract.stores import open_store  # noqa: F401
from tests.contract.test_sharded_store import (
    DIM,
    PLAN,
    dealt,
    packed,
    rows_of,
    samples,
    sharded,
    sharded_on_gpu,
    tables,
    train,
)
from tests.world.ranks import World

COUNTS = AdmitFrequent(min_count=4, half_life_steps=2)
DRAWS = AdmitAtRandom(probability=0.3)
CASES = {
    "sgd, counts": (SGD(learning_rate=0.5), {"admission": COUNTS}, False),
    "adagrad, counts, ttl": (Adagrad(), {"admission": COUNTS, "eviction": Eviction(ttl=1)}, True),
    "adam, draws": (Adam(), {"admission": DRAWS, "initializer": Constant(value=0.5)}, False),
    "row-wise adagrad, bf16, draws, lfu": (
        RowWiseAdagrad(),
        {
            "admission": DRAWS,
            "dtype": "bfloat16",
            "eviction": Eviction(ttl=2, order="lfu", half_life=2),
            "max_bytes": 1 << 20,
        },
        True,
    ),
    "lamb, room for all": (LAMB(), {"max_bytes": 1 << 20}, True),
    "ftrl, counts": (FTRL(), {"admission": COUNTS}, False),
}
SIZES = (9, 2, 0, 14, 1, 11, 7)


def steps_of(case, scale=1.0):
    return [
        (*some[:2], some[2] * scale**n)
        for n, some in enumerate(samples(n, 31 * n, weighted=CASES[case][2]) for n in SIZES)
    ]


def remembered(store, configs):
    """Default rows, bits and all, by table."""
    states = [store.retention_state(table) for table in range(len(configs))]
    return [one.default_value.tolist() + one.default_state.tolist() for one in states]


def counted(stores, configs):
    """Counted keys of all stores by (table, key)."""
    found = {}
    for store in stores:
        for table in range(len(configs)):
            keys, counts = store.export_candidates(table, CURSOR_START, 1 << 20)[0]
            for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
                assert (table, key) not in found, "two ranks count one key"
                found[table, key] = count
    return found


def check_alike(made, alone, configs):
    """Rows, counts, default rows and numbers of ranks are those of one store."""
    assert rows_of(made, configs) == rows_of([alone], configs)
    assert counted(made, configs) == counted([alone], configs)
    for store in made:
        assert remembered(store, configs) == remembered(alone, configs)
    since = NUMBERS.index("admitted")
    total = sum(store.counters().numbers[:, since:] for store in made)
    np.testing.assert_array_equal(total, alone.counters().numbers[:, since:])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_refused_keys_have_the_bits_of_one_store(case, ranks):
    """Gradients shrink by a hundred a step: the sums' fixed point is that of what is refused."""
    optimizer, fields, _ = CASES[case]
    configs = tables(optimizer, **fields)
    steps = steps_of(case, scale=0.01)
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
            assert torch.equal(of_rank_outs[step], out[rank::ranks]), (step, rank)
    for _, _, of_rank_norms in made:
        np.testing.assert_allclose(of_rank_norms, norms, rtol=1e-6)
    check_alike([store for store, *_ in made], alone, configs)
    numbers = alone.counters().numbers
    if "admission" in fields:
        # No feature reads the third table.
        assert numbers[:2, NUMBERS.index("refused")].min() > 0
        assert numbers[:2, NUMBERS.index("admitted")].min() > 0
        assert remembered(alone, configs)[0] != remembered(HostStore(configs), configs)[0]
    if "eviction" in fields:
        assert numbers[:, NUMBERS.index("evicted")].sum() > 0


@pytest.mark.parametrize("evicts", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_whole_table_has_its_budget_on_one_rank(ranks, evicts):
    """So what is refused and what leaves does not depend on their number, and has the same bits."""
    fields = {"max_bytes": 700, "eviction": Eviction(order="lru") if evicts else None}
    configs = tables(Adagrad(), **fields, placement="whole")
    assert [share_of(config, ranks) for config in configs] == configs
    wholes = {name: number % ranks for number, name in enumerate("cab")}
    steps = steps_of("ftrl, counts")
    alone = HostStore(configs, seed=3, deterministic=True)
    outs, _ = train(alone, [[step] for step in steps])

    def of_rank(exchange):
        store = sharded(exchange, configs, seed=3, wholes=wholes)
        mine = train(store, [[dealt(step, ranks, exchange.rank)] for step in steps])
        return store, *mine

    made = World(ranks).run(of_rank)
    for step, out in enumerate(outs):
        for rank, (_, of_rank_outs, _) in enumerate(made):
            assert torch.equal(of_rank_outs[step], out[rank::ranks]), (step, rank)
    check_alike([store for store, *_ in made], alone, configs)
    numbers = alone.counters().numbers[:, NUMBERS.index("evicted" if evicts else "refused")]
    assert numbers[:2].min() > 0
    for rank, (store, *_) in enumerate(made):
        held = [store.num_rows(table) > 0 for table in range(2)]
        assert held == [wholes[name] == rank for name in "ab"]


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_refused_keys_on_a_gpu_have_the_bits_of_the_host(case, ranks):
    optimizer, fields, _ = CASES[case]
    configs = tables(optimizer, **fields)
    steps = steps_of(case, scale=0.01)
    alone = HostStore(configs, seed=3, deterministic=True)
    train(alone, [[step] for step in steps])

    def of_rank(exchange):
        store = sharded_on_gpu(exchange, configs, seed=3)
        train(store, [[dealt(step, ranks, exchange.rank)] for step in steps])
        return store

    check_alike(World(ranks).run(of_rank), alone, configs)


def test_a_new_key_of_several_ranks_is_counted_over_all_of_them():
    """Four times in one step, once or twice a rank: admitted at once, and one row."""
    configs = tables(SGD(learning_rate=1.0), admission=AdmitFrequent(min_count=4))
    names = ("f", "g", "h", "other", "s")

    def of_rank(exchange):
        store = sharded(exchange, configs)
        keys = [[7], [7], [7, 7], []][exchange.rank]
        bags = [[np.array([key] if name == "f" else []) for name in names] for key in keys]
        step = (bags, None, torch.ones(len(keys), PLAN.stride))
        outs, _ = train(store, [[step]])
        first = store.find(0, torch.tensor([7]))
        return store, first, outs

    made = World(4).run(of_rank)
    assert len(rows_of([store for store, *_ in made], configs)) == 1
    initial = HostStore(configs).find_or_insert(1, torch.tensor([7])).values
    assert initial.numel() == DIM
    for store, first, _ in made:
        assert first.found.tolist() == [True]
        assert remembered(store, configs)[0] == [0.0] * DIM


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_default_row_where_order_is_free(reduction):
    configs = tables(Adam(), admission=COUNTS)
    steps = [samples(n, n, weighted=False) for n in (8, 3, 12, 6)]
    alone = HostStore(configs, seed=3)
    share = 1 / 3 if reduction == "mean" else 1.0
    train(alone, [[(bags, weights, grad * share)] for bags, weights, grad in steps])

    def of_rank(exchange):
        store = sharded(exchange, configs, deterministic=False, reduction=reduction, seed=3)
        train(store, [[dealt(step, 3, exchange.rank)] for step in steps])
        return store

    made = World(3).run(of_rank)
    one, *others = [remembered(store, configs) for store in made]
    assert all(other == one for other in others)
    np.testing.assert_allclose(one, remembered(alone, configs), rtol=1e-5, atol=1e-6)
    assert counted(made, configs) == counted([alone], configs)


def test_several_lookups_share_one_step_of_the_default_row():
    configs = tables(Adagrad(), admission=COUNTS)
    steps = [[samples(5, n, weighted=False), samples(7, n + 9, weighted=True)] for n in range(3)]
    alone = HostStore(configs, deterministic=True)
    train(alone, steps)

    def of_rank(exchange):
        store = sharded(exchange, configs)
        train(store, [[dealt(part, 2, exchange.rank) for part in step] for step in steps])
        store.apply_gradients(PLAN, [], 9)
        return store

    check_alike(World(2).run(of_rank), alone, configs)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_norms_have_one_default_row(norm_type, deterministic):
    """Most of the gradient is that of keys that are refused."""
    configs = tables(SGD(), admission=AdmitFrequent(min_count=9))
    bags, weights, grad = samples(12, 4, weighted=False)
    alone = HostStore(configs)

    def norm(store, part):
        bags, weights, grad = part
        out = torch.empty(len(bags), PLAN.stride)
        lookup = store.pooled_lookup(PLAN, packed(bags, weights), insert=True, out=out)
        return float(store.gradient_norm(PLAN, [PooledGradient(lookup, None, grad)], norm_type))

    wanted = norm(alone, (bags, weights, grad))
    made = World(3).run(
        lambda exchange: norm(
            sharded(exchange, configs, deterministic=deterministic),
            tuple(None if part is None else part[exchange.rank :: 3] for part in (bags, weights))
            + (grad[exchange.rank :: 3].contiguous(),),
        )
    )
    assert made == pytest.approx([wanted] * 3, rel=1e-6)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_beyond_float32_reach_every_copy(bad, deterministic):
    configs = tables(SGD(), admission=AdmitFrequent(min_count=9))
    bags, weights, grad = samples(6, 4, weighted=False)
    grad[:, :DIM] = 0.0
    grad[3, :DIM] = bad

    def of_rank(exchange):
        store = sharded(exchange, configs, deterministic=deterministic)
        train(store, [[dealt((bags, weights, grad), 2, exchange.rank)]])
        return store.retention_state(0).default_value

    assert len(bags[3][0]) > 0
    for value in World(2).run(of_rank):
        assert not value.isfinite().any()


def test_counts_are_given_to_all_and_kept_by_one():
    configs = tables(SGD(), admission=COUNTS)
    given = Candidates(torch.arange(40), torch.arange(40) % 3 + 1)

    def of_rank(exchange):
        store = sharded(exchange, configs)
        store.import_candidates(1, given)
        return store

    made = World(3).run(of_rank)
    pairs = zip(given.keys.tolist(), given.counts.tolist(), strict=True)
    assert counted(made, configs) == {(1, key): count for key, count in pairs}
    assert min(store.num_candidates(1) for store in made) > 0


def test_nothing_more_travels_where_no_table_refuses_keys():
    def messages(configs):
        def of_rank(exchange):
            sent = []
            combined = exchange.combined
            exchange.combined = lambda call, numbers, **how: (
                sent.append((call, tuple(numbers.shape))) or combined(call, numbers, **how)
            )
            store = sharded(exchange, configs)
            step = samples(5, 0, weighted=False)
            lookup = store.pooled_lookup(
                PLAN, packed(*step[:2]), insert=True, out=torch.empty(5, PLAN.stride)
            )
            store.apply_gradients(PLAN, [PooledGradient(lookup, None, step[2])], 0)
            return sent

        return World(2).run(of_rank)

    assert messages(tables(SGD(), eviction=Eviction(ttl=3))) == [[], []]
    small = [("update", (4,)), ("update", (3, DIM + 1))]
    assert messages(tables(SGD(), admission=COUNTS)) == [small, small]


BY_KEY = PoolingPlan.by_key(3, DIM)
KEYS = torch.tensor([1, 2, 1, 3, 5, 5, 2**63 - 1, -(2**63), 9])
OFFSETS = torch.tensor([0, 4, 4, 9])


def look_up(store, *, insert=True):
    batch = KeyedJagged(("a", "b", "c"), KEYS, OFFSETS)
    return store.pooled_lookup(BY_KEY, batch, insert=insert, out=torch.empty(len(KEYS), DIM))


@pytest.mark.parametrize("insert", [False, True])
def test_keys_that_read_the_default_row_are_known(open_store, insert):  # noqa: F811
    """Of table `a` 1 comes twice, of `c` 5."""
    store = open_store(tables(SGD(), admission=AdmitFrequent(min_count=2)))
    reads = look_up(store, insert=insert).reads_default().cpu()
    twice = torch.tensor([0, 2, 4, 5])
    wanted = torch.ones(len(KEYS), dtype=torch.bool)
    if insert:
        wanted[twice] = False
    assert torch.equal(reads, wanted)
    plain = open_store(tables(SGD()))
    assert not look_up(plain, insert=insert).reads_default().any()


@pytest.mark.parametrize("value_type", ["float32", "bfloat16"])
def test_default_rows_take_what_they_are_given(open_store, value_type):  # noqa: F811
    """In place of what the gradients say of them; also a table without a key here."""
    rule = Adam(learning_rate=0.5)
    configs = tables(rule, admission=AdmitFrequent(min_count=2), dtype=value_type)
    rng = np.random.default_rng(0)
    grad = torch.from_numpy(rng.standard_normal((len(KEYS), DIM)).astype(np.float32))
    sums = torch.from_numpy(rng.standard_normal((3, DIM)).astype(np.float32))
    sums[1] = 0.0
    touched = torch.tensor([False, True, True])
    made = []
    for store in (open_store(configs), DictStore(configs)):
        store.advance(Clock(0, 0))
        parts = [PooledGradient(look_up(store), None, grad)]
        device = getattr(store, "device", torch.device("cpu"))
        defaults = DefaultGradients(sums.to(device), touched.to(device))
        assert int(store.apply_gradients(BY_KEY, parts, 0, 0.5, defaults)) == 2
        store.check_invariants()
        rows = {table: store.find(table, KEYS) for table in (0, 2)}
        made.append((store, rows))
    store, oracle = made[0][0], made[1][0]
    # One place of bfloat16: the oracle's numbers before rounding are of float64.
    near = {"rtol": 1e-2 if value_type == "bfloat16" else 1e-5, "atol": 1e-6}
    for table in range(3):
        mine, wanted = store.retention_state(table), oracle.retention_state(table)
        torch.testing.assert_close(mine.default_value, wanted.default_value, **near)
        torch.testing.assert_close(mine.default_state, wanted.default_state, **near)
    for table in (0, 2):
        mine, wanted = made[0][1][table], made[1][1][table]
        torch.testing.assert_close(mine.values, wanted.values, **near)
    assert not store.retention_state(0).default_value.any()
    assert store.retention_state(2).default_value.all()


def test_what_the_default_row_takes_is_not_rounded():
    """A column that is small beside another's: fixed point of one share would cut it off."""
    configs = tables(SGD(learning_rate=1.0), admission=AdmitFrequent(min_count=2))
    store = HostStore(configs, deterministic=True)
    sums = torch.zeros(3, DIM)
    sums[2] = torch.tensor([2.0**20, 2.0**-30 * 1.25, -(2.0**-40) * 1.5, 1.0, 0.0])
    parts = [PooledGradient(look_up(store), None, torch.ones(len(KEYS), DIM))]
    defaults = DefaultGradients(sums, torch.tensor([False, False, True]))
    store.apply_gradients(BY_KEY, parts, 0, 1.0, defaults)
    assert torch.equal(store.retention_state(2).default_value, -sums[2])


def test_keys_that_are_counted_again_after_their_rows_were_erased(open_store):  # noqa: F811
    """They got rows by their counts, lost them, and came again: exported once, halved once."""
    rule = AdmitFrequent(min_count=3, half_life_steps=5)
    store = open_store(tables(SGD(), admission=rule))
    again, later = [1, 2, 3], [4, 5, 6]
    for step, keys in enumerate([again, 2 * again, 2 * again, 2 * later]):
        store.advance(Clock(step, 0))
        store.find_or_insert(0, torch.tensor(keys))
        if step == 1:
            assert store.erase(0, torch.tensor(again)) == 3
    for step, count in ((3, 2), (5, 1)):
        store.advance(Clock(step, 0))
        store.check_invariants()
        keys, counts = store.export_candidates(0, CURSOR_START, 99)[0]
        assert sorted(keys.tolist()) == again + later
        assert set(counts.tolist()) == {count}
