"""`penstock data history`: each history against a plain loop, and what is refused."""

import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.data import history
from penstock.data.history import HistoryColumns, write_history
from penstock.errors import ConfigError, DataError
from tests.contract.data_cases import write_case

COLUMNS = HistoryColumns("user", ("item", "word"), "time", 3)


def log(users, times, seed=0):
    rng = np.random.default_rng(seed)
    n = len(users)
    return pa.table({
        "user": pa.array(users, pa.int64()),
        "item": pa.array(rng.integers(0, 99, n), mask=rng.random(n) < 0.2),
        "word": pa.array([f"w{number}" for number in range(n)]),
        "time": pa.array(times, pa.int64()),
        "row": np.arange(n),
    })


def by_hand(rows, last=3):
    """The documented rule, row by row."""
    ordered = sorted(rows, key=lambda row: row["time"])  # stable
    out = []
    for place, row in enumerate(ordered):
        before = [
            one for one in ordered[:place] if row["user"] is not None and one["user"] == row["user"]
        ][-last:]
        new = {f"{name}_history": [one[name] for one in before] for name in ("item", "word")}
        out.append({**row, **new})
    return out


ROWS = st.lists(
    st.tuples(st.none() | st.integers(-2, 3), st.integers(0, 9)), min_size=1, max_size=40
)


@settings(max_examples=60)
@given(rows=ROWS, in_order=st.booleans(), last=st.integers(1, 5), group=st.integers(1, 12))
def test_equals_a_plain_loop(rows, in_order, last, group, tmp_path_factory):
    path = tmp_path_factory.mktemp("history")
    times = [time for _, time in rows]
    table = log([user for user, _ in rows], sorted(times) if in_order else times)
    half = len(rows) // 2
    files = [path / "a.parquet", path / "b.parquet"]
    pq.write_table(table[:half], files[0], row_group_size=5)
    pq.write_table(table[half:], files[1], row_group_size=7)
    columns = HistoryColumns("user", ("item", "word"), "time", last)
    before = history.ROW_GROUP_ROWS
    history.ROW_GROUP_ROWS = group
    try:
        count = write_history([str(file) for file in files], columns, path / "out.parquet")
    finally:
        history.ROW_GROUP_ROWS = before
    found = pq.read_table(path / "out.parquet")
    assert count == len(rows)
    assert found.to_pylist() == by_hand(table.to_pylist(), last)
    new = pa.list_(pa.field("element", pa.int64()))
    assert found.schema.field("item_history").type == new


