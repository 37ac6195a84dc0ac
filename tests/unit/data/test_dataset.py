"""Parts, list columns, evaluation sources, prediction, and what may go wrong in the background."""

import threading
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.batches.channel import Channel, Closed, Ended
from penstock.data.files import glob_pattern
from penstock.data.formats import columnar
from penstock.data.source import chunk_rows
from penstock.errors import ConfigError, DataError
from penstock.position import Position
from tests.contract.data_cases import (
    assert_resumes_everywhere,
    make_job,
    make_table,
    read_all,
    rows_of,
    synthetic_job,
)


def write_days(path, days=4, rows=50):
    table = make_table(days * rows)
    for day in range(days):
        pq.write_table(table[day * rows : (day + 1) * rows], path / f"day_{day}.parquet")
    return {"format": "parquet", "path": str(path)}


def labels(dataset, part):
    return [row[0] for row in rows_of(read_all(dataset, part, shuffle=False))]


def test_split_by_file(tmp_path):
    source = write_days(tmp_path)
    dataset = Dataset.open(make_job(source, split={"by": "file", "evaluation": "day_[23]*"}))
    expected = make_table(200)["label"].to_pylist()
    assert labels(dataset, "train") == expected[:100]
    assert labels(dataset, "evaluation") == expected[100:]
    whole_path = {"by": "file", "evaluation": f"{tmp_path}/day_3.parquet"}
    assert Dataset.open(make_job(source, split=whole_path)).num_rows("evaluation") == 50


def test_evaluation_source(tmp_path):
    source = {**write_days(tmp_path), "path": f"{tmp_path}/*.parquet"}
    table = pq.read_table(tmp_path / "day_1.parquet")
    (tmp_path / "other").mkdir()
    other = {"format": "parquet", "path": str(tmp_path / "other")}
    pq.write_table(table, tmp_path / "other" / "x.parquet")
    dataset = Dataset.open(make_job(source, split=None, evaluation_source=other))
    assert (dataset.num_rows("train"), dataset.num_rows("evaluation")) == (200, 50)
    assert labels(dataset, "evaluation") == make_table(200)["label"].to_pylist()[50:100]
    pq.write_table(table.append_column("C9", table["C1"]), tmp_path / "other" / "x.parquet")
    with pytest.raises(ConfigError) as error:
        Dataset.open(make_job(source, split=None, evaluation_source=other))
    assert str(error.value) == (
        f"data.evaluation_source: {tmp_path}/other/x.parquet has other features (C1, C2, C3, C4, "
        "C9) "
        "than data.source (C1, C2, C3, C4); name the columns that both have"
    )


@pytest.mark.parametrize("kind", ["itself", "symbolic link", "hard link", "relative"])
def test_rows_that_are_trained_on_are_not_measured(kind, tmp_path, monkeypatch):
    source = {**write_days(tmp_path), "path": f"{tmp_path}/*.parquet"}
    day = tmp_path / "day_1.parquet"
    (tmp_path / "other").mkdir()
    same = tmp_path / "other" / "same.parquet"
    if kind == "symbolic link":
        same.symlink_to(day)
    elif kind == "hard link":
        same.hardlink_to(day)
    else:
        monkeypatch.chdir(tmp_path)
        same = day if kind == "itself" else "./day_1.parquet"
    other = {"format": "parquet", "path": str(same)}
    with pytest.raises(ConfigError) as error:
        Dataset.open(make_job(source, split=None, evaluation_source=other))
    name = str(same) if kind == "itself" else f"{same} ({day})"
    assert str(error.value) == (
        f"data.evaluation_source: {name} is in data.source, too, so rows that were trained on "
        "would be measured; name other files, or hold some out with data.split"
    )


@pytest.mark.parametrize("rows", [100, 50])
def test_synthetic_rows_that_are_trained_on_are_not_measured(rows):
    other = {"format": "synthetic", "rows": rows}
    with pytest.raises(ConfigError, match="is in data.source, too"):
        Dataset.open(synthetic_job(100, split=None, evaluation_source=other))
    Dataset.open(synthetic_job(100, split=None, evaluation_source={**other, "seed": 1}))


def test_one_file_under_two_names_is_read_once_or_not_at_all(tmp_path):
    write_days(tmp_path)
    (tmp_path / "latest.parquet").symlink_to(tmp_path / "day_3.parquet")
    with pytest.raises(DataError) as error:
        Dataset.open(make_job({"format": "parquet", "path": str(tmp_path)}))
    assert str(error.value) == (
        f"{tmp_path}/latest.parquet: the same file as {tmp_path}/day_3.parquet; its rows would be "
        "read twice"
    )


