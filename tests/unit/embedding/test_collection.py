import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import penstock.embedding.collection.collection as collection_module
from penstock.config import SGD, Adagrad, Adam, FeatureConfig, RowWiseAdagrad, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.embedding.store import TableRows
from penstock.errors import ConfigError
from penstock.types import FeatureShape, Jagged, KeyedJagged

TABLES = [
    TableConfig(name="user", dim=4, optimizer=SGD(learning_rate=0.1)),
    TableConfig(name="item", dim=8, optimizer=Adagrad(learning_rate=0.1)),
]
FEATURES = [
    FeatureConfig(name="u", table="user"),
    FeatureConfig(name="clicked", table="item", pooling="mean"),
    FeatureConfig(name="shown", table="item"),
]
BAGS = KeyedJagged.pack({
    "u": Jagged.from_dense(torch.tensor([3, -5, 3])),
    "clicked": Jagged(torch.tensor([1, 2, 2, 9]), torch.tensor([0, 3, 3, 4])),
    "shown": Jagged(torch.tensor([9, 2**63 - 1]), torch.tensor([0, 1, 2, 2])),
})


def test_outputs_lie_side_by_side_in_feature_order():
    embeddings = EmbeddingCollection(TABLES, FEATURES)
    shapes = [("u", 4, None), ("clicked", 8, None), ("shown", 8, None)]
    assert embeddings.feature_shapes == tuple(FeatureShape(*shape) for shape in shapes)
    out = embeddings(BAGS)
    assert out.shape == (3, 20)
    assert torch.equal(out[0, :4], out[2, :4])
    assert (out[1, 4:12] == 0).all()
    assert (out[2, 12:] == 0).all()
    assert torch.equal(out[2, 4:12], out[0, 12:])
    assert [stats.rows for stats in embeddings.table_stats()] == [2, 4]
    embeddings.check_invariants()


def twin(embeddings, table, keys, mode):
    """An nn.EmbeddingBag that holds the same rows; key i of `keys` is its row i."""
    (rows,) = embeddings.export_table(table)
    order = [rows.keys.tolist().index(key) for key in keys]
    bag = torch.nn.EmbeddingBag(len(keys), rows.values.shape[1], mode=mode, sparse=True)
    bag.weight.data = rows.values[order].clone()
    return bag


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        (SGD(learning_rate=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Adagrad(learning_rate=0.1, eps=1e-10), lambda p: torch.optim.Adagrad(p, lr=0.1)),
        (Adam(learning_rate=0.01), lambda p: torch.optim.SparseAdam(p, lr=0.01)),
    ],
)
def test_drop_in_for_embedding_bag(rule, optimizer, mode):
    table = TableConfig(name="t", dim=6, optimizer=rule)
    embeddings = EmbeddingCollection([table], [FeatureConfig(name="f", table="t", pooling=mode)])
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**63), 2**63 - 1, 30).tolist()
    embeddings(KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor(keys))}))
    bag = twin(embeddings, "t", keys, mode)
    torch_optimizer = optimizer(bag.parameters())
    for _ in range(100):
        lengths = rng.integers(0, 4, 16)
        rows = torch.from_numpy(rng.integers(0, 30, lengths.sum()))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        grad = torch.from_numpy(rng.standard_normal((16, 6)).astype(np.float32))
        ours = embeddings(KeyedJagged.pack({"f": Jagged(torch.tensor(keys)[rows], offsets)}))
        theirs = bag(rows, offsets[:-1])
        # fp32 sums of up to 3 rows, and 100 fp32 updates in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ours.backward(grad)
        theirs.backward(grad)
        embeddings.apply_gradients()
        torch_optimizer.step()
        torch_optimizer.zero_grad()


def test_evaluation_makes_no_rows_and_counts_missing_keys():
    embeddings = EmbeddingCollection(TABLES, FEATURES)
    trained = EmbeddingCollection(TABLES, FEATURES)(BAGS)
    embeddings.eval()
    assert torch.equal(embeddings(BAGS), trained)
    assert embeddings.num_missing == 9
    embeddings.train()
    with torch.no_grad():
        embeddings(BAGS)
    assert sum(stats.rows for stats in embeddings.table_stats()) == 0


