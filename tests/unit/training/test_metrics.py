import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from penstock.errors import DataError, NonFiniteError
from penstock.training.metrics import binary as metrics_module
from penstock.training.metrics.binary import BinaryMetrics, auc_of_scores, logits_of_probabilities


def exact_auc(scores, labels, weights=None):
    """Rank statistic in float64, equal scores half; independent of the code under test."""
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(labels, dtype=np.float64)
    weights = np.ones_like(labels) if weights is None else np.asarray(weights, dtype=np.float64)
    _, place = np.unique(scores, return_inverse=True)
    positive = np.bincount(place, weights * labels)
    negative = np.bincount(place, weights * (1 - labels))
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))


def distribution(name, size, generator):
    """Logits as training makes them, and as only a test would."""
    normal = torch.randn(size, generator=generator)
    return {
        "typical": 1.5 * normal - 3.0,
        "untrained": 1e-6 * normal,
        "narrow": -3.4 + 0.01 * normal,
        "very narrow": -3.4 + 1e-5 * normal,
        "all equal": torch.full((size,), -3.4),
        "few values": normal.round(),
        "huge": 1e30 * normal,
        "tiny": 1e-38 * normal,
        "wide": torch.exp(15 * normal) * normal.sign(),
        "heavy tail on a narrow bulk": torch.where(
            torch.rand(size, generator=generator) < 0.3, 50 * normal, -3.4 + 1e-3 * normal
        ),
        "signed zeros": torch.where(normal > 0, 0.0, -0.0),
    }[name]


NAMES = [
    "typical",
    "untrained",
    "narrow",
    "very narrow",
    "all equal",
    "few values",
    "huge",
    "tiny",
    "wide",
    "heavy tail on a narrow bulk",
    "signed zeros",
]


def labels_for(scores, generator):
    rank = scores.argsort().argsort() / max(1, scores.numel())
    return (torch.rand(scores.numel(), generator=generator) < 0.02 + 0.3 * rank).float()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_auc_is_exact_while_the_scores_fit_the_bins(name, weighted):
    generator = torch.Generator().manual_seed(1)
    scores = distribution(name, 20_000, generator)
    labels = labels_for(scores, generator)
    weights = torch.rand(20_000, generator=generator) if weighted else None
    metrics = BinaryMetrics()
    for part in torch.arange(20_000).split(777):
        metrics.update(scores[part], labels[part], None if weights is None else weights[part])
    exact = exact_auc(scores, labels, weights)
    assert metrics.compute()["auc"] == pytest.approx(exact, abs=1e-12)
    assert auc_of_scores(scores, labels, weights) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_auc_stays_within_1e_4_when_bins_are_joined(name, monkeypatch):
    # Fewer bins than scores at a size that a test can afford. The bulk of the last but one is so
    # narrow that it needs nearly all that there are.
    max_bins = 1 << 17 if name == "heavy tail on a narrow bulk" else 1 << 12
    monkeypatch.setattr(metrics_module, "_PENDING_SAMPLES", 50_000)
    generator = torch.Generator().manual_seed(2)
    scores = distribution(name, 500_000, generator)
    labels = labels_for(scores, generator)
    metrics = BinaryMetrics(max_bins)
    for part in torch.arange(500_000).split(8192):
        metrics.update(scores[part], labels[part])
    assert metrics.state_dict()["bins"].numel() <= max_bins
    assert metrics.compute()["auc"] == pytest.approx(exact_auc(scores, labels), abs=1e-4)


def test_log_loss_auc_and_calibration_agree_with_other_libraries():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5000, generator=generator) * 2 - 2
    labels = (torch.rand(5000, generator=generator) < torch.sigmoid(logits)).float()
    metrics = BinaryMetrics()
    metrics.update(logits, labels)
    result = metrics.compute()
    assert result["auc"] == pytest.approx(
        float(binary_auroc(torch.sigmoid(logits.double()), labels.long())), abs=1e-6
    )
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    assert result["log_loss"] == pytest.approx(float(loss), rel=1e-12)
    mean = float(labels.double().mean())
    entropy = -mean * math.log(mean) - (1 - mean) * math.log(1 - mean)
    assert result["normalized_entropy"] == pytest.approx(float(loss) / entropy, rel=1e-12)
    assert result["calibration"] == pytest.approx(
        float(torch.sigmoid(logits.double()).mean()) / mean, rel=1e-12
    )
    assert (result["samples"], result["positives"]) == (5000, int(labels.sum()))


