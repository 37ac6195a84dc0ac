"""nn.EmbeddingBag's documented behaviour over random shapes: values, gradients, errors.

What differs is in the table of docs/torch.md, and named here.
"""

import numpy as np
import pytest
import torch
from torch import nn

from penstock.config import SGD, FeatureConfig, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.errors import ConfigError
from penstock.types import Jagged, KeyedJagged

ROWS = 12
MODES = {"sum": "sum", "mean": "mean", "max": "max"}
SEEDS = range(12)


def pair(mode, dim, *, padding=None, dtype="float32", **options):
    """A bag of torch's and a collection with the same rows; SGD of rate 1."""
    torch.manual_seed(dim)
    bag = nn.EmbeddingBag(ROWS, dim, mode=mode, padding_idx=padding, **options)
    table = TableConfig(name="t", dim=dim, dtype=dtype, optimizer=SGD(learning_rate=1.0))
    feature = FeatureConfig(name="f", table="t", pooling=mode, padding_key=padding)
    ours = EmbeddingCollection([table], [feature], num_threads=1)
    keys = torch.arange(ROWS)
    if padding is not None:
        keys = keys[keys != padding]
    assign(ours, keys, bag.weight.detach()[keys])
    return bag, ours


def assign(ours, keys, values):
    from penstock.embedding.store import TableRows

    ours.import_rows("t", TableRows(keys, values, torch.empty(len(keys), 0)))


