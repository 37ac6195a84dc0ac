"""Integer event times in any unit mean the same instant; the split by time agrees."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data.columns.decode import TICKS_PER_S
from penstock.data.dataset import Dataset
from penstock.errors import DataError

FIRST_S = 1_700_000_000
AT_ROW = 70


def job_of(path, unit, at):
    return parse_job({
        "data": {
            "source": {"format": "parquet", "path": str(path)},
            "label": {"column": "click"},
            "event_time": "time",
            "event_time_unit": unit,
            "split": {"by": "time", "at": at},
            "numeric": [{"columns": ["n"]}],
            "shuffle": {"block_rows": 0},
        },
    })


@pytest.mark.parametrize("unit", TICKS_PER_S)
@pytest.mark.parametrize("descending", [False, True])
def test_units_mean_the_same_instant(tmp_path, unit, descending):
    seconds = FIRST_S + np.arange(100)[:: -1 if descending else 1]
    columns = {
        "click": np.arange(100) % 2,
        "time": seconds * TICKS_PER_S[unit],
        "n": np.arange(100.0),
    }
    path = tmp_path / "rows.parquet"
    # Row groups of which the statistics rule most out.
    pq.write_table(pa.table(columns), path, row_group_size=10)
    at = np.datetime64(FIRST_S + AT_ROW, "s").item().isoformat() + "Z"
    for moment in (at, (FIRST_S + AT_ROW) * 1000):
        data = Dataset.open(job_of(path, unit, moment))
        assert (data.num_rows("train"), data.num_rows("evaluation")) == (AT_ROW, 100 - AT_ROW)
        with data.batches("evaluation", batch_size=100) as batches:
            (batch,) = list(batches)
        expected = np.sort(seconds)[AT_ROW:] * 1000
        assert np.array_equal(np.sort(batch.event_time.numpy()), expected)


def test_order_puts_the_columns_as_those_of_another_data_set(tmp_path):
    columns = {"click": [0, 1], "c": [7, 8], "b": [5, 6], "n": [1.0, 2.0], "m": [3.0, 4.0]}
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    job = parse_job({
        "data": {
            "source": {"format": "parquet", "path": str(path)},
            "label": {"column": "click"},
            "numeric": [{"columns": ["n", "m"]}],
            "shuffle": {"block_rows": 0},
        },
        "features": [{"columns": ["b", "c"]}],
    })
    plain = Dataset.open(job)
    assert plain.numeric == ("n", "m") and [f.name for f in plain.features] == ["c", "b"]
    ordered = Dataset.open(job, order=("m", "n", "b", "c"))
    assert ordered.numeric == ("m", "n") and [f.name for f in ordered.features] == ["b", "c"]
    with ordered.batches("train", batch_size=2) as batches:
        (batch,) = list(batches)
    assert batch.dense.tolist() == [[3.0, 1.0], [4.0, 2.0]]
    assert batch.sparse["b"].values.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        (pa.array([0, 2**60]), "s"),
        (pa.array([0, -(2**63)]), "s"),
        (pa.array([0, 2**63], pa.uint64()), "ms"),
        (pa.array([0, 2**60], pa.timestamp("s")), "ms"),
    ],
)
def test_times_that_ms_cannot_hold(tmp_path, column, unit):
    path = tmp_path / "x.arrow"  # Parquet has no seconds
    table = pa.table({"label": [0, 1], "t": column})
    with pa.ipc.new_file(path, table.schema) as out:
        out.write_table(table)
    job = parse_job({
        "data": {
            "source": {"format": "arrow", "path": str(path)},
            "label": {"column": "label"},
            "event_time": "t",
            "event_time_unit": unit,
        },
    })
    with (
        Dataset.open(job).batches("train", batch_size=2) as batches,
        pytest.raises(DataError) as caught,
    ):
        next(batches)
    assert str(caught.value) == (
        f"{path}, column 't': a time is more than 64 bits of ms from 1970; set "
        "data.event_time_unit or mend the file"
    )
