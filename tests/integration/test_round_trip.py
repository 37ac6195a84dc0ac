"""Train, resume, evaluate, predict, inspect: each through the command line, on a small job."""

import json
import math
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small import STEPS

from penstock import __version__


@pytest.fixture
def finished(penstock, small_yaml, tmp_path):
    """A finished run and what it printed."""
    out = tmp_path / "run"
    code, shown, errors = penstock("train", small_yaml, "--out", out)
    assert (code, errors) == (0, "")
    return out, shown


def lines(out, kind):
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def test_a_run_leaves_what_it_promises(finished):
    out, shown = finished
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["name"] == "small"
    assert summary["steps"] == STEPS
    assert summary["samples"] == 4500
    assert summary["evaluation_samples"] == 1500
    assert 0.5 < summary["auc"] < summary["teacher_auc"] < 1
    way = (summary["auc"] - 0.5) / (summary["teacher_auc"] - 0.5)
    assert math.isclose(summary["share_of_teacher"], way)
    assert 0 < summary["normalized_entropy"] < 1.1
    assert 0.5 < summary["calibration"] < 1.5
    assert summary["samples_per_s"] > 0
    assert set(summary["seconds"]) == {"data", "embedding", "dense", "evaluation", "checkpoint"}
    assert 0 < sum(summary["seconds"].values()) <= summary["wall_s"]
    assert set(summary["tables"]) == {"c0", "c1", "c2", "c3"}
    for table in summary["tables"].values():
        # Adam keeps two numbers beside each of the value.
        assert 0 < table["rows"] <= 500
        assert table["bytes"] == table["rows"] * 8 * 3 * 4
    assert summary["quarantined_rows"] == 0
    assert summary["versions"]["penstock"] == __version__
    assert {"torch", "python", "numpy", "pyarrow"} <= set(summary["versions"])
    assert summary["hardware"]["cores"] >= 1 and summary["hardware"]["memory_bytes"] > 0
    assert f"{summary['auc']:.4f}" in shown
    assert f"{summary['teacher_auc']:.4f}" in shown
    assert f"run folder: {out}" in shown
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))


def test_metrics_come_at_the_steps_asked_for(finished):
    out, shown = finished
    train = lines(out, "train")
    assert [line["step"] for line in train] == [7, 14, 21, 28, 35, 36]
    assert [line["samples"] for line in train] == [128 * s for s in (7, 14, 21, 28, 35)] + [4500]
    assert [line["step"] for line in lines(out, "evaluation")] == [10, 20, 30, 36]
    for line in train:
        assert {
            "auc",
            "log_loss",
            "normalized_entropy",
            "samples_per_s",
            "seconds",
            "tables",
        } <= set(line)
    assert "evaluation at step 10: loss" in shown
    assert "ETA" in shown


def test_evaluate_agrees_with_the_end_of_training(penstock, finished):
    out, _ = finished
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    before = sorted(path for path in out.rglob("*") if path.is_file())
    code, shown, _ = penstock("evaluate", out)
    assert code == 0
    for name in ("auc", "teacher_auc", "log_loss", "normalized_entropy", "calibration"):
        assert f"{summary[name]:.6f}" in shown, name
    assert sorted(path for path in out.rglob("*") if path.is_file()) == before


def test_predict_and_evaluate_on_files(penstock, finished, tmp_path):
    out, _ = finished
    fresh = tmp_path / "fresh.parquet"
    assert (
        penstock(
            "data",
            "synth",
            "--out",
            fresh,
            "--rows",
            3000,
            "--seed",
            0,
            "--num-categorical",
            4,
            "--keys-per-feature",
            500,
        )[0]
        == 0
    )
    code, shown, errors = penstock("predict", out, "--data", fresh, "--out", tmp_path / "s.parquet")
    assert (code, errors) == (0, "")
    assert f"3,000 rows scored: {tmp_path / 's.parquet'}" in shown
    scores = pq.read_table(tmp_path / "s.parquet")
    assert scores.schema == pa.schema([
        ("row", pa.int64()),
        ("score", pa.float32()),
        ("label", pa.float32()),
    ])
    assert scores["row"].to_pylist() == list(range(3000))
    assert all(0 < score < 1 for score in scores["score"].to_pylist())
    assert (
        scores["label"].to_pylist() == pq.read_table(fresh)["click"].cast(pa.float32()).to_pylist()
    )

    code, shown, _ = penstock("evaluate", out, "--data", fresh)
    assert code == 0 and "3,000" in shown

    # Without the label column, and with the others in another order, the scores are the same.
    table = pq.read_table(fresh)
    shuffled = table.select([name for name in reversed(table.column_names) if name != "click"])
    pq.write_table(shuffled, tmp_path / "unlabelled.parquet")
    assert (
        penstock(
            "predict",
            out,
            "--data",
            tmp_path / "unlabelled.parquet",
            "--out",
            tmp_path / "u.parquet",
        )[0]
        == 0
    )
    unlabelled = pq.read_table(tmp_path / "u.parquet")
    assert unlabelled.column_names == ["row", "score"]
    assert unlabelled["score"].equals(scores["score"])

    code, _, errors = penstock("evaluate", out, "--data", tmp_path / "unlabelled.parquet")
    assert code == 2 and "click" in errors and "Traceback" not in errors