def test_a_weight_of_three_is_three_samples():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.5])
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    weights = torch.tensor([1.0, 3.0, 2.0, 0.0])
    weighted, repeated = BinaryMetrics(), BinaryMetrics()
    weighted.update(logits, labels, weights)
    times = weights.long()
    repeated.update(logits.repeat_interleave(times), labels.repeat_interleave(times))
    expected = repeated.compute()
    got = weighted.compute()
    for name in ("auc", "log_loss", "normalized_entropy", "calibration"):
        assert got[name] == pytest.approx(expected[name], rel=1e-12)
    assert (got["samples"], got["positives"]) == (4, 2)


def test_extreme_logits_keep_their_loss():
    metrics = BinaryMetrics()
    metrics.update(torch.tensor([1000.0, -1000.0]), torch.tensor([0.0, 0.0]))
    assert metrics.compute()["log_loss"] == 500.0


def test_a_perfect_model_beats_the_mean_and_a_constant_one_equals_it():
    labels = torch.tensor([0.0, 0.0, 0.0, 1.0])
    perfect, constant = BinaryMetrics(), BinaryMetrics()
    perfect.update(torch.tensor([-30.0, -30.0, -30.0, 30.0]), labels)
    constant.update(torch.full((4,), math.log(1 / 3)), labels)
    assert perfect.compute()["normalized_entropy"] < 1e-12
    assert perfect.compute()["auc"] == 1.0
    assert constant.compute()["normalized_entropy"] == pytest.approx(1.0, rel=1e-6)
    assert constant.compute()["calibration"] == pytest.approx(1.0, rel=1e-6)
    assert constant.compute()["auc"] == 0.5


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_alone_has_no_auc(label):
    metrics = BinaryMetrics()
    metrics.update(torch.tensor([0.1, -0.2]), torch.tensor([label, label]))
    result = metrics.compute()
    assert math.isnan(result["auc"])
    assert math.isnan(result["normalized_entropy"])
    assert math.isnan(result["calibration"]) == (label == 0.0)
    assert result["log_loss"] > 0


def test_no_samples_have_no_metrics():
    for metrics in (BinaryMetrics(), BinaryMetrics()):
        metrics.update(torch.zeros(0), torch.zeros(0))
        result = metrics.compute()
        assert (result["samples"], result["positives"]) == (0, 0)
        assert all(math.isnan(result[name]) for name in ("auc", "log_loss", "calibration"))
        assert math.isnan(result["normalized_entropy"])


@pytest.mark.parametrize("max_bins", [1 << 20, 64])
def test_state_is_additive_and_survives_a_round_trip(max_bins):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3000, generator=generator)
    labels = labels_for(logits, generator)
    whole, first, second, restored = (BinaryMetrics(max_bins) for _ in range(4))
    whole.update(logits, labels)
    first.update(logits[:100], labels[:100])
    second.update(logits[100:], labels[100:])
    restored.load_state_dict(first.state_dict())
    restored.merge(second)
    second.merge(first)
    for merged in (restored, second):
        got, expected = merged.compute(), whole.compute()
        assert got["auc"] == expected["auc"]  # the same bins, whatever the order
        assert got["log_loss"] == pytest.approx(expected["log_loss"], rel=1e-12)
        assert got["samples"] == 3000


def test_without_a_limit_of_bins_the_auc_is_exact(monkeypatch):
    monkeypatch.setattr(metrics_module, "_PENDING_SAMPLES", 10_000)
    generator = torch.Generator().manual_seed(5)
    # Scores so close together that 2^12 bins cannot tell them apart.
    scores = 1 + torch.randn(100_000, generator=generator) * 2e-5
    labels = labels_for((scores - 1) * 1e5, generator)
    exact, coarse = BinaryMetrics(None), BinaryMetrics(64)
    for part in torch.arange(100_000).split(3000):
        exact.update(scores[part], labels[part])
        coarse.update(scores[part], labels[part])
    reference = exact_auc(scores, labels)
    assert exact.compute()["auc"] == pytest.approx(reference, abs=1e-12)
    assert coarse.compute()["auc"] != pytest.approx(reference, abs=1e-3)


