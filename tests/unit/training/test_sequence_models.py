"""DIN and HSTU against their formulas in loops; padding, order and causality."""

import pytest
import torch
from torch import nn

from penstock.config import DINConfig, HSTUConfig
from penstock.errors import ConfigError
from penstock.models import DIN, HSTU, build_model
from penstock.models.networks.din import Dice
from penstock.models.networks.hstu import HSTULayer
from penstock.types import FeatureShape

D, L = 4, 5
FEATURES = [
    FeatureShape("user", 3),
    FeatureShape("clicked", D, L),
    FeatureShape("item", D),
    FeatureShape("city", 2),
]
SEQUENCE, CANDIDATE = slice(3, 3 + L * D), slice(3 + L * D, 3 + L * D + D)
WIDTH = 3 + L * D + D + 2
OTHERS = [0, 1, 2, WIDTH - 2, WIDTH - 1]
DIN_CONFIGS = [
    DINConfig(candidate="item", sequence="clicked", attention=(6, 3), deep=(7,)),
    DINConfig(candidate="item", sequence="clicked", activation="prelu", attention=(), deep=()),
    DINConfig(candidate="item", sequence="clicked", activation="prelu", deep=(5, 4)),
]
HSTU_CONFIGS = [
    HSTUConfig(candidate="item", sequence="clicked", layers=1, deep=()),
    HSTUConfig(candidate="item", sequence="clicked", layers=2, heads=2, deep=(6,)),
]
EVERY = DIN_CONFIGS + HSTU_CONFIGS
LENGTHS = torch.tensor([[0], [1], [5], [3], [2], [4]])


