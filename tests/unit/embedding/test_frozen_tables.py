"""`trainable: false`: a table that training reads and never changes, beside others."""

import copy

import pytest
import torch

from penstock import (
    FTRL,
    SGD,
    Adagrad,
    AdmitFrequent,
    ConfigError,
    EmbeddingCollection,
    Eviction,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    TableConfig,
    TableRows,
)
from tests.contract.stores import ON_GPU

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not ON_GPU, reason="no GPU"))]
FEATURES = [
    FeatureConfig(name="x", table="frozen"),
    FeatureConfig(name="y", table="moving"),
    FeatureConfig(name="z", table="frozen", pooling="mean"),
]
KEYS = torch.tensor([[1, 2], [2, 3], [-5, 1]])
KNOWN = torch.tensor([1, 2])


def collection(*, trainable=False, device="cpu", moving=None, **rules):
    frozen = {"name": "frozen", "dim": 3, "optimizer": Adagrad(learning_rate=0.5), **rules}
    tables = [
        TableConfig(**frozen, trainable=trainable),
        TableConfig(name="moving", dim=3, optimizer=moving or Adagrad(learning_rate=0.5)),
    ]
    return EmbeddingCollection(tables, FEATURES, device=device)


def packed(keys=KEYS):
    return KeyedJagged.pack(dict.fromkeys("xyz", Jagged.from_dense(keys)))


def step(embeddings, keys=KEYS):
    embeddings(packed(keys)).square().sum().backward()
    embeddings.apply_gradients()


def rows(embeddings, table):
    parts = list(embeddings.export_table(table))
    order = torch.cat([part.keys for part in parts]).argsort() if parts else None
    if order is None:
        return []
    columns = zip(*(part[:3] for part in parts), strict=True)
    return [torch.cat(column)[order] for column in columns]


def known(embeddings):
    """Gives the frozen table two rows of its own."""
    before = embeddings.find("frozen", KNOWN)
    values = torch.arange(6.0).view(2, 3)
    embeddings.import_rows("frozen", TableRows(KNOWN, values, before.state + 0.5))
    return rows(embeddings, "frozen")


@pytest.mark.parametrize("device", DEVICES)
def test_training_reads_it_and_changes_nothing(device):
    embeddings = collection(device=device)
    before = known(embeddings)
    moving = embeddings.find("moving", KNOWN).values
    out = embeddings(packed())
    read = embeddings.find("frozen", KEYS.flatten()).values.view(3, 2, 3)
    torch.testing.assert_close(out[:, :3], read.sum(1))
    assert embeddings.num_missing == 4  # -5 and 3, of two features
    for _ in range(3):
        step(embeddings)
    for found, expected in zip(rows(embeddings, "frozen"), before, strict=True):
        assert torch.equal(found, expected)
    assert len(rows(embeddings, "moving")[0]) == 4
    assert not torch.equal(embeddings.find("moving", KNOWN).values, moving)
    assert embeddings.step == 3


@pytest.mark.parametrize("is_weighted", [False, True])
def test_other_tables_learn_as_without(is_weighted):
    """The frozen table's part of the gradient goes nowhere, the others' where it went."""
    alone = EmbeddingCollection(
        [TableConfig(name="moving", dim=3, optimizer=Adagrad(learning_rate=0.5))],
        [FEATURES[1]],
    )
    beside = collection()
    weights = torch.tensor([0.5, 2.0, 1.0, -1.0, 3.0, 0.0]) if is_weighted else None
    bags = Jagged.from_dense(KEYS)._replace(weights=weights)
    for _ in range(3):
        out = beside(KeyedJagged.pack(dict.fromkeys("xyz", bags)))
        out.square().sum().backward()
        beside.apply_gradients()
        alone(KeyedJagged.pack({"y": bags})).square().sum().backward()
        alone.apply_gradients()
    for found, expected in zip(rows(beside, "moving"), rows(alone, "moving"), strict=True):
        assert torch.equal(found, expected)


def test_rows_neither_age_nor_come_nor_are_counted():
    rules = {
        "eviction": Eviction(ttl=2),
        "admission": AdmitFrequent(min_count=2),
    }
    embeddings = collection(**rules)
    before = known(embeddings)
    state = embeddings.retention_state("frozen")
    for _ in range(6):
        step(embeddings)
    for found, expected in zip(rows(embeddings, "frozen"), before, strict=True):
        assert torch.equal(found, expected)
    after = embeddings.retention_state("frozen")
    assert after.numbers == state.numbers
    assert torch.equal(after.default_value, state.default_value)
    assert not list(embeddings.export_candidates("frozen"))


def test_all_tables_may_be_frozen():
    embeddings = EmbeddingCollection(
        [TableConfig(name="frozen", dim=3, trainable=False)], [FEATURES[0]]
    )
    for _ in range(2):
        embeddings(KeyedJagged.pack({"x": Jagged.from_dense(KEYS)})).sum().backward()
        embeddings.apply_gradients()
    assert not rows(embeddings, "frozen")
    head = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    embeddings.attach(optimizer)
    before = head.weight.clone()
    head(embeddings(KeyedJagged.pack({"x": Jagged.from_dense(KEYS)}))).sum().backward()
    assert float(embeddings.gradient_norm()) == 0
    optimizer.step()
    assert not torch.equal(head.weight, before)


def test_a_state_moves_between_frozen_and_not():
    trained = collection(trainable=True)
    step(trained)
    frozen = collection()
    frozen.load_state_dict(trained.state_dict())
    before = rows(frozen, "frozen")
    assert all(torch.equal(*pair) for pair in zip(before, rows(trained, "frozen"), strict=True))
    step(copy.deepcopy(frozen))
    step(frozen)
    assert all(torch.equal(*pair) for pair in zip(before, rows(frozen, "frozen"), strict=True))
    again = collection(trainable=True)
    again.load_state_dict(frozen.state_dict())
    step(again)
    assert not torch.equal(rows(again, "frozen")[1], before[1])


def test_attached_its_learning_rate_does_not_count():
    embeddings = collection(moving=SGD(learning_rate=0.125))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    embeddings.attach(optimizer)
    assert optimizer.param_groups[-1]["lr"] == 0.125
    ftrl = collection(optimizer=FTRL())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    ftrl.attach(optimizer)
    optimizer.param_groups[-1]["lr"] = 0.0
    ftrl(packed()).sum().backward()
    optimizer.step()


def test_its_gradients_norm_does_not_count():
    embeddings = collection()
    out = embeddings(packed())
    (out * torch.tensor([100.0, 1.0, 100.0]).repeat_interleave(3)).sum().backward()
    alone = collection(trainable=True)
    out = alone(packed())
    (out * torch.tensor([0.0, 1.0, 0.0]).repeat_interleave(3)).sum().backward()
    assert float(embeddings.gradient_norm()) == float(alone.gradient_norm()) > 0


def test_nothing_needs_another_layout():
    """Tables of one layout share a store with those trained alike."""
    embeddings = EmbeddingCollection(
        [
            TableConfig(name="frozen", trainable=False),
            TableConfig(name="moving"),
            TableConfig(name="more", trainable=False),
        ],
        FEATURES,
    )
    groups = embeddings._stores.groups
    assert (
        [[table.name for table in group.store.tables] for group in groups]
        == [[table.name for table in group.store.tables] for group in embeddings._stores.groups]
        == [
            ["frozen", "more"],
            ["moving"],
        ]
    )


def test_it_is_yes_or_no():
    with pytest.raises(ConfigError, match="trainable"):
        TableConfig(name="frozen", trainable="never")
