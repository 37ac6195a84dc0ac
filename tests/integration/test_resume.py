"""A run that was stopped, by whatever, ends with the same bits as one that was not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import yaml
from run_contents import contents, differences
from stopped_runs import crash, with_rules
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from penstock import run as story
from penstock.config import parse_job
from penstock.data.quarantine import Quarantine
from penstock.errors import CheckpointError, ConfigError
from penstock.training.checkpoint.checkpoint import Checkpoints


@pytest.fixture
def whole(small_job, tmp_path, quiet):
    """The run that nothing stops."""
    story.train(small_job, tmp_path / "whole", console=quiet)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("step", [6, 9, 12, 20, 35])
def test_after_a_crash(small_job, tmp_path, quiet, whole, monkeypatch, step):
    out = tmp_path / "run"
    crash(small_job, out, step, monkeypatch, quiet)
    story.train(small_job, out, resume=True, console=quiet)
    assert not differences(contents(out), whole)
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/log_loss")]
    assert sorted(steps) == [7, 14, 21, 28, 35, 36]


def test_what_a_checkpoint_counts_as_quarantined_is_on_the_disk_before_it(
    small_job, tmp_path, quiet, monkeypatch
):
    order = []

    def note(owner, name):
        real = getattr(owner, name)

        def noted(*arguments):
            order.append(name)
            return real(*arguments)

        monkeypatch.setattr(owner, name, noted)

    note(Quarantine, "sync")
    note(Checkpoints, "save")
    training = small_job.training.model_copy(update={"max_steps": 8})
    story.train(small_job.model_copy(update={"training": training}), tmp_path, console=quiet)
    assert order == ["sync", "save"] * 2


def test_after_a_crash_with_admission_and_eviction(small_job, tmp_path, quiet, monkeypatch):
    """Counts, marks of use, default rows and clocks are part of a checkpoint."""
    job = with_rules(small_job)
    story.train(job, tmp_path / "whole", console=quiet)
    crash(job, tmp_path / "run", 20, monkeypatch, quiet)
    summary = story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole"))
    tables = summary["tables"].values()
    assert all(table["evicted"] and table["refused"] and table["admitted"] for table in tables)
    assert all(table["budget_used"] <= 1 for table in tables)


SIGNALLED = """
import os, signal, threading, time
from penstock import cli, run
from penstock.data.formats.synthetic import SyntheticRows
real_step, real_read = run.train_step, SyntheticRows.read
def step(training, batches, at):
    {at_the_step}
    return real_step(training, batches, at)
def read(self, split, columns):
    yield from real_read(self, split, columns)
    {after_reading}
