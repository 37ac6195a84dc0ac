"""A look-up owns what its update needs, and what does not belong together is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from penstock import _core
from penstock.config import SGD, Adagrad, AdmitFrequent, Constant, Eviction, TableConfig
from penstock.embedding.host_store import HostStore, raise_for
from penstock.embedding.store import (
    CURSOR_START,
    Candidates,
    PooledFeature,
    PooledGradient,
    PoolingPlan,
    TableRows,
)
from penstock.errors import CapacityError, ConfigError, PartialUpdateError, StaleExportError
from penstock.types import Jagged, KeyedJagged
from tests.contract.stores import WITHOUT_TRITON, OnCpu, open_store, skip_in_interpreter

__all__ = ["open_store"]
DIM = 3
PLAN = PoolingPlan((PooledFeature(0, 0, "sum", 0), PooledFeature(1, 1, "mean", DIM)), 2 * DIM)
SEQUENCE = PoolingPlan(
    (PooledFeature(0, 0, "sequence", 0, 4), PooledFeature(1, 1, "sqrt_n", 4 * DIM)), 5 * DIM
)


def tables(**fields):
    return [
        TableConfig(name=name, dim=DIM, optimizer=Adagrad(learning_rate=0.1), **fields)
        for name in "ab"
    ]


def bags(kind):
    rng = np.random.default_rng(3)
    columns = {}
    for name in ("f", "g"):
        lengths = np.ones(20, np.int64) if kind == "one key a bag" else rng.integers(0, 5, 20)
        keys = torch.from_numpy(rng.integers(0, 15, lengths.sum()))
        weights = torch.from_numpy(rng.standard_normal(len(keys)).astype(np.float32))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        columns[name] = Jagged(keys, offsets, weights if kind == "weighted" else None)
    return KeyedJagged.pack(columns)


def overwrite(batch):
    batch.values.fill_(-1)
    batch.offsets.mul_(2**40)
    if batch.weights is not None:
        batch.weights.fill_(float("nan"))


@pytest.mark.parametrize("is_erased", [False, True])
@pytest.mark.parametrize(
    ("kind", "plan"),
    [("one key a bag", PLAN), ("bags", PLAN), ("weighted", PLAN), ("bags", SEQUENCE)],
)
def test_a_batch_may_be_overwritten_after_its_lookup(open_store, kind, plan, is_erased):
    if not (kind == "weighted" and is_erased):
        skip_in_interpreter(open_store, kind)
    # Without rules keys that are on the store's device are not copied; see the next test.
    rules = {"eviction": Eviction(ttl=100)} if open_store is OnCpu and is_erased else {}
    # On a GPU the order of other sums is left to the hardware.
    options = {"deterministic": True} if open_store is OnCpu else {}
    results = []
    for is_overwritten in (False, True):
        store = open_store(tables(**rules), seed=1, **options)
        gradients = []
        for turn in range(2):
            batch = bags(kind)
            grad = torch.randn(20, plan.stride, generator=torch.Generator().manual_seed(turn))
            lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(20, plan.stride))
            gradients.append(PooledGradient(lookup, batch, grad))
            if is_overwritten:
                overwrite(batch)
        if is_erased:
            assert int(store.erase(0, torch.arange(7))) > 0
        store.apply_gradients(plan, gradients, 0)
        store.check_invariants()
        results.append([store.find(table, torch.arange(-1, 15)) for table in range(2)])
    for one, other in zip(*results, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rules", [{}, {"eviction": Eviction(ttl=100)}])
@WITHOUT_TRITON
def test_a_batch_on_the_device_may_be_overwritten_too(rules):
    """One key a bag, so that nothing is copied that need not be."""
    results = []
    for is_overwritten in (False, True):
        store = OnCpu(tables(**rules), seed=1)
        device = store.store.device
        gradients = []
        for turn in range(2):
            batch = bags("one key a bag").to(device)
            batch = replace(batch, is_checked=True, is_one_hot=True)
            lookup = store.pooled_lookup(PLAN, batch, insert=True, out=torch.empty(20, 6))
            gradients.append(PooledGradient(lookup, batch, torch.full((20, 6), 1.0 + turn)))
            if is_overwritten:
                overwrite(batch)
        if rules:
            store.erase(0, torch.arange(7))
        store.apply_gradients(PLAN, gradients, 0)
        results.append(store.find(0, torch.arange(-1, 15)))
        if not rules and is_overwritten:
            again = replace(bags("bags").to(device), is_checked=True)
            lookup = store.pooled_lookup(PLAN, again, insert=True, out=torch.empty(20, 6))
            overwrite(again)
            store.erase(0, torch.arange(7))
            with pytest.raises(ConfigError, match="keys on a GPU were changed"):
                store.apply_gradients(PLAN, [PooledGradient(lookup, None, torch.ones(20, 6))], 1)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def looked_up(store, plan=PLAN, kind="bags"):
    batch = bags(kind)
    lookup = store.pooled_lookup(plan, batch, insert=True, out=torch.empty(20, plan.stride))
    return PooledGradient(lookup, batch, torch.ones(20, plan.stride))


def short(batch):
    offsets = batch.offsets[::2].contiguous()
    return KeyedJagged(batch.features, batch.values, offsets)


OTHER_PLAN = PoolingPlan((PooledFeature(0, 1, "sum", 0), PooledFeature(1, 0, "mean", DIM)), 2 * DIM)
WRONG = {
    "rows": (lambda part, _: part._replace(grad=torch.ones(4, 6)), r"float32 \[20, 6\].*\[4, 6\]"),
    "columns": (lambda part, _: part._replace(grad=torch.ones(20, 5)), r"got torch.float32 \[20"),
    "flat": (lambda part, _: part._replace(grad=torch.ones(120)), r"got torch.float32 \[120\]"),
    "dtype": (lambda part, _: part._replace(grad=part.grad.double()), "got torch.float64"),
    "strided": (
        lambda part, _: part._replace(grad=torch.ones(20, 12)[:, ::2]),
        r"not contiguous; use grad.contiguous\(\)",
    ),
    "expanded": (
        lambda part, _: part._replace(grad=torch.ones(1, 1).expand(20, 6)),
        "not contiguous",
    ),
    "samples": (lambda part, _: part._replace(batch=short(part.batch)), "batch is not the one"),
    "weights": (lambda part, _: part._replace(batch=bags("weighted")), "batch is not the one"),
    "keys": (lambda part, _: part._replace(batch=bags("one key a bag")), "batch is not the one"),
    "no look-up": (lambda part, _: part._replace(lookup=object()), "did not make, but a object"),
    "store": (lambda _, other: looked_up(other), "did not make, but another one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_gradients_that_do_not_belong_are_refused(open_store, name):
    change, message = WRONG[name]
    if name not in {"rows", "store"}:
        skip_in_interpreter(open_store, name)
    store, other = open_store(tables(), seed=1), open_store(tables(), seed=1)
    part = looked_up(store)
    before = store.find(0, torch.arange(15))
    # Beside a right one: of neither a row is changed.
    for refused in (store.check_gradients, lambda *given: store.apply_gradients(*given, 0)):
        with pytest.raises(ConfigError, match=message):
            refused(PLAN, [part, change(looked_up(store), other)])
    after = store.find(0, torch.arange(15))
    assert torch.equal(before.values, after.values)
    assert int(store.apply_gradients(PLAN, [part], 0)) > 0


def test_a_lookup_is_applied_once_and_by_its_own_plan(open_store):
    store = open_store(tables())
    part = looked_up(store)
    with pytest.raises(ConfigError, match="by another plan"):
        store.apply_gradients(OTHER_PLAN, [part], 0)
    with pytest.raises(ConfigError, match="is given twice"):
        store.apply_gradients(PLAN, [part, part], 0)
    store.apply_gradients(PoolingPlan(PLAN.features, PLAN.stride), [part], 0)
    with pytest.raises(ConfigError, match="has been applied before"):
        store.apply_gradients(PLAN, [part], 1)


LONGER = PoolingPlan(
    (PooledFeature(0, 0, "sequence", 1, 7), PooledFeature(1, 1, "sqrt_n", 7 * DIM + 2)), 9 * DIM
)


def in_layout(grad, plan):
    """The gradient of `SEQUENCE`, where another plan of the same features has its columns."""
    moved = torch.full((len(grad), plan.stride), float("nan"))
    for here, there in zip(SEQUENCE.features, plan.features, strict=True):
        width = DIM * (here.max_keys or 1)
        part = grad[:, here.column : here.column + width]
        moved[:, there.column : there.column + width] = part
    return moved


@pytest.mark.parametrize("kind", ["one key a bag", "weighted"])
def test_one_update_takes_lookups_of_several_layouts(open_store, kind):
    if kind == "weighted":
        skip_in_interpreter(open_store, kind)
    results = []
    for plans in ([SEQUENCE, SEQUENCE], [SEQUENCE, LONGER], [LONGER, SEQUENCE]):
        store = open_store(tables(), seed=1)
        gradients = []
        for turn, plan in enumerate(plans):
            grad = torch.randn(20, SEQUENCE.stride, generator=torch.Generator().manual_seed(turn))
            part = looked_up(store, plan, kind)
            gradients.append(part._replace(grad=in_layout(grad, plan)))
        norm = float(store.gradient_norm(plans[0], gradients, 2.0))
        assert int(store.apply_gradients(plans[0], gradients, 0)) > 0
        rows = [store.find(table, torch.arange(15)) for table in range(2)]
        results.append([torch.tensor(norm), *(part for row in rows for part in row)])
    # On a GPU the order of a row's sum is that of slots, which differ from run to run.
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-5, atol=2e-6)


def test_a_lookup_without_rows_may_take_a_gradient(open_store):
    store = open_store(tables(initializer=Constant(value=1.0)))
    batch = bags("bags")
    lookup = store.pooled_lookup(PLAN, batch, insert=False, out=torch.empty(20, 6))
    assert lookup.num_missing == batch.values.numel()
    overwrite(batch)
    rows = store.apply_gradients(PLAN, [PooledGradient(lookup, None, torch.ones(20, 6))], 0)
    assert int(rows) == store.num_rows(0) + store.num_rows(1) > 0


PLANS = {
    "table": (PoolingPlan((PooledFeature(0, 2, "sum", 0),), DIM), "tables up to 0 and 2"),
    "feature": (PoolingPlan((PooledFeature(2, 0, "sum", 0),), DIM), "tables up to 2 and 0"),
    "column": (PoolingPlan((PooledFeature(0, 0, "sum", 1),), DIM), "ends at column 4 of 3"),
    "positions": (
        PoolingPlan((PooledFeature(0, 0, "sequence", 0, 9),), 8 * DIM),
        "ends at column 27 of 24",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_that_do_not_fit_are_refused(open_store, name):
    plan, message = PLANS[name]
    with pytest.raises(ConfigError, match=message):
        open_store(tables()).pooled_lookup(
            plan, bags("bags"), insert=True, out=torch.empty(20, plan.stride)
        )


@pytest.mark.parametrize(
    "fields",
    [(-1, 0, "sum", 0), (0, -1, "sum", 0), (0, 0, "sum", -1), (0, 0, "sum", 0, 3)],
)
def test_plans_that_cannot_be_are_refused(fields):
    with pytest.raises(ConfigError, match="not possible"):
        PoolingPlan((PooledFeature(*fields),), 8)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(19, 6), r"\[20, 6\] on .*, got torch.float32 \[19, 6\]"),
        (torch.empty(20, 6, dtype=torch.float64), "got torch.float64"),
        (torch.empty(6, 20).t(), "expected contiguous float32"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(open_store, out, message):
    with pytest.raises(ConfigError, match=message):
        open_store(tables()).pooled_lookup(PLAN, bags("bags"), insert=True, out=out)


# --- offsets -------------------------------------------------------------------------------------

BAGS = 100_000
"""More than three tasks of the check."""


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("each", [1, 2, 0])
@pytest.mark.parametrize(
    "place", [1, 2, 17, 32_767, 32_768, 32_769, 65_535, 65_536, 65_537, 99_998, 99_999]
)
def test_falling_offsets_are_refused_in_every_position(threads, each, place):
    """Of bags of one key each, where sizes that differ are found by comparing bits, and others."""
    offsets = torch.arange(BAGS + 1) * each
    if each == 0:
        offsets[place:] = 3
        offsets[place + 1 :] = 2
    else:
        offsets[place] = offsets[place + 1] + 1
    keys = torch.zeros(int(offsets[-1]), dtype=torch.int64)
    store = HostStore([TableConfig(name="a", dim=1, optimizer=SGD())], num_threads=threads)
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 1)
    with pytest.raises(ConfigError, match="must rise"):
        store.pooled_lookup(
            plan, KeyedJagged(("f",), keys, offsets), insert=True, out=torch.empty(BAGS, 1)
        )
    assert store.num_rows(0) == 0


@pytest.mark.parametrize(
    "offsets", [[1, 2, 3], [0, 1, 2], [0, 1, 4], [-1, 1, 3], [0, 4, 3], [0, -1, 3], [3, 2, 3]]
)
def test_offsets_that_are_wrong_are_refused_by_every_store(open_store, offsets):
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), DIM)
    batch = KeyedJagged(("f",), torch.arange(3), torch.tensor(offsets))
    with pytest.raises(ConfigError, match="must rise from 0 to the number of keys"):
        open_store(tables()).pooled_lookup(plan, batch, insert=True, out=torch.empty(2, DIM))


# --- exports -------------------------------------------------------------------------------------


def update(store, part):
    store.apply_gradients(PLAN, [part], 0)


def assign(store, _=None):
    keys = torch.arange(3)
    usage = torch.zeros(3, 1, dtype=torch.int64) if store.layout.usage_dim else None
    store.insert_or_assign(0, TableRows(keys, torch.ones(3, DIM), torch.ones(3, DIM), usage))


CHANGES = {
    "update": update,
    "assign": assign,
    "erase": lambda store, _: store.erase(0, torch.tensor([2])),
    "insert": lambda store, _: store.find_or_insert(0, torch.tensor([99])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_export_across_a_change_is_refused(open_store, change):
    if change not in {"update", "assign"}:
        skip_in_interpreter(open_store, change)
    store = open_store(tables())
    for table in range(2):
        store.find_or_insert(table, torch.arange(15))
    part = looked_up(store)
    _, cursor = store.export_batch(0, CURSOR_START, 4)
    store.find(0, torch.arange(30))
    store.pooled_lookup(PLAN, bags("bags"), insert=False, out=torch.empty(20, 6))
    rows, cursor = store.export_batch(0, cursor, 4)
    assert len(rows.keys)
    _, end = store.export_batch(0, cursor, 100)
    assert not len(store.export_batch(0, end, 4)[0].keys)
    CHANGES[change](store, part)
    for stale in (cursor, end):
        with pytest.raises(StaleExportError, match="begin the export again"):
            store.export_batch(0, stale, 4)
    store.export_batch(0, CURSOR_START, 4)


@pytest.mark.parametrize("change", ["update", "assign", "count"])
def test_an_export_of_counts_across_a_change_is_refused(open_store, change):
    if change != "update":
        skip_in_interpreter(open_store, change)
    counted = tables(admission=AdmitFrequent(min_count=3), eviction=Eviction(ttl=1000))
    store = open_store(counted)
    assign(store)
    counts = Candidates(torch.arange(10, 30), torch.ones(20, dtype=torch.int64))
    store.import_candidates(0, counts)
    part = looked_up(store)
    _, cursor = store.export_candidates(0, CURSOR_START, 4)
    if change == "update":
        store.apply_gradients(PLAN, [part], 0)
    elif change == "assign":
        assign(store)
    else:
        store.import_candidates(0, counts)
    with pytest.raises(StaleExportError, match="begin the export again"):
        store.export_candidates(0, cursor, 4)


def test_what_the_core_says_of_an_update_reaches_whoever_called():
    """Half an update is no plain lack of memory: it must not be tried again."""
    store = HostStore(tables())
    for status, error, words in (
        (_core.Status.HALF_UPDATED, PartialUpdateError, "others have not; go on from a checkpoint"),
        (_core.Status.NO_WORKING_MEMORY, CapacityError, "no working memory for an update"),
        (_core.Status.NO_THREADS, CapacityError, "the system starts no more threads"),
        (_core.Status.TOO_MANY_ROWS, CapacityError, r"and a store takes 2\^32 - 1"),
        (_core.Status.STALE_CURSOR, StaleExportError, "begin the export again"),
    ):
        with pytest.raises(error, match=words) as caught:
            raise_for(store, status, "an update")
        assert type(caught.value) is error


@pytest.mark.parametrize(
    "offsets", [[0, 1, 2, 8], [0, 1, 2, 2], [1, 1, 2, 3], [0, 2, 2, 3, 4], [7]]
)
def test_offsets_that_are_nearly_those_of_one_key_a_bag(offsets):
    """A batch whose bags have one key each needs no offsets; whether it is one is looked at."""
    store = HostStore([TableConfig(name="a", dim=1)])
    plan = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 1)
    size = len(offsets) - 1
    batch = KeyedJagged(("f",), torch.arange(size), torch.tensor(offsets))
    out = torch.full((size, 1), 7.0)
    if offsets == [0, 2, 2, 3, 4]:  # right, but not one each
        store.pooled_lookup(plan, batch, insert=True, out=out)
        assert float(out[1]) == 0.0
        return
    with pytest.raises(ConfigError, match="must rise from 0 to the number of keys"):
        store.pooled_lookup(plan, batch, insert=True, out=out)
    assert store.num_rows(0) == 0
