"""Rows by key: find, assign, erase, export."""

import pytest
import torch

from penstock.config import Adagrad, AdmitFrequent, Eviction, FeatureConfig, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.errors import CapacityError, ConfigError

DIM = 2
RULE = Adagrad(learning_rate=0.1, initial_accumulator=0.5)


def collection(**rules):
    table = TableConfig(name="t", dim=DIM, optimizer=RULE, **rules)
    return EmbeddingCollection([table], [FeatureConfig(name="f", table="t")], num_threads=1)


def train(embeddings, *keys):
    embeddings({"f": torch.tensor(keys)}).sum().backward()
    embeddings.apply_gradients()


def exported(embeddings, **which):
    parts = list(embeddings.export("t", **which))
    return [torch.cat(part) for part in list(zip(*parts, strict=True))[:3]] if parts else None


def test_assigned_rows_keep_their_optimizer_states():
    embeddings = collection()
    train(embeddings, 1, 2)
    keys = torch.tensor([2, -(2**63), 2**63 - 1])
    values = torch.randn(3, DIM)
    assert embeddings.assign("t", keys, values) == 2
    found = embeddings.find("t", keys)
    assert torch.equal(found.values, values)
    assert found.state.tolist() == [[1.5] * DIM, [0.5] * DIM, [0.5] * DIM]
    assert embeddings.assign("t", torch.tensor([7, 7], dtype=torch.int32), values[:2].double()) == 1
    assert torch.equal(embeddings.find("t", torch.tensor([7])).values, values[1:2])


def test_every_assigned_key_is_admitted_and_begins_anew():
    """Not with the state of the default row, which keys that are refused share."""
    embeddings = collection(admission=AdmitFrequent(min_count=5))
    train(embeddings, 1, 2)
    assert not embeddings.find("t", torch.tensor([1])).found.any()
    assert embeddings.assign("t", torch.tensor([1]), torch.ones(1, DIM)) == 1
    found = embeddings.find("t", torch.tensor([1]))
    assert found.found.all()
    assert found.state.tolist() == [[0.5] * DIM]
    full = collection(max_bytes=400)
    with pytest.raises(CapacityError, match="max_bytes"):
        full.assign("t", torch.arange(100), torch.zeros(100, DIM))


def test_export_of_keys():
    embeddings = collection()
    train(embeddings, 1, 2, 3)
    keys, values, state = exported(embeddings, keys=torch.tensor([3, 9, 1], dtype=torch.int32))
    assert keys.tolist() == [3, 1]
    found = embeddings.find("t", keys)
    assert torch.equal(values, found.values)
    assert torch.equal(state, found.state)


def test_export_of_what_changed_since():
    embeddings = collection(eviction=Eviction(ttl=1000))
    train(embeddings, 1, 2)
    train(embeddings, 3)
    since = embeddings.step
    train(embeddings, 2, 4)
    keys, values, _ = exported(embeddings, since=since)
    assert sorted(keys.tolist()) == [2, 4]
    assert torch.equal(values, embeddings.find("t", keys).values)
    assert exported(embeddings, since=since + 1) is None
    assert embeddings.erase("t", torch.tensor([2, 5])) == 1
    assert exported(embeddings, since=since)[0].tolist() == [4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda one: one.assign("t", torch.tensor([1]), torch.ones(1, 3)),
            r"expected floats \[1, 2\] for keys \[1\], got torch.float32 \[1, 3\]",
        ),
        (lambda one: one.assign("t", torch.tensor([1]), torch.ones(1, 2).long()), "torch.int64"),
        (lambda one: one.assign("t", torch.tensor([1.5]), torch.ones(1, 2)), "keys are integers"),
        (lambda one: one.assign("t", torch.ones(1, 1).long(), torch.ones(1, 2)), r"\[1, 1\]"),
        (
            lambda one: one.assign(
                "t", torch.tensor([5, 6]), torch.tensor([[0, 0], [0, torch.inf]])
            ),
            "those of key 6 are not finite",
        ),
        (lambda one: one.assign("x", torch.tensor([1]), torch.ones(1, 2)), "no table 'x'"),
        (lambda one: one.export("t"), "give keys or since"),
        (lambda one: one.export("t", keys=torch.tensor([1]), since=2), "give keys or since"),
        (lambda one: one.export("t", since=2), "its rows have no time of use"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(call, message):
    embeddings = collection()
    train(embeddings, 1)
    with pytest.raises(ConfigError, match=message):
        call(embeddings)
    assert embeddings.table_stats()[0].rows == 1
