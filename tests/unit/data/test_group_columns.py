"""Columns that metrics are grouped by: read in evaluation alone, in any type and format."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.errors import DataError

ROWS = 60
NAMES = ["ann", "bob", None, "cleo", "d\u00e9d\u00e9"]


def table():
    names = [NAMES[row % 5] for row in range(ROWS)]
    numbers = [None if row % 7 == 0 else row - 30 for row in range(ROWS)]
    return pa.table({
        "label": [row % 2 for row in range(ROWS)],
        "item": pa.array(range(ROWS)),
        "name": pa.array(names),
        "view": pa.array(names).cast(pa.string_view()),
        "coded": pa.array(names).dictionary_encode(),
        "raw": pa.array([None if name is None else name.encode() for name in names]),
        "number": pa.array(numbers, pa.int16()),
        "large": pa.array([2**64 - 1 - row for row in range(ROWS)], pa.uint64()),
        "flag": pa.array([row % 3 == 0 for row in range(ROWS)]),
        "real": pa.array([row / 2 for row in range(ROWS)]),
    })


EXPECTED = {
    "item": list(range(ROWS)),
    "name": table()["name"].to_pylist(),
    "view": table()["name"].to_pylist(),
    "coded": table()["name"].to_pylist(),
    "raw": table()["raw"].to_pylist(),
    "number": table()["number"].to_pylist(),
    "large": [-1 - row for row in range(ROWS)],
    "flag": [int(row % 3 == 0) for row in range(ROWS)],
}


def open_data(path, columns, data_path=None, **options):
    pq.write_table(table(), path / "rows.parquet", row_group_size=17)
    job = {
        "data": {
            "source": {"format": "parquet", "path": str(data_path or path / "rows.parquet")},
            "label": {"column": "label"},
            "split": {"by": "fraction", "evaluation": 0.5},
        },
        "features": [{"columns": ["item"]}],
        "evaluation": {"metrics": {"grouped_auc": columns}},
    }
    return Dataset.open(parse_job(job), **options)


def test_evaluation_reads_them_beside_the_features(tmp_path):
    dataset = open_data(tmp_path, list(EXPECTED))
    with dataset.batches("evaluation", batch_size=11, groups=True) as batches:
        read = list(batches)
    for column, expected in EXPECTED.items():
        got = [value for batch in read for value in batch.groups[column].to_pylist()]
        assert got == expected[ROWS // 2 :], column
    assert {str(read[0].groups[column].type) for column in EXPECTED} == {
        "int64",
        "large_string",
        "large_binary",
    }
    assert read[0].sparse["item"].values.tolist() == list(range(30, 41))


@pytest.mark.parametrize("part", ["train", "evaluation"])
def test_nothing_else_reads_them(tmp_path, part):
    with open_data(tmp_path, ["name"]).batches(part, batch_size=16) as batches:
        assert all(batch.groups == {} for batch in batches)


def test_prediction_does_not_need_them(tmp_path):
    dataset = open_data(tmp_path, ["nowhere"], labels="optional")
    with dataset.batches("evaluation", batch_size=16, groups=True) as batches:
        assert next(batches).groups == {}


def test_text_files_hold_them_too(tmp_path):
    (tmp_path / "rows.csv").write_text("label,item,user\n1,3,ann\n0,4,\n1,5,bob\n0,6,ann\n")
    job = {
        "data": {
            "source": {"format": "csv", "path": str(tmp_path), "types": {"item": "int64"}},
            "label": {"column": "label"},
        },
        "features": [{"columns": ["item"]}],
        "evaluation": {"metrics": {"slices": [{"by": "user", "top": 1}]}},
    }
    dataset = Dataset.open(parse_job(job))
    with dataset.batches("train", batch_size=9, shuffle=False, groups=True) as batches:
        assert next(batches).groups["user"].to_pylist() == ["ann", None, "bob", "ann"]


def test_a_missing_column_and_one_of_reals_are_refused(tmp_path):
    with pytest.raises(DataError) as caught:
        open_data(tmp_path, ["nam"])
    file = tmp_path / "rows.parquet"
    assert str(caught.value) == (
        f"{file}: no column 'nam' (evaluation.metrics); did you mean 'name'?"
    )
    with pytest.raises(DataError) as caught:
        open_data(tmp_path, ["real"])
    assert str(caught.value) == (
        f"{file}: column 'real' is double; evaluation.metrics groups rows by integers or strings; "
        "name another column"
    )