run.train_step, SyntheticRows.read = step, read
cli.main()
"""
IN_A_STEP = SIGNALLED.format(
    at_the_step="at == 8 and os.kill(os.getpid(), signal.SIGINT)", after_reading=""
)
IN_A_READ_THAT_DOES_NOT_END = SIGNALLED.format(
    # The last one that can be made of four blocks of 1,024 rows.
    at_the_step="at == 31 and threading.Timer(.5, os.kill, (os.getpid(), signal.SIGTERM)).start()",
    after_reading="split.stop <= 4500 and time.sleep(3600)",
)


@pytest.mark.parametrize(
    ("script", "status", "step"),
    [(IN_A_STEP, 130, 9), (IN_A_READ_THAT_DOES_NOT_END, 143, 32)],
    ids=["in a step", "in a read that does not end"],
)
def test_after_a_signal(small_yaml, tmp_path, penstock, whole, script, status, step):
    out = tmp_path / "run"
    stopped = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
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
    assert stopped.returncode == status, stopped.stderr
    assert stopped.stderr == f"stopped by {signal.Signals(status - 128).name}\n"
    assert f"stopped after step {step}; the checkpoint is complete. Continue:" in stopped.stdout
    assert not (out / "summary.json").exists()
    # The line that it printed is the line that continues.
    command = re.search(r"^  penstock (train .*)$", stopped.stdout, re.MULTILINE).group(1)
    code, shown, errors = penstock(*command.split())
    assert (code, errors) == (0, "")
    assert f"resumed at step {step} ({step * 128:,} samples)" in shown
    assert not differences(contents(out), whole)


def test_a_finished_run_resumes_to_the_same_summary(small_job, tmp_path, quiet):
    out = tmp_path / "run"
    first = story.train(small_job, out, console=quiet)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8")
    files = contents(out)
    again = story.train(small_job, out, resume=True, console=quiet)
    for name in ("auc", "teacher_auc", "log_loss", "steps", "samples", "tables"):
        assert first[name] == again[name], name
    assert not differences(contents(out), files)
    more = (out / "metrics.jsonl").read_text(encoding="utf-8").removeprefix(lines)
    assert [json.loads(line)["kind"] for line in more.splitlines()] == ["start", "nothing_new"]


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
        f"{out}: no complete checkpoint in this run folder; look at the name, or train anew "
        "without --resume"
    )
    assert not out.exists()


def test_a_folder_in_use_is_refused_untouched(small_job, tmp_path, quiet):
    out = tmp_path / "used"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        story.train(small_job, out, console=quiet)
    assert str(caught.value) == f"{out} is not empty; name another folder with --out"
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_do_not_share_a_run_folder(small_fields, tmp_path, quiet, resume):
    out = tmp_path / "run"
    small_fields["training"]["max_steps"] = 2
    job = parse_job(small_fields)
    if resume:
        story.train(job, out, console=quiet)
    with story.open_run(job, out, resume=resume, console=quiet):
        with pytest.raises(ConfigError) as caught:
            story.train(job, out, resume=resume, console=quiet)
        assert str(caught.value) == (
            f"{out}: process {os.getpid()} on {socket.gethostname()} is training in this run "
            "folder; wait for it or stop it, or name another folder with --out"
        )
        if resume:
            assert story.evaluate(out)["samples"] == 1500  # whoever only reads needs no leave
    assert out.exists() == resume  # nothing was written
    # A lock that its holder left behind is in nobody's way.
    out.mkdir(exist_ok=True)
    (out / "run.lock").write_text("process 1 on a machine that is gone")
    story.train(job, out, resume=resume, console=quiet)
    assert not (out / "run.lock").exists()


def test_a_folder_that_cannot_be_written_is_known_first(small_job, tmp_path, quiet, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(story.Dataset, "open", None)
    with pytest.raises(ConfigError, match="cannot write the run folder"):
        story.train(small_job, tmp_path / "file" / "run", console=quiet)


def test_a_file_system_without_locks_is_named(small_fields, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr("penstock.locking._flock", lambda descriptor: False)
    small_fields["training"]["max_steps"] = 1
    story.train(parse_job(small_fields), tmp_path / "run", console=quiet)
    assert "this file system has no locks" in quiet.file.getvalue()


def test_the_remedy_for_a_folder_in_use_is_one_that_helps(small_job, tmp_path, quiet):
    out = tmp_path / "used"
    out.mkdir()
    (out / "job.yaml").write_text("", encoding="utf-8")  # all that a run leaves that failed early
    with pytest.raises(ConfigError) as caught:
        story.train(small_job, out, console=quiet)
    assert str(caught.value) == (
        f"{out} is not empty; that run wrote no checkpoint: remove the folder, "
        "or name another with --out"
    )
    (out / "job.yaml").unlink()
    story.train(small_job, out, console=quiet)
    with pytest.raises(ConfigError) as caught:
        story.train(small_job, out, console=quiet)
    assert str(caught.value) == (
        f"{out} is not empty; continue that run with --resume, or name another folder with --out"
    )


def test_resume_with_another_job_is_refused_with_the_difference(
    small_job, small_fields, tmp_path, quiet
):
    out = tmp_path / "run"
    story.train(small_job, out, console=quiet)
    small_fields["table_defaults"]["dim"] = 16
    with pytest.raises(CheckpointError) as caught:
        story.train(parse_job(small_fields), out, resume=True, console=quiet)
    assert "table c0.dim: 8 in the checkpoint, 16 in the job" in str(caught.value)
    assert yaml.safe_load((out / "job.yaml").read_text())["table_defaults"]["dim"] == 8
