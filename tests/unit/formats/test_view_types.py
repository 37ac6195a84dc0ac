"""Columns of Arrow's view types are read as what they are views of, or refused by name."""

from dataclasses import replace

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.errors import ConfigError, DataError
from penstock.survey.survey import survey_data
from tests.contract.data_cases import read_all

TEXTS = [None if n % 11 == 0 else f"key {n % 7}" + "x" * (n % 17) for n in range(90)]
LISTS = [[text for text in TEXTS[n : n + n % 4] if text] for n in range(90)]


def dictionary(values):
    indices = pa.array([None if n % 9 == 0 else n % 7 for n in range(90)], pa.uint32())
    return pa.DictionaryArray.from_arrays(indices, pa.array(TEXTS[1:8], values))


COLUMNS = {
    "text": (pa.array(TEXTS, pa.string()), pa.array(TEXTS, pa.string_view())),
    "bytes": (pa.array(TEXTS, pa.binary()), pa.array(TEXTS, pa.binary_view())),
    "lists": (
        pa.array(LISTS, pa.list_(pa.string())),
        pa.array(LISTS, pa.list_(pa.string_view())),
    ),
    "large lists": (
        pa.array(LISTS, pa.large_list(pa.string())),
        pa.array(LISTS, pa.large_list(pa.string_view())),
    ),
    "fixed lists": (
        pa.array([["a", "b"]] * 90, pa.list_(pa.string(), 2)),
        pa.array([["a", "b"]] * 90, pa.list_(pa.string_view(), 2)),
    ),
    "dictionary": (dictionary(pa.string()), dictionary(pa.string_view())),
}


def write(path, column):
    label = pa.array([n % 2 for n in range(90)])
    # Slices: their offsets must not be lost.
    table = pa.table({"label": label, "x": column})
    tables = [table.slice(0, 40), table.slice(40)]
    if path.suffix == ".parquet":
        with parquet.ParquetWriter(path, table.schema) as writer:
            for part in tables:
                writer.write_table(part)
        return
    new = ipc.new_stream if path.stem == "stream" else ipc.new_file
    with new(path, table.schema) as writer:
        for part in tables:
            writer.write_table(part)


def job(path):
    kind = path.suffix.removeprefix(".")
    return parse_job({
        "data": {
            "source": {"format": kind, "path": str(path)},
            "label": {"column": "label"},
            "shuffle": {"block_rows": 0},
        },
        "features": [
            {"columns": ["x"], "transforms": [{"kind": "hash"}], "pooling": "mean", "missing": -1}
        ],
    })


def keys(path):
    bags = [batch.sparse["x"] for batch in read_all(Dataset.open(job(path)))]
    return [(bag.values.tolist(), bag.offsets.tolist()) for bag in bags]


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "file.parquet"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_views_are_read_as_what_they_are_views_of(tmp_path, name, kind):
    if (kind, name) == ("dictionary", "file.parquet"):
        pytest.skip("pyarrow does not write these")
    plain, views = COLUMNS[kind]
    found = []
    for folder, column in (("plain", plain), ("views", views)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / name
        write(path, column)
        seen = survey_data(job(path).data.source).profile["x"]
        found.append((keys(path), str(replace(seen, type=""))))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [pa.list_view(pa.int64()), pa.large_list_view(pa.int64())])
def test_views_of_lists_are_refused(tmp_path, kind):
    path = tmp_path / "file.arrow"
    write(path, pa.array([[1, 2]] * 90, kind))
    with pytest.raises((ConfigError, DataError), match=r"column 'x' is (large_)?list_view<"):
        Dataset.open(job(path))
