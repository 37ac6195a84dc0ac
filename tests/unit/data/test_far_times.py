"""Rows of a log whose event time cannot be are left out of training, counted, and named."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data.columns.far_times import FarTimes
from penstock.data.dataset import Dataset
from penstock.data.quarantine import MalformedRow
from penstock.data.source import Chunk, RowPlace

DAY_MS = 86_400_000
YEAR_MS = 366 * DAY_MS
BEGIN_MS = 1_700_000_000_000


def chunk_of(times, **fields):
    table = pa.table({"time": np.asarray(times, dtype=np.int64)})
    return Chunk(table, RowPlace("f", 100), **fields)


def left_out(times, ahead_s=10 * 366 * 86_400):
    chunk = FarTimes("time", "ms", ahead_s).leave_out(chunk_of(times))
    assert chunk.num_read == len(times)
    assert chunk.table.num_rows + len(chunk.malformed) == len(times)
    rows = [row.line for row in chunk.malformed]
    if rows:
        good = np.delete(np.arange(len(times)), rows)
        assert chunk.kept.tolist() == good.tolist()
        assert chunk.table.column("time").to_pylist() == [int(times[row]) for row in good]
        assert chunk.malformed_lines == [101 + row for row in rows]
        assert chunk.place.locate(0) == f"f row {100 + good[0]}"
    return rows


def test_times_years_ahead_are_left_out():
    times = BEGIN_MS + np.arange(1000) * 1000
    assert left_out(times) == []
    times[[0, 500, 999]] = [BEGIN_MS + 74 * YEAR_MS, 2**62, BEGIN_MS + 11 * YEAR_MS]
    assert left_out(times) == [0, 500, 999]
    assert left_out(times[499:501]) == [1]


@pytest.mark.parametrize(
    "times",
    [
        [],
        [2**63 - 1],
        [2**63 - 1] * 100,
        BEGIN_MS + np.arange(10_000) * YEAR_MS // 500,  # twenty years in one chunk
        np.concatenate([np.full(990, BEGIN_MS), np.full(10, BEGIN_MS + 9 * YEAR_MS)]),  # a gap
        np.concatenate([np.full(50, BEGIN_MS), np.full(50, BEGIN_MS + 50 * YEAR_MS)]),  # too many
        np.concatenate([np.full(990, BEGIN_MS), np.full(10, -(2**63))]),  # late, however much
    ],
    ids=["none", "one", "alike", "years", "gap", "half", "late"],
)
def test_other_times_stay(times):
    assert left_out(times) == []


def test_the_ends_of_the_number_line():
    times = np.full(200, -(2**63))
    times[7] = 2**63 - 1
    assert left_out(times) == [7]
    times[:] = BEGIN_MS
    times[[3, 5]] = BEGIN_MS + 1000, BEGIN_MS + 1001
    assert left_out(times, ahead_s=1) == [5]


def test_rows_left_out_before_keep_their_numbers():
    times = np.full(200, BEGIN_MS)
    times[4] = 2**62
    before = chunk_of(times, stretch=400, kept=np.arange(200) * 2 + 1)
    chunk = FarTimes("time", "ms", 86_400).leave_out(before)
    assert [row.line for row in chunk.malformed] == [9]
    assert chunk.num_read == 400
    assert chunk.kept.tolist() == [n * 2 + 1 for n in range(200) if n != 4]


def test_they_stand_among_the_malformed_rows_in_the_order_of_the_file():
    times = np.full(200, BEGIN_MS)
    times[[4, 150]] = 2**62
    kept = np.delete(np.arange(202), [2, 100])
    malformed = [MalformedRow(2, "no number", "x"), MalformedRow(100, "no number", "y")]
    before = chunk_of(times, stretch=202, kept=kept, malformed=malformed, malformed_lines=[3, 101])
    chunk = FarTimes("time", "ms", 86_400).leave_out(before)
    assert [row.line for row in chunk.malformed] == [2, 5, 100, 152]
    assert chunk.malformed_lines == [3, 105, 101, 251]  # RowPlace counts good rows, from 101
    assert chunk.kept.tolist() == np.delete(np.arange(202), [2, 5, 100, 152]).tolist()


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_job_quarantines_them_in_training_alone(tmp_path, kind):
    rows = 500
    times = BEGIN_MS + np.arange(rows) * 1000
    times[[10, 333]] = BEGIN_MS + 74 * YEAR_MS
    table = pa.table({"click": np.arange(rows) % 2, "time": times, "n": np.arange(rows) * 1.0})
    path = tmp_path / f"rows.{kind}"
    pq.write_table(table, path) if kind == "parquet" else pc.write_csv(table, path)
    job = parse_job({
        "data": {
            "source": {"format": kind, "path": str(path)},
            "label": {"column": "click"},
            "event_time": "time",
            "evaluation_source": None,
            "numeric": [{"columns": ["n"]}],
            "shuffle": {"block_rows": 0},
        },
    })
    quarantine = tmp_path / "quarantine.jsonl"
    dataset = Dataset.open(job, quarantine=quarantine)
    for _ in range(2):
        with dataset.batches("train", batch_size=64) as batches:
            read = np.concatenate([batch.dense[:, 0].numpy() for batch in batches])
        assert read.tolist() == np.delete(np.arange(rows), [10, 333]).tolist()
    assert dataset.quarantined_rows == 2
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    # A row of Parquet by its number, one of text by its line, below the header.
    assert [entry["line"] for entry in entries] == ([11, 334] if kind == "parquet" else [12, 335])
    for entry in entries:
        assert "the event time 2098-01-" in entry["reason"]
        assert "raise data.event_time_ahead_s" in entry["reason"]
    longer = job.data.model_copy(update={"event_time_ahead_s": 100 * 366 * 86_400})
    dataset = Dataset.open(job.model_copy(update={"data": longer}))
    with dataset.batches("train", batch_size=64) as batches:
        assert sum(batch.batch_size for batch in batches) == rows
