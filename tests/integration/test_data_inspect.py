"""`data inspect` says what is in files, and writes a job that trains as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv, ipc, orc

from penstock.job_file import load_job

ROWS = 4000


def log(rows=ROWS):
    rng = np.random.default_rng(0)
    item = rng.zipf(1.3, rows) % 100
    return pa.table({
        "click": (rng.random(rows) < np.where(item % 2, 0.7, 0.1)).astype(np.int64),
        "event_time": 1_700_000_000_000 + np.arange(rows) * 50_000,
        "user_id": rng.integers(0, 60, rows),
        "item_id": item,
        "city": pa.array(rng.choice(["Bonn", "Kiel", "Ulm"], rows), mask=rng.random(rows) < 0.1),
        "price": pa.array(rng.lognormal(3, 2, rows), mask=rng.random(rows) < 0.1),
    })


def write(kind, folder):
    path = folder / f"log.{kind}"
    table = log()
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "orc":
        orc.write_table(table, path)
    elif kind == "arrow":
        with ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        options = csv.WriteOptions(
            delimiter="\t" if kind == "tsv" else ",",
            include_header=kind == "csv",
            quoting_style="none",
        )
        csv.write_csv(table, path, options)
    return path


@pytest.mark.parametrize("kind", ["parquet", "orc", "arrow", "csv", "tsv", "jsonl"])
def test_the_job_that_is_written_trains(penstock, tmp_path, kind):
    path, job = write(kind, tmp_path), tmp_path / "first.yaml"
    columns = ["--columns", ",".join(log(1).column_names)] if kind == "tsv" else []
    code, shown, errors = penstock("data", "inspect", path, *columns, "--job", job)
    assert (code, errors) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    roles = {row[0]: row[1] for row in rows if len(row) == 3}
    assert roles == {
        "click": "label",
        "event_time": "event time",
        "user_id": "categorical",
        "item_id": "categorical",
        "city": "categorical",
        "price": "numeric",
    }
    assert f"job {job}; next: penstock train {job}" in shown
    loaded = load_job(job)
    assert (loaded.name, loaded.data.split.by, loaded.data.source.format) == ("first", "time", kind)
    code, shown, errors = penstock("train", job, "--out", tmp_path / "run")
    assert (code, errors) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The items tell: a model that learns nothing stays at 0.5.
    assert summary["auc"] > 0.7 and summary["measured_on"] == "held-out part"
    assert summary["evaluation_samples"] == pytest.approx(0.2 * ROWS, rel=0.15)


def test_what_is_shown(penstock, tmp_path):
    path = write("parquet", tmp_path)
    code, shown, errors = penstock("data", "inspect", path)
    assert (code, errors) == (0, "")
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    by_first = {}
    for line in lines:
        by_first.setdefault(line[0] if line else None, []).append(line[1:])
    assert by_first["rows looked at"] == [["4,000"]]
    assert by_first["row groups"] == [["1"]]
    city = by_first["city"][0]
    table = log()
    counts = sorted(table["city"].to_pylist().count(c) for c in ("Bonn", "Kiel", "Ulm"))
    present = sum(counts)
    assert city[:3] == ["string", f"{(ROWS - present) / ROWS:.1%}", "3"]
    assert city[6:] == [f"{counts[-1] / present:.2%}", "0.0%", "categorical"]
    assert len(by_first["price"]) == 3  # columns, numbers, roles
    assert "label rate of click:" in shown and "over event_time, in parts of equal width" in shown
    code, shown, _ = penstock("data", "inspect", path, "--rows", 1000)
    assert code == 0
    assert "1,000: a sample; all figures below are of it alone" in shown


def test_pictures(penstock, tmp_path, monkeypatch):
    path = write("parquet", tmp_path)
    code, shown, _ = penstock("data", "inspect", path, "--out", tmp_path / "pictures")
    assert code == 0
    for name in ("label_rate.png", "skew.png"):
        file = tmp_path / "pictures" / name
        assert f"picture {file}" in shown
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, shown, _ = penstock("data", "inspect", path, "--out", tmp_path / "none")
    assert code == 0 and "pip install 'penstock[plots]'" in shown
    assert not (tmp_path / "none").exists()


def test_a_job_is_not_overwritten_unless_told(penstock, tmp_path):
    path, job = write("parquet", tmp_path), tmp_path / "job.yaml"
    job.write_text("name: mine\n")
    code, shown, errors = penstock("data", "inspect", path, "--job", job)
    assert (code, shown) == (2, "")
    assert errors == (
        f"error: {job}: exists already; name another file, or overwrite it with --force\n"
    )
    assert job.read_text() == "name: mine\n"
    code, _, errors = penstock("data", "inspect", path, "--job", job, "--force")
    assert (code, errors) == (0, "")
    assert load_job(job).data.label.column == "click"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["rows.txt"],
            "rows.txt: no format is known by this name; give --format parquet, orc, arrow, csv, "
            "tsv, jsonl, tfrecord",
        ),
        (
            ["a.csv", "b.parquet"],
            "files of several formats (csv, parquet): inspect those of one format at a time",
        ),
        (
            ["a.parquet", "--columns", "a,b"],
            "--columns: parquet files name their columns themselves; leave it out",
        ),
        (
            ["none.parquet"],
            "none.parquet: no such file or directory; a relative path begins in the working "
            f"directory, {Path.cwd()}",
        ),
    ],
)
def test_what_cannot_be_inspected_is_said(penstock, arguments, message):
    code, _, errors = penstock("data", "inspect", *arguments)
    assert (code, errors) == (2, f"error: {message}\n")


def test_a_pipe_gets_whole_lines(tmp_path):
    path = write("parquet", tmp_path)
    code = "import sys; from penstock.cli import main; sys.argv[1:1] = ['data', 'inspect']; main()"
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    shown = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout
    assert 80 < max(map(len, shown.splitlines())) <= 160
    assert "…" not in shown
