"""A deterministic run has the same bits on any number of ranks, also if that changes on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from run_contents import contents, differences

from penstock.cli import main
from penstock.ranks import launch

BINARY = str(Path(sys.executable).with_name("penstock"))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Files of unlike sizes; frequent keys, rare ones, and keys at both ends of int64.

    Keys are admitted by counts, leave again, and are clipped together with a dense model that
    drops out, so that every part of a step takes part.
    """
    folder = tmp_path_factory.mktemp("job")
    rng = np.random.default_rng(3)
    (folder / "data").mkdir()
    taste = rng.normal(size=300)
    for number in range(9):
        n = 240 - 20 * number
        keys = rng.zipf(1.3, (n, 3)) % 300
        logits = taste[keys].sum(1)
        columns = {
            "label": (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(np.int64),
            "weight": rng.random(n).astype(np.float32) + 0.5,
            "n0": rng.random(n, dtype=np.float32),
            "time": (np.arange(n) + 1000 * number) * 1000 + 1_700_000_000_000,
            "k0": np.iinfo(np.int64).min + keys[:, 0],
            "k1": np.iinfo(np.int64).max - keys[:, 1],
            "k2": keys[:, 2],
            "group": keys[:, 0] % 7,
        }
        if number in (2, 4):
            columns["time"][n // 2] += 20 * 366 * 86_400_000  # of a broken clock: malformed
        pq.write_table(pa.table(columns), folder / "data" / f"{number}.parquet")
    table = {"dim": 6, "optimizer": {"kind": "adam", "learning_rate": 0.01}}
    fields = {
        "data": {
            "source": {"format": "parquet", "path": str(folder / "data" / "*.parquet")},
            "split": {"by": "fraction", "evaluation": 0.15},
            "label": {"column": "label"},
            "weight": "weight",
            "event_time": "time",
            "numeric": [{"columns": ["n0"]}],
            "shuffle": {"block_rows": 256},
        },
        "features": [
            {"columns": ["k0"], "table": "rare"},
            {"columns": ["k1"], "table": "rare"},
            {"columns": ["k2"]},
        ],
        "tables": [
            {
                "name": "rare",
                **table,
                "admission": {"kind": "min_count", "min_count": 2},
                "eviction": {"ttl": 600, "unit": "seconds"},
            },
            {"name": "k2", **table, "placement": "whole"},
        ],
        "table_defaults": table,
        "model": {"kind": "dlrm", "bottom": [8], "top": [16], "dropout": 0.2, "batch_norm": True},
        "training": {
            "batch_size": 48,
            "epochs": 2,
            "deterministic": True,
            "clip_gradient_norm": 0.5,
            "clip_with_tables": True,
            "accumulate_batches": 2,
        },
        "evaluation": {"every_steps": 12, "metrics": {"grouped_auc": ["group"]}},
        "report": {"every_steps": 5},
        "checkpoint": {"keep_best": "auc"},
    }
    fields["data"]["lanes"] = 5  # of batch norm
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def train(job, out, ranks, *more):
    command = [BINARY, "train", str(job), "--out", str(out), "--nproc", str(ranks), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def alone(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    ended = train(job, out, 1)
    assert ended.returncode == 0, ended.stderr
    assert len((out / "quarantine.jsonl").read_text("utf-8").splitlines()) == 2
    return out


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_the_bits_of_one_process(job, alone, tmp_path, ranks):
    ended = train(job, tmp_path / "run", ranks)
    assert ended.returncode == 0, ended.stderr
    assert differences(contents(alone), contents(tmp_path / "run")) == []
    one, other = (
        json.loads((out / "summary.json").read_text()) for out in (alone, tmp_path / "run")
    )
    for name in ("auc", "log_loss", "grouped_auc", "tables", "best", "counts", "samples"):
        assert one[name] == other[name], name


def test_the_number_of_ranks_may_change_on_the_way(job, alone, tmp_path):
    out = tmp_path / "run"
    for ranks, steps in ((3, 4), (1, 9), (2, 14), (3, 1000)):
        more = ["--set", f"training.max_steps={steps}", *(["--resume"] if steps > 4 else [])]
        ended = train(job, out, ranks, *more)
        assert ended.returncode == 0, ended.stderr
    found, expected = contents(out), contents(alone)
    # What was logged or measured where it stopped is not of the run that did not stop.
    for one in (found, expected):
        del one["lines"], one["best"]
    assert differences(expected, found) == []


def test_more_ranks_than_lanes_are_refused(job, tmp_path):
    ended = train(job, tmp_path / "run", 3, "--set", "data.lanes=2")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: 3 ranks, but the data is divided into 2 lanes")
    assert "data.lanes" in ended.stderr


def test_far_too_many_ranks_are_refused_before_any_is_started(job, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["penstock", "train", str(job), "--nproc", "900"])
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("900 processes"))
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2


def test_a_run_keeps_its_lanes(job, alone):
    ended = train(job, alone, 1, "--resume", "--set", "data.lanes=4")
    assert ended.returncode == 2
    assert "data.lanes: 5 in the checkpoint, 4 in the job" in ended.stderr
