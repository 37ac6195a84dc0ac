"""Any stream of keys through the collection does what the same collection over dictionaries does.

Gradients are eighths and bags hold 0, 1 or 4 keys, so that sums of gradients are exact in float32,
too: an optimizer that divides by the size of a gradient would make much of a rounding error.
"""

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from penstock.config import (
    FTRL,
    LAMB,
    SGD,
    Adagrad,
    Adam,
    FeatureConfig,
    MomentumSGD,
    RowWiseAdagrad,
    RowWiseAdam,
    TableConfig,
)
from penstock.embedding import EmbeddingCollection
from penstock.embedding.collection import table_stores
from penstock.embedding.dict_store import DictStore
from penstock.embedding.store import TableRows
from penstock.errors import ConfigError
from penstock.types import Jagged, KeyedJagged
from tests.fuzz.effort import effort

FEATURES = ("a", "b", "c")
POOLINGS = ("sum", "mean", "sqrt_n")
RULES = (
    SGD(learning_rate=0.1, weight_decay=0.01),
    MomentumSGD(learning_rate=0.1),
    Adagrad(learning_rate=0.1, eps=1e-3, initial_accumulator=0.1),
    RowWiseAdagrad(learning_rate=0.1, eps=1e-3),
    Adam(learning_rate=0.01, eps=1e-3),
    RowWiseAdam(learning_rate=0.01, eps=1e-3, clip_norm=0.5),
    FTRL(learning_rate=0.1, l1=0.01),
    LAMB(learning_rate=0.01, eps=1e-3),
)
KEYS = st.one_of(
    st.sampled_from([-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1]),
    st.integers(0, 12),
    st.integers(-(2**63), 2**63 - 1),
)
BAGS = st.sampled_from([0, 1, 1, 4]).flatmap(lambda n: st.lists(KEYS, min_size=n, max_size=n))


@st.composite
def batches(draw):
    """A batch of one to five samples, and a gradient for each of its features."""
    samples = draw(st.integers(1, 5))
    columns = {}
    for name in FEATURES:
        bags = [draw(BAGS) for _ in range(samples)]
        offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)
        keys = torch.tensor([key for bag in bags for key in bag], dtype=torch.int64)
        columns[name] = Jagged(keys, offsets)
    eighths = st.integers(-8, 8)
    grads = draw(st.lists(eighths, min_size=3 * samples, max_size=3 * samples))
    return KeyedJagged.pack(columns), torch.tensor(grads).reshape(samples, 3) / 8


OPERATIONS = st.one_of(
    st.tuples(st.just("train"), st.lists(batches(), min_size=1, max_size=2)),
    st.tuples(st.just("evaluate"), batches()),
    st.tuples(st.just("discard"), batches()),
    st.tuples(st.just("import"), st.lists(KEYS, max_size=6), st.sampled_from(["x", "y"])),
    st.tuples(st.just("move")),
)


class OverDictionaries(DictStore):
    """Takes the options of a host store, which change no result."""

    def __init__(self, tables, *, seed=0, num_threads=1, deterministic=False):
        super().__init__(tables, seed=seed)