def test_time_split_skips_row_groups_by_their_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 50)
    pq.write_table(make_table(200), tmp_path / "x.parquet", row_group_size=50)
    source = {"format": "parquet", "path": str(tmp_path)}
    job = make_job(source, split={"by": "time", "at": 1_700_000_120_000})
    dataset = Dataset.open(job)
    assert [len(dataset._parts[part].extents) for part in ("train", "evaluation")] == [3, 2]
    assert (dataset.num_rows("train"), dataset.num_rows("evaluation")) == (120, 80)


def test_a_moment_needs_no_quotation_marks():
    fields = yaml.safe_load("data: {source: {format: synthetic}, label: {column: click}}")
    for text, expected in (
        ("2026-01-31T00:00:00Z", "2026-01-31T00:00:00+00:00"),
        ("2026-01-31", "2026-01-31"),
    ):
        split = yaml.safe_load(f"{{by: time, at: {text}}}")
        job = parse_job({"data": {**fields["data"], "event_time": "event_time", "split": split}})
        assert job.data.split.at == expected
        assert parse_job(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    "times",
    [
        pa.array([1000, 2000], pa.timestamp("us")).cast(pa.timestamp("ns")),
        pa.array([1000, 2000], pa.timestamp("us", tz="UTC")),
        pa.array(["1970-01-01T00:00:00.001Z", "1970-01-01T00:00:00.002Z"]),
        pa.array([1, 2], pa.int32()),
    ],
)
def test_times_of_all_kinds_become_milliseconds(times, tmp_path):
    pq.write_table(make_table(2).set_column(2, "time", times), tmp_path / "x.parquet")
    source = {"format": "parquet", "path": str(tmp_path)}
    dataset = Dataset.open(make_job(source, split={"by": "time", "at": 2}))
    for part, expected in (("train", [1]), ("evaluation", [2])):
        assert read_all(dataset, part)[0].event_time.tolist() == expected


def test_list_columns_become_bags(tmp_path):
    rng = np.random.default_rng(1)
    bags = [None if r % 7 == 0 else rng.integers(0, 99, r % 5).tolist() for r in range(203)]
    words = [[f"w{key}" for key in bag] if bag else None for bag in bags]
    table = pa.table({
        "label": [r % 2 for r in range(203)],
        "items": bags,
        "words": words,
        "one": list(range(203)),
    })
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=60)
    job = parse_job({
        "data": {
            "source": {"format": "parquet", "path": str(tmp_path)},
            "label": {"column": "label"},
            "shuffle": {"block_rows": 50},
        },
        "features": [
            {"columns": ["items", "one"], "table": "item", "pooling": "mean"},
            {"columns": ["words"], "transforms": [{"kind": "hash"}]},
        ],
        "tables": [{"name": "item", "dim": 4}],
    })
    dataset = Dataset.open(job)
    assert [(f.name, f.table, f.pooling) for f in dataset.features] == [
        ("items", "item", "mean"),
        ("words", "words", "sum"),
        ("one", "item", "mean"),
    ]
    assert [(t.name, t.dim) for t in dataset.tables] == [("item", 4), ("words", 16)]
    assert dataset.numeric == ()
    rows = rows_of(read_all(dataset, shuffle=False))
    assert [row[2][0] for row in rows] == [tuple(bag or ()) for bag in bags]
    assert [len(row[2][1]) for row in rows] == [len(bag or ()) for bag in bags]
    assert [row[2][2] for row in rows] == [(r,) for r in range(203)]
    assert sorted(rows_of(read_all(dataset))) == sorted(rows)
    assert_resumes_everywhere(dataset, epochs=2)


def test_prediction_without_labels(tmp_path):
    pq.write_table(make_table(20).drop_columns(["label"]), tmp_path / "x.parquet")
    job = make_job({"format": "parquet", "path": str(tmp_path)}, split=None)
    with pytest.raises(DataError, match="no column 'label'"):
        Dataset.open(job)
    batch = read_all(Dataset.open(job, labels="optional"))[0]
    assert np.isnan(batch.labels.numpy()).all()
    assert batch.batch_size == 20


