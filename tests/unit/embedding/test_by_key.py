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


def test_a_users_scores_say_which_rows_leave():
    embeddings = collection(max_bytes=400, eviction=Eviction(order="score"))
    train(embeddings, *range(6))
    scores = torch.tensor([30, 10, 20, 50, 40, 5, 9])
    assert embeddings.set_scores("t", torch.arange(7), scores) == 6
    before = embeddings.find("t", torch.arange(6))
    train(embeddings, 100, 101, 102)
    found = embeddings.find("t", torch.tensor([*range(6), 100, 101, 102])).found
    assert found[[3, 4, 6, 7, 8]].all()
    assert not found[5]
    kept = found[:6]
    assert kept.sum() < 6
    assert scores[:6][kept].min() > scores[:6][~kept].max()
    after = embeddings.find("t", torch.arange(6))
    assert torch.equal(after.values[kept], before.values[kept])
    assert torch.equal(after.state[kept], before.state[kept])
    restored = collection(max_bytes=400, eviction=Eviction(order="score"))
    restored.load_state_dict(embeddings.state_dict())
    for one in (embeddings, restored):
        train(one, 200)
    gone, also = (one.find("t", torch.arange(201)).found for one in (embeddings, restored))
    assert torch.equal(gone, also)


def test_a_score_is_a_use_now_and_makes_no_row():
    embeddings = collection(max_bytes=400, eviction=Eviction(order="score"))
    train(embeddings, 1)
    since = embeddings.step
    train(embeddings, 2)
    assert exported(embeddings, since=since)[0].tolist() == [2]
    assert embeddings.set_scores("t", torch.tensor([1, 9]), torch.tensor([5, 5])) == 1
    assert sorted(exported(embeddings, since=since)[0].tolist()) == [1, 2]
    assert embeddings.find("t", torch.tensor([1, 2, 9])).found.tolist() == [True, True, False]


def test_scores_that_do_not_fit_are_named():
    plain = collection(max_bytes=400, eviction=Eviction())
    with pytest.raises(ConfigError, match="whose eviction has order lru: score"):
        plain.set_scores("t", torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ConfigError, match="order None"):
        collection().set_scores("t", torch.tensor([1]), torch.tensor([1]))
    embeddings = collection(max_bytes=400, eviction=Eviction(order="score"))
    train(embeddings, 1)
    with pytest.raises(ConfigError, match=r"\[2\] scores for keys \[1\]"):
        embeddings.set_scores("t", torch.tensor([1]), torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match="-1 is no time or number of uses"):
        embeddings.set_scores("t", torch.tensor([1]), torch.tensor([-1]))
    with pytest.raises(ConfigError, match="scores of torch.float32"):
        embeddings.set_scores("t", torch.tensor([1]), torch.tensor([1.0]))


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
