"""Grouped AUC and slices from the job to the evaluation, the summary and the terminal."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from penstock import run
from penstock.config import parse_job
from penstock.training.metrics.binary import auc_of_scores


@pytest.fixture
def measured_fields(small_fields):
    # n-columns are inputs of the model and cannot group; c0 is a feature, event_time is nothing.
    small_fields["evaluation"]["metrics"] = {
        "exact_auc": True,
        "grouped_auc": ["c0"],
        "slices": [{"by": "c1", "top": 3}],
    }
    return small_fields


def last_evaluation(out):
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "evaluation"][-1]


def test_they_reach_every_report(penstock, measured_fields, tmp_path):
    job, out = tmp_path / "job.yaml", tmp_path / "run"
    job.write_text(yaml.safe_dump(measured_fields), encoding="utf-8")
    code, shown, errors = penstock("train", job, "--out", out)
    assert (code, errors) == (0, "")
    line = last_evaluation(out)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for place in (line, summary):
        assert set(place["grouped_auc"]) == {"c0"}
        assert len(place["slices"]["c1"]["values"]) == 3
    found = line["slices"]["c1"]
    assert sum(one["samples"] for one in (*found["values"].values(), found["rest"])) == 1500
    assert sum(weight for _, _, weight in line["calibration_buckets"]) == 1500
    assert f"{line['grouped_auc']['c0']['auc']:.4f} (" in shown
    assert "all others" in shown and "AUC grouped by c0" in shown

    code, shown, errors = penstock("evaluate", out)
    assert (code, errors) == (0, "")
    assert f"{line['grouped_auc']['c0']['auc']:.6f} (" in shown
    assert "all others" in shown


def test_they_are_those_of_the_scores(measured_fields, tmp_path, penstock):
    out, rows, scores = tmp_path / "run", tmp_path / "rows.parquet", tmp_path / "scores.parquet"
    run.train(parse_job(measured_fields), out)
    penstock("data", "synth", "--out", rows, "--rows", 3000, "--num-categorical", 4, "--seed", 0)
    metrics = run.evaluate(out, str(rows))
    run.predict(out, str(rows), scores)
    data, scored = pq.read_table(rows), pq.read_table(scores)
    logits = torch.logit(torch.from_numpy(scored["score"].to_numpy().copy()).double()).float()
    labels = torch.from_numpy(scored["label"].to_numpy().copy())

    users = data["c0"].to_numpy()
    total = counted = 0.0
    for user in np.unique(users):
        chosen = torch.from_numpy(np.flatnonzero(users == user))
        if 0 < labels[chosen].sum() < len(chosen):
            total += len(chosen) * auc_of_scores(logits[chosen], labels[chosen])
            counted += len(chosen)
    grouped = metrics["grouped_auc"]["c0"]
    assert grouped["auc"] == pytest.approx(total / counted, abs=1e-5)
    assert grouped["share"] == pytest.approx(counted / 3000)

    for value, found in metrics["slices"]["c1"]["values"].items():
        chosen = torch.from_numpy(np.flatnonzero(data["c1"].to_numpy() == int(value)))
        assert found["samples"] == len(chosen)
        assert found["auc"] == pytest.approx(
            auc_of_scores(logits[chosen], labels[chosen]), abs=1e-4
        )


def test_a_resumed_run_may_ask_for_other_metrics(small_fields, measured_fields, tmp_path):
    out = tmp_path / "run"
    without = json.loads(json.dumps(small_fields))
    del without["evaluation"]["metrics"]
    without["training"]["max_steps"] = 12
    run.train(parse_job(without), out)
    assert "grouped_auc" not in last_evaluation(out)
    run.train(parse_job(measured_fields), out, resume=True)
    assert "grouped_auc" in last_evaluation(out)


def test_a_column_that_is_not_there_is_refused_before_anything_is_written(
    penstock, small_yaml, tmp_path
):
    wanted = "evaluation.metrics.grouped_auc=[c9]"
    code, _, errors = penstock("train", small_yaml, "--out", tmp_path / "r", "--set", wanted)
    assert code == 2
    assert "no column 'c9' (evaluation.metrics); there are click, event_time" in errors
    assert not (tmp_path / "r").exists()
