"""Columns that folders name, through the command line: train, go on, evaluate, predict, data."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

TYPES = {"region": "string", "day": "date"}
REGIONS = ("01", "1", "2A")


@pytest.fixture
def log(tmp_path):
    """Four days of three regions, of which 01 and 1 differ in their rate of clicks."""
    rng = np.random.default_rng(0)
    for day in range(1, 5):
        for number, region in enumerate(REGIONS):
            folder = tmp_path / f"log/day=2024-01-0{day}/region={region}/shop={10 + number}"
            folder.mkdir(parents=True)
            rows = 200
            pq.write_table(
                pa.table({
                    "click": (rng.random(rows) < (0.9, 0.1, 0.5)[number]).astype(np.int64),
                    "user": rng.integers(0, 20, rows),
                    "item": rng.integers(0, 20, rows),
                    "hour": rng.integers(0, 24, rows),
                }),
                folder / "p.parquet",
            )
    return tmp_path / "log"


@pytest.fixture
def job(log, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        yaml.safe_dump({
            "data": {
                "source": {"format": "parquet", "path": str(log), "partitions": TYPES},
                "label": {"column": "click"},
                "event_time": "day",
                "split": {"by": "time", "at": "2024-01-04"},
            },
            "features": [
                {"columns": ["user", "item"]},
                {"columns": ["region"], "transforms": [{"kind": "hash"}]},
            ],
            "table_defaults": {"dim": 4, "optimizer": {"kind": "adagrad", "learning_rate": 0.5}},
            "model": {"kind": "wide_deep", "deep": [8]},
            "training": {"batch_size": 100, "epochs": 3},
            "run": {"threads": 1},
            "checkpoint": {"every_steps": 10},
        })
    )
    return path


def test_train_evaluate_and_predict(penstock, job, log, tmp_path):
    out = tmp_path / "run"
    code, shown, errors = penstock("train", job, "--out", out)
    assert (code, errors) == (0, ""), shown
    code, shown, errors = penstock("evaluate", out, "--data", log / "day=2024-01-02")
    assert (code, errors) == (0, ""), shown

    scores = {}
    for region in REGIONS:
        path, to = log / f"day=2024-01-04/region={region}", tmp_path / f"{region}.parquet"
        code, shown, errors = penstock("predict", out, "--data", path, "--out", to)
        assert (code, errors) == (0, ""), shown
        scores[region] = pq.read_table(to)["score"].to_numpy().mean()
    # The folder alone tells the three apart.
    assert scores["01"] > 0.7 > scores["2A"] > 0.3 > scores["1"]

    pq.write_table(pq.ParquetFile(path / "shop=12" / "p.parquet").read(), tmp_path / "flat.parquet")
    code, shown, errors = penstock(
        "predict", out, "--data", tmp_path / "flat.parquet", "--out", tmp_path / "s.parquet"
    )
    assert code == 2 and "flat.parquet: no folder of its path says day=..." in errors


def test_other_types_are_another_job(penstock, job, tmp_path):
    out = tmp_path / "run"
    assert penstock("train", job, "--out", out, "--set", "training.epochs=1")[0] == 0
    code, _, errors = penstock(
        "train", job, "--out", out, "--resume", "--set", "data.source.partitions.day=timestamp"
    )
    assert code == 2 and "data.source.partitions" in errors


def test_plan(penstock, job):
    code, shown, errors = penstock("data", "plan", job)
    assert (code, errors) == (0, "") and "2,400" in shown


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_inspect_writes_them_into_the_job(penstock, kind, log, tmp_path):
    path = log
    if kind == "csv":
        path = tmp_path / "texts"
        for file in sorted(log.rglob("*.parquet")):
            to = path / file.relative_to(log).with_suffix(".csv")
            to.parent.mkdir(parents=True)
            rows = pq.ParquetFile(file).read().to_pylist()
            lines = [",".join(map(str, row.values())) for row in rows]
            to.write_text("\n".join([",".join(rows[0]), *lines, ""]))
    given = ["--partition", "region=string", "--partition", "day=date"]
    # Declared as text, its digits are no number.
    given += ["--partition", "shop=string"]
    drafted = tmp_path / "drafted.yaml"
    options = [*given, "--format", kind, "--job", drafted]
    code, shown, errors = penstock("data", "inspect", path, *options)
    assert (code, errors) == (0, ""), shown
    job = yaml.safe_load(drafted.read_text())
    assert job["data"]["source"]["partitions"] == {**TYPES, "shop": "string"}
    assert not set(job["data"]["source"].get("types", {})) & {*TYPES, "shop"}
    assert job["data"]["event_time"] == "day"
    for name in ("region", "shop"):
        (feature,) = [one for one in job["features"] if name in one["columns"]]
        assert feature["transforms"] == [{"kind": "hash"}]
    code, shown, errors = penstock("train", drafted, "--out", tmp_path / "run")
    assert code == 0, errors


@pytest.mark.parametrize("given", ["region", "region=text", "=string", "region="])
def test_what_is_no_name_and_type_is_refused(penstock, given, log, tmp_path):
    history = ["--by", "user", "--of", "item", "--order", "hour", "--out", tmp_path / "x.parquet"]
    for command in (["inspect", log, "--format", "parquet"], ["history", log, *history]):
        code, _, errors = penstock("data", *command, "--partition", given)
        assert code == 2 and f"--partition {given!r}: write NAME=TYPE once" in errors


@pytest.mark.parametrize("order", ["hour", "day"])
def test_history_reads_and_writes_them(penstock, order, log, tmp_path):
    out = tmp_path / "seq.parquet"
    options = ["--by", "user", "--of", "region", "--order", order, "--last", "3", "--out", out]
    given = ["--partition", "region=string", "--partition", "day=date"]
    code, shown, errors = penstock("data", "history", log, *options, *given)
    assert (code, errors) == (0, ""), shown
    rows = pq.read_table(out).to_pylist()
    before = {}
    for row in rows:
        mine = before.setdefault(row["user"], [])
        assert row["region_history"] == mine[-3:]
        mine.append(row["region"])
    assert [row[order] for row in rows] == sorted(row[order] for row in rows)
    assert len(rows) == 2400 and {row["region"] for row in rows} == set(REGIONS)