def test_no_features_and_no_numbers(tmp_path):
    pq.write_table(make_table(20), tmp_path / "x.parquet")
    source = {"format": "parquet", "path": str(tmp_path)}
    job = parse_job({"data": {"source": source, "label": {"column": "label"}}})
    batch = read_all(Dataset.open(job))[0]
    assert batch.dense.shape == (20, 0)
    assert batch.sparse.values.numel() == 0


def test_position_of_other_data_is_refused(tmp_path):
    dataset = Dataset.open(make_job(write_days(tmp_path)))
    with pytest.raises(DataError) as error:
        dataset.batches("train", batch_size=8, start=Position(version_1=(9, 0, 8)))
    assert str(error.value) == (
        "position in extent 9, but the data has 4 extents; it is not the data that the checkpoint "
        "was "
        "taken on"
    )


def test_origin_names_files_and_rows(tmp_path):
    dataset = Dataset.open(make_job(write_days(tmp_path), split=None))
    plain = read_all(dataset, shuffle=False, batch_size=40)
    assert str(plain[0].origin) == f"{tmp_path}/day_0.parquet rows 0-39"
    assert (
        str(plain[1].origin)
        == f"{tmp_path}/day_0.parquet rows 40-49, {tmp_path}/day_1.parquet rows 0-29"
    )
    shuffled = read_all(dataset, batch_size=180)
    assert str(shuffled[0].origin) == (
        f"{tmp_path}/day_0.parquet rows 0-49 to {tmp_path}/day_3.parquet rows 0-29 (shuffled)"
    )


def test_memory_is_bounded_whatever_the_rows(monkeypatch):
    def peak(rows):
        dataset = Dataset.open(synthetic_job(rows, shuffle={"block_rows": 4096}))
        tracemalloc.start()
        with dataset.batches("train", batch_size=512) as batches:
            for _ in batches:
                pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    small = peak(100_000)
    assert peak(400_000) < 1.5 * small


def test_channel_passes_items_errors_and_ends():
    channel = Channel(2)
    channel.put(1)
    channel.fail(DataError("broken"))
    assert channel.get() == 1
    with pytest.raises(DataError, match="broken"):
        channel.get()
    ended = Channel(1)
    ended.end()
    with pytest.raises(Ended):
        ended.get()


@pytest.mark.parametrize("blocked", ["put", "get"])
def test_close_wakes_whoever_is_blocked(blocked):
    channel = Channel(1)
    if blocked == "put":
        channel.put(0)
    raised = []

    def work():
        try:
            channel.put(1) if blocked == "put" else channel.get()
        except Closed as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    channel.close()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert len(raised) == 1


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("a/*.csv", "a/x.csv", True),
        ("a/*.csv", "a/b/x.csv", False),
        ("a/**/*.csv", "a/b/c/x.csv", True),
        ("a/**/*.csv", "a/x.csv", True),
        ("day_[!0-2].tsv", "day_3.tsv", True),
        ("day_[!0-2].tsv", "day_1.tsv", False),
        ("x?.csv", "x1.csv", True),
        ("x+.csv", "xx.csv", False),
        ("[[]x", "[x", True),
        ("[a[]x", "[x", True),
        ("[a[b-]x", "cx", False),
        ("[&&~~||]x", "|x", True),
        ("[!&&]x", "&x", False),
        ("[--0]x", ".x", True),
        ("[\\]x", "\\x", True),
    ],
)
@pytest.mark.filterwarnings("error")
def test_globs(glob, path, expected):
    assert bool(glob_pattern(glob).fullmatch(path)) is expected


def test_directories_are_read_recursively_in_order_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    table = make_table(30)
    pq.write_table(table[20:], tmp_path / "b" / "0.parquet")
    pq.write_table(table[:20], tmp_path / "a.parquet")
    (tmp_path / "_SUCCESS").touch()
    pq.write_table(table, tmp_path / "a.parquet~")  # an editor's backup: its rows would come twice
    for path in (
        str(tmp_path),
        f"file://{tmp_path}",
        f"{tmp_path}/**/*.parquet",
        f"file://{tmp_path}/**",
    ):
        dataset = Dataset.open(make_job({"format": "parquet", "path": path}, split=None))
        assert labels(dataset, "train") == table["label"].to_pylist()


def test_wide_rows_are_decoded_in_smaller_chunks():
    assert chunk_rows(1, 65_536) == chunk_rows(40, 65_536) == 65_536
    assert chunk_rows(1000, 65_536) == 4195
    assert chunk_rows(2**30, 65_536) == chunk_rows(5, 1) == 1
