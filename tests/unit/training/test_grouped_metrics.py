"""AUC within groups and metrics by slice against plain loops over groups and samples."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from penstock.config import Label, MetricsConfig
from penstock.embedding import EmbeddingCollection
from penstock.errors import ConfigError
from penstock.position import Position
from penstock.training.evaluation import evaluate_batches, scored
from penstock.training.metrics import grouped as grouped_metrics
from penstock.training.metrics.binary import BinaryMetrics
from penstock.training.metrics.grouped import GroupedAUC, SliceMetrics
from penstock.training.objective import SumOfTasks
from penstock.training.tasks import BinaryTask
from penstock.types import Batch, KeyedJagged


def samples(n=3000, groups=200, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    # Some groups are large, many have a few samples, so that some have one class alone.
    keys = (rng.pareto(1.0, n) * 5).astype(np.int64) % groups - groups // 2
    logits = torch.from_numpy(rng.normal(size=n).astype(np.float32))
    if ties:
        logits = (logits * 2).round()
    labels = (torch.from_numpy(rng.random(n).astype(np.float32)) < torch.sigmoid(logits)).float()
    weights = torch.from_numpy(rng.integers(0, 4, n).astype(np.float32) / 2)
    return keys, logits, labels, weights


def gauc_by_loops(keys, logits, labels, weights):
    """Every pair of every group."""
    total = counted = groups = 0
    for key in sorted(set(keys)):
        rows = [i for i, other in enumerate(keys) if other == key]
        wins = pairs = 0.0
        for i in rows:
            for j in rows:
                if labels[i] == 1 and labels[j] == 0:
                    both = float(weights[i] * weights[j])
                    pairs += both
                    wins += both * (
                        1.0 if logits[i] > logits[j] else 0.5 * (logits[i] == logits[j])
                    )
        if pairs:
            weight = float(sum(weights[i] for i in rows))
            total += weight * float(wins) / pairs
            counted += weight
            groups += 1
    return total / counted, groups, counted / float(weights.sum())


def add(metric, keys, logits, labels, weights, batch=97):
    for part in torch.arange(len(logits)).split(batch):
        metric.update(
            keys.take(pa.array(part.numpy())),
            logits[part],
            labels[part],
            None if weights is None else weights[part],
        )
    return metric


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_grouped_auc_is_that_of_all_pairs_within_groups(ties, weighted):
    keys, logits, labels, weights = samples(600, 60, ties=ties)
    weights = weights if weighted else None
    found = add(GroupedAUC(), pa.array(keys), logits, labels, weights).compute()
    one = torch.ones(600) if weights is None else weights
    auc, groups, share = gauc_by_loops(keys.tolist(), logits, labels, one)
    assert found["auc"] == pytest.approx(auc, abs=1e-12)
    assert found["groups"] == groups
    assert found["share"] == pytest.approx(share, abs=1e-12)
    assert 0.5 < share < 1


def test_grouped_auc_agrees_with_another_library_group_by_group():
    keys, logits, labels, _ = samples(seed=3)
    found = add(GroupedAUC(), pa.array(keys), logits, labels, None).compute()
    total = counted = 0.0
    for key in np.unique(keys):
        rows = torch.from_numpy(np.flatnonzero(keys == key))
        if 0 < labels[rows].sum() < len(rows):
            auc = binary_auroc(torch.sigmoid(logits[rows].double()), labels[rows].long())
            total, counted = total + len(rows) * float(auc), counted + len(rows)
    assert found["auc"] == pytest.approx(total / counted, abs=1e-6)


def test_text_groups_as_its_numbers_do_and_missing_ones_are_left_out():
    keys, logits, labels, weights = samples()
    mask = np.arange(len(keys)) % 10 == 0
    numbers = add(GroupedAUC(), pa.array(keys, mask=mask), logits, labels, weights).compute()
    text = pa.array([f"user {key}" for key in keys], pa.large_string(), mask=mask)
    assert add(GroupedAUC(), text, logits, labels, weights).compute() == numbers
    rest = torch.from_numpy(np.flatnonzero(~mask))
    chosen = (column[rest] for column in (logits, labels, weights))
    without = add(GroupedAUC(), pa.array(keys[~mask]), *chosen).compute()
    assert without["auc"] == numbers["auc"]
    share = without["share"] * float(weights[rest].sum() / weights.sum())
    assert numbers["share"] == pytest.approx(share, rel=1e-6)


def test_nothing_to_compare_is_nan():
    assert math.isnan(GroupedAUC().compute()["auc"])
    metric = GroupedAUC()
    metric.update(pa.array([1, 2, 2]), torch.zeros(3), torch.tensor([1.0, 0, 0]))
    result = metric.compute()
    assert math.isnan(result["auc"])
    assert (result["groups"], result["share"]) == (0, 0.0)


def test_too_many_samples_leave_whole_groups_whatever_the_order():
    rng = np.random.default_rng(1)
    n = 40_000
    keys = rng.integers(0, 4000, n)
    logits = torch.from_numpy(rng.normal(size=n).astype(np.float32))
    labels = (torch.rand(n, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    labels = torch.where(torch.from_numpy(keys % 2 == 0), (logits > 0).float(), labels)
    results = []
    for order in (np.arange(n), rng.permutation(n)):
        chosen = torch.from_numpy(order)
        metric = add(
            GroupedAUC(max_samples=6000),
            pa.array(keys[order]),
            logits[chosen],
            labels[chosen],
            None,
        )
        assert metric._kept <= 6000
        results.append(metric.compute())
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    assert 300 < results[0]["groups"] < 800  # an eighth of the groups, all their samples
    assert results[0]["share"] == pytest.approx(1 / 8, rel=0.2)
    whole = add(GroupedAUC(), pa.array(keys), logits, labels, None).compute()
    assert results[0]["auc"] == pytest.approx(whole["auc"], abs=0.03)


def test_one_group_larger_than_the_limit_is_dropped_and_not_kept_in_part():
    metric = GroupedAUC(max_samples=10)
    metric.update(pa.array([7] * 20), torch.arange(20.0), (torch.arange(20) % 2).float())
    assert metric.compute()["share"] == 0.0


def test_grouped_auc_of_two_parts_merges_into_that_of_the_whole():
    keys, logits, labels, weights = samples()
    columns = pa.array(keys), logits, labels, weights
    whole = add(GroupedAUC(1000), *columns)
    parts = [
        add(GroupedAUC(1000), *(column[part] for column in columns))
        for part in (slice(0, 800), slice(800, None))
    ]
    parts[0].merge(parts[1])
    assert parts[0].compute() == pytest.approx(whole.compute(), rel=1e-12)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("decided_after", [100, 1 << 18])
def test_slices_are_the_metrics_of_their_samples(monkeypatch, text, decided_after):
    monkeypatch.setattr(grouped_metrics, "SLICES_DECIDED_AFTER", decided_after)
    keys, logits, labels, weights = samples()
    mask = np.arange(len(keys)) % 9 == 0
    column = pa.array([f"v{key}" for key in keys], pa.large_string(), mask=mask)
    column = column if text else pa.array(keys, mask=mask)
    found = add(
        SliceMetrics(5, lambda: BinaryMetrics(None)), column, logits, labels, weights
    ).compute()
    values = column.to_pylist()
    first = values[:decided_after]
    ranked = sorted(set(first), key=lambda value: (-first.count(value), first.index(value)))[:5]
    names = ["(missing)" if value is None else str(value) for value in ranked]
    assert list(found["values"]) == names
    seen = 0
    for value, result in zip(
        [*ranked, "the rest"], [*found["values"].values(), found["rest"]], strict=True
    ):
        rows = [
            i
            for i, own in enumerate(values)
            if own == value or (value == "the rest" and own not in ranked)
        ]
        expected = BinaryMetrics()
        expected.update(logits[rows], labels[rows], weights[rows])
        assert result == pytest.approx(expected.compute(), rel=1e-12, nan_ok=True)
        seen += result["samples"]
    assert seen == len(values)


def test_fewer_values_than_slices_leave_an_empty_rest():
    metric = SliceMetrics(10, BinaryMetrics)
    assert metric.compute()["values"] == {}
    metric.update(pa.array([3, 3, 4]), torch.zeros(3), torch.tensor([1.0, 0, 0]))
    found = metric.compute()
    assert {name: one["samples"] for name, one in found["values"].items()} == {"3": 2, "4": 1}
    assert found["rest"]["samples"] == 0 and math.isnan(found["rest"]["log_loss"])


class FirstNumber(torch.nn.Module):
    """Its output is the first numeric column."""

    def forward(self, dense, embeddings):
        return dense[:, 0]


@pytest.mark.parametrize("weighted", [False, True])
def test_an_evaluation_weighs_its_samples_in_every_metric(weighted):
    keys, logits, labels, weights = samples(600, 20)
    weights = weights if weighted else None
    groups = pa.array(keys)
    batches = [
        Batch(
            dense=logits[part, None],
            sparse=KeyedJagged((), torch.empty(0, dtype=torch.int64), torch.zeros(1).long()),
            labels=labels[part],
            weights=None if weights is None else weights[part],
            event_time=None,
            teacher=None,
            start=Position(),
            end=Position(),
            origin="rows",
            groups={"user": groups.take(pa.array(part.numpy()))},
        )
        for part in torch.arange(600).split(97)
    ]
    wanted = MetricsConfig(
        exact_auc=True, grouped_auc=("user",), slices=({"by": "user", "top": 3},)
    )
    objective = SumOfTasks([BinaryTask(Label(column="click"))])
    collection = EmbeddingCollection([], [])
    found = evaluate_batches(scored(batches, FirstNumber(), collection), objective, wanted)
    whole = BinaryMetrics(None)
    whole.update(logits, labels, weights)
    assert found["auc"] == pytest.approx(whole.compute()["auc"], rel=1e-12)
    grouped = add(GroupedAUC(), groups, logits, labels, weights).compute()
    assert found["grouped_auc"]["user"] == pytest.approx(grouped, rel=1e-12)
    slices = add(SliceMetrics(3, lambda: BinaryMetrics(None)), groups, logits, labels, weights)
    for name, one in slices.compute()["values"].items():
        assert found["slices"]["user"]["values"][name] == pytest.approx(one, rel=1e-12)


def test_a_column_given_twice_is_refused():
    with pytest.raises(ConfigError, match="grouped_auc names column 'user' twice; remove one"):
        MetricsConfig(grouped_auc=("user", "item", "user"))
    with pytest.raises(ConfigError, match="slices names column 'city' twice; remove one"):
        MetricsConfig(slices=({"by": "city"}, {"by": "city", "top": 3}))
    both = MetricsConfig(grouped_auc=("user", "city"), slices=({"by": "city"},))
    assert both.columns == ("user", "city")