def test_no_command_writes_over_what_it_reads(penstock, finished, tmp_path):
    """Of every command that writes a file; what else a name may be is in test_output.py."""
    out, _ = finished
    log = tmp_path / "log.parquet"
    assert penstock("data", "synth", "--out", log, "--rows", 500, "--num-categorical", 4)[0] == 0
    picture = tmp_path / "label_rate.png"
    picture.write_bytes(log.read_bytes())
    inside = ("metrics.jsonl", "summary.json", "job.yaml", "checkpoints/new.parquet")
    newest = max((out / "checkpoints").iterdir())
    before = {path: path.read_bytes() for path in (*out.rglob("*"), log, picture) if path.is_file()}
    history = ("data", "history", log, "--by", "c0", "--of", "c1", "--order", "event_time")
    look = ("data", "inspect", log)
    calls = [
        ("predict", out, "--data", log, "--out", log),
        *(("predict", out, "--data", log, "--out", out / name) for name in inside),
        ("predict", newest, "--data", log, "--out", newest / "manifest.json"),
        (*history, "--out", log),
        (*look, "--job", log),
        ("data", "inspect", picture, "--format", "parquet", "--out", tmp_path),
        ("compare", out, newest.parent.parent, "--out", out / "metrics.jsonl"),
    ]
    for call in calls:
        code, _, errors = penstock(*call, "--force")
        assert code == 2 and "among the files that are read" in errors, (call, errors)
    taken = tmp_path / "taken"
    taken.write_text("mine", encoding="utf-8")
    os.rename(picture, tmp_path / "other.parquet")
    (tmp_path / "skew.png").write_text("mine", encoding="utf-8")
    calls = [
        ("predict", out, "--data", log, "--out", taken),
        ("data", "synth", "--out", taken, "--format", "csv"),
        (*history, "--out", taken),
        (*look, "--job", taken),
        (*look, "--out", tmp_path),
        ("compare", out, newest.parent.parent, "--out", taken),
    ]
    for call in calls:
        code, shown, errors = penstock(*call)
        assert (code, shown) == (2, "") and "exists already" in errors, (call, errors)
    assert taken.read_text(encoding="utf-8") == "mine"
    os.rename(tmp_path / "other.parquet", picture)
    found = {path: path.read_bytes() for path in (*out.rglob("*"), log, picture) if path.is_file()}
    assert found == before


def test_predict_over_older_scores(penstock, finished, tmp_path):
    out, _ = finished
    log, scores = tmp_path / "log.parquet", tmp_path / "scores.parquet"
    synth = ("data", "synth", "--out", log, "--num-categorical", 4)
    assert penstock(*synth, "--rows", 500)[0] == 0
    assert penstock("predict", out, "--data", log, "--out", scores)[0] == 0
    assert penstock(*synth, "--rows", 200, "--force")[0] == 0
    assert penstock("predict", out, "--data", log, "--out", scores, "--force")[0] == 0
    assert pq.read_metadata(scores).num_rows == 200


def test_predict_names_a_missing_column(penstock, finished, tmp_path):
    out, _ = finished
    pq.write_table(pa.table({"n0": [1.0], "c0": [1]}), tmp_path / "few.parquet")
    code, _, errors = penstock(
        "predict", out, "--data", tmp_path / "few.parquet", "--out", tmp_path / "s.parquet"
    )
    assert code == 2
    assert "n1" in errors and "Traceback" not in errors
    assert not list(tmp_path.glob("*s.parquet*"))


