"""Columns of vectors as numeric input: of every format with lists, at their widths, or refused."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from penstock import run as story
from penstock.config import parse_job
from penstock.data import Dataset
from penstock.errors import CheckpointError, DataError
from penstock.training.trained import open_trained
from tests.contract.data_cases import assert_resumes_everywhere, read_all

ROWS, WIDTH = 97, 3
QUIET = Console(file=io.StringIO())


def vectors(rows=ROWS, width=WIDTH, seed=0, holes=True):
    rng = np.random.default_rng(seed)
    found = [[round(float(x), 4) for x in row] for row in rng.normal(size=(rows, width))]
    if holes:
        found[4], found[9] = None, []
        found[11][1] = None
    return found


def table(given, kind=pa.float64, fixed=False):
    inner = kind()
    of = pa.list_(inner, WIDTH) if fixed else pa.list_(inner)
    if fixed:
        given = [row or None for row in given]
    return pa.table({
        "label": [n % 2 for n in range(len(given))],
        "a": pa.array(range(len(given)), pa.float32()),
        "v": pa.array(given, of),
        "z": pa.array([-float(n) for n in range(len(given))]),
        "item": [n % 7 for n in range(len(given))],
    })


def write(kind, path, rows):
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows.to_pylist())
        path.write_text(text, encoding="utf-8")
    elif kind == "orc":
        orc.write_table(rows, str(path))
    elif kind == "arrow":
        feather.write_feather(rows, str(path), compression="uncompressed", chunksize=20)
    else:
        pq.write_table(rows, path, row_group_size=20)
    return path


def job_of(path, kind="parquet", numeric=None, **source):
    return parse_job({
        "name": "vectors",
        "data": {
            "source": {"format": kind, "path": str(path), **source},
            "label": {"column": "label"},
            "numeric": numeric or [{"columns": ["a", "z"]}, {"columns": ["v"], "width": WIDTH}],
            "shuffle": {"block_rows": 0},
        },
        "features": [{"columns": ["item"]}],
        "table_defaults": {"dim": 4},
        "model": {"kind": "dlrm", "bottom": [4], "top": [4]},
        "training": {"batch_size": 16},
        "run": {"threads": 1},
    })


def dense_of(dataset, **options):
    return np.concatenate([batch.dense.numpy() for batch in read_all(dataset, **options)])


def expected(given, fill=0.0):
    out = np.empty((len(given), 2 + WIDTH), dtype=np.float32)
    for n, row in enumerate(given):
        inner = [fill if x is None else x for x in (row or [None] * WIDTH)]
        out[n] = [n, *inner, -n]
    return out


@pytest.mark.parametrize("kind", ["parquet", "orc", "arrow", "jsonl"])
def test_every_number_is_an_input(kind, tmp_path):
    given = vectors()
    dataset = Dataset.open(job_of(write(kind, tmp_path / f"x.{kind}", table(given)), kind))
    assert dataset.numeric == ("a", "v", "z")
    assert (dataset.num_numeric, dataset.numeric_widths) == (5, {"v": WIDTH})
    np.testing.assert_array_equal(dense_of(dataset), expected(given))
    assert_resumes_everywhere(dataset, batch_size=16)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("inner", [pa.float32, pa.float64, pa.int32, pa.int64, pa.int8])
def test_lists_of_a_fixed_size_say_their_width(kind, inner, tmp_path):
    given = vectors(holes=False)
    if inner not in {pa.float32, pa.float64}:
        given = [[int(10 * x) for x in row] for row in given]
    given[4] = None
    path = write(kind, tmp_path / f"x.{kind}", table(given, inner, fixed=True))
    dataset = Dataset.open(job_of(path, kind, [{"columns": ["a", "v", "z"]}]))
    assert dataset.numeric_widths == {"v": WIDTH}
    np.testing.assert_array_equal(dense_of(dataset), expected(given))


def test_fill_and_transforms_are_of_each_number(tmp_path):
    given = vectors()
    rule = {"columns": ["v"], "width": WIDTH, "missing": {"policy": "fill", "value": 2}}
    rule["transforms"] = [{"kind": "scale", "offset": 1, "factor": 10}]
    path = write("parquet", tmp_path / "x.parquet", table(given))
    got = dense_of(Dataset.open(job_of(path, numeric=[{"columns": ["a", "z"]}, rule])))
    plain = expected(given, fill=2.0).astype(np.float64)
    plain[:, 1:4] = (plain[:, 1:4] - 1) * 10
    # The given numbers were rounded to float32 first.
    np.testing.assert_allclose(got, plain, rtol=1e-6, atol=1e-5)


def test_a_vector_alone(tmp_path):
    given = vectors()
    path = write("parquet", tmp_path / "x.parquet", table(given))
    dataset = Dataset.open(job_of(path, numeric=[{"columns": ["v"], "width": WIDTH}]))
    np.testing.assert_array_equal(dense_of(dataset), expected(given)[:, 1:4])


def test_vectors_of_the_item_go_with_it(tmp_path):
    given = vectors(holes=False)
    path = write("parquet", tmp_path / "x.parquet", table(given))
    job = job_of(path).model_dump()
    job["data"]["label"] = None
    job["data"]["negatives"] = {"per_positive": 2, "columns": ["item", "v"], "user": False}
    job["features"] = [{"columns": ["item"]}]
    for batch in read_all(Dataset.open(parse_job(job)), batch_size=16):
        for dense, label in zip(batch.dense.numpy(), batch.labels.tolist(), strict=True):
            taken = [n for n, row in enumerate(given) if np.allclose(row, dense[1:4])]
            assert dense[0] == -dense[4]
            assert (int(dense[0]) in taken) == bool(label)


def refusal(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_ragged_row_stops_with_its_place(length, tmp_path):
    given = vectors()
    given[37] = [1.0] * length
    path = write("parquet", tmp_path / "x.parquet", table(given))
    assert refusal(DataError, lambda: dense_of(Dataset.open(job_of(path)))) == (
        f"{path} row 37, column 'v': {length} numbers, but the column's vectors have 3; mend the "
        "file, or set the width of data.numeric"
    )


def test_a_ragged_row_of_json_is_malformed(tmp_path):
    given = vectors()
    given[37], given[60] = [1.0, 2.0], [0.0] * 4
    path = write("jsonl", tmp_path / "x.jsonl", table(given))
    text = refusal(DataError, lambda: dense_of(Dataset.open(job_of(path, "jsonl"))))
    assert text.startswith(f"{path}:38: field 'v' has 2 numbers, expected 3")
    job = job_of(path, "jsonl", on_malformed_row="quarantine")
    dataset = Dataset.open(job, quarantine=tmp_path / "quarantine.jsonl")
    good = [n for n in range(ROWS) if n not in {37, 60}]
    got = dense_of(dataset)
    given[37] = given[60] = None
    np.testing.assert_array_equal(got, expected(given)[good])
    lines = [json.loads(one) for one in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in lines if "line" in one] == [
        (38, "field 'v' has 2 numbers, expected 3"),
        (61, "field 'v' has 4 numbers, expected 3"),
    ]


def test_numbers_that_cannot_be_are_named(tmp_path):
    given = vectors(holes=False)
    given[50][2] = float("inf")
    path = write("parquet", tmp_path / "x.parquet", table(given))
    text = refusal(DataError, lambda: dense_of(Dataset.open(job_of(path))))
    assert text.startswith(f"{path} row 50, column 'v': inf is no finite float32")
    given[50][2] = None
    write("parquet", path, table(given))
    rule = {"columns": ["v"], "width": WIDTH, "missing": {"policy": "fail"}}
    text = refusal(DataError, lambda: dense_of(Dataset.open(job_of(path, numeric=[rule]))))
    assert text.startswith(f"{path} row 50, column 'v': missing number; set `missing`")


@pytest.mark.parametrize(
    ("numeric", "text"),
    [
        (
            [{"columns": ["a"], "width": 3}],
            "column 'a' is float; with width 3 its rows are lists of numbers; remove the width",
        ),
        (
            [{"columns": ["v"], "width": 4}],
            "column 'v' is fixed_size_list<element: double>[3]; but its width is 4; mend the "
            "file, or data.numeric",
        ),
    ],
)
def test_types_that_are_no_vectors(numeric, text, tmp_path):
    given = [row or [0.0] * 3 for row in vectors()]
    path = write("parquet", tmp_path / "x.parquet", table(given, fixed=True))
    assert refusal(DataError, lambda: Dataset.open(job_of(path, numeric=numeric))) == (
        f"{path}: {text}"
    )


def test_text_has_no_vectors(tmp_path):
    (tmp_path / "x.csv").write_text("label,item,v\n1,2,0.5|1|2\n", encoding="utf-8")
    job = job_of(
        tmp_path / "x.csv", "csv", [{"columns": ["v"], "width": 3}], types={"item": "int64"}
    )
    assert refusal(DataError, lambda: Dataset.open(job)) == (
        f"{tmp_path}/x.csv: column 'v' is string; vectors are lists of numbers; write them to "
        "Parquet, Arrow or JSON"
    )


def test_without_a_width_the_error_names_it(tmp_path):
    path = write("parquet", tmp_path / "x.parquet", table(vectors(holes=False)))
    job = job_of(path, numeric=[{"columns": ["v"]}])
    assert refusal(DataError, lambda: dense_of(Dataset.open(job))) == (
        f"{path} row 0, column 'v': 3 values where at most one is expected; mend the file, or "
        "list the column under `features`; where each row is a vector, set its `width` in "
        "data.numeric"
    )


def test_a_trained_run_keeps_its_width(tmp_path):
    given = vectors()
    path = write("parquet", tmp_path / "x.parquet", table(given, fixed=True))
    out = tmp_path / "run"
    story.train(job_of(path, numeric=[{"columns": ["a", "v", "z"]}]), out, console=QUIET)
    # Written elsewhere, lists have no fixed size.
    other = write("jsonl", tmp_path / "x.jsonl", table(given))
    trained = open_trained(out, str(other))
    assert trained.dataset.numeric_widths == {"v": WIDTH}
    wide = write("jsonl", tmp_path / "wide.jsonl", table([[1.0] * 4] * ROWS))
    text = refusal(DataError, lambda: story.evaluate(out, str(wide)))
    assert "field 'v' has 4 numbers, expected 3" in text


def test_another_width_does_not_resume(tmp_path):
    path = write("jsonl", tmp_path / "x.jsonl", table(vectors()))
    story.train(job_of(path, "jsonl"), tmp_path / "run", console=QUIET)
    job = job_of(path, "jsonl", [{"columns": ["a", "z"]}, {"columns": ["v"], "width": 4}])
    text = refusal(
        CheckpointError, lambda: story.train(job, tmp_path / "run", resume=True, console=QUIET)
    )
    assert "data.numeric.1.width: 3 in the checkpoint, 4 in the job" in text