def make(config, num_numeric=2, features=FEATURES):
    torch.manual_seed(1)
    model = build_model(config, num_numeric, features).double()
    for parameter in model.parameters():  # biases begin at zero and would hide a mistake
        nn.init.normal_(parameter, std=0.5)
    return model


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(len(LENGTHS), 2, generator=generator, dtype=torch.float64)
    embeddings = torch.randn(len(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)
    return dense, embeddings, LENGTHS


def keys_of(embeddings, sample):
    return embeddings[sample, SEQUENCE].reshape(L, D)[: int(LENGTHS[sample])]


def mlp_by_loops(mlp, row):
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            row = layer.weight @ row + layer.bias
        elif isinstance(layer, nn.PReLU):
            row = torch.where(row > 0, row, layer.weight * row)
        elif isinstance(layer, Dice):
            gate = 1 / (1 + torch.exp(-(row - layer.mean) / (layer.variance + 1e-8).sqrt()))
            row = gate * row + (1 - gate) * layer.slope * row
        else:
            row = row.relu()
    return row


def din_by_loops(model, dense, embeddings, lengths):
    """The paper's formula, one sample and one key at a time, in evaluation mode."""
    logits = []
    for sample in range(len(dense)):
        candidate = embeddings[sample, CANDIDATE]
        interest = torch.zeros_like(candidate)
        for key in keys_of(embeddings, sample):
            pair = torch.cat((candidate, key, candidate - key, candidate * key))
            interest = interest + mlp_by_loops(model.attention, pair) * key
        row = torch.cat((interest, candidate, dense[sample], embeddings[sample, OTHERS]))
        logits.append(mlp_by_loops(model.deep, row)[0])
    return torch.stack(logits)


def norm_by_loops(norm, row):
    centred = row - row.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def layer_by_loops(layer, x, positions):
    """x: the rows of one sample, without padding; `positions` is the length with padding."""
    dim, per_head = D, D // layer.heads
    parts = [
        nn.functional.silu(layer.uvqk.weight @ norm_by_loops(layer.norm, row)).split(dim)
        for row in x
    ]
    out = []
    for i, (u, _, query, _) in enumerate(parts):
        heads = []
        for head in range(layer.heads):
            own = slice(head * per_head, (head + 1) * per_head)
            mixed = torch.zeros(per_head, dtype=x[0].dtype)
            for j in range(i + 1):
                _, value, _, key = parts[j]
                score = query[own] @ key[own] + layer.distance_bias[i - j]
                mixed = mixed + score * torch.sigmoid(score) / positions * value[own]
            heads.append(mixed)
        gated = norm_by_loops(layer.out_norm, torch.cat(heads)) * u
        out.append(x[i] + layer.out.weight @ gated + layer.out.bias)
    return out


def hstu_by_loops(model, dense, embeddings, lengths):
    logits = []
    for sample in range(len(dense)):
        x = [*keys_of(embeddings, sample), embeddings[sample, CANDIDATE]]
        for layer in model.layers:
            x = layer_by_loops(layer, x, L + 1)
        row = torch.cat((x[-1], dense[sample], embeddings[sample, OTHERS]))
        logits.append(model.head.logit.weight[0] @ mlp_by_loops(model.head.hidden, row))
        logits[-1] = logits[-1] + model.head.logit.bias[0]
    return torch.stack(logits)


@pytest.mark.parametrize("config", EVERY)
def test_logits_and_gradients_are_those_of_the_formula(config):
    model = make(config).eval()
    reference = din_by_loops if isinstance(model, DIN) else hstu_by_loops
    dense, embeddings, lengths = inputs()
    wanted = [dense.requires_grad_(), embeddings.requires_grad_(), *model.parameters()]
    results = []
    for forward in (model, lambda *given: reference(model, *given)):
        logits = forward(dense, embeddings, lengths)
        assert logits.shape == (len(LENGTHS),)
        gradients = torch.autograd.grad(logits.sin().sum(), wanted, allow_unused=True)
        results.append([logits, *gradients])
    for got, expected in zip(*results, strict=True):
        expected = torch.zeros_like(got) if expected is None and got is not None else expected
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", EVERY)
def test_padding_never_changes_a_bit(config, training):
    dense, embeddings, lengths = inputs()
    is_padding = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
    places = torch.arange(L).repeat_interleave(D)
    is_padding[:, SEQUENCE] = places >= lengths
    results = []
    for padding in (0.0, 1e30, torch.nan):
        model = make(config).train(training)
        given = torch.where(is_padding, padding, embeddings).requires_grad_()
        logits = model(dense, given, lengths)
        logits.sum().backward()
        assert (given.grad[is_padding] == 0).all()
        results.append([
            logits,
            given.grad,
            *(parameter.grad for parameter in model.parameters()),
            *model.state_dict().values(),
        ])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@pytest.mark.parametrize("config", DIN_CONFIGS)
def test_din_does_not_know_the_order_of_the_keys(config):
    model = make(config).eval()
    dense, embeddings, lengths = inputs()
    turned = embeddings.clone()
    for sample, length in enumerate(lengths.flatten().tolist()):
        keys = keys_of(embeddings, sample).flip(0)
        turned[sample, 3 : 3 + length * D] = keys.flatten()
    assert not torch.equal(turned, embeddings)
    torch.testing.assert_close(
        model(dense, turned, lengths), model(dense, embeddings, lengths), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("config", HSTU_CONFIGS)
def test_hstu_knows_the_order_of_the_keys(config):
    model = make(config).eval()
    dense, embeddings, lengths = inputs()
    turned = embeddings.clone()
    turned[:, SEQUENCE] = embeddings[:, SEQUENCE].view(-1, L, D).flip(1).flatten(1)
    full = lengths.flatten() == L
    changed = (model(dense, turned, lengths) - model(dense, embeddings, lengths)).abs()
    assert (changed[full] > 1e-6).all()


def test_an_hstu_position_sees_nothing_behind_it():
    layer = HSTULayer(D, 2, 6).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 6, D, dtype=torch.float64)
    before = layer(x)
    for position in range(6):
        changed = x.clone()
        changed[:, position:] = torch.randn(2, 6 - position, D, dtype=torch.float64)
        after = layer(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("config", EVERY)
def test_a_sample_does_not_depend_on_the_others_in_evaluation(config):
    model = make(config).eval()
    dense, embeddings, lengths = inputs()
    whole = model(dense, embeddings, lengths)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = model(dense[order], embeddings[order], lengths[order])
    torch.testing.assert_close(turned, whole[order], rtol=1e-12, atol=1e-12)
    empty = model(dense[:0], embeddings[:0], lengths[:0])
    assert empty.shape == (0,)


@pytest.mark.parametrize("config", EVERY)
def test_initial_weights_are_a_function_of_the_seed_and_logits_small(config):
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(build_model(config, 2, FEATURES))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    dense, embeddings, lengths = inputs()
    logits = models[0](dense.float(), 0.05 * embeddings.float(), lengths)
    assert logits.dtype == torch.float32
    assert bool((logits.abs() < 20).all())


def test_dice_is_batch_norm_and_a_gate():
    dice, norm = Dice(3), nn.BatchNorm1d(3, eps=1e-8, affine=False)
    nn.init.normal_(dice.slope)
    x = torch.randn(40, 3) * 3 + 1
    gate = torch.sigmoid(norm(x))
    torch.testing.assert_close(dice(x), x * (gate + (1 - gate) * dice.slope))
    gate = torch.sigmoid(norm.eval()(x))
    torch.testing.assert_close(dice.eval()(x), x * (gate + (1 - gate) * dice.slope))
    dice.train()
    state = dice.mean.clone()
    assert dice(x[:1]).isfinite().all() and dice(x[:0]).shape == (0, 3)
    assert torch.equal(dice.mean, state)  # one row has no statistics


NAMED = {"candidate": "item", "sequence": "clicked"}


@pytest.mark.parametrize("kind", [DINConfig, HSTUConfig])
@pytest.mark.parametrize(
    ("named", "features", "message"),
    [
        (
            NAMED | {"candidate": "itme"},
            FEATURES,
            "model.candidate: no feature 'itme'; there are user, clicked, item, city",
        ),
        (
            NAMED | {"sequence": "history"},
            FEATURES,
            "model.sequence: no feature 'history'; there are user, clicked, item, city",
        ),
        (
            NAMED | {"candidate": "clicked"},
            FEATURES,
            "model.candidate: 'clicked' is a sequence; name a feature of one vector",
        ),
        (
            NAMED | {"sequence": "user"},
            FEATURES,
            "model.sequence: 'user' has one vector; give it pooling sequence and max_keys",
        ),
        (
            NAMED | {"candidate": "user"},
            FEATURES,
            "model {kind} compares 'user' with 'clicked', but their dims are 3 and 4; let them "
            "share a table",
        ),
        (
            NAMED,
            [*FEATURES, FeatureShape("bought", 4, 2)],
            "model {kind} reads one sequence, 'clicked', but 'bought' is another; give it another "
            "pooling",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(kind, named, features, message):
    config = kind(**named)
    with pytest.raises(ConfigError) as caught:
        build_model(config, 2, features)
    assert str(caught.value) == message.format(kind=config.kind)


def test_heads_must_divide_the_dim():
    with pytest.raises(ConfigError) as caught:
        build_model(HSTUConfig(**NAMED, heads=3), 2, FEATURES)
    assert str(caught.value) == (
        "model hstu: 3 heads do not divide the embedding dim 4; change model.heads or the dim of "
        "the table"
    )


def test_several_labels_are_refused():
    with pytest.raises(ConfigError, match="model din predicts one label, but data.label names 2"):
        build_model(DINConfig(**NAMED), 2, FEATURES, num_tasks=2)
    assert isinstance(build_model(HSTUConfig(**NAMED), 0, FEATURES), HSTU)
