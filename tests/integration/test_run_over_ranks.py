"""`penstock train --nproc`: stopped, killed, gone on with by other numbers of ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small import STEPS

from penstock.training.checkpoint.checkpoint import latest_checkpoint, verify

BINARY = str(Path(sys.executable).with_name("penstock"))


def start(job, out, size, tmp_path, *more):
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [BINARY, "train", str(job), "--out", str(out), "--nproc", str(size), *more],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process):
    try:
        out, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out, errors


def ranks_of(process):
    """Its processes by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        rank = [one for one in variables if one.startswith(b"RANK=")]
        if parent == process.pid and rank:
            found[int(rank[0].removeprefix(b"RANK="))] = int(folder.name)
    return found


def until_saved(out, step):
    for _ in range(2400):
        newest = latest_checkpoint(out / "checkpoints")
        if newest is not None and int(newest.name.removeprefix("step-")) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint")


def assert_nothing_left(tmp_path, ranks):
    for pid in ranks.values():
        assert not Path(f"/proc/{pid}").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.fixture
def long_job(small_fields, tmp_path):
    """The small job with a hundred epochs."""
    path = tmp_path / "long.yaml"
    fields = {**small_fields, "evaluation": {}}
    fields["training"] = {**fields["training"], "epochs": 100}
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def test_a_run_that_is_stopped_and_killed_goes_on_with_any_number(long_job, tmp_path, penstock):
    out = tmp_path / "run"
    stopped = start(long_job, out, 2, tmp_path)
    until_saved(out, 6)
    ranks = ranks_of(stopped)
    assert sorted(ranks) == [0, 1]
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal sends it
    status, shown, errors = ended(stopped)
    assert (status, errors) == (130, "stopped by SIGINT\n"), shown
    assert "the checkpoint is complete" in shown
    assert shown.rstrip().endswith(f"--out {out} --nproc 2 --resume")
    assert_nothing_left(tmp_path, ranks)
    step = verify(latest_checkpoint(out / "checkpoints")).step

    killed = start(long_job, out, 2, tmp_path, "--resume")
    until_saved(out, step + 6)
    ranks = ranks_of(killed)
    os.kill(ranks[1], signal.SIGKILL)
    began_s = time.monotonic()
    status, shown, errors = ended(killed)
    assert time.monotonic() - began_s < 15
    assert (status, errors) == (137, "error: rank 1 of 2 was killed by SIGKILL\n"), shown
    assert_nothing_left(tmp_path, ranks)

    step = verify(latest_checkpoint(out / "checkpoints")).step
    status, shown, errors = penstock(
        "train", long_job, "--out", out, "--resume", "--set", f"training.max_steps={step + 2}"
    )
    assert status == 0, errors
    assert f"resumed at step {step:,}" in shown
    assert json.loads((out / "summary.json").read_text())["steps"] == step + 2


def test_two_ranks_train_to_the_end(small_yaml, tmp_path, penstock):
    out = tmp_path / "run"
    status, shown, errors = ended(start(small_yaml, out, 2, tmp_path))
    assert (status, errors) == (0, ""), errors
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == STEPS
    manifest = verify(latest_checkpoint(out / "checkpoints"))
    assert {table.name: table.rows for table in manifest.tables} == {
        name: table["rows"] for name, table in summary["tables"].items()
    }
    evaluated = penstock("evaluate", out)
    assert evaluated[0] == 0
    assert f"{summary['auc']:.6f}" in evaluated[1]
    assert_nothing_left(tmp_path, {})