def test_backward_alone_changes_nothing_and_passes_add_up():
    one, two = (EmbeddingCollection(TABLES, FEATURES) for _ in range(2))
    grad = torch.randn(3, 20)
    before = one(BAGS)
    before.backward(grad)
    assert torch.equal(one(BAGS), before)
    one.apply_gradients()
    for _ in range(2):
        two(BAGS).backward(grad / 2)
    two.apply_gradients()
    torch.testing.assert_close(one(BAGS), two(BAGS))
    assert not torch.equal(one(BAGS), before)
    assert (one.step, two.step) == (1, 1)


def test_discarded_gradients_are_not_applied():
    embeddings = EmbeddingCollection(TABLES, FEATURES)
    before = embeddings(BAGS)
    before.sum().backward()
    embeddings.discard_gradients()
    embeddings.apply_gradients()
    assert torch.equal(embeddings(BAGS), before)


def test_outputs_stay_valid_while_they_are_held():
    embeddings = EmbeddingCollection(TABLES, FEATURES)
    held = [embeddings(BAGS) for _ in range(3)]
    copies = [out.clone() for out in held]
    for _ in range(20):
        embeddings(BAGS).backward(torch.ones(3, 20))
        embeddings.apply_gradients()
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))


def test_rows_move_between_collections():
    first, second = (EmbeddingCollection(TABLES, FEATURES, seed=seed) for seed in (1, 2))
    first(BAGS).backward(torch.ones(3, 20))
    first.apply_gradients()
    for table in TABLES:
        for rows in first.export_table(table.name, batch_rows=2):
            assert len(rows.keys) <= 2
            second.import_rows(table.name, rows)
    assert torch.equal(first(BAGS), second(BAGS))


def test_zero_samples_and_zero_features():
    embeddings = EmbeddingCollection(TABLES, FEATURES)
    empty = Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    out = embeddings(KeyedJagged.pack(dict.fromkeys(["u", "clicked", "shown"], empty)))
    assert out.shape == (0, 20)
    out.sum().backward()
    embeddings.apply_gradients()
    nothing = EmbeddingCollection([], [])
    assert nothing(KeyedJagged.pack({})).shape == (0, 0)


def test_a_table_without_features_costs_nothing():
    unused = TableConfig(name="unused", dim=5)
    embeddings = EmbeddingCollection([*TABLES, unused], FEATURES)
    embeddings(BAGS).sum().backward()
    embeddings.apply_gradients()
    assert [stats.rows for stats in embeddings.table_stats()] == [2, 4, 0]


def test_many_tables_of_many_dims_use_one_store_a_layout():
    tables = [
        TableConfig(name=f"t{i}", dim=1 + i % 3, optimizer=RowWiseAdagrad()) for i in range(9)
    ]
    features = [FeatureConfig(name=f"f{i}", table=f"t{i}") for i in range(9)]
    embeddings = EmbeddingCollection(tables, features)
    assert len(embeddings._stores.groups) == 3
    keys = Jagged.from_dense(torch.arange(5))
    out = embeddings(KeyedJagged.pack({feature.name: keys for feature in features}))
    first = 0
    for i, dim in enumerate(shape.width for shape in embeddings.feature_shapes):
        (rows,) = embeddings.export_table(f"t{i}")
        assert torch.equal(out[:, first : first + dim], rows.values[rows.keys.argsort()])
        first += dim


