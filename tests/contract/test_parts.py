"""Training and evaluation: disjoint, together every row, by each format, unit and kind of split."""

import bisect

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data.columns.decode import TICKS_PER_S
from penstock.data.dataset import Dataset
from penstock.data.formats import columnar, lines
from penstock.errors import DataError
from tests.contract.data_cases import make_job, make_table, read_all, write_case
from tests.fuzz.effort import effort

KINDS = (
    *("parquet", "orc", "arrow", "arrow stream", "csv", "tsv.bz2", "quoted csv", "jsonl"),
    *("quoted csv.zst", "jsonl.gz"),
)
UNITS = tuple(TICKS_PER_S)
FIRST_S = 1_700_000_000


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    """Several extents of a few rows in every file that can have them."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 400)
    monkeypatch.setattr(lines, "READ_BYTES", 150)
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 8)
    monkeypatch.setattr(columnar, "CHUNK_ROWS", 5)


def rows_of(dataset, part):
    """Each row of a part by its key in the column C4."""
    batches = read_all(dataset, part, shuffle=False, batch_size=16)
    return [int(key) for batch in batches for key in batch.sparse["C4"].values]


def numbered(rows, seconds=None, unit="ms"):
    """Rows whose C4 is their number."""
    table = make_table(rows)
    columns = {
        **{name: table[name] for name in table.column_names},
        "C4": pa.array(np.arange(rows)),
    }
    if seconds is not None:
        columns["time"] = pa.array(np.asarray(seconds, dtype=np.int64) * TICKS_PER_S[unit])
    return pa.table(columns)


@effort(40)
@given(st.sampled_from(KINDS), st.integers(2, 60), st.floats(0.01, 0.99))
def test_by_fraction(tmp_path_factory, kind, rows, fraction):
    source = write_case(kind, numbered(rows), tmp_path_factory.mktemp("x"))
    job = make_job(source, split={"by": "fraction", "evaluation": fraction})
    held_out = round(rows * fraction)
    if not 0 < held_out < rows:
        with pytest.raises(DataError, match="leaves no rows for"):
            Dataset.open(job)
        return
    dataset = Dataset.open(job)
    cut = rows - held_out
    # The cut costs no more reading, and no split is in both.
    parts = [dataset._parts[name] for name in ("train", "evaluation")]
    assert [part.expected_rows() for part in parts] == [(cut, True), (held_out, True)]
    assert rows_of(dataset, "train") == list(range(cut))
    assert rows_of(dataset, "evaluation") == list(range(cut, rows))
    assert (dataset.num_rows("train"), dataset.num_rows("evaluation")) == (cut, held_out)
    assert not set(parts[0].extents) & set(parts[1].extents)


@pytest.mark.parametrize("kind", KINDS)
def test_by_fraction_at_every_row(kind, tmp_path):
    """Whether or not a split ends there."""
    rows = 40
    source = write_case(kind, numbered(rows), tmp_path)
    for cut in range(1, rows, 1 if kind in {"parquet", "orc", "csv"} else 5):
        split = {"by": "fraction", "evaluation": (rows - cut) / rows}
        dataset = Dataset.open(make_job(source, split=split))
        train, held_out = dataset._parts["train"], dataset._parts["evaluation"]
        counts = [[p.source.count_rows(one) for one in p.extents] for p in (train, held_out)]
        assert [sum(one) for one in counts] == [cut, rows - cut]
        # Of text, a block may lie within a row.
        assert all(map(all, counts)) or "csv" in kind, "an empty split"
        assert not set(train.extents) & set(held_out.extents)
        assert rows_of(dataset, "evaluation") == list(range(cut, rows))


@effort(80)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(UNITS),
    st.lists(st.integers(0, 30), min_size=1, max_size=50),
    st.booleans(),
    st.integers(-1000, 31_000),
)
def test_by_time(tmp_path_factory, kind, unit, seconds, in_order, at_ms):
    """The instant lies at seconds or between them, the rows in order of time or not."""
    seconds = sorted(seconds) if in_order else seconds
    table = numbered(len(seconds), [FIRST_S + one for one in seconds], unit)
    source = write_case(kind, table, tmp_path_factory.mktemp("x"))
    split = {"by": "time", "at": FIRST_S * 1000 + at_ms}
    job = make_job(source, split=split, event_time_unit=unit)
    early = [number for number, one in enumerate(seconds) if one * 1000 < at_ms]
    late = [number for number, one in enumerate(seconds) if one * 1000 >= at_ms]
    if not early or not late:
        part = "evaluation" if early else "train"
        with pytest.raises(DataError, match=f"leaves no rows for {part}"):
            Dataset.open(job)
        return
    dataset = Dataset.open(job)
    assert rows_of(dataset, "train") == early
    assert rows_of(dataset, "evaluation") == late
    assert (dataset.num_rows("train"), dataset.num_rows("evaluation")) == (len(early), len(late))


@pytest.mark.parametrize("unit", UNITS)
def test_instants_around_the_first_times_of_row_groups(unit, tmp_path):
    """What statistics rule out is no more than what has no row: bounds are rounded outwards."""
    seconds = np.arange(30)
    source = write_case("parquet", numbered(30, FIRST_S + seconds, unit), tmp_path)
    for second in (5, 10, 15, 22):
        for at_ms in (1000 * second + past for past in (-999, -1, 0, 1, 500, 999)):
            split = {"by": "time", "at": FIRST_S * 1000 + at_ms}
            dataset = Dataset.open(make_job(source, split=split, event_time_unit=unit))
            early = bisect.bisect_left(seconds.tolist(), at_ms / 1000)
            assert rows_of(dataset, "train") == list(range(early))
            assert rows_of(dataset, "evaluation") == list(range(early, 30))


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl.gz", "quoted csv"])
def test_by_file(kind, tmp_path):
    for number in range(3):
        (tmp_path / f"day_{number}").mkdir()
    total, sources = 0, []
    for number, rows in enumerate((7, 20, 13)):
        table = numbered(total + rows)[total:]
        sources.append(write_case(kind, table, tmp_path / f"day_{number}"))
        total += rows
    source = {**sources[0], "path": [one["path"] for one in sources]}
    split = {"by": "file", "evaluation": "**/day_1/*"}
    dataset = Dataset.open(make_job(source, split=split))
    assert rows_of(dataset, "train") == [*range(7), *range(27, 40)]
    assert rows_of(dataset, "evaluation") == list(range(7, 27))
