import pytest
import torch

from penstock.config import FeatureConfig
from penstock.errors import ConfigError
from penstock.types import FeatureShape, Jagged, KeyedJagged

BAGS = Jagged(
    torch.tensor([1, 2, 3, 4, 5, 6]),
    torch.tensor([0, 3, 3, 4, 6]),
    torch.tensor([0.1, 0.2, 0.3, -0.4, 0.0, 0.6]),
)


@pytest.mark.parametrize(("keep", "keys"), [("first", [1, 2, 4, 5, 6]), ("last", [2, 3, 4, 5, 6])])
def test_truncation_cuts_long_bags_with_their_weights(keep, keys):
    cut = BAGS.truncate(2, keep)
    assert cut.values.tolist() == keys
    assert cut.offsets.tolist() == [0, 2, 2, 3, 5]
    assert torch.equal(cut.weights, BAGS.weights[cut.values - 1])
    assert BAGS._replace(weights=None).truncate(1, keep).weights is None


def test_truncation_of_short_bags_changes_nothing():
    assert BAGS.truncate(3) is BAGS
    empty = Jagged(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert empty.truncate(1) is empty
    with pytest.raises(ConfigError, match="max_keys is 0; a bag keeps at least 1 key"):
        BAGS.truncate(0)


def test_packing_joins_weights():
    plain = BAGS._replace(weights=None)
    assert KeyedJagged.pack({"a": plain, "b": plain}).weights is None
    packed = KeyedJagged.pack({"a": plain, "b": BAGS})
    assert torch.equal(packed.weights, torch.cat([torch.ones(6), BAGS.weights]))
    assert torch.equal(packed["b"].weights, BAGS.weights)
    assert torch.equal(packed["b"].values, BAGS.values)
    with pytest.raises(ConfigError) as caught:
        KeyedJagged.pack({"b": BAGS._replace(weights=torch.ones(5))})
    assert str(caught.value) == "weights of feature 'b': [5] for keys of [6]; give one weight a key"


def test_a_sequence_is_as_wide_as_its_positions():
    assert FeatureShape("f", 8).width == 8
    assert FeatureShape("f", 8, 5).width == 40


def test_max_keys_belongs_to_sequences():
    assert FeatureConfig(name="f", table="t", pooling="sequence", max_keys=3).max_keys == 3
    with pytest.raises(ConfigError, match="pooling 'sequence' needs max_keys, its number of pos"):
        FeatureConfig(name="f", table="t", pooling="sequence")
    with pytest.raises(ConfigError, match="max_keys is for pooling 'sequence'; 'mean' reads every"):
        FeatureConfig(name="f", table="t", pooling="mean", max_keys=3)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_integers_of_every_width_are_keys(dtype):
    dtype = getattr(torch, dtype)
    keys = torch.tensor([0, 1, 127]).to(dtype)
    assert Jagged.from_dense(keys).values.tolist() == [0, 1, 127]
    bags = Jagged(keys, torch.tensor([0, 1, 3], dtype=torch.int32))
    packed = KeyedJagged.pack({"a": bags, "b": Jagged.from_dense(torch.tensor([5, 2**62]))})
    assert packed.values.tolist() == [0, 1, 127, 5, 2**62]
    assert (packed.values.dtype, packed.offsets.dtype) == (torch.int64, torch.int64)
    assert packed.offsets.tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "bfloat16", "float16", "bool", "complex64"]
)
def test_what_is_no_integer_is_no_key(dtype):
    keys = torch.tensor([1, 0]).to(getattr(torch, dtype))
    message = f"of torch.{dtype}: keys are integers"
    with pytest.raises(ConfigError, match=f"^keys {message}"):
        Jagged.from_dense(keys)
    with pytest.raises(ConfigError, match=f"^feature 'a' {message}"):
        KeyedJagged.pack({"a": Jagged(keys, torch.arange(3))})


def test_unsigned_keys_keep_their_value_or_are_refused():
    most = torch.tensor([2**63 - 1], dtype=torch.uint64)
    assert Jagged.from_dense(most).values.tolist() == [2**63 - 1]
    beyond = torch.tensor([2**63 + 1], dtype=torch.uint64)
    with pytest.raises(ConfigError, match=f"uint64 {2**63 + 1} is beyond int64; give the same"):
        Jagged.from_dense(beyond)
    assert Jagged.from_dense(beyond.view(torch.int64)).values.tolist() == [-(2**63) + 1]


def test_bags_are_made_of_their_starts_as_embedding_bag_has_them():
    starts = torch.tensor([0, 2, 2], dtype=torch.int32)
    bags = Jagged.from_starts(torch.tensor([4, 5, 6]), starts, torch.ones(3))
    assert bags.offsets.tolist() == [0, 2, 2, 3]
    assert bags.offsets.dtype == torch.int64
    assert bags.weights is not None
    none = torch.zeros(0, dtype=torch.int64)
    assert Jagged.from_starts(none, none).offsets.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_no_batch(dtype):
    def packed():
        plain = BAGS._replace(weights=None)
        return KeyedJagged.pack({
            "a": plain,
            "b": BAGS,
            "c": BAGS._replace(weights=BAGS.weights.double()),
        })

    before = packed()
    torch.set_default_dtype(dtype)
    try:
        after = packed()
    finally:
        torch.set_default_dtype(torch.float32)
    assert after.weights.dtype == torch.float32
    assert torch.equal(after.weights, before.weights)


def test_a_batch_stays_on_its_device_and_moves_as_a_whole():
    # The meta device stands for one that is not the CPU: nothing may be made beside it.
    there = Jagged(*(part.to("meta") for part in BAGS))
    packed = KeyedJagged.pack({"a": there, "b": there._replace(weights=None)})
    moved = KeyedJagged.pack({"a": BAGS, "b": BAGS}).to("meta")
    for batch in (packed, moved):
        assert {batch.values.device.type, batch.offsets.device.type} == {"meta"}
        assert batch.weights.device.type == "meta"
    assert Jagged.from_dense(torch.zeros(3, 2, dtype=torch.int64, device="meta")).offsets.is_meta
    with pytest.raises(ConfigError, match="lie on different devices: {'a': 'cpu', 'b': 'meta'}"):
        KeyedJagged.pack({"a": BAGS, "b": there})
