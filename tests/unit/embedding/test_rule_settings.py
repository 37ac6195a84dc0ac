"""Settings of rules: bounds of rows, decoupled decay, rates that are set while training."""

import copy
import pickle

import numpy as np
import pytest
import torch

from penstock import (
    SGD,
    AdamW,
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    TableConfig,
    Uniform,
)
from penstock.embedding.collection.torch_idioms import average_tables
from penstock.embedding.interop import import_weights
from penstock.embedding.rules.rounding import DTYPES, largest_within
from penstock.errors import ConfigError


def collection_of(optimizer, **options):
    table = TableConfig(name="t", dim=options.pop("dim", 4), optimizer=optimizer, **options)
    return EmbeddingCollection([table], [FeatureConfig(name="f", table="t")])


def batch_of(*keys):
    return KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor(keys))})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.1, 2**-14, 3.0])
def test_no_update_leaves_a_value_beyond_the_bound(dtype, bound):
    optimizer = SGD(learning_rate=bound, weight_bound=bound)
    collection = collection_of(optimizer, dtype=dtype, dim=33, initializer=Uniform(bound=bound))
    rng = torch.Generator().manual_seed(0)
    keys = range(200)
    reached = 0
    for _ in range(8):
        collection(batch_of(*keys)).backward(torch.randn(200, 33, generator=rng))
        collection.apply_gradients()
        values = collection.find("t", torch.arange(200)).values.double()
        assert values.abs().max() <= bound
        reached = (values.abs() == largest_within(bound, dtype)).sum()
    # Among them the values that would lie beyond; the others are no multiple of anything.
    assert reached > 1000


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_of_a_dtype_is_its_largest_number_within(dtype):
    bounds = torch.logspace(-4.2, 4, 999, base=10, dtype=torch.float64).tolist()
    for bound in [2**-14, 0.1, 1.0, 10.0, *bounds]:
        found = torch.tensor(largest_within(bound, dtype), dtype=torch.float64)
        stored = found.to(DTYPES[dtype])
        assert stored.double() == found <= bound
        bits = torch.int32 if dtype == "float32" else torch.int16
        assert (stored.view(bits) + 1).view(DTYPES[dtype]).double() > bound


def test_what_is_beyond_the_bound_stays_until_it_is_trained():
    collection = collection_of(SGD(learning_rate=0.1, weight_bound=1.0))
    import_weights(collection, "t", torch.full((2, 4), 5.0))
    collection(batch_of(1)).sum().backward()
    collection.apply_gradients()
    assert collection.find("t", torch.tensor([0, 1])).values[:, 0].tolist() == [5.0, 1.0]


def test_nan_is_no_number_within_the_bound():
    collection = collection_of(SGD(learning_rate=0.1, weight_bound=1.0))
    import_weights(collection, "t", torch.tensor([[float("nan"), 1.0, 1.0, 1.0]]))
    collection.apply_gradients()
    rows = collection.find("t", torch.tensor([0])).values
    with torch.no_grad():
        assert rows[0, 0].isnan()
    collection(batch_of(0)).backward(torch.ones(1, 4))
    collection.apply_gradients()
    assert collection.find("t", torch.tensor([0])).values[0, 0].isnan()


def test_adamw_is_torchs_where_every_row_is_touched():
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    options = {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-6}
    expected = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.AdamW([expected], **options)
    collection = collection_of(AdamW(learning_rate=0.01, weight_decay=0.3, eps=1e-6))
    import_weights(collection, "t", weight)
    for step in range(30):
        grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(step)) + 0.1
        collection(batch_of(*range(5))).backward(grad)
        collection.apply_gradients()
        expected.grad = grad
        optimizer.step()
    got = collection.find("t", torch.arange(5)).values
    # Where eps stands beside the root differs by the bias correction: 1e-6 of a step.
    torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)


def test_adamw_leaves_rows_alone_that_no_batch_touches():
    collection = collection_of(AdamW(learning_rate=0.1, weight_decay=0.5))
    import_weights(collection, "t", torch.ones(2, 4))
    for _ in range(3):
        collection(batch_of(1)).sum().backward()
        collection.apply_gradients()
    values = collection.find("t", torch.tensor([0, 1])).values.numpy()
    assert np.array_equal(values[0], np.ones(4)) and (values[1] < 0.8).all()


def test_a_bound_that_two_bytes_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match="weight_bound"):
        SGD(weight_bound=1e-5)


def two_tables():
    tables = [TableConfig(name=n, dim=1, optimizer=SGD(learning_rate=1.0)) for n in "ab"]
    features = [FeatureConfig(name=n, table=n) for n in "ab"]
    return EmbeddingCollection(tables, features)


def steps_of(collection, step):
    """What a step takes off a row of each table, for a gradient of 1."""
    keys = torch.tensor([3])
    before = [collection.find(name, keys).values.item() for name in "ab"]
    batch = KeyedJagged.pack({name: Jagged.from_dense(keys) for name in "ab"})
    collection(batch).sum().backward()
    step()
    after = [collection.find(name, keys).values.item() for name in "ab"]
    return [round(b - a, 5) for b, a in zip(before, after, strict=True)]


def test_the_rate_of_a_table_is_set_while_it_is_trained():
    collection = two_tables()
    assert steps_of(collection, collection.apply_gradients) == [1.0, 1.0]
    collection.set_learning_rate("b", 0.25)
    assert steps_of(collection, collection.apply_gradients) == [1.0, 0.25]
    for twin in (copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
        twin.detach_optimizer()
        assert steps_of(twin, twin.apply_gradients) == [1.0, 0.25]
    with pytest.raises(ConfigError, match="no table 'c'"):
        collection.set_learning_rate("c", 1.0)


def test_the_groups_rate_multiplies_what_is_set():
    collection = two_tables()
    optimizer = torch.optim.SGD(collection.parameters(), lr=1.0)
    collection.attach(optimizer)
    collection.set_learning_rate("b", 0.25)
    assert steps_of(collection, optimizer.step) == [1.0, 0.25]
    for group in optimizer.param_groups:
        group["lr"] /= 2
    assert steps_of(collection, optimizer.step) == [0.5, 0.125]


def test_averages_go_on_where_a_rate_has_changed():
    collection = two_tables()
    steps_of(collection, collection.apply_gradients)
    averaged = copy.deepcopy(collection)
    collection.set_learning_rate("b", 0.5)
    steps_of(collection, collection.apply_gradients)
    average_tables(averaged, collection, 1.0)
    keys = torch.tensor([3])
    assert averaged.find("a", keys).values == collection.find("a", keys).values
