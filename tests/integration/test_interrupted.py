"""A signal, a closed pipe or a full disk at any moment: nothing is lost, and it is told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from run_contents import contents, differences

from penstock import run as story
from penstock.config import SyntheticSource, parse_job
from penstock.data.formats.synthetic import SyntheticRows, write_synthetic
from penstock.errors import ConfigError, DataError, Interrupted
from penstock.report.json_lines import JsonLines
from penstock.training.checkpoint.checkpoint import latest_checkpoint
from penstock.training.steps.dense import DenseTrainer

BINARY = str(Path(sys.executable).with_name("penstock"))


def at_call(monkeypatch, owner, name, call, act):
    """Acts before one call of a function."""
    real, calls = getattr(owner, name), []

    def wrapped(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            act()
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, wrapped)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def whole(small_job, tmp_path, quiet):
    story.train(small_job, tmp_path / "whole", console=quiet)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("owner", "name", "call", "step"),
    [
        (SyntheticRows, "extents", 1, None),  # opening
        (story, "build", 1, None),
        (story, "train_step", 9, 9),
        (story.Evaluator, "measure", 1, 10),
        (story, "train_step", 36, 36),
        (story.Evaluator, "measure", 4, 36),  # the last one
        (story.Checkpoints, "save", 1, 6),
    ],
)
def test_a_signal_at_any_moment(
    small_job, tmp_path, quiet, whole, monkeypatch, owner, name, call, step
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, stop)
        with pytest.raises(Interrupted) as raised:
            story.train(small_job, out, console=quiet)
    assert raised.value.exit_status == 143
    assert not (out / "summary.json").exists()
    if step is None:
        assert not out.exists()
        return
    assert f"stopped after step {step}; the checkpoint is complete" in quiet.file.getvalue()
    assert contents(out)["step"] == step
    story.train(small_job, out, resume=True, console=quiet)
    assert not differences(contents(out), whole)


def test_a_signal_while_the_loop_waits(small_job, tmp_path, quiet, whole, monkeypatch):
    """The reader is within a read that does not end; the loop has trained on all it was given."""
    out, real, release = tmp_path / "run", SyntheticRows.read, threading.Event()

    def read(self, split, columns):
        yield from real(self, split, columns)
        if split.stop <= 4500:
            release.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticRows, "read", read)
        # Step 32 is the last one that can be made of four blocks of 1,024 rows.
        at_call(patch, story, "train_step", 32, threading.Timer(0.5, stop).start)
        began = time.monotonic()
        with pytest.raises(Interrupted):
            story.train(small_job, out, console=quiet)
        assert time.monotonic() - began < 30, "it waited for the read to end"
        release.set()
    assert contents(out)["step"] == 32
    story.train(small_job, out, resume=True, console=quiet)
    assert not differences(contents(out), whole)


def test_a_second_signal_leaves_at_once(small_job, tmp_path, quiet, monkeypatch):
    """In the middle of a step and of a checkpoint: what is half done is not kept."""

    def twice():
        stop()
        stop()

    for name, owner, call, kept in (
        ("step", DenseTrainer, 9, 6),
        ("save", story, 9, 6),
        ("log", story.Run, 2, 12),
    ):
        out = tmp_path / name
        with monkeypatch.context() as patch:
            if name != "save":
                at_call(patch, owner, name, call, twice)
            else:
                at_call(patch, owner, "train_step", call, stop)
                at_call(patch, story.Checkpoints, "_commit", 2, stop)
            with pytest.raises(Interrupted) as raised:
                story.train(small_job, out, console=quiet)
        assert raised.value.is_repeated
        assert contents(out)["step"] == kept
        names = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert names == [f"step-{step:09d}" for step in range(6, kept + 1, 6)]


@pytest.fixture
def finished(small_fields, tmp_path, quiet):
    small_fields["training"]["max_steps"] = 2
    out, log = tmp_path / "run", tmp_path / "log.parquet"
    story.train(parse_job(small_fields), out, console=quiet)
    source = SyntheticSource(rows=1000, num_categorical=4)
    write_synthetic(source, log, "parquet")
    return out, log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_other_commands_leave_no_half_file(penstock, finished, tmp_path, monkeypatch, number):
    out, log = finished
    scores = tmp_path / "scores.parquet"
    scores.write_text("older")
    monkeypatch.setattr(os, "_exit", sys.exit)
    act = lambda: os.kill(os.getpid(), number)  # noqa: E731
    history = ("data", "history", log, "--by", "c0", "--of", "c1", "--order", "event_time")
    for command, owner, name, call in (
        (("predict", out, "--data", log, "--out", scores), pq.ParquetWriter, "write_table", 1),
        ((*history, "--out", scores), pq.ParquetWriter, "write_table", 1),
        (("data", "synth", "--out", scores), SyntheticRows, "block", 3),
        (("evaluate", out), SyntheticRows, "extents", 1),
    ):
        with monkeypatch.context() as patch:
            at_call(patch, owner, name, call, act)
            force = () if command[0] == "evaluate" else ("--force",)
            code, shown, errors = penstock(*command, *force)
        assert (code, shown) == (128 + number, "")
        assert errors == f"stopped by {number.name}\n"
        assert scores.read_text() == "older"
        assert not list(tmp_path.glob(".*"))


def test_an_error_while_reading_leaves_a_checkpoint(small_job, tmp_path, quiet, whole, monkeypatch):
    out = tmp_path / "run"

    def fail():
        raise DataError("a.parquet: the disk is gone")

    with monkeypatch.context() as patch:
        # Held-out rows are read from block 0, too.
        at_call(patch, story.Run, "is_due", 28, fail)
        with pytest.raises(DataError, match="the disk is gone"):
            story.train(small_job, out, console=quiet)
    assert "stopped after step 10; the checkpoint is complete" in quiet.file.getvalue()
    assert "the disk is gone" in (out / "run.log").read_text()
    story.train(small_job, out, resume=True, console=quiet)
    assert not differences(contents(out), whole)


def test_metrics_that_cannot_be_written_leave_a_checkpoint(small_job, tmp_path, quiet, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        # The start of the run, the checkpoint of step 6, the log line of step 7.
        at_call(patch, JsonLines, "take", 3, lambda: fill(out / "metrics.jsonl"))
        with pytest.raises(ConfigError, match=f"{out}: cannot write the run folder: ") as raised:
            story.train(small_job, out, console=quiet)
    assert contents_step(out) == 7
    # Who else listens hears of it, and of the checkpoint.
    assert str(raised.value) in (out / "run.log").read_text()
    assert "stopped after step 7; the checkpoint is complete" in quiet.file.getvalue()


def fill(path):
    path.unlink()
    path.symlink_to("/dev/full")


def contents_step(out):
    return int(latest_checkpoint(out / "checkpoints").name.removeprefix("step-"))


@pytest.mark.parametrize("kind", ["closed pipe", "full", "closed", "ascii"])
def test_training_does_not_need_to_be_seen(small_fields, tmp_path, monkeypatch, penstock, kind):
    small_fields["training"]["max_steps"] = 8
    job, out = tmp_path / "job.yaml", tmp_path / "café"
    job.write_text(json.dumps(small_fields), encoding="utf-8")
    stream = unseen(kind)
    monkeypatch.setattr(sys, "stdout", stream)
    code, _, errors = penstock("train", job, "--out", out)
    assert (code, errors) == (0, "")
    assert (out / "summary.json").exists()
    log = (out / "run.log").read_text() if (out / "run.log").exists() else ""
    assert log.count("training goes on") == (kind != "ascii")
    if kind == "ascii":
        stream.flush()
        assert b"caf\\xe9" in stream.buffer.getvalue()
    elif stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.close()


def unseen(kind):
    import io

    if kind == "closed":
        return None
    if kind == "full":
        return open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    if kind == "ascii":
        return io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def test_names_of_files_where_the_locale_is_ascii(tmp_path):
    environment = {
        **os.environ,
        "LC_ALL": "POSIX",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    out = tmp_path / "日本" / "é.csv"
    done = subprocess.run(
        [BINARY, "data", "synth", "--rows", "10", "--out", out],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"10 rows: " in done.stdout and b"\\u65e5\\u672c/\\xe9.csv" in done.stdout
    assert out.exists()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ('"$0" schema | head -c 10', 141),
        ('"$0" schema >/dev/full', 2),
        ('"$0" schema >&-', 2),
        ('"$0" --help | head -c 10', 141),
        ('"$0" train --help >/dev/full', 2),
        ('"$0" schema 2>&-', 0),
        ('"$0" absent 2>/dev/full', 2),
    ],
)
def test_output_that_is_the_product(command, status):
    # head may have all it wants before the rest is written, so more is written than a pipe holds.
    script = f"set -o pipefail; {command}"
    done = subprocess.run(
        ["bash", "-c", script, BINARY], capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if status == 2 and "2>" not in command:
        assert done.stderr.startswith("error: standard output: cannot be written: ")