def make(rules, poolings, tables_of, *, over_dictionaries, threads, deterministic):
    tables = [
        TableConfig(name="x", dim=4, optimizer=rules[0]),
        TableConfig(name="y", dim=3, optimizer=rules[1]),
    ]
    features = [
        FeatureConfig(name=name, table=table, pooling=pooling)
        for name, table, pooling in zip(FEATURES, tables_of, poolings, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        if over_dictionaries:
            patch.setattr(table_stores, "HostStore", OverDictionaries)
        return EmbeddingCollection(
            tables, features, seed=3, num_threads=threads, deterministic=deterministic
        )


def apply(operation, collection):
    """Does one operation; returns what can be seen of it."""
    kind = operation[0]
    if kind == "evaluate":
        collection.eval()
        out = collection(operation[1][0])
        collection.train()
        return out
    if kind in {"train", "discard"}:
        seen = []
        for batch, grads in operation[1] if kind == "train" else [operation[1]]:
            out = collection(batch)
            weights = torch.cat([
                grads[:, f : f + 1].expand(-1, dim) for f, dim in enumerate(widths(collection))
            ], dim=1)  # fmt: skip
            out.backward(weights.contiguous())
            seen.append(out.detach().clone())
        if kind == "discard":
            collection.discard_gradients()
        else:
            collection.apply_gradients()
        return torch.cat(seen)
    if kind == "import":
        _, keys, table = operation
        layout = rows_of(collection, table)
        width, state = layout.values.shape[1], layout.state.shape[1]
        values = torch.arange(len(keys) * width).reshape(-1, width) / 16
        rows = TableRows(
            torch.tensor(keys, dtype=torch.int64), values, torch.ones(len(keys), state)
        )
        return torch.tensor(collection.import_rows(table, rows))
    # Export everything and write it back: nothing may change.
    for table in ("x", "y"):
        rows = rows_of(collection, table)
        assert collection.import_rows(table, rows) == 0
    return torch.zeros(0)


def widths(collection):
    dims = {table.name: table.dim for table in collection.tables}
    return [dims[feature.table] for feature in collection.features]


def rows_of(collection, table):
    """All rows of a table by ascending key."""
    parts = list(collection.export_table(table, batch_rows=3))
    if not parts:
        store, _ = collection._stores.find_table(table)
        empty = torch.zeros(0, dtype=torch.int64)
        layout = store.layout
        return TableRows(empty, torch.zeros(0, layout.dim), torch.zeros(0, layout.state_dim))
    keys = torch.cat([part.keys for part in parts])
    values = torch.cat([part.values for part in parts])
    state = torch.cat([part.state for part in parts])
    order = keys.argsort()
    return TableRows(keys[order], values[order].contiguous(), state[order].contiguous())


@effort(50)
@given(
    rules=st.tuples(st.sampled_from(RULES), st.sampled_from(RULES)),
    poolings=st.tuples(*[st.sampled_from(POOLINGS)] * 3),
    tables_of=st.tuples(*[st.sampled_from(["x", "y"])] * 3),
    operations=st.lists(OPERATIONS, min_size=1, max_size=8),
    threads=st.integers(1, 3),
    deterministic=st.booleans(),
)
def test_streams_of_keys(rules, poolings, tables_of, operations, threads, deterministic):
    options = {"threads": threads, "deterministic": deterministic}
    host = make(rules, poolings, tables_of, over_dictionaries=False, **options)
    oracle = make(rules, poolings, tables_of, over_dictionaries=True, **options)
    for operation in operations:
        event(operation[0])
        got, expected = apply(operation, host), apply(operation, oracle)
        # fp32 against fp64, over at most eight steps
        torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-4, atol=1e-5)
        assert (host.step, host.num_missing) == (oracle.step, oracle.num_missing)
        host.check_invariants()
        for table in ("x", "y"):
            mine, theirs = rows_of(host, table), rows_of(oracle, table)
            assert mine.keys.tolist() == theirs.keys.tolist()
            torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine.state, theirs.state, rtol=1e-4, atol=1e-5)


@effort(60)
@given(
    st.lists(st.integers(-2, 7), min_size=0, max_size=8),
    st.lists(KEYS, max_size=5),
    st.sampled_from([torch.int64, torch.int32, torch.float32]),
    st.booleans(),
)
def test_batches_that_are_none(offsets, keys, kind, training):
    """Offsets that do not rise from 0 to the number of keys, and other types, are refused."""
    rules, poolings = (SGD(), SGD()), ("sum",) * 3
    collection = make(
        rules, poolings, ("x",) * 3, over_dictionaries=False, threads=1, deterministic=False
    )
    collection.train(training)
    values = torch.tensor(keys, dtype=torch.int64).to(kind)
    batch = KeyedJagged(FEATURES, values, torch.tensor(offsets, dtype=torch.int64))
    rises = offsets == sorted(offsets) and offsets[:1] == [0] and offsets[-1] == len(keys)
    is_right = rises and len(offsets) % 3 == 1 and kind == torch.int64
    if is_right:
        assert collection(batch).shape == (len(offsets) // 3, 12)
    else:
        with pytest.raises(ConfigError):
            collection(batch)
        assert sum(stats.rows for stats in collection.table_stats()) == 0
