"""How the accesses of a job's tables are spread over keys."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.errors import DataError
from penstock.report.terminal_curves import skew_table
from penstock.survey.key_skew import key_skew
from tests.unit.tables import cells


def job_over(path, features=None):
    return parse_job({
        "data": {"source": {"format": "parquet", "path": str(path)}, "label": {"column": "label"}},
        "features": features
        or [
            {"columns": ["a", "b"], "table": "shared"},
            {"columns": ["s"], "transforms": [{"kind": "hash"}]},
        ],
        "tables": [{"name": "shared"}] if features is None else [],
    })


@pytest.fixture
def path(tmp_path):
    rows = 1000
    table = pa.table({
        "label": ["no number"] * rows,  # labels are not read
        "a": np.arange(rows) % 10,
        "b": pa.array([[7] * (n % 3) for n in range(rows)], pa.list_(pa.int64())),
        "s": ["x" if n % 4 else "y" for n in range(rows)],
    })
    table = table.set_column(0, "label", pa.array(np.full(rows, 5)))
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    return tmp_path / "rows.parquet"


def test_keys_are_counted_by_table(path):
    skew = key_skew(job_over(path))
    assert (skew.rows, skew.is_whole, list(skew.tables)) == (1000, True, ["shared", "s"])
    shared, texts = skew.tables["shared"], skew.tables["s"]
    # 1,000 of `a`, and 999 sevens of `b`.
    assert (shared.accesses, shared.distinct, shared.hottest) == (1999, 10, 7)
    assert shared.hottest_share == (100 + 999) / 1999
    assert shared.top_shares == ((100 + 999) / 1999,) * 2
    assert (texts.distinct, texts.top_shares) == (2, (0.75, 0.75))


def test_a_large_source_is_sampled(path, monkeypatch):
    monkeypatch.setattr("penstock.data.formats.columnar.EXTENT_ROWS", 100)
    skew = key_skew(job_over(path), max_rows=50)
    assert (skew.rows, skew.is_whole) == (50, False)
    # The first five rows of each of the ten row groups.
    assert skew.tables["shared"].distinct == 6
    caption = skew_table(skew).caption
    assert caption.startswith("of a sample of 50 rows of the job's data, read just now, ")


def test_the_terminal_shows_it(path):
    shown = cells(skew_table(key_skew(job_over(path))))
    assert shown[0][:-1] == ["shared", "1,999", "10", "55.0%", "55.0%", "7", "54.98%", "0.0%"]
    assert shown[0][-1].startswith("█") and shown[0][-1].endswith("▁")
    assert shown[1][:5] == ["s", "1,000", "2", "75.0%", "75.0%"]


def test_data_that_is_gone(path):
    job = job_over(path)
    path.unlink()
    with pytest.raises(DataError, match="no such file or directory"):
        key_skew(job)
