"""An update that is told to do nothing, by a flag on the device, in every store."""

import pytest
import torch

from penstock.config import LAMB, SGD, Adagrad, Adam, AdmitFrequent, Eviction, TableConfig
from penstock.embedding.dict_store import DictStore
from penstock.embedding.store import CURSOR_START, PooledFeature, PooledGradient, PoolingPlan
from penstock.types import Jagged, KeyedJagged
from tests.contract.stores import ON_GPU, WITHOUT_TRITON, is_slow, open_store, skip_in_interpreter
from tests.contract.test_sharded_store import sharded, sharded_on_gpu
from tests.world.ranks import World

__all__ = ["open_store"]

PLAN = PoolingPlan((PooledFeature(0, 0, "sum", 0), PooledFeature(1, 1, "mean", 3)), 6)
RULES = {
    "plain": {"optimizer": Adam(learning_rate=0.1)},
    "narrow": {"optimizer": Adagrad(learning_rate=0.1), "dtype": "bfloat16"},
    "clipped": {"optimizer": LAMB(learning_rate=0.1, clip_norm=0.5)},
    "refused": {
        "optimizer": SGD(learning_rate=0.1),
        "admission": AdmitFrequent(min_count=3),
        "eviction": Eviction(order="lfu", half_life=10),
        "max_bytes": 4000,
    },
}


def tables(rule):
    return [TableConfig(name=name, dim=3, **RULES[rule]) for name in "ab"]


def update(store, step, skip=None, *, bad=False):
    """One step on keys of which one occurs in most samples, and one is that of the step alone."""
    keys = torch.tensor([[7, 7, 8], [7, step, 9], [7, 9, -1], [7, 7, 7]])
    batch = KeyedJagged.pack({name: Jagged.from_dense(keys) for name in "fg"})
    lookup = store.pooled_lookup(PLAN, batch, insert=True, out=torch.empty(4, 6))
    grad = torch.linspace(-1, 1, 24).reshape(4, 6) * (step + 1)
    if bad:
        grad[0] = torch.nan
    return int(store.apply_gradients(PLAN, [PooledGradient(lookup, batch, grad)], step, skip=skip))


def contents(store):
    """All rows with their states and marks, and default rows."""
    found = []
    for table in range(2):
        rows, _ = store.export_batch(table, CURSOR_START, 1000)
        order = rows.keys.argsort()
        found += [part[order].cpu() for part in rows if part is not None]
    return [*found, *defaults(store)]


def defaults(store):
    states = [store.retention_state(table) for table in range(2)]
    return [part.cpu().clone() for one in states for part in (one.default_value, one.default_state)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_changes(open_store, rule, deterministic):
    if deterministic and open_store is DictStore:
        pytest.skip("it has one order of sums")
    options = {"deterministic": True} if deterministic else {}
    if rule != ("refused" if deterministic else "plain"):
        skip_in_interpreter(open_store, "four rules in two modes")
    store = open_store(tables(rule), **options)
    # So often that the skipped ones, of the same keys, make no row.
    for step in (0, 2, 2, 2):
        assert update(store, step) > 0
    before = contents(store)
    assert update(store, 2, torch.tensor(1.0), bad=True) == 0
    assert update(store, 2, torch.tensor(1.0)) == 0
    after = contents(store)
    assert all(map(torch.equal, before, after))
    store.check_invariants()
    assert update(store, 2, torch.tensor(0.0)) > 0
    assert not all(map(torch.equal, before, contents(store)))


@pytest.mark.parametrize("rule", RULES)
def test_told_to_go_on_it_has_the_bits_of_an_update_that_is_told_nothing(open_store, rule):
    if rule in {"narrow", "clipped"}:
        skip_in_interpreter(open_store, "four rules")
    told, plain = open_store(tables(rule)), open_store(tables(rule))
    for step in range(1 if is_slow(open_store) else 4):
        assert update(told, step, torch.tensor(0.0)) == update(plain, step)
    assert all(map(torch.equal, contents(told), contents(plain)))


@pytest.mark.parametrize("made", [sharded, pytest.param(sharded_on_gpu, marks=WITHOUT_TRITON)])
def test_over_ranks_default_rows_do_not_change_either(made):
    """Which each rank has a copy of, and steps by itself."""

    def act(exchange):
        options = {}
        if made is sharded_on_gpu and not ON_GPU:
            options = {"device": "cpu", "max_bytes": 1 << 21}
        store = made(exchange, tables("refused"), **options)
        update(store, 0)
        before = defaults(store)
        assert before[0].any(), "no key was refused"
        rows = update(store, 0, torch.tensor(1.0), bad=True)
        skipped = defaults(store)
        update(store, 1, torch.tensor(0.0))
        return before, rows, skipped, defaults(store)

    for before, rows, skipped, after in World(2).run(act):
        assert rows == 0 and all(map(torch.equal, before, skipped))
        assert not torch.equal(before[0], after[0])
