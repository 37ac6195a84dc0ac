"""`training.pretrained`: vectors by key from files, what is refused by name, and the resume."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from penstock import run as story
from penstock.config import parse_job
from penstock.errors import CapacityError, ConfigError, DataError
from penstock.report.json_lines import read_events
from penstock.training import pretrained

DIM = 4


def table_of(keys, vectors=None, **columns):
    if vectors is None:
        vectors = [[float(n + i) for i in range(DIM)] for n in range(len(keys))]
    return pa.table({"key": keys, "vector": vectors, **columns})


def job_with(tmp_path, table, *, name="item", rules=None, transforms=(), **more):
    """A job of one text or integer feature, whose table begins with the vectors of a file."""
    texts = bool(transforms)
    ids = [f"i{n % 30}" if texts else n % 30 for n in range(200)]
    data = {"item": ids, "label": [n % 2 for n in range(200)]}
    pq.write_table(pa.table(data), tmp_path / "log.parquet")
    if table is not None:
        pq.write_table(table, tmp_path / "vectors.parquet", row_group_size=7)
    given = {"table": name, "path": str(tmp_path / "vectors.parquet"), **more}
    return parse_job({
        "name": "small",
        "data": {
            "source": {"format": "parquet", "path": str(tmp_path / "log.parquet")},
            "label": {"column": "label"},
        },
        "features": [{"columns": ["item"], "transforms": list(transforms)}],
        "tables": [{"name": "item", "dim": DIM, **(rules or {})}],
        "model": {"kind": "dlrm", "bottom": [], "top": [4]},
        "training": {"batch_size": 50, "pretrained": [given]},
        "run": {"threads": 1},
    })


def begun(job, out, quiet):
    with story.open_run(job, out, console=quiet) as run:
        run.begin(resume=False)
        return run.state.collection


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float16(), DIM)])
def test_keys_begin_with_their_vectors(tmp_path, quiet, kind):
    keys = pa.array([3, -5, 2**62, *range(100, 130)], pa.int64())
    table = table_of(keys, other=["x"] * 33)
    table = table.set_column(
        1,
        "vector",
        table["vector"].cast(pa.list_(pa.float32())).cast(kind)
        if kind != pa.list_(pa.float16(), DIM)
        else pa.array([np.float16([n] * DIM) for n in range(33)], kind),
    )
    tables = begun(job_with(tmp_path, table), tmp_path / "run", quiet)
    found = tables.find("item", torch.tensor(keys.to_pylist()))
    assert found.found.all()
    wanted = torch.tensor(table["vector"].to_pylist(), dtype=torch.float32)
    assert torch.equal(found.values, wanted)
    assert not found.state.any()
    assert tables.table_stats()[0].rows == 33


def test_texts_are_hashed_as_the_features_of_the_table_are(tmp_path, quiet):
    table = table_of([f"i{n}" for n in range(30)])
    job = job_with(tmp_path, table, transforms=[{"kind": "hash"}])
    tables = begun(job, tmp_path / "run", quiet)
    before = tables.table_stats()[0].rows
    story.train(job, tmp_path / "trained", console=quiet)
    events = list(read_events(tmp_path / "trained" / "metrics.jsonl"))
    told = [one.values for one in events if one.kind == "pretrained"]
    assert told == [{"table": "item", "rows": 30, "kept": 30}]
    last = [one.values for one in events if one.kind == "summary"][0]
    assert before == last["tables"]["item"]["rows"] == 30


def test_a_resumed_run_reads_no_file_again(tmp_path, quiet):
    job = job_with(tmp_path, table_of([1, 2]))
    story.train(job, tmp_path / "run", console=quiet)
    (tmp_path / "vectors.parquet").unlink()
    story.train(job, tmp_path / "run", resume=True, console=quiet)


def test_what_a_budget_left_is_counted(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(pretrained, "_ROWS_AT_ONCE", 20)
    keys = list(range(1000, 1200))
    evicting = {"max_bytes": 4800, "eviction": {"order": "lru"}}
    job = job_with(tmp_path, table_of(keys), rules=evicting)
    story.train(job, tmp_path / "run", console=quiet)
    (told,) = [
        one.values
        for one in read_events(tmp_path / "run" / "metrics.jsonl")
        if one.kind == "pretrained"
    ]
    assert told["rows"] == 200
    assert 0 < told["kept"] < 200
    full = job_with(tmp_path, table_of(keys), rules={"max_bytes": 4800})
    with pytest.raises(CapacityError, match="table 'item' holds"):
        begun(full, tmp_path / "full", quiet)


VECTOR = [1.0] * DIM
WRONG = {
    "dim": (table_of([1, 2], [VECTOR, [1.0]]), "row 1 after it has 1 numbers, and the table a dim"),
    "null vector": (table_of([1, 2], [VECTOR, None]), "row 1 after it has 0 numbers"),
    "null number": (table_of([1], [[1.0, None, 1.0, 1.0]]), "is null, NaN or infinite"),
    "nan": (
        table_of([1, 2], [VECTOR, [1.0, float("nan"), 1.0, 1.0]]),
        "row 1 after it is null, NaN",
    ),
    "twice": (table_of([5, *range(20), 5]), r"key 5 has two vectors .* \(2 such rows"),
    "null key": (table_of([1, None]), "the key of row 1 after it is null"),
    "float key": (table_of([1.0]), "'key' is double; keys are integers, or texts with"),
    "text key": (
        table_of(["a"]),
        "column 'key' is string; keys are integers, or texts with the transforms",
    ),
    "integers": (table_of([1], [[1] * DIM]), "expected lists of 4 floats"),
    "no lists": (table_of([1], [1.0]), "expected lists of 4 floats"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path, quiet, name):
    table, message = WRONG[name]
    with pytest.raises(DataError, match=message):
        begun(job_with(tmp_path, table), tmp_path / "run", quiet)


def test_what_is_not_there_is_named(tmp_path, quiet):
    with pytest.raises(ConfigError, match=r"training.pretrained: no table 'user'; there are item"):
        begun(job_with(tmp_path, table_of([1]), name="user"), tmp_path / "a", quiet)
    with pytest.raises(DataError, match="has no column 'id'; it has key, vector"):
        begun(job_with(tmp_path, table_of([1]), key="id"), tmp_path / "b", quiet)
    with pytest.raises(DataError, match="no such file or directory"):
        job = job_with(tmp_path, None)
        (tmp_path / "vectors.parquet").unlink()
        begun(job, tmp_path / "c", quiet)
    (tmp_path / "vectors.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        begun(job_with(tmp_path, None), tmp_path / "d", quiet)
