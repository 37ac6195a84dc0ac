import copy

import pytest
import torch
from torch import nn

from penstock import (
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    TableConfig,
    clip_grad_norm_,
)
from penstock.config import SGD, DenseOptimizer, Schedule, TrainingConfig
from penstock.errors import ConfigError
from penstock.training.steps import dense
from penstock.training.steps.dense import DenseTrainer


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))


def set_gradients(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def take(trainer, step, skip=None):
    """A step; returns the norm that it clipped by."""
    norm = trainer.norm()
    trainer.step(step, norm, skip)
    return float(norm)


def weights(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


PLAIN = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, foreach=False),
    "adamw": lambda parameters, lr: torch.optim.AdamW(
        parameters, lr=lr, weight_decay=0, foreach=False
    ),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, foreach=False),
    "adagrad": lambda parameters, lr: torch.optim.Adagrad(parameters, lr=lr, foreach=False),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_steps_equal_those_of_the_plain_torch_optimizer(kind):
    model, twin = make_model(), make_model()
    trainer = DenseTrainer(model, DenseOptimizer(kind=kind, learning_rate=0.01))
    plain = PLAIN[kind](twin.parameters(), 0.01)
    for step in range(20):
        set_gradients(model, step)
        set_gradients(twin, step)
        take(trainer, step)
        plain.step()
    assert not torch.equal(weights(model), weights(make_model()))
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({"kind": "adam"}, {"kind": "adamw"}),
        ({"kind": "adam"}, {"weight_decay": 0.1}),
        ({"kind": "adamw"}, {"weight_decay": 0.1}),
        ({"kind": "sgd"}, {"weight_decay": 0.1}),
        ({"kind": "sgd"}, {"momentum": 0.9}),
        ({"kind": "adagrad"}, {"weight_decay": 0.1}),
        ({"kind": "adam"}, {"learning_rate": 2e-3}),
        ({"kind": "adam"}, {"schedule": Schedule(warmup_steps=10)}),
    ],
)
def test_every_hyper_parameter_changes_the_result(base, change):
    results = []
    # AdamW and Adam differ in how they decay, so they need some.
    decay = {"weight_decay": 0.01} if "kind" in change else {}
    for fields in ({**decay, **base}, {**decay, **base, **change}):
        model = make_model()
        trainer = DenseTrainer(model, DenseOptimizer(**fields))
        for step in range(5):
            set_gradients(model, step)
            take(trainer, step)
        results.append(weights(model))
    assert not torch.allclose(results[0], results[1], rtol=1e-6, atol=0)


def test_the_schedule_sets_the_rate_of_each_step():
    schedule = Schedule(warmup_steps=2, decay="linear", decay_steps=4, end_factor=0.5)
    model = make_model()
    trainer = DenseTrainer(model, DenseOptimizer(kind="sgd", learning_rate=1.0, schedule=schedule))
    moves = []
    for step in range(7):
        before = weights(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        take(trainer, step)
        moves.append(round(float((before - weights(model)).mean()), 5))
    assert moves == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5]


def test_clipping_limits_the_norm_and_reports_it_before():
    model = make_model()
    config = DenseOptimizer(kind="sgd", learning_rate=1.0)
    trainer = DenseTrainer(model, config, clip_gradient_norm=0.5)
    for scale, expected in ((10.0, 0.5), (1e-3, None)):
        set_gradients(model, 0, scale)
        norm = float(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm())
        before = weights(model)
        assert take(trainer, 0) == pytest.approx(norm, rel=1e-5)
        moved = float((weights(model) - before).norm())
        assert moved == pytest.approx(norm if expected is None else expected, rel=1e-3)


def test_gradients_are_cleared_and_unused_parameters_stay():
    model = make_model()
    trainer = DenseTrainer(model, DenseOptimizer())
    before = weights(model)
    model[2].bias.grad = torch.ones(1)
    assert take(trainer, 0) == 1.0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(weights(model)[:-1], before[:-1])
    assert take(trainer, 1) == 0.0  # no gradient at all


def test_a_model_without_parameters_is_no_error():
    trainer = DenseTrainer(nn.Identity(), DenseOptimizer())
    assert trainer.optimizer is None
    assert take(trainer, 0) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_is_named(value):
    model = make_model()
    trainer = DenseTrainer(model, DenseOptimizer(), clip_gradient_norm=1.0)
    set_gradients(model, 0)
    model[0].weight.grad[1, :3] = value
    assert not trainer.norm().isfinite()
    assert trainer.describe_non_finite(12) == (
        "step 12: the gradient of '0.weight' is NaN or infinite in 3 of 20 elements; lower "
        "training.optimizer.learning_rate, set training.clip_gradient_norm, or look for extreme "
        "numeric inputs"
    )


