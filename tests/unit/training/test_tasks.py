"""Losses, metrics and scores of several labels against plain formulas."""

import math

import pytest
import torch

from penstock.config import Label
from penstock.errors import NonFiniteError
from penstock.position import Position
from penstock.training.metrics.binary import BinaryMetrics
from penstock.training.metrics.regression import RegressionMetrics
from penstock.training.objective import SumOfTasks
from penstock.training.tasks import BinaryTask, RegressionTask, TaskMetrics, tasks_of
from penstock.types import Batch, KeyedJagged

CLICK = Label(column="click")
SOMETIMES = Label(column="bought", missing="ignore")
STARS = Label(column="stars", task="regression", offset=3.0, scale=2.0)
NAN = math.nan


def batch_of(labels, weights=None):
    return Batch(
        dense=torch.zeros(len(labels), 0),
        sparse=KeyedJagged.pack({}),
        labels=labels,
        weights=weights,
        event_time=None,
        teacher=None,
        start=Position(),
        end=Position(),
        origin="here",
    )


def samples(labels=3, seed=0, rows=64):
    """Outputs, and labels [B, 3] of CLICK, SOMETIMES and STARS, and weights."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(rows, labels, generator=generator)
    click = (torch.rand(rows, generator=generator) < 0.4).float()
    bought = (torch.rand(rows, generator=generator) < 0.5).float()
    bought[torch.rand(rows, generator=generator) < 0.3] = NAN
    stars = torch.randint(1, 6, (rows,), generator=generator).float()
    weights = torch.rand(rows, generator=generator)
    return outputs, torch.stack((click, bought, stars), 1)[:, :labels], weights


def entropy(logit, label):
    chance = 1 / (1 + math.exp(-logit))
    return -math.log(chance if label else 1 - chance)


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_means_over_known_labels(weighted):
    outputs, labels, weights = samples()
    expected = []
    for number, loss in enumerate((entropy, entropy, lambda y, t: (y - (t - 3) / 2) ** 2)):
        pairs = [
            (loss(y, t), w if weighted else 1.0)
            for y, t, w in zip(
                outputs[:, number].tolist(),
                labels[:, number].tolist(),
                weights.tolist(),
                strict=True,
            )
            if not math.isnan(t)
        ]
        expected.append(sum(x * w for x, w in pairs) / sum(w for _, w in pairs))
    tasks = tasks_of((CLICK, SOMETIMES, STARS), {"stars": 0.25})
    found = [
        task.loss(outputs[:, n], labels[:, n], weights if weighted else None).item()
        for n, task in enumerate(tasks)
    ]
    assert found == pytest.approx(expected, rel=1e-5)
    outcome = SumOfTasks(tasks)(
        torch.nn.Identity(), (outputs,), batch_of(labels, weights if weighted else None)
    )
    whole = expected[0] + expected[1] + 0.25 * expected[2]
    assert outcome.loss.item() == pytest.approx(whole, rel=1e-5)


def test_one_plain_label_has_the_bits_of_torch():
    outputs, labels, weights = samples(labels=1)
    logits, click = outputs[:, 0], labels[:, 0]
    objective = SumOfTasks(tasks_of((CLICK,), {}))
    torch_loss = torch.nn.functional.binary_cross_entropy_with_logits
    plain = objective(torch.nn.Identity(), (logits,), batch_of(click))
    assert torch.equal(plain.loss, torch_loss(logits, click))
    assert plain.outputs is logits
    weighted = objective(torch.nn.Identity(), (logits,), batch_of(click, weights))
    expected = torch_loss(logits, click, weights, reduction="sum") / weights.sum()
    assert torch.equal(weighted.loss, expected)


def test_a_missing_label_has_no_gradient_and_the_others_keep_theirs():
    outputs, labels, _ = samples(labels=2)
    outputs.requires_grad_()
    objective = SumOfTasks(tasks_of((CLICK, SOMETIMES), {}))
    objective(torch.nn.Identity(), (outputs,), batch_of(labels)).loss.backward()
    missing = labels[:, 1].isnan()
    assert missing.any() and not missing.all()
    assert (outputs.grad[missing, 1] == 0).all()
    assert (outputs.grad[~missing, 1] != 0).all()
    assert (outputs.grad[:, 0] != 0).all()


@pytest.mark.parametrize("task", [BinaryTask(SOMETIMES), RegressionTask(STARS)])
def test_a_batch_without_any_weight_costs_nothing(task):
    outputs = torch.randn(4, requires_grad=True)
    labels = torch.full((4,), NAN) if task.label.missing == "ignore" else torch.ones(4)
    loss = task.loss(outputs, labels, torch.zeros(4))
    loss.backward()
    assert loss.item() == 0.0
    assert (outputs.grad == 0).all()


def test_metrics_of_several_labels_come_by_name():
    outputs, labels, weights = samples()
    tasks = tasks_of((CLICK, SOMETIMES, STARS), {"stars": 0.25})
    metrics = TaskMetrics(tasks)
    for part in (slice(0, 20), slice(20, 64)):
        metrics.add(batch_of(labels[part], weights[part]), outputs[part], 0.0)
    found = metrics.compute()
    known = ~labels[:, 1].isnan()
    click, bought, stars = BinaryMetrics(), BinaryMetrics(), RegressionMetrics()
    click.update(outputs[:, 0], labels[:, 0], weights)
    bought.update(outputs[known, 1], labels[known, 1], weights[known])
    stars.update(outputs[:, 2] * 2 + 3, labels[:, 2], weights)
    expected = {"click": click.compute(), "bought": bought.compute(), "stars": stars.compute()}
    for name, one in expected.items():
        assert found["tasks"][name] == pytest.approx(one, rel=1e-12), name
    assert found["samples"] == 64
    assert found["tasks"]["bought"]["samples"] == int(known.sum())
    loss = click.compute()["log_loss"] + bought.compute()["log_loss"]
    loss += 0.25 * (stars.compute()["rmse"] / 2) ** 2
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    restored = TaskMetrics(tasks)
    restored.load_state_dict(metrics.state_dict())
    assert restored.compute() == found


def test_of_one_label_the_metrics_have_no_name():
    outputs, labels, _ = samples(labels=1)
    metrics, alone = TaskMetrics(tasks_of((CLICK,), {})), BinaryMetrics()
    metrics.add(batch_of(labels[:, 0]), outputs[:, 0], 0.0)
    alone.update(outputs[:, 0], labels[:, 0])
    assert metrics.compute() == alone.compute()
    assert list(metrics.state_dict()) == list(alone.state_dict())


def test_scores_are_probabilities_and_numbers():
    outputs = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    scores = SumOfTasks(tasks_of((CLICK, STARS), {})).scores(outputs)
    assert scores["click"].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-2))])
    assert scores["stars"].tolist() == [5.0, 1.0]


def test_errors_of_a_regression_are_means():
    metrics = RegressionMetrics()
    assert math.isnan(metrics.compute()["rmse"])
    metrics.update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]), torch.tensor([3.0, 1.0]))
    other = RegressionMetrics()
    other.update(torch.tensor([5.0]), torch.tensor([5.0]))
    metrics.merge(other)
    assert metrics.compute() == {
        "rmse": pytest.approx(math.sqrt((3 * 1 + 4) / 5)),
        "mae": pytest.approx((3 + 2) / 5),
        "bias": pytest.approx((3 - 2) / 5),
        "samples": 3,
    }
    with pytest.raises(NonFiniteError, match="1 of 2 predictions are NaN or infinite"):
        metrics.update(torch.tensor([1.0, NAN]), torch.zeros(2))
