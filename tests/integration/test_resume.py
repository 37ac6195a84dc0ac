"""A run that was stopped, by whatever, ends with the same bits as one that was not."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from penstock import run as story
from penstock.config import parse_job
from penstock.errors import CheckpointError, ConfigError
from penstock.training.interruption import interruption

# Seconds and rates are of the machine, not of the run.
MEASURED = {"seconds", "samples_per_s"}


def contents(out):
    """All that a run computed: rows by key, dense weights, optimizer state, metrics."""
    with story.open_trained(out) as trained:
        state = trained.state
        tables = {}
        for table in state.collection.tables:
            parts = list(state.collection.export_table(table.name))
            keys = torch.cat([part.keys for part in parts])
            order = keys.argsort()
            tables[table.name] = (
                keys[order],
                torch.cat([part.values for part in parts])[order],
                torch.cat([part.state for part in parts])[order],
            )
        dense = {name: value.clone() for name, value in state.model.state_dict().items()}
        optimizer = state.optimizer.state_dict()
        where = (state.step, state.position)
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [
        {name: value for name, value in json.loads(line).items() if name not in MEASURED}
        for line in text.splitlines()
    ]
    return {
        "where": where,
        "tables": tables,
        "dense": dense,
        "optimizer": optimizer,
        "lines": lines,
    }


def assert_same_bits(left, right, path=""):
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), path
    elif isinstance(left, dict):
        assert list(left) == list(right), path
        for name in left:
            assert_same_bits(left[name], right[name], f"{path}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same_bits(one, other, f"{path}.{index}")
    else:
        assert left == right, path


@pytest.fixture
def whole(small_job, tmp_path, quiet):
    """The run that nothing stops."""
    story.train(small_job, tmp_path / "whole", console=quiet)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("step", [6, 9, 12, 20, 35])
def test_after_a_crash(small_job, tmp_path, quiet, whole, monkeypatch, step):
    out, real = tmp_path / "run", story.train_step

    def crash(model, collection, trainer, batch, at, clock):
        if at == step:
            raise RuntimeError("the power went")
        return real(model, collection, trainer, batch, at, clock)

    monkeypatch.setattr(story, "train_step", crash)
    with pytest.raises(RuntimeError, match="the power went"):
        story.train(small_job, out, console=quiet)
    monkeypatch.setattr(story, "train_step", real)
    story.train(small_job, out, resume=True, console=quiet)
    assert_same_bits(contents(out), whole)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/log_loss")]
    assert steps == [7, 14, 21, 28, 35, 36]


SIGNALLED = """
import os, signal, sys
from penstock import cli, run
real = run.train_step
def step(model, collection, trainer, batch, at, clock):
    if at == {step}:
        os.kill(os.getpid(), signal.{signal})
    return real(model, collection, trainer, batch, at, clock)
run.train_step = step
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_after_a_signal(small_yaml, tmp_path, penstock, whole, name):
    out = tmp_path / "run"
    stopped = subprocess.run(
        [
            sys.executable,
            "-c",
            SIGNALLED.format(step=8, signal=name),
            "train",
            small_yaml,
            "--out",
            out,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped after step 9; the checkpoint is complete. Continue:" in stopped.stdout
    assert not (out / "summary.json").exists()
    # The line that it printed is the line that continues.
    command = re.search(r"^  penstock (train .*)$", stopped.stdout, re.MULTILINE).group(1)
    code, shown, errors = penstock(*command.split())
    assert (code, errors) == (0, "")
    assert "resumed at step 9 (1,152 samples)" in shown
    assert_same_bits(contents(out), whole)


def test_signals_are_a_question_first_and_an_order_then():
    before = signal.getsignal(signal.SIGTERM)
    with interruption() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(SystemExit) as exit_:
            os.kill(os.getpid(), signal.SIGINT)
        assert exit_.value.code == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_off_the_main_thread_signals_stay_as_they_are():
    handlers = []

    def look():
        with interruption() as stop:
            handlers.append((signal.getsignal(signal.SIGTERM), stop.requested))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [(signal.getsignal(signal.SIGTERM), False)]


def test_a_finished_run_resumes_to_the_same_summary(small_job, tmp_path, quiet):
    out = tmp_path / "run"
    first = story.train(small_job, out, console=quiet)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8")
    again = story.train(small_job, out, resume=True, console=quiet)
    for name in ("auc", "teacher_auc", "log_loss", "steps", "samples", "tables"):
        assert first[name] == again[name], name
    assert (out / "metrics.jsonl").read_text(encoding="utf-8") == lines


def test_max_steps_stops_and_the_run_can_go_on(small_fields, tmp_path, quiet, whole):
    out = tmp_path / "run"
    small_fields["training"]["max_steps"] = 15
    part = story.train(parse_job(small_fields), out, console=quiet)
    assert (part["steps"], part["samples"]) == (15, 15 * 128)
    again = story.train(parse_job(small_fields), out, resume=True, console=quiet)
    assert (again["steps"], again["samples"]) == (15, 15 * 128)


def test_resume_needs_a_checkpoint(small_job, tmp_path, quiet):
    out = tmp_path / "nothing"
    with pytest.raises(CheckpointError) as caught:
        story.train(small_job, out, resume=True, console=quiet)
    assert str(caught.value) == (
        f"{out / 'checkpoints'}: no complete checkpoint to resume from; start anew without --resume"
    )
    assert not out.exists()


def test_a_folder_in_use_is_refused_untouched(small_job, tmp_path, quiet):
    out = tmp_path / "used"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        story.train(small_job, out, console=quiet)
    assert str(caught.value) == (
        f"{out} is not empty; continue that run with --resume, or name another folder with --out"
    )
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_resume_with_another_job_is_refused_with_the_difference(
    small_job, small_fields, tmp_path, quiet
):
    out = tmp_path / "run"
    story.train(small_job, out, console=quiet)
    small_fields["table_defaults"]["dim"] = 16
    with pytest.raises(CheckpointError) as caught:
        story.train(parse_job(small_fields), out, resume=True, console=quiet)
    assert "table_defaults.dim" in str(caught.value)
    assert yaml.safe_load((out / "job.yaml").read_text())["table_defaults"]["dim"] == 8
