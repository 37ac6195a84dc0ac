"""Clipping by norm: tables count and are scaled as torch's own embeddings are."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from penstock import (
    SGD,
    ConfigError,
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    NonFiniteError,
    TableConfig,
    clip_grad_norm_,
)

NUM_KEYS = 30
RATE = 0.5
CLOSE = {"rtol": 2e-5, "atol": 1e-6}  # float32 sums in another order
POOLINGS = [("sum", "a"), ("mean", "b"), ("mean", "a"), ("sum", "c")]
DIMS = {"a": 4, "b": 4, "c": 7}


class Ours(nn.Module):
    """Three tables in two stores, one of them read by two features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        tables = [
            TableConfig(name=name, dim=dim, optimizer=SGD(learning_rate=RATE))
            for name, dim in DIMS.items()
        ]
        features = [
            FeatureConfig(name=f"f{n}", table=table, pooling=pooling)
            for n, (pooling, table) in enumerate(POOLINGS)
        ]
        self.embeddings = EmbeddingCollection(tables, features)
        self.head = nn.Linear(self.embeddings.width, 1)

    def forward(self, keys):
        bags = Jagged.from_dense(keys)
        return self.head(
            self.embeddings(KeyedJagged.pack({f"f{n}": bags for n in range(len(POOLINGS))}))
        )

    def rows(self):
        keys = torch.arange(NUM_KEYS)
        return {name: self.embeddings.find(name, keys).values for name in DIMS}


class Twin(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.tables = nn.ParameterDict(ours.rows())
        self.head = nn.Linear(ours.head.in_features, 1)
        self.head.load_state_dict(ours.head.state_dict())

    def forward(self, keys):
        pooled = [
            nn.functional.embedding_bag(keys, self.tables[table], mode=pooling)
            for pooling, table in POOLINGS
        ]
        return self.head(torch.cat(pooled, 1))


def pair(*, attached=False, backwards=1):
    """Both models with gradients, and how each takes its step."""
    ours = Ours()
    twin = Twin(ours)
    optimizer = torch.optim.SGD(ours.head.parameters(), lr=RATE)
    theirs = torch.optim.SGD(twin.parameters(), lr=RATE)
    if attached:
        ours.embeddings.attach(optimizer)
    rng = np.random.default_rng(0)
    for _ in range(backwards):
        keys = torch.from_numpy(rng.integers(0, NUM_KEYS, (8, 3)))
        for model in (ours, twin):
            model(keys).square().sum().backward()

    def step():
        optimizer.step()
        if not attached:
            ours.embeddings.apply_gradients()
        theirs.step()

    return ours, twin, step


def assert_same(ours, twin):
    for name, rows in ours.rows().items():
        torch.testing.assert_close(rows, twin.tables[name].detach(), **CLOSE)
    torch.testing.assert_close(ours.head.weight, twin.head.weight, **CLOSE)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("how", ["ours", "torch's", "ours, attached", "torch's, attached"])
def test_equals_torch(how, max_norm, norm_type, backwards):
    ours, twin, step = pair(attached="attached" in how, backwards=backwards)
    expected = nn.utils.clip_grad_norm_(twin.parameters(), max_norm, norm_type)
    if "torch" in how:
        found = nn.utils.clip_grad_norm_(ours.parameters(), max_norm, norm_type)
    else:
        found = clip_grad_norm_(ours, max_norm, norm_type)
    torch.testing.assert_close(found, expected, **CLOSE)
    tables = torch.cat([table.grad.flatten() for table in twin.tables.values()])
    after = torch.linalg.vector_norm(tables, norm_type)
    torch.testing.assert_close(ours.embeddings.gradient_norm(norm_type), after, **CLOSE)
    step()
    assert_same(ours, twin)


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model.parameters(),
        lambda model: [model.embeddings, model.head],
        lambda model: [model.embeddings.anchor, model.head.weight, model.head.bias],
        lambda model: [model, model.embeddings, *model.parameters()],
        lambda model: [[model.head], (model.embeddings,)],
    ],
)
def test_modules_and_parameters_count_once(given):
    ours, twin, step = pair()
    expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    torch.testing.assert_close(clip_grad_norm_(given(ours), 0.1), expected, **CLOSE)
    step()
    assert_same(ours, twin)


def test_tables_alone_and_dense_alone():
    ours, twin, _ = pair()
    tables = torch.cat([table.grad.flatten() for table in twin.tables.values()])
    torch.testing.assert_close(clip_grad_norm_(ours.embeddings, 1e9), tables.norm(), **CLOSE)
    assert clip_grad_norm_(ours.embeddings.anchor, 0.1) > 0.1
    torch.testing.assert_close(ours.embeddings.gradient_norm(), torch.tensor(0.1), **CLOSE)
    before = ours.embeddings.gradient_norm()
    norm = clip_grad_norm_(ours.head, 0.1)
    torch.testing.assert_close(
        norm, nn.utils.get_total_norm([each.grad for each in twin.head.parameters()]), **CLOSE
    )
    assert torch.equal(ours.embeddings.gradient_norm(), before)
    assert float(clip_grad_norm_([], 1.0)) == 0
    ours.embeddings.discard_gradients()
    assert float(clip_grad_norm_(ours.embeddings, 1.0)) == 0


def test_two_collections():
    models = [pair()[0], pair()[0]]
    single = float(clip_grad_norm_(models[0], 1e9))
    assert float(clip_grad_norm_(models, 1e9)) == pytest.approx(2**0.5 * single, rel=1e-6)


def test_what_is_not_finite():
    ours, _, _ = pair()
    norm = ours.embeddings.gradient_norm()
    ours.head.bias.grad.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="the norm of all gradients is nan"):
        clip_grad_norm_(ours, 1.0, error_if_nonfinite=True)
    assert torch.equal(ours.embeddings.gradient_norm(), norm)
    assert clip_grad_norm_(ours, 1.0).isnan()
    with pytest.raises(NonFiniteError):
        ours.embeddings.apply_gradients()

    ours, _, _ = pair()
    ours(torch.arange(3)[None]).mul(math.inf).sum().backward()
    with pytest.raises(NonFiniteError, match="the gradient of the embeddings is NaN or infinite"):
        clip_grad_norm_(ours.embeddings, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_norm": -1.0}, "max_norm -1.0"),
        ({"max_norm": math.nan}, "max_norm nan"),
        ({"max_norm": 1.0, "norm_type": 0.0}, "norm_type 0.0"),
    ],
)
def test_numbers_that_are_not_possible(given, match):
    ours, _, _ = pair()
    with pytest.raises(ConfigError, match=match):
        clip_grad_norm_(ours, **given)
    with pytest.raises(ConfigError, match="norm_type -1"):
        ours.embeddings.gradient_norm(-1)
    for model in ("head", 3, [ours, None]):
        with pytest.raises(ConfigError, match="expected modules and parameters"):
            clip_grad_norm_(model, 1.0)
