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
