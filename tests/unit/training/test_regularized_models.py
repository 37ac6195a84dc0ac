"""Dropout and batch norm in every model: where they are, in training, evaluation, of one sample."""

import pytest
import torch
from torch import nn

from penstock.config import Model, parse_job
from penstock.errors import ConfigError
from penstock.models import build_model
from penstock.models.parts.mlp import MLP, BatchNorm
from penstock.types import FeatureShape

KINDS = {
    "dlrm": {},
    "dcn_v2": {},
    "deepfm": {},
    "wide_deep": {},
    "autoint": {"deep": [8]},
    "xdeepfm": {},
    "final_mlp": {},
    "masknet": {},
    "shared_bottom": {},
    "mmoe": {},
    "ple": {},
    "esmm": {},
    # Dice has statistics of its own.
    "din": {"candidate": "item", "sequence": "history", "activation": "prelu"},
    "hstu": {"candidate": "item", "sequence": "history"},
    "two_tower": {"items": ["item"]},
}
SEQUENCES = {"din", "hstu"}
SEVERAL = {"shared_bottom", "mmoe", "ple", "esmm"}


def config_of(kind, **more):
    labels = [{"column": "click"}, {"column": "buy"}]
    label = labels if kind in SEVERAL else labels[0]
    data = {"source": {"format": "synthetic"}, "label": label}
    return parse_job({"data": data, "model": {"kind": kind, **KINDS[kind], **more}}).model


def build(kind, **more):
    features = [FeatureShape("user", 4), FeatureShape("item", 4)]
    if kind in SEQUENCES:
        features.append(FeatureShape("history", 4, 3))
    torch.manual_seed(0)
    return build_model(config_of(kind, **more), 2, features, 2 if kind in SEVERAL else 1)


def inputs(kind, samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    width = 8 + (12 if kind in SEQUENCES else 0)
    dense = torch.randn(samples, 2, generator=generator)
    embeddings = torch.randn(samples, width, generator=generator)
    lengths = torch.full((samples, 1), 2)
    return (dense, embeddings, lengths) if kind in SEQUENCES else (dense, embeddings)


def test_every_model_is_here():
    known = {kind.model_fields["kind"].default for kind in Model.__args__[0].__args__}
    assert set(KINDS) == known - {"custom"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_hidden_layer_has_both(kind):
    plain = build(kind)
    model = build(kind, dropout=0.5, batch_norm=True)
    layers = [
        (list(model.get_submodule(name)), len(part) // 2)
        for name, part in plain.named_modules()
        if isinstance(part, MLP) and not part.is_gate
    ]
    for found, hidden in layers:
        kinds = [nn.Linear, BatchNorm, nn.ReLU, nn.Dropout] * hidden
        assert [type(one) for one in found] == kinds
    assert layers or kind == "din"
    x = inputs(kind, 16)
    model.train()
    assert not torch.equal(model(*x), model(*x)), "dropout draws anew"
    model.eval()
    assert torch.equal(model(*x), model(*x))
    # What weights begin as does not depend on it.
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert all(map(torch.equal, weights, [p for p in plain.parameters() if p.dim() > 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_is_normalized_as_in_evaluation(kind):
    model = build(kind, batch_norm=True)
    model.train()
    for seed in range(3):
        model(*inputs(kind, 16, seed))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = inputs(kind, 1)
    trained = model(*one)
    trained.sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(trained, model.eval()(*one))


def test_equals_torch():
    """A layer is torch's own batch norm, activation and dropout."""
    mlp = MLP(3, [5])
    mlp.regularize(0.25, batch_norm=True)
    x = torch.randn(8, 3)
    norm = nn.BatchNorm1d(5)
    torch.manual_seed(3)
    got = mlp(x)
    torch.manual_seed(3)
    assert torch.equal(got, nn.functional.dropout(norm(mlp[0](x)).relu(), 0.25))
    assert torch.equal(mlp[1].running_mean, norm.running_mean)


@pytest.mark.parametrize(
    ("kind", "more"),
    [("dcn_v2", {"deep": []}), ("autoint", {"deep": []}), ("esmm", {"towers": []})],
)
def test_without_a_hidden_layer_it_is_refused(kind, more):
    with pytest.raises(ConfigError) as raised:
        build(kind, dropout=0.1, **more)
    assert str(raised.value) == (
        "model: dropout and batch_norm are of hidden layers, and this one has none; give it some, "
        "or remove them"
    )


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_share_is_below_one(value):
    with pytest.raises(ConfigError, match=r"model\.dropout"):
        config_of("dlrm", dropout=value)