@pytest.mark.parametrize("kind", ["parquet", "orc", "arrow", "arrow stream", "jsonl", "csv"])
def test_every_format(kind, tmp_path):
    table = log([1, 2, 1, 1, 2, 1], [5, 4, 3, 3, 9, 7])
    source = write_case(kind, table, tmp_path)
    write_history([source["path"]], COLUMNS, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    rows = table.to_pylist()
    if kind == "csv":  # whose other columns are text
        texts = [name for name in table.column_names if name != "time"]
        rows = [
            {k: str(v) if k in texts and v is not None else v for k, v in row.items()}
            for row in rows
        ]
    assert found.to_pylist() == by_hand(rows)


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        (pa.timestamp("us"), [3, 1, 2]),
        (pa.timestamp("ns", tz="UTC"), [3, 1, 2]),
        (pa.date32(), [3, 1, 2]),
        (pa.uint64(), [2**64 - 1, 1, 2**63]),
        (pa.int8(), [3, -100, 2]),
    ],
)
def test_every_time(kind, times, tmp_path):
    table = pa.table({"user": ["x"] * 3, "item": [10, 11, 12], "time": pa.array(times, kind)})
    pq.write_table(table, tmp_path / "log.parquet")
    columns = HistoryColumns("user", ("item",), "time", 9)
    write_history([str(tmp_path)], columns, tmp_path / "_out.parquet")
    found = pq.read_table(tmp_path / "_out.parquet")
    assert found["item_history"].to_pylist() == [[], [11], [11, 12]]


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.bool_()])
def test_values_of_other_types(kind, tmp_path):
    values = [True, None, False, True] if kind == pa.bool_() else ["a", None, "", "a"]
    table = pa.table({
        "user": pa.array(["u", "v", "u", "u"]).cast(pa.dictionary(pa.int32(), pa.string())),
        "item": pa.array(values).cast(kind),
        "time": [datetime.date(2026, 1, day) for day in (1, 2, 3, 4)],
    })
    pq.write_table(table, tmp_path / "log.parquet")
    columns = HistoryColumns("user", ("item", "user"), "time", 9)
    write_history([str(tmp_path / "log.parquet")], columns, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["item_history"].to_pylist() == [[], [], values[:1], [values[0], values[2]]]
    assert found["user_history"].to_pylist() == [[], [], ["u"], ["u", "u"]]


def test_progress_counts_both_passes(tmp_path):
    pq.write_table(log([1] * 10, range(10)), tmp_path / "log.parquet", row_group_size=4)
    seen = []
    write_history(
        [str(tmp_path / "log.parquet")],
        COLUMNS,
        tmp_path / "out.parquet",
        progress=lambda *done: seen.append(done),
    )
    assert [total for _, total in seen] == [20] * len(seen)
    done = [count for count, _ in seen]
    assert done == sorted(done) and done[-1] == 20 and 10 in done


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(log([1, 1], [0, 1]).append_column("tags", [[[1], [2]]]), path)
    return path


@pytest.mark.parametrize(
    ("columns", "error", "text"),
    [
        (
            HistoryColumns("usr", ("item",), "time", 3),
            DataError,
            "{file}: no column 'usr' (--by); did you mean 'user'?",
        ),
        (
            HistoryColumns("user", ("item", "itm"), "time", 3),
            DataError,
            "{file}: no column 'itm' (--of); did you mean 'item'?",
        ),
        (
            HistoryColumns("user", ("item",), "when", 3),
            DataError,
            "{file}: no column 'when' (--order); there are user, item, word, time, row, tags",
        ),
        (
            HistoryColumns("tags", ("item",), "time", 3),
            DataError,
            "{file}: column 'tags' is list<element: int64>; --by takes a column of integers or "
            "text",
        ),
        (
            HistoryColumns("user", ("item",), "word", 3),
            DataError,
            "{file}: column 'word' is string; --order takes a column of integers, timestamps or "
            "dates",
        ),
        (
            HistoryColumns("user", ("tags",), "time", 3),
            DataError,
            "{file}: column 'tags' is list<element: int64>; --of takes columns of one value a row",
        ),
        (
            HistoryColumns("user", ("item", "item"), "time", 3),
            ConfigError,
            "{file}: two columns would be named 'item_history'; give each column of --of once, "
            "and rename the one that is there",
        ),
    ],
)
def test_columns_that_do_not_fit(columns, error, text, file, tmp_path):
    with pytest.raises(error) as raised:
        write_history([str(file)], columns, tmp_path / "out.parquet")
    assert str(raised.value) == text.replace("{file}", str(file))
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_time_is_located(tmp_path):
    times = [0, 1, 2, None, 4]
    pq.write_table(log([1] * 2, [0, 1]), tmp_path / "a.parquet")
    pq.write_table(log([1] * 5, times), tmp_path / "b.parquet", row_group_size=2)
    with pytest.raises(DataError) as raised:
        write_history([str(tmp_path / "*.parquet")], COLUMNS, tmp_path / "out" / "o.parquet")
    assert str(raised.value) == (
        f"{tmp_path}/b.parquet row 3, column 'time': the time is missing; leave such rows out of "
        "the file"
    )


def test_what_is_there_stays(file, tmp_path):
    out = tmp_path / "out.parquet"
    out.write_text("mine")
    with pytest.raises(ConfigError) as raised:
        write_history([str(file)], COLUMNS, out)
    assert str(raised.value) == (
        f"{out}: exists already; name another file, or overwrite it with --force"
    )
    assert out.read_text() == "mine"
    assert write_history([str(file)], COLUMNS, out, overwrite=True) == 2
    assert pq.read_table(out).num_rows == 2
    with pytest.raises(ConfigError, match="among the files that are read"):
        write_history([str(file)], COLUMNS, file, overwrite=True)
    with pytest.raises(ConfigError, match=r"two columns would be named 'item_history'"):
        write_history([str(out)], COLUMNS, tmp_path / "again.parquet")
    assert not (tmp_path / "again.parquet").exists()


def test_nothing_to_write(file, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("user,item,word,time\n")
    stream = tmp_path / "empty.arrow"
    with pa.ipc.new_stream(stream, log([], []).schema):
        pass
    for paths, error, text in (
        ([str(empty)], DataError, f"{empty}: no rows; the source has none at all"),
        ([str(stream)], DataError, f"{stream}: no rows; the source has none at all"),
        (
            [str(file), "x.csv"],
            ConfigError,
            "files of several formats (csv, parquet); give those of one",
        ),
    ):
        with pytest.raises(error) as raised:
            write_history(paths, COLUMNS, tmp_path / "out.parquet")
        assert str(raised.value) == text
    with pytest.raises(ConfigError, match="cannot be written"):
        write_history([str(file)], COLUMNS, file / "out.parquet")
