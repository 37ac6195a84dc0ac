"""`penstock data audit`, by the command line, and streams that grow while a run reads them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from penstock.training.checkpoint.files import read_manifest, read_position


def hour(folder, number, rows=200):
    path = folder / f"2026-03-01/{number:02}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = range(1000 * number, 1000 * number + rows)
    table = pa.table({"label": [one % 2 for one in ids], "id": list(ids)})
    pq.write_table(table, folder / "part")
    (folder / "part").rename(path)


@pytest.fixture
def job(tmp_path):
    path = f"{tmp_path}/logs/{{YYYY}}-{{MM}}-{{DD}}/{{HH}}.parquet"
    source = {"name": "x", "files": {"format": "parquet", "path": path}}
    stream = {"name": "s", "window": "hour", "start": "2026-03-01", "end": "now"}
    (tmp_path / "logs").mkdir()
    fields = {
        "data": {
            "source": {"format": "streams", "poll": "1s",
                       "streams": [stream | {"sources": [source]}]},
            "label": {"column": "label"},
        },
        "features": [{"columns": ["id"]}],
        "model": {"kind": "dlrm", "bottom": [], "top": [4, 1]},
        "table_defaults": {"dim": 4},
        "training": {"batch_size": 64},
        "report": {"every_steps": 1},
    }  # fmt: skip
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def position(run):
    checkpoint = max((run / "checkpoints").iterdir())
    return read_position(checkpoint, read_manifest(checkpoint))


def test_a_run_follows_a_folder_and_every_row_is_accounted_for(job, tmp_path, penstock):
    logs, run = tmp_path / "logs", tmp_path / "run"

    command = [Path(sys.executable).with_name("penstock"), "train", job, "--out", run]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for number in range(4):
        hour(logs, number)
        time.sleep(0.2)
    # Four batches of each of the three hours that are complete.
    metrics = run / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and '"step": 12,' in metrics.read_text():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode in {-signal.SIGINT, 128 + signal.SIGINT}, errors
    assert position(run).counts.applied == 600
    code, shown, errors = penstock("data", "audit", run)
    assert (code, errors) == (0, "")
    assert [line.split()[1:4:2] for line in shown.splitlines() if "│" in line][:4:3] == [
        ["read", "600"], ["applied", "600"],
    ]  # fmt: skip
    hour(logs, 5)
    end = "data.source.streams.0.end=2026-03-01T06"
    code, _, errors = penstock("train", job, "--out", run, "--resume", "--set", end)
    assert code == 0, errors
    assert position(run).counts == (1000, 0, 0, 1000)
    code, shown, errors = penstock("data", "audit", run)
    assert code == 0 and "right" in shown, errors


def test_what_was_changed_or_is_gone_is_named(job, tmp_path, penstock):
    logs, run = tmp_path / "logs", tmp_path / "run"
    for number in range(3):
        hour(logs, number)
    end = "data.source.streams.0.end=2026-03-01T03"
    assert penstock("train", job, "--out", run, "--set", end)[0] == 0
    assert penstock("data", "audit", run)[0] == 0
    moved = tmp_path / "elsewhere"
    logs.rename(moved)
    code, _, errors = penstock("data", "audit", run)
    assert code != 0 and "logs" in errors
    path = f"{moved}/{{YYYY}}-{{MM}}-{{DD}}/{{HH}}.parquet"
    there = f"data.source.streams.0.sources.0.files.path={path}"
    assert penstock("data", "audit", run, "--set", there)[0] == 0
    hour(moved, 1, rows=199)
    code, _, errors = penstock("data", "audit", run, "--set", there)
    assert code != 0 and "01.parquet: changed" in errors


def test_without_a_run_there_is_nothing_to_audit(tmp_path, penstock):
    code, _, errors = penstock("data", "audit", tmp_path)
    assert code != 0 and str(tmp_path) in errors
