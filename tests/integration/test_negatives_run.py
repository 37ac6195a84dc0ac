"""A log of positives alone, from the job to the scores."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from run_contents import contents, differences
from stopped_runs import crash

from penstock import run as story
from penstock.config import parse_job
from penstock.training.metrics.binary import auc_of_scores

ROWS, GROUPS = 6000, 5


def clicks(rows=ROWS, seed=0):
    """Users of a group click its items, mostly; every item is as frequent as any other."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, 200, rows)
    group = np.where(rng.random(rows) < 0.9, user % GROUPS, rng.integers(0, GROUPS, rows))
    return pa.table({
        "user": user,
        "item": rng.integers(0, 20, rows) * GROUPS + group,
        "time": np.arange(rows) * 1000,
    })


@pytest.fixture
def fields(tmp_path):
    pq.write_table(clicks(), tmp_path / "clicks.parquet", row_group_size=1000)
    return {
        "name": "clicks",
        "data": {
            "source": {"format": "parquet", "path": str(tmp_path / "clicks.parquet")},
            "event_time": "time",
            "split": {"by": "time", "at": 4_500_000},
            "negatives": {"per_positive": 3, "columns": ["item"], "user": "user"},
            "shuffle": {"block_rows": 1000},
        },
        "features": [{"columns": ["user", "item"]}],
        "table_defaults": {"dim": 8, "optimizer": {"kind": "adam", "learning_rate": 0.03}},
        "model": {"kind": "dlrm", "top": [16]},
        "training": {
            "batch_size": 256,
            "epochs": 3,
        },
        "run": {"threads": 1},
        "evaluation": {"metrics": {"grouped_auc": ["user"]}},
        "checkpoint": {"every_steps": 10},
    }


def test_from_the_job_to_the_scores(penstock, fields, tmp_path):
    job, out, scores = tmp_path / "job.yaml", tmp_path / "run", tmp_path / "scores.parquet"
    job.write_text(yaml.safe_dump(fields), encoding="utf-8")
    code, _, errors = penstock("train", job, "--out", out)
    assert (code, errors) == (0, "")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["samples"] == 3 * 4500 * 4
    held = summary["grouped_auc"]["user"]
    # 0.9 of the clicks lie in the user's group, 0.2 of the candidates do.
    assert summary["auc"] > 0.75 and held["auc"] > 0.75
    measured = story.evaluate(out)
    assert measured["samples"] == 1500 * 4
    assert (measured["positives"], measured["auc"]) == (1500, summary["auc"])

    # Other files get negatives in evaluation, and scores row by row in prediction.
    other = tmp_path / "other.parquet"
    pq.write_table(clicks(500, seed=1), other)
    metrics = story.evaluate(out, str(other))
    assert (metrics["samples"], metrics["positives"]) == (2000, 500)
    assert metrics["auc"] > 0.75
    code, shown, errors = penstock("predict", out, "--data", other, "--out", scores)
    assert (code, errors) == (0, "")
    table = pq.read_table(scores)
    assert table.column_names == ["row", "score"]
    assert table["row"].to_pylist() == list(range(500))
    rows = clicks(500, seed=1)
    user, item = rows["user"].to_numpy(), rows["item"].to_numpy()
    liked = torch.tensor(user % GROUPS == item % GROUPS).float()
    assert auc_of_scores(torch.tensor(table["score"].to_numpy()), liked) > 0.8


@pytest.mark.parametrize("step", [10, 25, 33, 70])
def test_resumed_run_has_the_same_bits(fields, tmp_path, quiet, monkeypatch, step):
    job = parse_job(fields)
    story.train(job, tmp_path / "whole", console=quiet)
    out = tmp_path / "run"
    crash(job, out, step, monkeypatch, quiet)
    story.train(job, out, resume=True, console=quiet)
    assert not differences(contents(out), contents(tmp_path / "whole"))


def test_other_negatives_do_not_resume(penstock, fields, tmp_path):
    job, out = tmp_path / "job.yaml", tmp_path / "run"
    fields["training"]["epochs"] = 1
    job.write_text(yaml.safe_dump(fields), encoding="utf-8")
    assert penstock("train", job, "--out", out)[0] == 0
    changed = ("--set", "data.negatives.candidates=uniform", "--set", "training.epochs=2")
    code, _, errors = penstock("train", job, "--out", out, "--resume", *changed)
    assert code == 2
    assert (
        'data.negatives.candidates: "popularity" in the checkpoint, "uniform" in the job' in errors
    )