def test_sequences_and_weights_reach_autograd():
    table = TableConfig(name="item", dim=4, optimizer=SGD(learning_rate=1.0))
    features = [
        FeatureConfig(name="one", table="item", pooling="mean"),
        FeatureConfig(name="history", table="item", pooling="sequence", max_keys=3),
    ]
    embeddings = EmbeddingCollection([table], features)
    assert [shape.width for shape in embeddings.feature_shapes] == [4, 12]
    sparse = KeyedJagged.pack({
        "one": Jagged.from_dense(torch.tensor([7, 8, 7])),
        "history": Jagged(
            torch.tensor([7, 9, 9, 5]),
            torch.tensor([0, 3, 3, 4]),
            torch.tensor([1.0, 2.0, 0.0, -1]),
        ),
    })
    assert embeddings.sequence_lengths(sparse).tolist() == [[3], [0], [1]]
    row = {key: embeddings(sparse_of(key))[0, :4] for key in (5, 7, 8, 9)}
    out = embeddings(sparse)
    history = out[:, 4:].view(3, 3, 4)
    assert torch.equal(history[0], torch.stack([row[7], 2 * row[9], 0 * row[9]]))
    assert (history[1] == 0).all()
    assert torch.equal(history[2, 0], -row[5])
    out.backward(torch.ones(3, 16))
    embeddings.apply_gradients()
    steps = {5: -1.0, 7: 3.0, 8: 1.0, 9: 2.0}  # the sums of each key's weights
    for key, step in steps.items():
        after = embeddings(sparse_of(key))[0, :4]
        torch.testing.assert_close(after, row[key] - step, rtol=0, atol=1e-6)


def sparse_of(key):
    keys = Jagged.from_dense(torch.tensor([key]))
    empty = Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    return KeyedJagged.pack({"one": keys, "history": empty})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_no_row_and_no_output(dtype):
    def train():
        embeddings = EmbeddingCollection(TABLES, FEATURES)
        for _ in range(2):
            out = embeddings(BAGS)
            out.square().sum().backward()
            embeddings.apply_gradients()
        rows = [part for table in TABLES for part in rows_of(embeddings, table.name)]
        return [out.detach(), *rows, copy.deepcopy(embeddings)(BAGS).detach()]

    expected = train()
    torch.set_default_dtype(dtype)
    try:
        found = train()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def rows_of(embeddings, table):
    (rows,) = embeddings.export_table(table)
    order = rows.keys.argsort()
    return rows.keys[order], rows.values[order], rows.state[order]


def test_without_sequences_there_are_no_lengths():
    assert EmbeddingCollection(TABLES, FEATURES).sequence_lengths(BAGS).shape == (3, 0)


def test_the_example_of_the_docstring_is_that_of_the_readme():
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", collection_module.__doc__, re.DOTALL).group(1)
    assert source in readme


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: EmbeddingCollection(TABLES, [FeatureConfig(name="u", table="usr")]),
            "feature 'u': no table 'usr'; did you mean 'user'?",
        ),
        (
            lambda: EmbeddingCollection([*TABLES, TABLES[0]], FEATURES),
            "table names must differ; given twice: user",
        ),
        (
            lambda: EmbeddingCollection(TABLES, FEATURES)(KeyedJagged.pack({"u": BAGS["u"]})),
            "the batch has features ['u'], this collection ['u', 'clicked', 'shown'], "
            "in this order",
        ),
        (
            lambda: EmbeddingCollection(TABLES, FEATURES)(
                KeyedJagged(BAGS.features, BAGS.values.int(), BAGS.offsets)
            ),
            "values of the batch: expected contiguous int64 [n] on the CPU, "
            "got torch.int32 [9] on cpu",
        ),
        (
            lambda: EmbeddingCollection(TABLES, FEATURES)(
                KeyedJagged(BAGS.features, BAGS.values[:-1], BAGS.offsets)
            ),
            "offsets of the batch must rise from 0 to the number of keys (8), got 0 to 9",
        ),
        (
            lambda: EmbeddingCollection(TABLES, FEATURES)(
                KeyedJagged(BAGS.features, BAGS.values, BAGS.offsets[:-1])
            ),
            "9 offsets for 3 features: expected features * B + 1",
        ),
        (
            lambda: list(EmbeddingCollection(TABLES, FEATURES).export_table("items")),
            "no table 'items'; did you mean 'item'?",
        ),
        (
            lambda: EmbeddingCollection(TABLES, FEATURES).import_rows(
                "user", TableRows(torch.arange(2), torch.zeros(2, 3), torch.zeros(2, 0))
            ),
            "values: expected torch.float32 of shape [2, 4] on the CPU, "
            "got torch.float32 [2, 3] on cpu",
        ),
    ],
)
def test_wrong_use_is_named(call, message):
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == message
