"""Step by step, a run loses what the same network over nn.EmbeddingBag and torch's optimizers does.

The twin is that of benchmarks/bench_quality.py, which measures whole recipes.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.embedding_bag_twin import Twin, keys_of
from penstock.config import parse_job
from penstock.data.dataset import Dataset
from penstock.data.history import HistoryColumns, write_history
from penstock.run import evaluate, train

STEPS = 50
OPTIMIZERS = {
    "adam": {"kind": "adam", "learning_rate": 0.02},
    "adagrad": {"kind": "adagrad", "learning_rate": 0.1, "initial_accumulator": 0.01},
}


def small_job_with(fields, optimizer):
    """50 steps in two epochs, so that rows are read again after they were updated."""
    fields["table_defaults"]["optimizer"] = optimizer
    fields["training"] |= {
        "batch_size": 128,
        "epochs": 2,
        "max_steps": STEPS,
        "seed": 3,
    }
    fields |= {"report": {"every_steps": 1}, "checkpoint": {}}
    fields["evaluation"] = {"metrics": fields["evaluation"].get("metrics", {})}
    return parse_job(fields)


def losses_of_a_run(job, out, quiet, name="log_loss"):
    train(job, out, console=quiet)
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line[name] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_losses_equal_those_of_embedding_bags(small_fields, kind, tmp_path, quiet):
    job = small_job_with(small_fields, OPTIMIZERS[kind])
    losses = losses_of_a_run(job, tmp_path / "run", quiet)
    dataset = Dataset.open(job)
    twin = Twin(job, dataset, keys_of(dataset), sparse=True)
    expected = list(twin.train())
    assert len(losses) == len(expected) == STEPS
    # float32 sums in another order, carried through 50 updates.
    assert losses == pytest.approx(expected, rel=1e-4)
    # The comparison means something: training moved the loss.
    assert sum(losses[-10:]) < sum(losses[:10])


MODELS = {
    "autoint": {"layers": 2, "attention": 16, "deep": [16]},
    "xdeepfm": {"interactions": [8, 8], "deep": [16]},
    "final_mlp": {"first": [16], "second": [16], "second_context": ["c0"]},
    "masknet": {"blocks": [16, 16], "deep": [16]},
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_fields_lose_what_their_twins_do(small_fields, kind, tmp_path, quiet):
    small_fields["model"] = {"kind": kind, **MODELS[kind]}
    job = small_job_with(small_fields, OPTIMIZERS["adam"])
    losses = losses_of_a_run(job, tmp_path / "run", quiet)
    dataset = Dataset.open(job)
    twin = Twin(job, dataset, keys_of(dataset), sparse=True)
    expected = list(twin.train())
    # MaskNet normalizes small sums, and with them their rounding, as HSTU below.
    same = 15 if kind == "masknet" else STEPS
    assert losses[:same] == pytest.approx(expected[:same], rel=1e-4)
    assert losses == pytest.approx(expected, rel=0.01)
    assert sum(losses[-10:]) < sum(losses[:10])
    found = evaluate(tmp_path / "run")["auc"]
    assert found == pytest.approx(twin.measure()["auc"], abs=0.003)
    assert found > 0.55


def test_the_twin_with_another_rate_loses_differently(small_fields, tmp_path, quiet):
    job = small_job_with(small_fields, OPTIMIZERS["adam"])
    losses = losses_of_a_run(job, tmp_path / "run", quiet)
    other = small_job_with(small_fields, {"kind": "adam", "learning_rate": 0.021})
    dataset = Dataset.open(other)
    expected = list(Twin(other, dataset, keys_of(dataset), sparse=True).train())
    assert losses != pytest.approx(expected, rel=1e-4)


SESSIONS = 1500


@pytest.fixture
def reading(small_fields, tmp_path):
    """A log of positives: users who go on reading what they have read, with their histories."""
    random = np.random.default_rng(3)
    taste = random.integers(0, 6, 60)
    user = random.integers(0, 60, SESSIONS)
    # Of their own kind, or any; the head of each kind is popular.
    kind = np.where(random.random(SESSIONS) < 0.8, taste[user], random.integers(0, 6, SESSIONS))
    item = kind * 10 + np.minimum(random.geometric(0.3, SESSIONS) - 1, 9)
    columns = {"user": user, "item": item, "kind": kind, "time": np.arange(SESSIONS)}
    log, history = tmp_path / "log.parquet", tmp_path / "history.parquet"
    pq.write_table(pa.table(columns), log)
    write_history([str(log)], HistoryColumns("user", ("item",), "time", 6), history)
    small_fields["data"] |= {
        "source": {"format": "parquet", "path": str(history)},
        "negatives": {"per_positive": 2, "columns": ["item", "kind"]},
        "numeric": [],
    }
    del small_fields["data"]["label"]
    small_fields["features"] = [
        {"columns": ["item"], "table": "items"},
        {"columns": ["item_history"], "table": "items", "pooling": "sequence", "max_keys": 6},
        {"columns": ["kind"]},
    ]
    small_fields["tables"] = [
        {"name": "items", "dim": 8, "optimizer": OPTIMIZERS["adam"]},
    ]
    return small_fields


NAMED = {"candidate": "item", "sequence": "item_history"}
READERS = {
    "din": {**NAMED, "attention": [8], "deep": [16]},
    "hstu": {**NAMED, "layers": 2, "heads": 2, "deep": [16]},
}


# HSTU normalizes the small sums of its attention, and with them their rounding: what differs by
# 1e-8 at first is ten times as much every few steps.
@pytest.mark.parametrize(("kind", "steps"), [("din", STEPS), ("hstu", 15)])
def test_models_of_sequences_lose_what_their_twins_do(reading, kind, steps, tmp_path, quiet):
    reading["model"] = {"kind": kind, **READERS[kind]}
    job = small_job_with(reading, OPTIMIZERS["adam"])
    job = job.model_copy(update={"training": job.training.model_copy(update={"max_steps": steps})})
    losses = losses_of_a_run(job, tmp_path / "run", quiet)
    dataset = Dataset.open(job)
    twin = Twin(job, dataset, keys_of(dataset), sparse=True)
    expected = list(twin.train())
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(losses) == steps and sum(losses[-5:]) < sum(losses[:5])
    found = evaluate(tmp_path / "run")
    assert found["auc"] == pytest.approx(twin.measure()["auc"], abs=0.003)
    assert found["auc"] > 0.6 or kind == "hstu"


def test_two_towers_lose_and_recall_what_their_twin_does(reading, tmp_path, quiet):
    del reading["data"]["negatives"]
    reading["features"][1] |= {"pooling": "mean"}
    reading["model"] = {"kind": "two_tower", "items": ["item", "kind"], "user": [16], "dim": 8}
    reading["evaluation"] = {"metrics": {"recall_at": [1, 10]}}
    job = small_job_with(reading, OPTIMIZERS["adam"])
    losses = losses_of_a_run(job, tmp_path / "run", quiet, "loss")
    dataset = Dataset.open(job)
    twin = Twin(job, dataset, keys_of(dataset), sparse=True)
    expected = list(twin.train())
    assert losses == pytest.approx(expected, rel=1e-4)
    assert sum(losses[-5:]) < sum(losses[:5])
    found, of_twin = evaluate(tmp_path / "run"), twin.measure()
    assert found["recall_candidates"] == of_twin["recall_candidates"]
    for k in (1, 10):
        assert found[f"recall_at_{k}"] == pytest.approx(of_twin[f"recall_at_{k}"], abs=0.003)
    # 10 of 60 articles are of the reader's kind, and 8 of 10 clicks.
    assert found["recall_at_10"] > 0.4


@pytest.mark.parametrize("kind", ["shared_bottom", "mmoe", "ple"])
def test_models_of_several_labels_lose_what_their_twins_do(small_fields, kind, tmp_path, quiet):
    small_fields["data"]["label"] = [
        {"column": "click"},
        {"column": "n0", "task": "regression", "scale": 2},
    ]
    small_fields["data"]["numeric"] = [{"columns": ["n[1-9]*"]}]
    small_fields["model"] = {"kind": kind, "task_weights": {"n0": 0.3}}
    job = small_job_with(small_fields, OPTIMIZERS["adam"])
    losses = losses_of_a_run(job, tmp_path / "run", quiet, "loss")
    dataset = Dataset.open(job)
    twin = Twin(job, dataset, keys_of(dataset), sparse=True)
    assert losses == pytest.approx(list(twin.train()), rel=1e-4)
    found, of_twin = evaluate(tmp_path / "run")["tasks"], twin.measure()["tasks"]
    assert found["click"]["auc"] == pytest.approx(of_twin["click"]["auc"], abs=0.003)
    assert found["n0"]["rmse"] == pytest.approx(of_twin["n0"]["rmse"], abs=0.003)


def test_esmm_loses_what_its_twin_does(small_fields, tmp_path, quiet):
    """One label after the other: the count of a click's column, at least 1 and at least 2."""
    small_fields["data"]["label"] = [
        {"name": "some", "column": "n0", "at_least": 0.5},
        {"name": "many", "column": "n0", "at_least": 1.5},
    ]
    small_fields["data"]["numeric"] = [{"columns": ["n[1-9]*"]}]
    small_fields["model"] = {"kind": "esmm", "towers": [16]}
    job = small_job_with(small_fields, OPTIMIZERS["adam"])
    losses = losses_of_a_run(job, tmp_path / "run", quiet, "loss")
    dataset = Dataset.open(job)
    twin = Twin(job, dataset, keys_of(dataset), sparse=True)
    assert losses == pytest.approx(list(twin.train()), rel=1e-4)
    found, of_twin = evaluate(tmp_path / "run")["tasks"], twin.measure()["tasks"]
    assert found["some"]["samples"] == found["many"]["samples"]
    for name in ("some", "many"):
        assert found[name]["auc"] == pytest.approx(of_twin[name]["auc"], abs=0.003)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"kind": "row_wise_adagrad"}, "torch has no counterpart of the table optimizer"),
        ({"kind": "adam", "weight_decay": 0.1}, "torch's sparse optimizers have no weight decay"),
    ],
)
def test_the_twin_refuses_what_torch_cannot(small_fields, optimizer, message):
    job = small_job_with(small_fields, optimizer)
    dataset = Dataset.open(job)
    with pytest.raises(ValueError, match=message):
        Twin(job, dataset, keys_of(dataset), sparse=True)
