from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from penstock.config import Adagrad, FeatureConfig, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.embedding.interop import (
    from_keyed_jagged_tensor,
    import_state_dict,
    import_weights,
    to_keyed_jagged_tensor,
)
from penstock.errors import ConfigError
from penstock.types import Jagged, KeyedJagged

SPARSE = KeyedJagged.pack({
    "a": Jagged(torch.tensor([5, -7, 2**62]), torch.tensor([0, 2, 2, 3])),
    "b": Jagged.from_dense(torch.tensor([1, 2, 3])),
})


class FakeKjt:
    """What a KeyedJaggedTensor offers, for machines without torchrec."""

    def __init__(self, keys, values, lengths, weights=None, variable=()):
        self._keys, self._values, self._lengths = keys, values, lengths
        self._weights, self._variable = weights, variable

    def keys(self):
        return self._keys

    def values(self):
        return self._values

    def lengths(self):
        return self._lengths

    def weights_or_none(self):
        return self._weights

    def variable_stride_per_key(self):
        return bool(self._variable)

    def stride_per_key(self):
        return self._variable

    def inverse_indices_or_none(self):
        return None


def kjt(**fields):
    lengths = torch.tensor([2, 0, 1, 1, 1, 1], dtype=torch.int32)
    return FakeKjt(["a", "b"], SPARSE.values, lengths, **fields)


def assert_equal(one, other):
    assert one.features == other.features
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.offsets, other.offsets)


def test_from_a_keyed_jagged_tensor():
    assert_equal(from_keyed_jagged_tensor(kjt()), SPARSE)
    turned = KeyedJagged.pack({"b": SPARSE["b"], "a": SPARSE["a"]})
    assert_equal(from_keyed_jagged_tensor(kjt(), ["b", "a"]), turned)


def test_weights_are_taken_over():
    weights = torch.tensor([0.5, -1.0, 0.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    packed = from_keyed_jagged_tensor(kjt(weights=weights), ["b", "a"])
    assert torch.equal(packed["a"].weights, weights[:3].float())
    assert torch.equal(packed["b"].weights, weights[3:].float())


def test_what_cannot_be_taken_over_is_refused():
    with pytest.raises(ConfigError, match="every key needs the same batch size"):
        from_keyed_jagged_tensor(kjt(variable=[4, 2]))
    floats = FakeKjt(["a"], torch.tensor([1.0]), torch.tensor([1]))
    with pytest.raises(ConfigError, match="the KeyedJaggedTensor of torch.float32: keys are integ"):
        from_keyed_jagged_tensor(floats)
    with pytest.raises(ConfigError, match="no feature 'c'; there are a, b"):
        from_keyed_jagged_tensor(kjt(), ["c", "a"])


@pytest.mark.skipif(find_spec("torchrec") is None, reason="torchrec is not installed")
def test_there_and_back_with_torchrec():
    assert_equal(from_keyed_jagged_tensor(to_keyed_jagged_tensor(SPARSE)), SPARSE)
    weighted = replace(SPARSE, weights=torch.randn(6))
    back = from_keyed_jagged_tensor(to_keyed_jagged_tensor(weighted))
    assert torch.equal(back.weights, weighted.weights)


@pytest.mark.skipif(find_spec("torchrec") is not None, reason="torchrec is installed")
def test_without_torchrec_the_error_says_so():
    with pytest.raises(ConfigError, match="a KeyedJaggedTensor needs torchrec: No module named"):
        to_keyed_jagged_tensor(SPARSE)


def collection():
    rule = Adagrad(initial_accumulator=0.5)
    tables = [TableConfig(name=name, dim=2, optimizer=rule) for name in ("user", "item")]
    return EmbeddingCollection(tables, [FeatureConfig(name="f", table="user")])


def rows_of(embeddings, table):
    (rows,) = embeddings.export_table(table)
    order = rows.keys.argsort()
    return rows.keys[order], rows.values[order], rows.state[order]


def test_weights_become_rows_with_fresh_state():
    embeddings = collection()
    weight = torch.randn(300_000, 2)
    import_weights(embeddings, "user", weight)
    keys, values, state = rows_of_many(embeddings, "user")
    assert torch.equal(keys, torch.arange(300_000))
    assert torch.equal(values, weight)
    assert (state == 0.5).all()
    import_weights(embeddings, "user", weight, state=weight + 1)
    assert torch.equal(rows_of_many(embeddings, "user")[2], weight + 1)
    import_weights(embeddings, "item", weight[:3].half(), torch.tensor([-5, 9, 2**62]))
    keys, values, _ = rows_of(embeddings, "item")
    assert keys.tolist() == [-5, 9, 2**62]
    assert torch.equal(values, weight[:3].half().float())


def rows_of_many(embeddings, table):
    parts = list(embeddings.export_table(table))
    keys, values, state = (torch.cat(column) for column in list(zip(*parts, strict=True))[:3])
    order = keys.argsort()
    return keys[order], values[order], state[order]


def test_tables_are_found_in_a_state_dict():
    embeddings = collection()
    weights = {"user": torch.randn(4, 2), "item": torch.randn(5, 2)}
    names = {f"sparse.embedding_bags.{name}.weight": value for name, value in weights.items()}
    import_state_dict(embeddings, {**names, "over.0.weight": torch.randn(3, 3)})
    for table, weight in weights.items():
        assert torch.equal(rows_of(embeddings, table)[1], weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: import_weights(collection(), "users", torch.zeros(1, 2)),
            "no table 'users'; there are user, item",
        ),
        (
            lambda: import_weights(collection(), "user", torch.zeros(1, 3)),
            "weight of table 'user': expected [n, 2], got [1, 3]",
        ),
        (
            lambda: import_weights(collection(), "user", torch.zeros(2, 2), torch.arange(3)),
            "keys of table 'user': [3] for a weight of [2, 2]",
        ),
        (
            lambda: import_state_dict(collection(), {"user.weight": torch.zeros(1, 2)}),
            "table 'item': no entry named item.weight in the state_dict; "
            "use import_weights for tables of other names",
        ),
    ],
)
def test_wrong_weights_are_named(call, message):
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value) == message