def test_inspect_shows_and_verifies(penstock, finished):
    out, _ = finished
    newest = max((out / "checkpoints").iterdir())
    for path in (out, newest):
        code, shown, errors = penstock("inspect", path)
        assert (code, errors) == (0, "")
        assert str(newest) in shown
        assert f"{STEPS}" in shown and "4,500" in shown
        for table in ("c0", "c1", "c2", "c3"):
            assert table in shown
        assert "verified" in shown


def test_inspect_refuses_a_flipped_byte_by_name(penstock, finished):
    out, _ = finished
    newest = max((out / "checkpoints").iterdir())
    shard = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    for arguments in (("inspect", out), ("evaluate", out)):
        code, _, errors = penstock(*arguments)
        assert code == 2
        assert shard.name in errors and "Traceback" not in errors


def test_a_job_without_held_out_part_is_measured_while_training(penstock, small_yaml, tmp_path):
    code, _, errors = penstock(
        "train",
        small_yaml,
        "--out",
        tmp_path / "run",
        "--set",
        "data.split=null",
        "--set",
        "data.source.rows=1000",
    )
    assert (code, errors) == (0, "")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["measured_on"] == "last training steps, before their update"
    assert summary["auc"] is not None and summary["samples"] == 1000
    code, _, errors = penstock("evaluate", tmp_path / "run")
    assert code == 2
    assert errors.strip() == (
        "error: the job holds nothing out: set data.split or data.evaluation_source, or name files "
        "with --data"
    )


def test_streams_that_grow_hold_nothing_out(penstock, tmp_path):
    rows = tmp_path / "2026-01-01" / "0.csv"
    rows.parent.mkdir()
    rows.write_text("click,id\n" + "0,1\n1,2\n" * 50)
    files = {"format": "csv", "path": f"{tmp_path}/{{YYYY}}-{{MM}}-{{DD}}/*.csv"}
    source = {"name": "a", "files": files | {"types": {"id": "int64"}}, "closes_after": "1h"}
    stream = {"name": "s", "start": "2026-01-01", "end": "now", "sources": [source]}
    fields = {
        "data": {
            "source": {"format": "streams", "streams": [stream]},
            "label": {"column": "click"},
        },
        "features": [{"columns": ["id"]}],
        "training": {"batch_size": 10, "max_steps": 5},
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(fields))
    assert penstock("train", job, "--out", tmp_path / "run")[0] == 0
    code, _, errors = penstock("evaluate", tmp_path / "run")
    assert (code, errors.strip()) == (
        2,
        "error: the job holds nothing out, and of streams that grow no part can be: name files "
        "with --data, or set data.evaluation_source",
    )


def test_text_without_header_or_label(penstock, small_fields, tmp_path):
    rows = tmp_path / "rows.tsv"
    assert penstock("data", "synth", "--out", rows, "--rows", 2000)[0] == 0
    header, *lines = rows.read_text(encoding="utf-8").splitlines()
    rows.write_text("\n".join(lines) + "\n1\t2\n", encoding="utf-8")
    small_fields["data"]["source"] = {
        "format": "tsv",
        "path": str(rows),
        "columns": header.split("\t"),
        "types": {"c*": "int64"},
        "on_malformed_row": "quarantine",
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(small_fields), encoding="utf-8")
    out = tmp_path / "run"
    assert penstock("train", job, "--out", out)[0] == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["quarantined_rows"] == 1
    assert len((out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    code, shown, _ = penstock("evaluate", out, "--data", rows)
    assert code == 0 and "quarantined_rows" in shown

    # Prediction gives every row a score, so a malformed row is an error here.
    code, _, errors = penstock("predict", out, "--data", rows, "--out", tmp_path / "s.parquet")
    assert code == 2 and f"{rows}:2001: 2 fields, expected" in errors
    test = tmp_path / "test.tsv"
    test.write_text("".join(line.partition("\t")[2] + "\n" for line in lines), encoding="utf-8")
    scores = tmp_path / "scores.parquet"
    code, _, errors = penstock("predict", out, "--data", test, "--out", scores)
    assert code == 2 and "fields, expected" in errors and not scores.exists()
    assert penstock("predict", out, "--data", test, "--no-label", "--out", scores)[0] == 0
    assert pq.read_table(scores).column_names == ["row", "score"]
    assert pq.read_table(scores).num_rows == 2000