def test_a_norm_that_overflows_is_told_apart():
    model = make_model()
    trainer = DenseTrainer(model, DenseOptimizer())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e38)
    assert not trainer.norm().isfinite()
    assert trainer.describe_non_finite(3) == (
        "step 3: the gradients are finite, but their L2 norm overflows float32; lower "
        "training.optimizer.learning_rate or scale the numeric inputs"
    )


def states_of(trainer):
    return [value.clone() for one in trainer.optimizer.state.values() for value in one.values()]


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(
    ("fields", "is_fused"),
    [
        ({"kind": "adam"}, True),
        ({"kind": "adamw"}, True),
        ({"kind": "sgd", "momentum": 0.9}, True),
        ({"kind": "adagrad"}, True),
        ({"kind": "adagrad"}, False),
    ],
)
def test_a_step_that_is_skipped_changes_nothing(fields, clip, is_fused, monkeypatch):
    """Neither weights nor state, whatever the gradients; steps before and after are as without."""
    monkeypatch.setattr(dense, "_has_fused_adagrad", lambda device: is_fused)
    model, twin = make_model(), make_model()
    config = DenseOptimizer(**fields, weight_decay=0.1)
    trainer, of_twin = (DenseTrainer(one, config, clip) for one in (model, twin))
    for step, skip in enumerate((0.0, 1.0, 1.0, 0.0)):
        set_gradients(model, step)
        if skip:
            model[0].weight.grad[0, 0] = torch.nan
            before = weights(model), states_of(trainer)
        take(trainer, step, torch.tensor(skip))
        assert all(one.grad is None for one in model.parameters())
        if skip:
            assert torch.equal(weights(model), before[0])
            assert all(map(torch.equal, states_of(trainer), before[1]))
        else:
            set_gradients(twin, step)
            take(of_twin, step)
    assert torch.equal(weights(model), weights(twin))
    assert all(map(torch.equal, states_of(trainer), states_of(of_twin)))


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_tables_are_clipped_with_the_model(clip):
    tables = [TableConfig(name="t", dim=20, optimizer=SGD(learning_rate=1.0))]
    features = [FeatureConfig(name="x", table="t")]
    collection, twin = (EmbeddingCollection(tables, features) for _ in range(2))
    model = make_model()
    of_twin = copy.deepcopy(model)
    for embeddings, head in ((collection, model), (twin, of_twin)):
        keys = torch.tensor([[1, 2], [2, 3]])
        out = embeddings(KeyedJagged.pack({"x": Jagged.from_dense(keys)}))
        (out.sum(0) * torch.linspace(-1, 1, 20)).sum().backward()
        set_gradients(head, 0)
    norm = clip_grad_norm_([of_twin, twin], 1e9 if clip is None else clip)
    trainer = DenseTrainer(model, DenseOptimizer(kind="sgd"), clip, clip_with=collection)
    assert take(trainer, 0) == pytest.approx(float(norm), rel=1e-6)
    take(DenseTrainer(of_twin, DenseOptimizer(kind="sgd")), 0)
    torch.testing.assert_close(weights(model), weights(of_twin), rtol=1e-6, atol=1e-7)
    for each in (collection, twin):
        each.apply_gradients()
    rows = [each.find("t", torch.arange(4)).values for each in (collection, twin)]
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-7)


def test_tables_are_clipped_where_the_model_has_no_gradient():
    tables = [TableConfig(name="t", dim=4, optimizer=SGD(learning_rate=1.0))]
    collection = EmbeddingCollection(tables, [FeatureConfig(name="x", table="t")])
    collection(KeyedJagged.pack({"x": Jagged.from_dense(torch.arange(3))})).sum().backward()
    trainer = DenseTrainer(nn.Identity(), DenseOptimizer(), 0.5, clip_with=collection)
    assert take(trainer, 0) == pytest.approx(12**0.5)
    assert float(collection.gradient_norm()) == pytest.approx(0.5, rel=1e-5)


def test_a_job_says_whether_tables_are_clipped():
    with pytest.raises(ConfigError, match="clip_with_tables has no effect without clip_gradient"):
        TrainingConfig(clip_with_tables=True)
    assert not TrainingConfig(clip_gradient_norm=1.0).clip_with_tables
