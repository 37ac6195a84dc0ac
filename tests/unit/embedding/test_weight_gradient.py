"""Weights of a batch that require a gradient get it: per_sample_weights of nn.EmbeddingBag."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from penstock import (
    SGD,
    AdmitFrequent,
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    TableConfig,
)

CLOSE = {"rtol": 2e-5, "atol": 1e-6}  # float32 products of a few columns, summed
NUM_KEYS = 12


def jagged(rng, size, weights=True, most=4):
    lengths = rng.integers(0, most + 1, size)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    keys = torch.from_numpy(rng.integers(0, NUM_KEYS, int(lengths.sum())))
    numbers = torch.from_numpy(rng.normal(size=len(keys)).astype(np.float32))
    return Jagged(keys, offsets, numbers.requires_grad_() if weights else None)


def collection(poolings, dims, **rules):
    """One feature a pooling; of dims that differ, stores differ too."""
    tables = [
        TableConfig(name=f"t{n}", dim=dim, optimizer=SGD(learning_rate=0.5), **rules)
        for n, dim in enumerate(dims)
    ]
    features = [
        FeatureConfig(
            name=f"f{n}",
            table=f"t{n % len(tables)}",
            pooling=pooling,
            max_keys=4 if pooling == "sequence" else None,
        )
        for n, pooling in enumerate(poolings)
    ]
    return EmbeddingCollection(tables, features)


def plain(embeddings, columns):
    """The documented formula, on the rows as they are, for autograd."""
    parts = []
    for feature, (keys, offsets, weights) in zip(embeddings.features, columns, strict=True):
        rows = embeddings.find(feature.table, keys).values
        bags = []
        for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            x, w = rows[first:last].double(), weights[first:last].double()
            if feature.pooling == "sequence":
                padding = torch.zeros(4 - len(x), x.shape[1], dtype=torch.float64)
                bags.append(torch.cat([w[:, None] * x, padding]).flatten())
                continue
            divisor = {"sum": 1.0, "mean": w.sum(), "sqrt_n": (w * w).sum().sqrt()}[feature.pooling]
            total = (w[:, None] * x).sum(0)
            bags.append(total / divisor if last > first else total)
        parts.append(torch.stack(bags))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_embedding_bag(size, sparse):
    rng = np.random.default_rng(size)
    embeddings = collection(["sum"], [5])
    bags = jagged(rng, size)
    weight = embeddings.find("t0", torch.arange(NUM_KEYS)).values
    twin = nn.EmbeddingBag(NUM_KEYS, 5, mode="sum", sparse=sparse, _weight=weight)
    theirs = bags.weights.detach().clone().requires_grad_()
    grad = torch.from_numpy(rng.normal(size=(size, 5)).astype(np.float32))
    out = embeddings(KeyedJagged.pack({"f0": bags}))
    expected = twin(bags.values, bags.offsets[:-1], per_sample_weights=theirs)
    torch.testing.assert_close(out, expected, **CLOSE)
    (out * grad).sum().backward()
    (expected * grad).sum().backward()
    torch.testing.assert_close(bags.weights.grad, theirs.grad, **CLOSE)
    embeddings.apply_gradients()
    torch.optim.SGD(twin.parameters(), lr=0.5).step()
    keys = torch.arange(NUM_KEYS)
    torch.testing.assert_close(embeddings.find("t0", keys).values, twin.weight.detach(), **CLOSE)


@pytest.mark.parametrize("dims", [[4], [3, 3], [4, 8, 5]])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_formula_of_every_pooling(dims, mode, dtype):
    rng = np.random.default_rng(len(dims))
    poolings = ["sum", "mean", "sqrt_n", "sequence", "mean", "sequence"]
    embeddings = collection(poolings, dims, dtype=dtype)
    for size in (7, 1, 20):
        columns = [jagged(rng, size) for _ in poolings]
        names = [feature.name for feature in embeddings.features]
        packed = KeyedJagged.pack(dict(zip(names, columns, strict=True)))
        embeddings.train(mode != "eval").requires_grad_(mode != "frozen")
        out = embeddings(packed)
        twins = [
            each._replace(weights=each.weights.detach().clone().requires_grad_())
            for each in columns
        ]
        expected = plain(embeddings, twins)
        grad = torch.from_numpy(rng.normal(size=tuple(out.shape)).astype(np.float32))
        (out * grad).sum().backward()
        (expected * grad).sum().backward()
        for each, twin in zip(columns, twins, strict=True):
            # Divisors of weights of both signs are small now and then.
            torch.testing.assert_close(each.weights.grad, twin.weights.grad, rtol=1e-3, atol=1e-4)
        assert len(embeddings.pending) == (mode == "train")
        if mode == "train":
            embeddings.apply_gradients()


@pytest.mark.parametrize("pooling", ["sum", "mean", "sqrt_n", "sequence"])
def test_equals_finite_differences(pooling):
    embeddings = collection([pooling], [3]).eval()
    offsets = torch.tensor([0, 3, 3, 4, 6])
    keys = torch.arange(6)
    weights = torch.tensor([0.5, 1.5, -0.75, 2.0, 0.25, 1.0], requires_grad=True)
    factor = torch.linspace(-1, 2, 4 * embeddings.width).view(4, -1)

    def loss(w):
        out = embeddings(KeyedJagged.pack({"f0": Jagged(keys, offsets, w)}))
        return (out.double() * factor).sum() * 100

    loss(weights).backward()
    step = 2.0**-8
    for n in range(6):
        moved = torch.zeros(6).index_fill_(0, torch.tensor([n]), step)
        with torch.no_grad():
            slope = (loss(weights + moved) - loss(weights - moved)) / (2 * step)
        # Curvature times the square of the step, and the rounding of float32 over it.
        assert float(weights.grad[n]) == pytest.approx(float(slope), rel=2e-3, abs=2e-3)


def test_a_bag_whose_divisor_is_0_has_none():
    embeddings = collection(["mean", "sqrt_n"], [3])
    offsets = torch.tensor([0, 2, 4])
    columns = [
        Jagged(torch.arange(4), offsets, torch.tensor([1.0, -1.0, 1.0, 2.0], requires_grad=True)),
        Jagged(torch.arange(4), offsets, torch.tensor([0.0, 0.0, 1.0, 2.0], requires_grad=True)),
    ]
    embeddings(KeyedJagged.pack(dict(zip(["f0", "f1"], columns, strict=True)))).sum().backward()
    for each in columns:
        assert each.weights.grad[:2].tolist() == [0.0, 0.0]
        assert each.weights.grad[2:].isfinite().all()
        assert each.weights.grad[2:].abs().sum() > 0


def test_one_feature_learns_its_weights_beside_another():
    """Keys without weights have weight 1, and the gradient goes where it is asked for."""
    rng = np.random.default_rng(0)
    embeddings = collection(["sum", "sum"], [3])
    bags, without = jagged(rng, 6), jagged(rng, 6, weights=False)
    out = embeddings(KeyedJagged.pack({"f0": bags, "f1": without}))
    out.sum().backward()
    rows = embeddings.find("t0", bags.values).values
    torch.testing.assert_close(bags.weights.grad, rows.sum(1), **CLOSE)


def test_keys_that_are_refused_read_the_default_row():
    embeddings = collection(["sum"], [3], admission=AdmitFrequent(min_count=100))
    state = embeddings.retention_state("t0")
    state.default_value.copy_(torch.tensor([1.0, 2.0, 4.0]))
    embeddings.set_retention_state("t0", state)
    weights = torch.ones(2, requires_grad=True)
    bags = Jagged(torch.tensor([1, 2]), torch.tensor([0, 2]), weights)
    embeddings(KeyedJagged.pack({"f0": bags})).sum().backward()
    assert weights.grad.tolist() == [7.0, 7.0]


def test_rows_are_those_of_the_look_up():
    """A batch that was looked up before the last one's update, as a prefetch does."""
    embeddings = collection(["sum"], [3])
    weights = [torch.ones(2, requires_grad=True) for _ in range(2)]
    keys, offsets = torch.tensor([1, 2]), torch.tensor([0, 2])
    rows = embeddings.find("t0", keys).values
    outs = [embeddings(KeyedJagged.pack({"f0": Jagged(keys, offsets, each)})) for each in weights]
    outs[0].sum().backward()
    embeddings.apply_gradients()
    outs[1].sum().backward()
    torch.testing.assert_close(weights[1].grad, rows.sum(1), **CLOSE)


