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
from penstock.errors import ConfigError, NonFiniteError
from penstock.training.steps.dense import DenseTrainer


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))


def set_gradients(model, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


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
        trainer.step(step)
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
            trainer.step(step)
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
        trainer.step(step)
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
        assert trainer.step(0) == pytest.approx(norm, rel=1e-5)
        moved = float((weights(model) - before).norm())
        assert moved == pytest.approx(norm if expected is None else expected, rel=1e-3)


def test_gradients_are_cleared_and_unused_parameters_stay():
    model = make_model()
    trainer = DenseTrainer(model, DenseOptimizer())
    before = weights(model)
    model[2].bias.grad = torch.ones(1)
    assert trainer.step(0) == 1.0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(weights(model)[:-1], before[:-1])
    assert trainer.step(1) == 0.0  # no gradient at all


def test_a_model_without_parameters_is_no_error():
    trainer = DenseTrainer(nn.Identity(), DenseOptimizer())
    assert trainer.optimizer is None
    assert trainer.step(0) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_stops_before_anything_changes(value):
    model = make_model()
    trainer = DenseTrainer(model, DenseOptimizer(), clip_gradient_norm=1.0)
    set_gradients(model, 0)
    model[0].weight.grad[1, :3] = value
    before = weights(model)
    with pytest.raises(NonFiniteError) as caught:
        trainer.step(12)
    assert str(caught.value) == (
        "step 12: the gradient of '0.weight' is NaN or infinite in 3 of 20 elements; lower "
        "training.optimizer.learning_rate, set training.clip_gradient_norm, or look for extreme "
        "numeric inputs"
    )
    assert torch.equal(weights(model), before)


def test_a_norm_that_overflows_is_told_apart():
    model = make_model()
    trainer = DenseTrainer(model, DenseOptimizer())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e38)
    with pytest.raises(NonFiniteError) as caught:
        trainer.step(3)
    assert str(caught.value) == (
        "step 3: the gradients are finite, but their L2 norm overflows float32; lower "
        "training.optimizer.learning_rate or scale the numeric inputs"
    )


@pytest.mark.parametrize("clip", [None, 0.01, 1e6])
def test_tables_are_clipped_with_the_model(clip):
    tables = [TableConfig(name="t", dim=20, optimizer=SGD(learning_rate=1.0))]
    features = [FeatureConfig(name="x", table="t")]
    collection, twin = (EmbeddingCollection(tables, features) for _ in range(2))
    model = make_model()
    of_twin = copy.deepcopy(model)
    for embeddings, dense in ((collection, model), (twin, of_twin)):
        keys = torch.tensor([[1, 2], [2, 3]])
        out = embeddings(KeyedJagged.pack({"x": Jagged.from_dense(keys)}))
        (out.sum(0) * torch.linspace(-1, 1, 20)).sum().backward()
        set_gradients(dense, 0)
    norm = clip_grad_norm_([of_twin, twin], 1e9 if clip is None else clip)
    trainer = DenseTrainer(model, DenseOptimizer(kind="sgd"), clip, clip_with=collection)
    assert trainer.step(0) == pytest.approx(float(norm), rel=1e-6)
    DenseTrainer(of_twin, DenseOptimizer(kind="sgd")).step(0)
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
    assert trainer.step(0) == pytest.approx(12**0.5)
    assert float(collection.gradient_norm()) == pytest.approx(0.5, rel=1e-5)


def test_a_job_says_whether_tables_are_clipped():
    with pytest.raises(ConfigError, match="clip_with_tables has no effect without clip_gradient"):
        TrainingConfig(clip_with_tables=True)
    assert not TrainingConfig(clip_gradient_norm=1.0).clip_with_tables
