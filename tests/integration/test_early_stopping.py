"""Early stopping and the best checkpoint: by evaluations, kept, named, the same when resumed."""

import json

import pytest
from run_contents import contents, differences
from stopped_runs import crash

from penstock import run as story
from penstock.config import parse_job
from penstock.errors import CheckpointError


def steps_of(folder):
    return sorted(int(one.name[5:]) for one in (folder / "checkpoints").iterdir())


def evaluations(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if line["kind"] == "evaluation"}


@pytest.fixture
def overfitting(small_fields):
    """Overfits within a few evaluations: 9 steps an epoch, evaluated every 10."""
    small_fields["data"]["source"]["rows"] = 1500
    small_fields["table_defaults"]["optimizer"]["learning_rate"] = 0.1
    small_fields["training"] |= {"epochs": 12, "early_stopping": {"patience": 3}}
    small_fields["checkpoint"] |= {"keep_best": "auc"}
    return small_fields


def test_stops_after_patience_and_keeps_the_best(overfitting, tmp_path, quiet):
    out = tmp_path / "run"
    summary = story.train(parse_job(overfitting), out, console=quiet)
    found = evaluations(out)
    steps = sorted(found)
    best = max(steps, key=lambda step: found[step]["auc"])
    assert summary["steps"] == steps[-1] < 12 * 9
    assert steps.index(best) == len(steps) - 4, "three evaluations were no better"
    assert summary["best"] == {"metric": "auc", "value": found[best]["auc"], "step": best}
    kept = steps_of(out)
    assert best in kept and len(kept) == 3 and kept[-1] == summary["steps"]
    assert story.evaluate(out / "best")["auc"] == found[best]["auc"]
    assert story.evaluate(out)["auc"] == found[steps[-1]]["auc"] < found[best]["auc"]


@pytest.mark.parametrize("step", [7, 10, 23, 33])
def test_resumed_run_has_the_same_bits(overfitting, tmp_path, quiet, monkeypatch, step):
    job = parse_job(overfitting)
    story.train(job, tmp_path / "whole", console=quiet)
    whole = contents(tmp_path / "whole")
    crash(job, tmp_path / "run", step, monkeypatch, quiet)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert not differences(contents(tmp_path / "run"), whole)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")


def test_goes_on_only_with_more_patience(overfitting, tmp_path, quiet):
    out = tmp_path / "run"
    first = story.train(parse_job(overfitting), out, console=quiet)
    again = story.train(parse_job(overfitting), out, resume=True, console=quiet)
    assert again == first
    assert "no better (training.early_stopping)" in " ".join(quiet.file.getvalue().split())
    overfitting["training"]["early_stopping"]["patience"] = 5
    more = story.train(parse_job(overfitting), out, resume=True, console=quiet)
    assert more["steps"] == first["steps"] + 20 and more["best"] == first["best"]


def test_without_every_steps_each_epoch_is_measured(overfitting, tmp_path, quiet):
    del overfitting["evaluation"]["every_steps"]
    overfitting["training"] |= {"epochs": 3, "early_stopping": None}
    story.train(parse_job(overfitting), tmp_path, console=quiet)
    assert sorted(evaluations(tmp_path)) == [9, 18, 27]
    assert story.evaluate(tmp_path / "best")["auc"] == max(
        one["auc"] for one in evaluations(tmp_path).values()
    )


def test_a_run_without_a_best_one_says_so(small_job, tmp_path, quiet):
    story.train(small_job, tmp_path / "run", console=quiet)
    with pytest.raises(CheckpointError) as raised:
        story.evaluate(tmp_path / "run" / "best")
    assert str(raised.value) == (
        f"{tmp_path}/run: no best checkpoint is known; train with checkpoint.keep_best, or name "
        "the run for its newest one"
    )