def test_the_batch_may_be_overwritten():
    embeddings = collection(["mean"], [3])
    keys, offsets = torch.tensor([1, 2]), torch.tensor([0, 2])
    weights = torch.tensor([1.0, 3.0], requires_grad=True)
    bags = Jagged(keys, offsets, weights)
    packed = KeyedJagged.pack({"f0": bags})
    twin = packed.weights
    expected = plain(embeddings, [bags])
    out = embeddings(packed)
    packed.offsets.fill_(0)
    with torch.no_grad():
        twin.detach().fill_(9.0)
    out.sum().backward()
    found = weights.grad.clone()
    weights.grad = None
    expected.sum().backward()
    torch.testing.assert_close(found, weights.grad, **CLOSE)


def test_a_model_of_its_own_weights_learns_them():
    """Attention over keys: its parameters, the tables and the head in one step, as in torch."""
    torch.manual_seed(0)
    embeddings = collection(["sum"], [4])
    score = nn.Embedding(NUM_KEYS, 1)
    optimizer = torch.optim.SGD(score.parameters(), lr=0.5)
    embeddings.attach(optimizer)
    keys = torch.arange(NUM_KEYS)
    twin = nn.EmbeddingBag(NUM_KEYS, 4, mode="sum", _weight=embeddings.find("t0", keys).values)
    twin_score = copy.deepcopy(score)
    theirs = torch.optim.SGD([*twin.parameters(), *twin_score.parameters()], lr=0.5)
    rng = np.random.default_rng(3)
    for _ in range(4):
        ids = torch.from_numpy(rng.integers(0, NUM_KEYS, (6, 3)))
        flat = Jagged.from_dense(ids)
        for weights, each in ((score, optimizer), (twin_score, theirs)):
            each.zero_grad()
            factors = weights(ids).sigmoid().flatten()
            if weights is score:
                out = embeddings(KeyedJagged.pack({"f0": flat._replace(weights=factors)}))
            else:
                out = twin(ids, per_sample_weights=factors.view(6, 3))
            out.square().sum().backward()
            each.step()
    torch.testing.assert_close(score.weight, twin_score.weight, **CLOSE)
    torch.testing.assert_close(embeddings.find("t0", keys).values, twin.weight.detach(), **CLOSE)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_compiled(mode):
    embeddings = collection(["sum", "mean"], [3, 4])
    embeddings.train(mode != "eval").requires_grad_(mode != "frozen")
    offsets = torch.tensor([0, 2, 3])
    grads = []
    for run in (embeddings, torch.compile(embeddings, backend="aot_eager", fullgraph=True)):
        weights = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
        bags = Jagged(torch.arange(3), offsets, weights)
        out = run(KeyedJagged.pack({"f0": bags, "f1": bags}))
        (out * torch.arange(7.0)).sum().backward()
        grads.append(weights.grad)
        assert len(embeddings.pending) == (mode == "train")
        embeddings.discard_gradients()
    torch.testing.assert_close(*grads, **CLOSE)


def test_without_grad_they_are_read_and_nothing_is_kept():
    embeddings = collection(["sum"], [3])
    weights = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        bags = Jagged(torch.arange(2), torch.tensor([0, 2]), weights)
        out = embeddings(KeyedJagged(("f0",), bags.values, bags.offsets, weights))
    assert not out.requires_grad
    assert torch.equal(out[0], embeddings.find("t0", torch.arange(2)).values.sum(0))
