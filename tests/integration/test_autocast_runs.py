"""Runs under autocast: they learn, resume bit for bit, and are scored as they were trained."""

import pytest
from run_contents import contents, differences
from stopped_runs import crash

from penstock import run as story
from penstock.config import parse_job


@pytest.fixture
def job(small_fields):
    small_fields["training"] |= {"autocast": "bfloat16", "epochs": 2}
    return parse_job(small_fields)


@pytest.mark.parametrize("step", [9, 40])
def test_resumed_run_has_the_same_bits(job, tmp_path, quiet, monkeypatch, step):
    story.train(job, tmp_path / "whole", console=quiet)
    crash(job, tmp_path / "run", step, monkeypatch, quiet)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole"))


def test_evaluation_and_prediction_compute_alike(job, tmp_path, quiet, small_fields):
    summary = story.train(job, tmp_path / "run", console=quiet)
    assert story.evaluate(tmp_path / "run")["auc"] == summary["auc"]
    in_float32 = story.evaluate(tmp_path / "run", sets=["training.autocast=null"])
    assert in_float32["auc"] == pytest.approx(summary["auc"], abs=2e-3)
    assert in_float32["log_loss"] != summary["log_loss"]
    del small_fields["training"]["autocast"]
    plain = story.train(parse_job(small_fields), tmp_path / "plain", console=quiet)
    assert plain["auc"] == pytest.approx(summary["auc"], abs=5e-3)
    assert (
        contents(tmp_path / "run")["dense"].keys() == contents(tmp_path / "plain")["dense"].keys()
    )


@pytest.mark.parametrize("kind", ["two_tower", "din", "mmoe"])
def test_other_objectives(kind, tmp_path, quiet, small_fields):
    small_fields["training"]["autocast"] = "bfloat16"
    small_fields["training"]["max_steps"] = 8
    small_fields["model"] = {"kind": kind}
    if kind == "two_tower":
        small_fields["model"]["items"] = ["c0"]
        small_fields["evaluation"]["metrics"] = {"recall_at": [10]}
    elif kind == "mmoe":
        small_fields["data"]["label"] = [
            {"column": "click"},
            {"column": "n0", "task": "regression"},
        ]
        small_fields["data"]["numeric"] = [{"columns": ["n1"]}]
    else:
        small_fields["model"] |= {"candidate": "c0", "sequence": "c1"}
        small_fields["features"] = [
            {"columns": ["c0"], "table": "t"},
            {"columns": ["c1"], "table": "t", "pooling": "sequence", "max_keys": 2},
        ]
        small_fields["tables"] = [{"name": "t", "dim": 8}]
    summary = story.train(parse_job(small_fields), tmp_path / "run", console=quiet)
    again = story.evaluate(tmp_path / "run")
    assert all(again[name] == summary[name] for name in ("auc", "loss") if name in again)


def test_scores_are_float32(job, tmp_path, quiet):
    story.train(job, tmp_path / "run", console=quiet)
    with story.open_run(job, tmp_path / "run", resume=True, console=quiet) as run:
        run.begin(resume=True)
        with run.dataset.batches("evaluation", batch_size=64) as batches:
            outputs = [
                one.outputs for one in story.scored(batches, run.state.model, run.state.collection)
            ]
    assert {str(one.dtype) for one in outputs} == {"torch.float32"}
