"""The learning rate of a table may change while it is trained, in every store."""

import pytest
import torch

from penstock.config import SGD, Adam, Constant, Schedule, TableConfig
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan
from penstock.errors import ConfigError
from penstock.types import Jagged, KeyedJagged
from tests.contract.test_store_contract import open_store

__all__ = ["open_store"]

PLAN = PoolingPlan((PooledFeature(0, 0, "sum", 0), PooledFeature(1, 1, "sum", 2)), 4)
ZEROS = Constant(value=0.0)


def tables_of(optimizer):
    return [TableConfig(name=n, dim=2, optimizer=optimizer, initializer=ZEROS) for n in "ab"]


def look_up(store, plan=PLAN):
    batch = KeyedJagged.pack({
        "f": Jagged.from_dense(torch.tensor([5, 6, 5])),
        "g": Jagged.from_dense(torch.tensor([5, 7, 8])),
    })
    out = torch.empty(3, plan.stride)
    return PooledGradient(
        store.pooled_lookup(plan, batch, insert=True, out=out), batch, torch.ones(3, plan.stride)
    )


def values(store, table):
    return store.find(table, torch.tensor([5, 6, 7, 8])).values[:, 0].tolist()


def test_the_next_update_has_the_new_rate_of_that_table_alone(open_store):
    store = open_store(tables_of(SGD(learning_rate=0.5)))
    store.apply_gradients(PLAN, [look_up(store)], 0)
    assert values(store, 0) == [-1.0, -0.5, 0, 0] and values(store, 1) == [-0.5, 0, -0.5, -0.5]
    # A look-up from before: what it knows of its rows was made for one rate.
    pending = look_up(store)
    store.set_learning_rate(1, 0.25)
    assert [table.optimizer.learning_rate for table in store.tables] == [0.5, 0.25]
    store.apply_gradients(PLAN, [pending], 1)
    assert values(store, 0) == [-2.0, -1.0, 0, 0] and values(store, 1) == [-0.75, 0, -0.75, -0.75]
    store.set_learning_rate(0, 0.25)
    store.apply_gradients(PLAN, [look_up(store)], 2, 2.0)
    assert values(store, 0) == [-3.0, -1.5, 0, 0] and values(store, 1) == [-1.25, 0, -1.25, -1.25]


def test_the_schedule_goes_on_with_the_new_rate(open_store):
    schedule = Schedule(decay="linear", decay_steps=4)
    store = open_store(tables_of(SGD(learning_rate=8.0, schedule=schedule)))
    twin = open_store(tables_of(SGD(learning_rate=4.0, schedule=schedule)))
    store.set_learning_rate(0, 4.0)
    store.set_learning_rate(1, 4.0)
    for step in range(4):
        for each in (store, twin):
            each.apply_gradients(PLAN, [look_up(each)], step)
        assert values(store, 0) == values(twin, 0)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(open_store, rate):
    store = open_store(tables_of(Adam()))
    with pytest.raises(ConfigError, match="learning_rate"):
        store.set_learning_rate(0, rate)
    with pytest.raises(ConfigError, match="2"):
        store.set_learning_rate(2, 0.1)
    assert store.tables[0].optimizer == Adam()
