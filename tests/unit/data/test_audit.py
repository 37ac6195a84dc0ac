"""Rows counted anew in the files: whatever a job reads, and wherever it stands."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.formats import columnar
from penstock.errors import DataError
from penstock.position import Cursor, LanePosition, Position

SCHEMA = pa.schema([(name, pa.int64()) for name in ("label", "id", "item", "time")])
JOBS = {
    "shuffled": {},
    "in order": {"shuffle": {"block_rows": 0}},
    "by time": {"event_time": "time", "split": {"by": "time", "at": "1970-01-01T00:01:00Z"}},
    "by fraction": {"split": {"by": "fraction", "evaluation": 0.2}},
    "negatives": {"negatives": {"per_positive": 2, "columns": ["item"]}, "label": None},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 10)


def write(folder, kind):
    for number, rows in enumerate((37, 0, 80, 23)):
        columns = {
            "label": [one % 2 for one in range(rows)],
            "id": [100 * number + one for one in range(rows)],
            "item": [one % 9 for one in range(rows)],
            "time": [1000 * one for one in range(rows)],
        }
        if kind == "parquet":
            table = pa.table(columns, schema=SCHEMA)
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=10)
            continue
        lines = [",".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
        if lines:
            lines[::7] = ["not,a"] * len(lines[::7])
        (folder / f"{number}.csv").write_text("\n".join([",".join(columns), *lines, ""]))


def job(folder, kind, changes):
    source = {"format": kind, "path": f"{folder}/*.{kind}"}
    if kind == "csv":
        source |= {
            "types": dict.fromkeys(SCHEMA.names, "int64"),
            "on_malformed_row": "quarantine",
        }
    data = {
        "source": source,
        "label": {"column": "label"},
        "shuffle": {"block_rows": 30},
        **changes,
    }
    data = {name: value for name, value in data.items() if value is not None}
    return parse_job({"data": data, "features": [{"columns": ["id"]}, {"columns": ["item"]}]})


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("changes", JOBS.values(), ids=JOBS)
def test_every_position_is_right(tmp_path, kind, changes, lanes):
    write(tmp_path, kind)
    read = job(tmp_path, kind, changes)
    start = Position(lanes=(LanePosition(),) * lanes)
    dataset = Dataset.open(read)
    with dataset.batches("train", batch_size=7, seed=1, epochs=2, start=start) as loader:
        ends = [batch.end for batch in loader]
    assert {end.epoch for end in ends} == {0, 1}
    for end in [*ends[::5], ends[-1]]:
        again = Dataset.open(read, after=end)
        audit = again.audit(end)
        assert audit.is_right, (end, audit)
        one_less = replace(end, counts=end.counts._replace(applied=end.counts.applied - 1))
        assert not again.audit(one_less).is_right
        one_read_less = end.counts._replace(
            applied=end.counts.applied - 1, read=end.counts.read - 1
        )
        assert not again.audit(replace(end, counts=one_read_less)).is_right
        lost = (*end.lanes[:-1], end.lanes[-1]._replace(cursor=Cursor()))
        if end.lanes[-1].cursor != Cursor():
            assert again.audit(replace(end, lanes=lost)).in_files <= audit.in_files


def test_a_file_that_changed_is_named(tmp_path):
    write(tmp_path, "csv")
    read = job(tmp_path, "csv", {})
    dataset = Dataset.open(read)
    with dataset.batches("train", batch_size=7, start=Position(lanes=(LanePosition(),))) as loader:
        end = [batch.end for batch in loader][-1]
    path = tmp_path / "0.csv"
    path.write_text(path.read_text().replace("1,", "0,", 1))
    with pytest.raises(DataError, match="0.csv: changed"):
        Dataset.open(read, after=end).audit(end)


def test_version_1_says_nothing_of_what_was_read(tmp_path):
    write(tmp_path, "parquet")
    with pytest.raises(DataError, match="version 1"):
        Dataset.open(job(tmp_path, "parquet", {})).audit(Position(version_1=(0, 0, 10)))
