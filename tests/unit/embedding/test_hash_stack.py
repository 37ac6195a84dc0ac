"""A hash stack gives a key the sum of rows that it shares; the reference sums them one by one."""

import copy

import numpy as np
import pytest
import torch

from penstock import (
    SGD,
    EmbeddingCollection,
    FeatureConfig,
    HashStack,
    Jagged,
    KeyedJagged,
    TableConfig,
)
from penstock.embedding.shapes.hash_stack import stacked_rows
from penstock.errors import CheckpointError, ConfigError

STACK = HashStack(rounds=3, size=50)
POOLINGS = ("sum", "mean", "sqrt_n")
EDGES = [-(2**63), -1, 0, 1, 2**63 - 1]


def collection_of(stack=STACK, **options):
    tables = [
        TableConfig(name="t", dim=4, optimizer=SGD(learning_rate=0.5), hash_stack=stack),
        TableConfig(name="own", dim=2, optimizer=SGD(learning_rate=0.5)),
    ]
    features = [FeatureConfig(name=pooling, table="t", pooling=pooling) for pooling in POOLINGS]
    features.insert(1, FeatureConfig(name="plain", table="own", pooling="mean"))
    features.append(FeatureConfig(name="largest", table="own", pooling="max", padding_key=3))
    return EmbeddingCollection(tables, features, seed=7, **options)


def bags_of(seed, size=9, *, weighted=False):
    rng = np.random.default_rng(seed)
    columns = {}
    for name in ["sum", "plain", "mean", "sqrt_n", "largest"]:
        lengths = rng.integers(0, 4, size)
        keys = rng.integers(-5, 20, lengths.sum())
        keys[: len(EDGES)] = EDGES[: len(keys)]
        offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
        weights = torch.from_numpy(rng.uniform(0.5, 2, len(keys)).astype(np.float32))
        columns[name] = Jagged(torch.from_numpy(keys), offsets, weights if weighted else None)
    return KeyedJagged.pack(columns)


def row_of_python(key, number, stack=STACK):
    """splitmix64 in plain integers."""
    word = 2**64 - 1
    x = (key + (number + 1) * 0x9E3779B97F4A7C15) & word
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
    x = (x ^ x >> 27) * 0x94D049BB133111EB & word
    x ^= x >> 31
    return (x & (2**63 - 1)) % stack.size + number * stack.size


@pytest.mark.parametrize("stack", [STACK, HashStack(size=1), HashStack(rounds=16, size=2**40)])
def test_rows_are_the_documented_hash_of_the_key(stack):
    keys = [*EDGES, 12345, 2**40 + 1]
    rows = stacked_rows(stack, torch.tensor(keys))
    assert rows.tolist() == [
        [row_of_python(key, number, stack) for number in range(stack.rounds)] for key in keys
    ]


def test_rows_are_spread_evenly():
    rows = stacked_rows(HashStack(rounds=2, size=64), torch.arange(64_000))
    counts = torch.bincount(rows.flatten(), minlength=128)
    assert counts.min() > 850 and counts.max() < 1150
    # Of those that share one row hardly any share the other.
    assert torch.unique(rows, dim=0).shape[0] == 64 * 64


def vector_of(collection, feature, column, bag):
    """A bag, key by key and row by row."""
    first, last = column.offsets[bag : bag + 2].tolist()
    keys = column.values[first:last]
    weights = torch.ones(len(keys)) if column.weights is None else column.weights[first:last]
    rows = stacked_rows(STACK, keys)
    total = torch.zeros(4)
    for place, weight in zip(rows, weights, strict=True):
        for row in place:
            total += weight * collection.find("t", row[None]).values[0]
    divisor = {"sum": 1.0, "mean": weights.sum(), "sqrt_n": weights.square().sum().sqrt()}
    return total / divisor[feature] if len(keys) else total


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_a_vector_is_the_sum_of_its_rows(trains, weighted):
    collection = collection_of(output="by_feature").train(trains)
    batch = bags_of(1, weighted=weighted)
    got = collection(batch)
    for feature in POOLINGS:
        for bag in range(9):
            expected = vector_of(collection, feature, batch[feature], bag)
            torch.testing.assert_close(got[feature][bag], expected, rtol=1e-5, atol=1e-6)
    # Another table beside it is as ever.
    alone = EmbeddingCollection(
        [collection.tables[1]], [FeatureConfig(name="plain", table="own", pooling="mean")], seed=7
    ).eval()
    plain = KeyedJagged.pack({"plain": batch["plain"]})
    assert torch.equal(got["plain"], alone(plain))


