"""A job of several labels from training to scores, stopped and resumed on the way."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_contents import contents, differences
from stopped_runs import crash

from penstock import run as story
from penstock.config import parse_job

ROWS = 3000


@pytest.fixture
def fields(small_fields, tmp_path):
    """Click, then a purchase that only clicked rows have, then minutes of use."""
    random = np.random.default_rng(1)
    user, item = (random.integers(0, 40, ROWS) for _ in range(2))
    taste = random.normal(size=(2, 40))
    liking = taste[0][user] + taste[1][item]
    click = random.random(ROWS) < 1 / (1 + np.exp(-liking))
    buys = np.where(click, random.random(ROWS) < 1 / (1 + np.exp(-2 * liking)), np.nan)
    columns = {
        "click": click.astype(np.int64),
        "bought": pa.array(buys, mask=~click),
        "minutes": 10 + 4 * liking + random.normal(size=ROWS),
        "user": user,
        "item": item,
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    small_fields["data"] |= {
        "source": {"format": "parquet", "path": str(tmp_path / "log.parquet")},
        "label": [
            {"column": "click"},
            {"column": "bought", "missing": "ignore"},
            {"column": "minutes", "task": "regression", "offset": 10, "scale": 4},
        ],
        "numeric": [],
    }
    small_fields["features"] = [{"columns": ["user", "item"]}]
    small_fields["model"] = {
        "kind": "mmoe",
        "experts": 2,
        "expert": [16],
        "towers": [8],
        "task_weights": {"bought": 0.5},
    }
    small_fields["training"] |= {
        "epochs": 8,
        "optimizer": {"learning_rate": 0.005},
    }
    small_fields["checkpoint"] = {"every_steps": 6}
    small_fields["evaluation"] = {
        "metrics": {"grouped_auc": ["user"], "slices": [{"by": "item", "top": 2}]}
    }
    return small_fields


def test_every_label_is_learnt_measured_and_scored(fields, tmp_path, quiet):
    out = tmp_path / "run"
    summary = story.train(parse_job(fields), out, console=quiet)
    tasks = summary["tasks"]
    assert list(tasks) == ["click", "bought", "minutes"]
    assert tasks["click"]["auc"] > 0.7
    assert tasks["bought"]["auc"] > 0.75
    assert tasks["minutes"]["rmse"] < 2.5  # 5.7 without a model, 1 is the noise
    assert tasks["bought"]["samples"] == tasks["click"]["positives"] < tasks["click"]["samples"]
    assert tasks["click"]["grouped_auc"]["user"]["groups"] == 40
    assert "grouped_auc" not in tasks["minutes"]
    slices = {name: one["slices"]["item"] for name, one in tasks.items()}
    assert all(len(one["values"]) == 2 for one in slices.values())
    assert {"rmse", "mae", "bias", "samples"} == set(slices["minutes"]["rest"])
    expected = (
        tasks["click"]["log_loss"]
        + 0.5 * tasks["bought"]["log_loss"]
        + (tasks["minutes"]["rmse"] / 4) ** 2
    )
    assert summary["loss"] == pytest.approx(expected)
    again = story.evaluate(out)
    assert again["loss"] == summary["loss"]
    assert {name: again["tasks"][name] for name in tasks} == tasks
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    errors = [line["tasks"]["minutes"]["rmse"] for line in lines if line["kind"] == "train"]
    assert errors[0] > errors[-1]

    scores_file = tmp_path / "scores.parquet"
    story.predict(out, str(tmp_path / "log.parquet"), scores_file)
    scores = pq.read_table(scores_file)
    assert scores.column_names == [
        "row",
        *("score_click", "label_click", "score_bought", "label_bought"),
        *("score_minutes", "label_minutes"),
    ]
    log = pq.read_table(tmp_path / "log.parquet")
    assert scores["label_bought"].null_count == log["bought"].null_count > 0
    error = scores["score_minutes"].to_numpy() - log["minutes"].to_numpy()
    assert np.sqrt((error**2).mean()) < 2.5
    assert abs(scores["score_click"].to_numpy().mean() - log["click"].to_numpy().mean()) < 0.1

    pq.write_table(log.drop_columns(["click", "minutes"]), tmp_path / "tomorrow.parquet")
    story.predict(out, str(tmp_path / "tomorrow.parquet"), scores_file, overwrite=True)
    again = pq.read_table(scores_file)
    assert [name for name in again.column_names if name.startswith("label")] == ["label_bought"]
    assert again["score_minutes"] == scores["score_minutes"]


def test_a_stopped_run_ends_with_the_same_bits(fields, tmp_path, quiet, monkeypatch):
    fields["training"]["max_steps"] = 20
    job = parse_job(fields)
    story.train(job, tmp_path / "whole", console=quiet)
    crash(job, tmp_path / "run", 15, monkeypatch, quiet)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "run")
    assert not differences(resumed, whole)


def test_inspect_and_compare_know_the_labels(fields, tmp_path, quiet, penstock):
    fields["training"]["max_steps"] = 10
    for name in ("one", "two"):
        story.train(parse_job(fields), tmp_path / name, console=quiet)
    code, shown, errors = penstock("inspect", tmp_path / "one")
    assert (code, errors) == (0, "")
    assert "bought: AUC" in shown and "minutes: RMSE" in shown
    assert "calibration, held-out: click" in shown and "training.png" in shown
    code, shown, errors = penstock(
        "compare", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "c.png"
    )
    assert (code, errors) == (0, "")
    assert "bought: auc" in shown and "minutes: rmse" in shown
    code, shown, errors = penstock("evaluate", tmp_path / "one")
    assert (code, errors) == (0, "")
    assert "minutes: mae" in shown and "click by item" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"kind": "mmoe", "task_weights": {"buy": 1}}},
            "job: model.task_weights: no label 'buy'; there are click, bought, minutes",
        ),
        (
            {"model": {"kind": "esmm"}},
            "job: model esmm learns binary labels that no row lacks, and 'bought' is none; write 0 "
            "where what comes before did not happen",
        ),
        (
            {"model": {"kind": "dlrm"}},
            "model dlrm predicts one label, but data.label names 3; use model kind "
            "shared_bottom, mmoe, ple or esmm",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, tmp_path, quiet, changes, message):
    with pytest.raises(ValueError) as caught:
        story.train(parse_job(fields | changes), tmp_path / "run", console=quiet)
    assert str(caught.value) == message


def test_one_label_is_no_chain(fields):
    fields["data"]["label"] = fields["data"]["label"][:1]
    fields["model"] = {"kind": "esmm"}
    with pytest.raises(ValueError, match="give data.label a list of at least 2"):
        parse_job(fields)


def test_grouped_auc_needs_a_binary_label(fields):
    fields["data"]["label"] = fields["data"]["label"][2:]
    fields["model"] = {"kind": "dlrm"}
    with pytest.raises(ValueError) as caught:
        parse_job(fields)
    assert str(caught.value) == (
        "job: evaluation.metrics.grouped_auc: no label is binary, so there is no AUC; remove it"
    )
