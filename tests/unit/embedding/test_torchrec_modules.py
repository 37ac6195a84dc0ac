"""What stands in the place of TorchRec's modules, and its states, without TorchRec.

`tests/interop/torchrec_models.py` does the same with the real ones.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from penstock.config import FTRL, Adagrad, Adam, FeatureConfig, RowWiseAdagrad, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.embedding.interop import (
    TorchRecBags,
    TorchRecSequences,
    export_state_dict,
    from_keyed_jagged_tensor,
    import_state_dict,
)
from penstock.errors import ConfigError


class FakeKjt:
    """What a KeyedJaggedTensor offers."""

    def __init__(self, keys, bags, weights=None, strides=(), inverse=None):
        values = [key for bag in bags for key in bag]
        self._keys, self._values = keys, torch.tensor(values, dtype=torch.int64)
        self._lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int32)
        self._weights, self._strides, self._inverse = weights, strides, inverse

    def keys(self):
        return self._keys

    def values(self):
        return self._values

    def lengths(self):
        return self._lengths

    def weights_or_none(self):
        return self._weights

    def variable_stride_per_key(self):
        return bool(self._strides)

    def stride_per_key(self):
        return list(self._strides)

    def inverse_indices_or_none(self):
        return self._inverse


@pytest.fixture
def torchrec(monkeypatch):
    """Its classes of results, as plain namespaces."""
    for name in ("torchrec", "torchrec.sparse", "torchrec.sparse.jagged_tensor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules["torchrec.sparse.jagged_tensor"]
    module.KeyedTensor = module.JaggedTensor = SimpleNamespace


def config(name, features, pooling="SUM", dim=3):
    return SimpleNamespace(
        name=name,
        embedding_dim=dim,
        num_embeddings=10,
        feature_names=features,
        pooling=SimpleNamespace(name=pooling),
    )


CONFIGS = [config("t", ["a", "b"]), config("u", ["a"], "MEAN", dim=2)]
BAGS = [[1, 2], [], [3], [4, 4]]  # of a, then of b


def test_bags(torchrec):
    bags = TorchRecBags(CONFIGS)
    assert bags.embedding_bag_configs() == CONFIGS
    assert not bags.is_weighted()
    weights = torch.rand(5)
    out = bags(FakeKjt(["a", "b"], BAGS, weights))
    assert out.keys == ["a@t", "b", "a@u"]
    assert out.length_per_key == [3, 3, 2]
    t = bags.collection.find("t", torch.arange(5)).values
    u = bags.collection.find("u", torch.arange(5)).values
    wanted = [
        torch.cat([t[1] + t[2], t[3], (u[1] + u[2]) / 2]),
        torch.cat([torch.zeros(3), 2 * t[4], torch.zeros(2)]),
    ]
    torch.testing.assert_close(out.values.detach(), torch.stack(wanted))
    again = bags(FakeKjt(["b", "a", "a"], [[9], [9], *BAGS[:2], *BAGS[:2]]))
    assert torch.equal(again.values[:, :3], out.values[:, :3])
    weighted = TorchRecBags(CONFIGS, is_weighted=True)
    found = weighted(FakeKjt(["a", "b"], BAGS, weights)).values[0, :3]
    t = weighted.collection.find("t", torch.arange(5)).values
    torch.testing.assert_close(found.detach(), weights[0] * t[1] + weights[1] * t[2])
    with pytest.raises(ConfigError, match="has no weights, and is_weighted is set"):
        weighted(FakeKjt(["a", "b"], BAGS))


def test_bags_train(torchrec):
    rule = Adagrad(learning_rate=0.1)
    bags = TorchRecBags(
        CONFIGS, make_table=lambda name, dim: TableConfig(name=name, dim=dim, optimizer=rule)
    )
    kjt = FakeKjt(["a", "b"], BAGS)
    bags(kjt).values.sum().backward()
    before = bags.collection.find("t", torch.tensor([4])).values
    bags.collection.apply_gradients()
    torch.testing.assert_close(
        before - bags.collection.find("t", torch.tensor([4])).values, torch.full((1, 3), 0.1)
    )


def test_sequences(torchrec):
    same = [config("t", ["a", "b"]), config("u", ["a"])]
    sequences = TorchRecSequences(same, need_indices=True)
    assert sequences.embedding_configs() == same
    assert sequences.need_indices()
    assert sequences.embedding_dim() == 3
    assert sequences.embedding_names_by_table() == [["a@t", "b"], ["a@u"]]
    found = sequences(FakeKjt(["a", "b"], BAGS))
    assert list(found) == ["a@t", "b", "a@u"]
    assert found["b"].lengths.tolist() == [1, 2]
    assert found["a@u"].weights.tolist() == [1, 2]
    rows = sequences.collection.find("t", torch.tensor([3, 4, 4])).values
    assert torch.equal(found["b"].values, rows)
    plain = TorchRecSequences(same)(FakeKjt(["a", "b"], BAGS))
    assert plain["b"].weights is None
    weighted = sequences(FakeKjt(["a", "b"], BAGS, torch.rand(5)))
    assert torch.equal(weighted["b"].values, rows)


def test_no_samples_and_no_keys(torchrec):
    bags = TorchRecBags(CONFIGS)
    assert bags(FakeKjt(["a", "b"], [])).values.shape == (0, 8)
    found = TorchRecSequences(CONFIGS[:1])(FakeKjt(["a", "b"], []))
    assert found["b"].values.shape == (0, 3)
    assert bags(FakeKjt(["a", "b"], [[], []])).values.tolist() == [[0.0] * 8]
    empty = from_keyed_jagged_tensor(FakeKjt([], []))
    assert empty.features == ()
    assert empty.offsets.tolist() == [0]


def test_of_a_key_that_is_there_twice_the_last_one_counts():
    packed = from_keyed_jagged_tensor(FakeKjt(["a", "b", "a"], [[1], [2], [3, 4]]), ["b", "a"])
    assert packed["a"].values.tolist() == [3, 4]
    assert packed["b"].values.tolist() == [2]


def test_batch_sizes_by_key():
    packed = from_keyed_jagged_tensor(FakeKjt(["a", "b"], BAGS, strides=[2, 2]))
    assert packed.batch_size == 2
    with pytest.raises(ConfigError, match=r"batch sizes \[3, 1\] for 2 keys"):
        from_keyed_jagged_tensor(FakeKjt(["a", "b"], BAGS, strides=[3, 1]))
    with pytest.raises(ConfigError, match="no inverse indices"):
        from_keyed_jagged_tensor(FakeKjt(["a", "b"], BAGS, strides=[2, 2], inverse=(0, 1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TorchRecBags([config("t", ["a"], "NONE")]), "'t': pooling NONE"),
        (lambda: TorchRecBags([CONFIGS[0]] * 2), "given twice: t"),
        (lambda: TorchRecSequences(CONFIGS), r"tables of dims \[2, 3\]"),
        (
            lambda: TorchRecBags(CONFIGS, make_table=lambda name, dim: TableConfig(name=name)),
            "make_table gave table 't' of dim 16 for TorchRec's 't' of 3",
        ),
    ],
)
def test_wrong_configs_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def collection(rule):
    tables = [TableConfig(name=name, dim=2, optimizer=rule) for name in ("t", "u")]
    return EmbeddingCollection(tables, [FeatureConfig(name="f", table="t")])


SIZES = {"t": 4, "u": 3}
PARTS = {
    RowWiseAdagrad: (("sum", "momentum1", 1),),
    Adagrad: (("sum", "momentum1", 2),),
    Adam: (("exp_avg", "momentum1", 2), ("exp_avg_sq", "momentum2", 2)),
}


class Sharded:
    """What a ShardedTensor offers."""

    def __init__(self, tensor, parts):
        self._size, self._shards = tensor.size(), []
        for start in range(0, len(tensor), 2)[:parts]:
            shard = tensor[start : start + 2]
            offsets = [start] + [0] * (tensor.dim() - 1)
            about = SimpleNamespace(shard_offsets=offsets, shard_sizes=list(shard.shape))
            self._shards.append(SimpleNamespace(tensor=shard, metadata=about))

    def size(self):
        return self._size

    def local_shards(self):
        return self._shards


def states(rule, naming):
    """Of a model and its optimizer, as TorchRec's fused and torch's optimizers have them."""
    weights, state = {}, {}
    for name, rows in SIZES.items():
        entry = f"sparse.embedding_bags.{name}.weight"
        weights[entry] = torch.randn(rows, 2)
        state[entry] = {}
        for plain, fused, width in PARTS[type(rule)]:
            if naming == "fused":
                shape = (rows,) if width == 1 else (rows, width)
                state[entry][f"{name}.{fused}"] = torch.rand(shape)
            else:
                state[entry][plain] = torch.rand(rows, width)
        if naming == "torch":
            state[entry]["step"] = torch.tensor(7.0)
    return weights, {"state": state, "param_groups": []}


@pytest.mark.parametrize("naming", ["fused", "torch"])
@pytest.mark.parametrize("rule", [RowWiseAdagrad(), Adagrad(), Adam()])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_states_go_in_and_out(rule, naming, is_sharded):
    weights, optimizer = states(rule, naming)
    given, given_state = weights, optimizer
    if is_sharded:
        given = {name: Sharded(weight, 9) for name, weight in weights.items()}
        given_state = {
            name: {key: Sharded(part, 9) if part.dim() else part for key, part in of.items()}
            for name, of in optimizer["state"].items()
        }
    embeddings = collection(rule)
    import_state_dict(embeddings, given, given_state)
    assert embeddings.step == (7 if naming == "torch" else 0)
    back, state = export_state_dict(
        embeddings, SIZES, prefix="sparse.embedding_bags.", naming=naming
    )
    assert list(back) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(back[name], weight)
        assert list(state["state"][name]) == list(optimizer["state"][name])
        for key, part in optimizer["state"][name].items():
            assert torch.equal(state["state"][name][key], part)


def test_states_that_do_not_belong_are_named():
    rule = RowWiseAdagrad()
    weights, optimizer = states(rule, "torch")
    embeddings = collection(rule)
    entry = "sparse.embedding_bags.t.weight"
    of_table = optimizer["state"][entry]

    def refused(message, **changed):
        changed_state = {**optimizer["state"], entry: {**of_table, **changed}}
        with pytest.raises(ConfigError, match=message):
            import_state_dict(embeddings, weights, {"state": changed_state})
        assert embeddings.table_stats()[0].rows == 0

    refused("sum of table 't': .4, 2. for 4 rows of row_wise_adagrad", sum=torch.zeros(4, 2))
    refused("at different steps: .'5', '7'.", step=5)
    refused("this process has 4 of its 8 numbers", sum=Sharded(torch.zeros(4, 2), 1))
    refused("is a list, no tensor", sum=[0.0])
    del of_table["sum"]
    refused("'t' has step, not the sum of its optimizer, row_wise_adagrad")
    with pytest.raises(ConfigError, match="no entry named u.weight in the optimizer's state"):
        import_state_dict(embeddings, weights, {"state": {entry: {"sum": torch.zeros(4)}}})
    ftrl = collection(FTRL())
    with pytest.raises(ConfigError, match="TorchRec has no optimizer state for ftrl"):
        export_state_dict(ftrl, SIZES)
    import_state_dict(embeddings, weights)
    with pytest.raises(ConfigError, match="'t': 1 of its rows have keys beyond 0 to 2"):
        export_state_dict(embeddings, {**SIZES, "t": 3})
    with pytest.raises(ConfigError, match="sizes has no table 'u'"):
        export_state_dict(embeddings, {"t": 4})
