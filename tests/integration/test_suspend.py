"""`penstock suspend`: a run that trains stops with a checkpoint; who does not train is named."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from penstock.locking import FileLock
from penstock.training.checkpoint.checkpoint import latest_checkpoint

BINARY = str(Path(sys.executable).with_name("penstock"))


def started(job, out, ranks):
    """A run of its own process that trains for long."""
    sets = ["--set", "training.epochs=100000", "--set", "report.every_steps=1"]
    process = subprocess.Popen(
        [BINARY, "train", str(job), "--out", str(out), "--nproc", str(ranks), *sets],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    end_s = time.monotonic() + 120
    while (
        not (out / "metrics.jsonl").exists() or "train" not in (out / "metrics.jsonl").read_text()
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_stops_after_its_step_and_goes_on(small_fields, tmp_path, penstock, ranks):
    job, out = tmp_path / "job.yaml", tmp_path / "run"
    small_fields["checkpoint"] = {"every_steps": None}
    small_fields["evaluation"] = {"every_steps": None}
    job.write_text(yaml.safe_dump(small_fields))
    process = started(job, out, ranks)
    code, shown, errors = penstock("suspend", out)
    assert (code, errors) == (0, "")
    assert process.wait(30) == 143
    process.communicate()
    newest = latest_checkpoint(out / "checkpoints")
    assert shown.split() == f"stopped; newest checkpoint: {newest}".split()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert newest.name == f"step-{lines[-1]['step']:09}"
    steps = f"training.max_steps={lines[-1]['step'] + 5}"
    more = ("--set", "training.epochs=100000", "--set", steps)
    assert penstock("train", job, "--out", out, "--resume", *more)[0] == 0


def test_where_nobody_trains_there_is_nothing_to_suspend(tmp_path, penstock):
    for run in (tmp_path, tmp_path / "none"):
        code, _, errors = penstock("suspend", run)
        assert code == 2 and "no process trains in this folder" in errors.replace("\n", " ")
    (tmp_path / "run.lock").write_text("process 1 on elsewhere\n")  # left by a killed one
    assert penstock("suspend", tmp_path)[0] == 2


@pytest.mark.parametrize(
    ("note", "words"),
    [
        ("process 12 on another-machine", "trained by process 12 on another-machine"),
        ("somebody", "held by somebody that it does not name"),
    ],
)
def test_who_cannot_be_asked_is_named(tmp_path, penstock, note, words):
    lock = FileLock.take(tmp_path / "run.lock", signed=True)
    (tmp_path / "run.lock").write_text(note + "\n")
    code, _, errors = penstock("suspend", tmp_path)
    assert code == 2 and words in " ".join(errors.split())
    lock.release()


def test_who_does_not_stop_in_time_is_told_of(tmp_path, penstock):
    script = (
        "import signal, sys, time; from pathlib import Path; from penstock.locking import FileLock;"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True));"
        "lock = FileLock.take(Path(sys.argv[1]), signed=True); print('held', flush=True);"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run.lock")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    code, _, errors = penstock("suspend", tmp_path, "--patience", "0.3")
    assert process.stdout.readline() == b"asked\n"
    assert code == 2 and "has not done so for 0.3 s" in " ".join(errors.split())
    process.kill()
    process.communicate()