def test_calibration_buckets_are_of_equal_weight_and_agree_with_the_samples():
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(20_000, generator=generator) * 2 - 2
    labels = labels_for(logits, generator)
    weights = torch.rand(20_000, generator=generator)
    metrics = BinaryMetrics()
    metrics.update(logits, labels, weights)
    buckets = torch.tensor(metrics.calibration_buckets(10), dtype=torch.float64)
    order = logits.argsort()
    place = (weights[order].double().cumsum(0) - 0.5 * weights[order]) / weights.double().sum() * 10
    for number, (predicted, observed, weight) in enumerate(buckets):
        rows = order[place.long() == number]
        of_rows = weights[rows].double()
        assert weight == pytest.approx(float(of_rows.sum()), rel=1e-9)
        assert weight == pytest.approx(float(weights.double().sum()) / 10, rel=1e-3)
        prediction = (torch.sigmoid(logits[rows].double()) * of_rows).sum() / of_rows.sum()
        assert predicted == pytest.approx(float(prediction), rel=1e-9)
        assert observed == pytest.approx(float((labels[rows] * of_rows).sum() / of_rows.sum()))
    assert bool((buckets[1:, 0] > buckets[:-1, 0]).all())


def test_equal_scores_share_one_calibration_bucket():
    metrics = BinaryMetrics()
    assert metrics.calibration_buckets(5) == []
    metrics.update(torch.zeros(8), torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1]))
    assert metrics.calibration_buckets(5) == [[0.5, 0.25, 8.0]]


def test_the_callers_tensors_are_not_kept():
    logits, labels = torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0])
    metrics = BinaryMetrics()
    metrics.update(logits, labels)
    logits.fill_(0)
    labels.fill_(0)
    assert metrics.compute()["auc"] == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_wrong_input_is_refused(value):
    metrics = BinaryMetrics()
    with pytest.raises(NonFiniteError, match=r"^1 of 2 logits are NaN or infinite$"):
        metrics.update(torch.tensor([0.0, value]), torch.zeros(2))
    with pytest.raises(DataError, match=r"^metrics need labels, but the data has no label column$"):
        metrics.update(torch.zeros(2), torch.full((2,), math.nan))
    assert metrics.compute()["samples"] == 0


def test_the_teachers_probabilities_keep_their_auc():
    generator = torch.Generator().manual_seed(5)
    probabilities = torch.rand(10_000, generator=generator)
    probabilities[:2] = torch.tensor([0.0, 1.0])
    labels = (torch.rand(10_000, generator=generator) < probabilities).float()
    metrics = BinaryMetrics()
    metrics.update(logits_of_probabilities(probabilities), labels)
    assert metrics.compute()["auc"] == pytest.approx(auc_of_scores(probabilities, labels), abs=1e-6)


def test_asking_for_the_state_changes_no_bit_of_what_comes_out():
    generator = torch.Generator().manual_seed(5)
    asked, left_alone = BinaryMetrics(), BinaryMetrics()
    for number in range(300):
        logits = torch.randn(500, generator=generator)
        labels = torch.bernoulli(torch.sigmoid(logits), generator=generator)
        weights = torch.rand(500, generator=generator) if number % 3 else None
        for metrics in (asked, left_alone):
            metrics.update(logits, labels, weights)
        if number % 7 == 0:
            restored = BinaryMetrics()
            restored.load_state_dict(asked.state_dict())
            asked = restored
        if number % 5 == 0:
            asked.compute()
    assert asked.compute() == left_alone.compute()


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("max_bins", [1000, metrics_module.MAX_BINS])
def test_summed_on_a_gpu_they_are_those_of_the_cpu(weighted, max_bins):
    there = torch.device("cuda")
    on_gpu, on_cpu, again = (
        BinaryMetrics(max_bins, device) for device in (there, torch.device("cpu"), there)
    )
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 100_000, 600_000, 7):
        logits = torch.randn(size, generator=generator)
        labels = (torch.rand(size, generator=generator) < 0.3).float()
        weights = torch.rand(size, generator=generator) if weighted else None
        on_cpu.update(logits, labels, weights)
        on_gpu.update(logits.to(there), labels.to(there), weights)
        again.load_state_dict(on_gpu.state_dict())
    assert all(one.device.type == "cpu" for one in on_gpu.state_dict().values())
    expected = on_cpu.compute()
    for found in (on_gpu.compute(), again.compute()):
        # Sums of 700,000 float64 in another order.
        assert found == pytest.approx(expected, rel=1e-12)
        assert weighted or found["auc"] == expected["auc"]
    with pytest.raises(NonFiniteError, match="1 of"):
        on_gpu.update(torch.tensor([torch.inf]), torch.zeros(1))
        on_gpu.compute()