def test_an_update_gives_every_row_its_share():
    collection = collection_of()
    batch = KeyedJagged.pack({
        name: Jagged.from_dense(torch.tensor([[8, 9]]) if name != "plain" else torch.tensor([[8]]))
        for name in ["sum", "plain", "mean", "sqrt_n", "largest"]
    })
    rows = stacked_rows(STACK, torch.tensor([8, 9])).flatten()
    before = collection.eval().find("t", rows).values
    collection.train()(batch).sum().backward()
    collection.apply_gradients()
    moved = before - collection.find("t", rows).values
    # 1 of sum, 1/2 of mean, 1/sqrt 2 of sqrt_n, of each key; times the rate.
    times = torch.tensor([(rows == row).sum() for row in rows])[:, None]
    torch.testing.assert_close(moved, 0.5 * (1 + 0.5 + 2**-0.5) * times * torch.ones(6, 4))
    assert collection.table_stats()[0].rows == len(set(rows.tolist()))


def test_weights_get_their_gradient():
    collection = collection_of(output="by_feature").eval()
    batch = bags_of(2, weighted=True)
    weights = batch.weights.clone().requires_grad_()
    with_gradient = KeyedJagged(batch.features, batch.values, batch.offsets, weights)
    collection(with_gradient)["sum"].sum().backward()
    column = batch["sum"]
    sums = [collection.find("t", rows).values.sum() for rows in stacked_rows(STACK, column.values)]
    got = weights.grad[: len(column.values)]
    torch.testing.assert_close(got, torch.stack(sums), rtol=1e-5, atol=1e-6)


def test_state_and_copies_hold_the_rows(tmp_path):
    collection = collection_of()
    collection(bags_of(1)).sum().backward()
    collection.apply_gradients()
    collection.eval()
    batch = bags_of(1)
    other = collection_of().eval()
    other.load_state_dict(collection.state_dict())
    files = collection_of().eval()
    collection.save_tables(tmp_path / "tables")
    files.load_tables(tmp_path / "tables")
    for twin in (other, files, copy.deepcopy(collection)):
        assert torch.equal(twin(batch), collection(batch))


def test_rows_of_another_stack_are_refused(tmp_path):
    collection = collection_of()
    collection.save_tables(tmp_path / "tables")
    for stack in (None, HashStack(rounds=2, size=50)):
        other = collection_of(stack)
        with pytest.raises(CheckpointError, match="hash_stack was '3 x 50', is"):
            other.load_state_dict(collection.state_dict())
        with pytest.raises(CheckpointError, match="hash_stack was '3 x 50', is"):
            other.load_tables(tmp_path / "tables")


@pytest.mark.parametrize("pooling", ["max", "none", "sequence"])
def test_poolings_of_single_vectors_are_refused(pooling):
    options = {"max_keys": 3} if pooling == "sequence" else {}
    feature = FeatureConfig(name="f", table="t", pooling=pooling, **options)
    with pytest.raises(ConfigError, match=f"feature 'f': pooling {pooling} of table 't'"):
        EmbeddingCollection(
            [TableConfig(name="t", hash_stack=STACK)], [feature], output="by_feature"
        )


@pytest.mark.parametrize("key", [-1, 150, 2**62])
def test_keys_are_no_rows_of_a_stack(key):
    collection = collection_of()
    assert not collection.find("t", torch.tensor([149])).found
    for verb in (
        collection.find,
        collection.erase,
        lambda t, keys: collection.export(t, keys=keys),
    ):
        with pytest.raises(ConfigError, match="rows are numbers below 150"):
            verb("t", torch.tensor([key]))