def bags_of(seed):
    """Keys and starts; empty bags and many duplicates among them, in every place."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, (1, 2, 5, 30)[seed % 4], rng.integers(1, 40), endpoint=True)
    keys = torch.from_numpy(rng.integers(0, ROWS, lengths.sum()))
    starts = torch.from_numpy(np.cumsum(lengths) - lengths)
    return keys, starts


def packed(keys, starts, weights=None):
    return KeyedJagged.pack({"f": Jagged.from_starts(keys, starts, weights)})


def updated(ours):
    """Minus the gradient of each row: SGD of rate 1."""
    before = ours.find("t", torch.arange(ROWS)).values
    ours.apply_gradients()
    return before - ours.find("t", torch.arange(ROWS)).values


def assert_close(ours, theirs, scale=1.0):
    torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_values_and_gradients(mode, padding, seed):
    dim = (1, 3, 8, 16)[seed % 4]
    bag, ours = pair(mode, dim, padding=padding)
    keys, starts = bags_of(seed)
    theirs, mine = bag(keys, starts), ours(packed(keys, starts))
    assert_close(mine.detach(), theirs.detach())
    grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
    theirs.backward(grad)
    mine.backward(grad)
    wanted = bag.weight.grad
    if padding is not None:
        wanted = wanted.clone()
        assert not wanted[padding].any()
    assert_close(updated(ours), wanted, scale=10)


@pytest.mark.parametrize("seed", SEEDS)
def test_ties_of_max_go_where_torch_sends_them(seed):
    bag, ours = pair("max", 3)
    tied = torch.randint(0, 2, (ROWS, 3), generator=torch.Generator().manual_seed(seed)).float()
    with torch.no_grad():
        bag.weight.copy_(tied)
    assign(ours, torch.arange(ROWS), tied)
    keys, starts = bags_of(seed)
    theirs, mine = bag(keys, starts), ours(packed(keys, starts))
    assert torch.equal(mine, theirs)
    grad = torch.randint(-4, 5, theirs.shape).float()
    theirs.backward(grad)
    mine.backward(grad)
    assert torch.equal(updated(ours), bag.weight.grad)


@pytest.mark.parametrize("seed", SEEDS)
def test_per_sample_weights_and_their_gradients(seed):
    bag, ours = pair("sum", (1, 3, 8, 16)[seed % 4])
    keys, starts = bags_of(seed)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(keys), generator=generator)
    of_theirs, of_ours = (weights.clone().requires_grad_() for _ in range(2))
    theirs = bag(keys, starts, per_sample_weights=of_theirs)
    mine = ours(packed(keys, starts, of_ours))
    assert_close(mine.detach(), theirs.detach(), scale=10)
    grad = torch.randn(theirs.shape, generator=generator)
    theirs.backward(grad)
    mine.backward(grad)
    assert_close(of_ours.grad, of_theirs.grad, scale=10)
    assert_close(updated(ours), bag.weight.grad, scale=10)


@pytest.mark.parametrize("mode", MODES)
def test_input_of_two_dimensions_is_bags_of_one_size(mode):
    bag, ours = pair(mode, 4)
    keys = torch.randint(0, ROWS, (7, 5))
    assert_close(ours({"f": keys}).detach(), bag(keys).detach())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offsets_may_have_a_last_one(mode, dtype):
    bag, ours = pair(mode, 4, include_last_offset=True)
    keys, starts = bags_of(2)
    offsets = torch.cat([starts, torch.tensor([len(keys)])])
    theirs = bag(keys.to(dtype), offsets.to(dtype))
    given = KeyedJagged.pack({"f": Jagged(keys.to(dtype), offsets)})
    assert_close(ours(given).detach(), theirs.detach())


@pytest.mark.parametrize("mode", MODES)
def test_no_bags_at_all(mode):
    bag, ours = pair(mode, 4)
    keys = torch.empty(0, dtype=torch.int64)
    theirs = bag(keys, keys)
    mine = ours(packed(keys, keys))
    assert mine.shape == theirs.shape == (0, 4)
    mine.sum().backward()
    ours.apply_gradients()


@pytest.mark.parametrize("mode", MODES)
def test_empty_bags_are_zeros(mode):
    bag, ours = pair(mode, 4)
    keys, starts = torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    assert torch.equal(ours(packed(keys, starts)), torch.zeros(3, 4))
    assert torch.equal(bag(keys, starts), torch.zeros(3, 4))


@pytest.mark.parametrize("mode", MODES)
def test_several_backward_passes_add_up(mode):
    """Bags of other lengths at each, so that those of max lie in other places."""
    bag, ours = pair(mode, 3)
    for seed in (0, 1, 3, 2):
        keys, starts = bags_of(seed)
        theirs, mine = bag(keys, starts), ours(packed(keys, starts))
        grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
        theirs.backward(grad)
        mine.backward(grad)
    assert_close(updated(ours), bag.weight.grad, scale=30)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_in_flight_together(mode):
    bag, ours = pair(mode, 3)
    batches = [bags_of(seed) for seed in (1, 3, 0)]
    total, mine = 0.0, 0.0
    for keys, starts in batches:
        total = total + bag(keys, starts).square().sum()
        mine = mine + ours(packed(keys, starts)).square().sum()
    total.backward()
    mine.backward()
    assert_close(updated(ours), bag.weight.grad, scale=300)


def test_a_weight_of_max_multiplies_its_vector():
    """A difference: nn.EmbeddingBag refuses them."""
    bag, ours = pair("max", 3)
    keys, starts, weights = torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([2.0, -1.0])
    with pytest.raises(NotImplementedError):
        bag(keys, starts, per_sample_weights=weights)
    wanted = (bag.weight[keys] * weights[:, None]).amax(0, keepdim=True)
    assert torch.equal(ours(packed(keys, starts, weights)), wanted)


def test_weights_of_mean_divide_by_their_sum():
    """A difference: nn.EmbeddingBag refuses them."""
    bag, ours = pair("mean", 3)
    keys, starts, weights = torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([2.0, 1.0])
    with pytest.raises(NotImplementedError):
        bag(keys, starts, per_sample_weights=weights)
    wanted = (bag.weight[keys] * weights[:, None]).sum(0, keepdim=True) / 3
    assert_close(ours(packed(keys, starts, weights)).detach(), wanted.detach())


def test_keys_beyond_a_table_are_keys():
    """A difference: nn.EmbeddingBag has num_embeddings rows."""
    bag, ours = pair("sum", 3)
    with pytest.raises((IndexError, RuntimeError)):
        bag(torch.tensor([ROWS]), torch.tensor([0]))
    assert ours(packed(torch.tensor([ROWS]), torch.tensor([0]))).abs().sum() > 0


@pytest.mark.parametrize(
    ("keys", "starts", "weights", "message"),
    [
        (torch.tensor([1.0]), [0], None, "of torch.float32: keys are integers"),
        (torch.tensor([1, 2]), [1], None, r"must rise from 0 to the number of keys \(2\)"),
        (torch.tensor([1, 2]), [0, 3], None, "must rise from 0"),
        (torch.tensor([1, 2]), [0, 2, 1], None, "must rise from 0"),
        (torch.tensor([1, 2]), [0], torch.ones(1), "give one weight a key"),
        (torch.tensor([1, 2]), [0], torch.ones(2, dtype=torch.int64), "expected float32"),
        (torch.tensor([1, 2]), [0], torch.tensor([1.0, float("nan")]), "weights must be finite"),
    ],
)
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_wrong_input_is_named(keys, starts, weights, message, mode):
    _, ours = pair(mode, 3)
    with pytest.raises(ConfigError, match=message):
        ours(packed(keys, torch.tensor(starts), weights))


def test_kernels_differ_by_nothing_where_one_key_is_read():
    """A bag of one key is its row, bit for bit, in every mode."""
    for mode in MODES:
        bag, ours = pair(mode, 16)
        keys = torch.arange(ROWS)
        assert torch.equal(ours({"f": keys}).detach(), bag.weight.detach())
