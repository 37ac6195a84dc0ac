"""Runs with dropout and batch norm: the same bits when resumed, also with a last batch of one."""

import pytest
from run_contents import contents, differences
from stopped_runs import crash

from penstock import run as story
from penstock.config import parse_job


@pytest.fixture
def job(small_fields):
    small_fields["data"]["source"]["rows"] = 1500
    small_fields["data"]["split"] = {"by": "fraction", "evaluation": 0.3}
    small_fields["model"] |= {"dropout": 0.3, "batch_norm": True}
    small_fields["training"] |= {"batch_size": 149, "epochs": 2}
    small_fields["checkpoint"]["every_steps"] = 3
    return parse_job(small_fields)


@pytest.mark.parametrize("step", [5, 8, 14])
def test_resumed_run_has_the_same_bits(job, tmp_path, quiet, monkeypatch, step):
    summary = story.train(job, tmp_path / "whole", console=quiet)
    # 1,050 rows an epoch: seven batches of 149 and one of 7.
    assert summary["steps"] == 16
    whole = contents(tmp_path / "whole")
    assert "top.hidden.1.running_mean" in whole["dense"]
    crash(job, tmp_path / "run", step, monkeypatch, quiet)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert not differences(contents(tmp_path / "run"), whole)
    assert story.evaluate(tmp_path / "run") == story.evaluate(tmp_path / "whole")


def test_a_last_batch_of_one_sample(job, tmp_path, quiet):
    training = job.training.model_copy(update={"batch_size": 1049, "epochs": 1})
    summary = story.train(job.model_copy(update={"training": training}), tmp_path, console=quiet)
    assert (summary["steps"], summary["samples"]) == (2, 1050)


def test_model_fields_do_not_change_on_resume(job, tmp_path, quiet):
    story.train(job, tmp_path, console=quiet)
    model = job.model.model_copy(update={"dropout": 0.1})
    with pytest.raises(Exception, match=r"model.dropout: 0.3 in the checkpoint, 0.1 in the job"):
        story.train(job.model_copy(update={"model": model}), tmp_path, resume=True, console=quiet)
