"""Learning rates over the steps of a run, to its end where the job says so."""

import json

import pytest
import torch

from penstock import run as story
from penstock.config import (
    SGD,
    FeatureConfig,
    FractionSplit,
    Schedule,
    TableConfig,
    lasts_to_the_end,
    parse_job,
    with_end,
)
from penstock.embedding import EmbeddingCollection
from penstock.errors import ConfigError
from penstock.job_file import load_job
from penstock.types import KeyedJagged

HELD_OUT = FractionSplit(evaluation=0.1)
TO_THE_END = {"decay": "linear", "decay_steps": "end", "end_factor": 0.1}


def job_of(**training):
    return parse_job({
        "data": {
            "source": {"format": "synthetic", "rows": 1000, "num_categorical": 2},
            "label": {"column": "click"},
            "numeric": [{"columns": ["n[0-9]*"]}],
        },
        "features": [{"columns": ["c[0-9]*"]}],
        "table_defaults": {"dim": 4, "optimizer": {"kind": "sgd", "schedule": TO_THE_END}},
        "model": {"kind": "dlrm"},
        "training": {
            "batch_size": 64,
            "optimizer": {"kind": "sgd", "learning_rate": 1.0, "schedule": TO_THE_END},
            **training,
        },
        "report": {"every_steps": 1},
    })


def rates(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [line["learning_rate"] for line in found if "learning_rate" in line]


@pytest.mark.parametrize(
    ("training", "steps"), [({}, 16), ({"epochs": 3}, 48), ({"epochs": 3, "max_steps": 20}, 20)]
)
def test_a_schedule_lasts_to_the_end_of_the_run(training, steps, tmp_path, quiet):
    story.train(job_of(**training), tmp_path / "run", console=quiet)
    found = rates(tmp_path / "run")
    expected = [1 - 0.9 * step / steps for step in range(steps)]
    assert found == pytest.approx(expected)
    written = load_job(tmp_path / "run" / "job.yaml")
    assert written.training.optimizer.schedule.decay_steps == "end"


def test_a_run_goes_on_and_is_measured_with_the_schedule_of_the_whole(tmp_path, quiet, monkeypatch):
    job = job_of(epochs=2)
    job = job.model_copy(update={"data": job.data.model_copy(update={"split": HELD_OUT})})
    story.train(job, tmp_path / "whole", console=quiet)

    def stop(run, batch, save=story.Run.step):
        if run.state.step == 11:
            raise KeyboardInterrupt
        save(run, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(story.Run, "step", stop)
        checkpoint = job.checkpoint.model_copy(update={"every_steps": 5})
        story.train(
            job.model_copy(update={"checkpoint": checkpoint}), tmp_path / "run", console=quiet
        )
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert rates(tmp_path / "run") == rates(tmp_path / "whole")
    assert story.evaluate(tmp_path / "run") == story.evaluate(tmp_path / "whole")


def test_everything_that_says_end_gets_the_steps_and_nothing_else():
    job = job_of()
    assert lasts_to_the_end(job)
    ended = with_end(job, 50)
    assert not lasts_to_the_end(ended)
    assert ended.table_defaults.optimizer.schedule.decay_steps == 50
    assert ended.training.optimizer.schedule.decay_steps == 50
    assert ended.data is job.data and ended.model is job.model
    assert with_end(ended, 7) is ended
    assert job.training.optimizer.schedule.decay_steps == "end"


def test_the_warm_up_is_not_of_the_decay():
    schedule = Schedule(warmup_steps=10, decay="cosine", decay_steps="end")
    assert with_end(schedule, 50).decay_steps == 40
    assert with_end(schedule, 5).decay_steps == 1


def test_tables_in_a_tuple_are_found():
    table = TableConfig(name="t", dim=4, optimizer=SGD(schedule=Schedule(**TO_THE_END)))
    plain = TableConfig(name="u", dim=4)
    found = with_end((plain, table), 9)
    assert found[0] is plain and found[1].optimizer.schedule.decay_steps == 9
    assert with_end((plain,), 9)[0] is plain


def test_a_loop_of_ones_own_gives_the_number():
    table = TableConfig(name="t", dim=4, optimizer=SGD(schedule=Schedule(**TO_THE_END)))
    collection = EmbeddingCollection([table], [FeatureConfig(name="f", table="t", pooling="sum")])
    batch = KeyedJagged(("f",), torch.tensor([1, 2]), torch.tensor([0, 2]))
    collection(batch).sum().backward()
    with pytest.raises(ConfigError, match="decay_steps is `end`.*give the number of steps"):
        collection.apply_gradients()
