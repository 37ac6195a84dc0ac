"""Many files of groups: opened side by side, when their rows are asked for, and each once."""

import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import ipc, orc

from penstock.config import ArrowSource, OrcSource, ParquetSource, parse_job
from penstock.data import Dataset
from penstock.data.formats import columnar
from penstock.data.formats.columnar import GroupedFiles, Layout, check_schema
from penstock.data.formats.lines import BLOCK_BYTES
from penstock.data.formats.parquet import ParquetFormat
from penstock.data.opening import open_source
from penstock.data.plan.lazy_extents import LazyExtents
from penstock.data.source import Extent
from penstock.errors import DataError

KINDS = ("parquet", "orc", "arrow")


def write(kind, path, table):
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=10)
    elif kind == "orc":
        orc.write_table(table, path)
    else:
        with ipc.new_file(path, table.schema) as out:
            out.write_table(table, max_chunksize=10)


def open_files(kind, folder):
    configs = {"parquet": ParquetSource, "orc": OrcSource, "arrow": ArrowSource}
    return open_source(configs[kind](format=kind, path=str(folder)), {})


def write_many(kind, folder, count, rows=20):
    for number in range(count):
        first = number * rows
        table = pa.table({"label": np.arange(first, first + rows), "C1": np.arange(rows)})
        write(kind, folder / f"{number:03}.{kind}", table)


@pytest.fixture
def opened(monkeypatch):
    """How often each file's layout was read."""
    counts = Counter()
    plain = GroupedFiles._layout

    def layout(self, path):
        counts[path] += 1
        return plain(self, path)

    monkeypatch.setattr(GroupedFiles, "_layout", layout)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_opened_when_their_splits_are_asked_for(tmp_path, opened, kind):
    write_many(kind, tmp_path, 100)
    source = open_files(kind, tmp_path)
    assert len(opened) == 1
    extents = source.extents()
    assert extents[0].path == source.paths[0]
    assert len(opened) == 1
    taken = iter(extents)
    for number in range(5):
        assert next(taken).path == source.paths[number]
    assert len(opened) == 8
    assert [split.path for split in extents] == source.paths
    assert opened == Counter(source.paths)
    assert len(extents) == 100
    assert source.num_groups == (100 if kind == "orc" else 200)
    assert opened == Counter(source.paths)
    labels = [
        chunk.table["label"].to_pylist()
        for split in extents
        for chunk in source.read(split, ["label"])
    ]
    assert sum(labels, []) == list(range(2000))
    assert opened == Counter(source.paths)


def test_many_files_are_opened_at_once(tmp_path, monkeypatch):
    write_many("parquet", tmp_path, 16)
    source = open_files("parquet", tmp_path)
    plain, together = ParquetFormat.layout, threading.Barrier(8)

    def layout(self, opened):
        if int(opened.path[-11:-8]) >= 8:  # the last eight; nobody goes on alone
            together.wait(timeout=60)
        return plain(self, opened)

    monkeypatch.setattr(ParquetFormat, "layout", layout)
    assert len(source.extents()) == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"label": [1], "C1": ["x"]}, "column 'C1' is string, but int64 in {first}"),
        ({"label": [1]}, "column 'C1' of {first} is missing"),
        ({"label": [1], "C1": [1], "C2": [1]}, "column 'C2' is not in {first}"),
    ],
)
def test_a_file_of_another_schema_is_refused_by_name(tmp_path, kind, other, message):
    write_many(kind, tmp_path, 12)
    bad = tmp_path / f"009.{kind}"
    write(kind, bad, pa.table(other))
    expected = f"{bad}: {message.format(first=f'{tmp_path}/000.{kind}')}; all files of a source"
    source = open_files(kind, tmp_path)
    assert source.extents()[7].path.endswith(f"007.{kind}")
    for _ in range(2):  # and does not look like the end of the data afterwards
        with pytest.raises(DataError) as error:
            len(source.extents())
        assert str(error.value).startswith(expected)
        with pytest.raises(DataError):
            list(source.extents())
    label = {"column": "label", "task": "regression"}
    data = {"source": {"format": kind, "path": str(tmp_path)}, "label": label}
    data["shuffle"] = {"block_rows": 0}
    job = parse_job({"data": data, "features": [{"columns": ["C1"]}]})
    dataset = Dataset.open(job)
    with (
        pytest.raises(DataError) as error,
        dataset.batches("train", batch_size=16) as batches,
    ):
        list(batches)
    assert str(error.value).startswith(expected)


def test_columns_in_another_order_are_the_same_schema(tmp_path):
    write_many("parquet", tmp_path, 1)
    write("parquet", tmp_path / "001.parquet", pa.table({"C1": [7], "label": [20]}))
    source = open_files("parquet", tmp_path)
    rows = [chunk.table for one in source.extents() for chunk in source.read(one, ["label", "C1"])]
    assert pa.concat_tables(rows)["label"].to_pylist() == list(range(21))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(tmp_path, kind):
    table = pa.table({"label": pa.array([], pa.int64())})
    for number in range(3):
        write(kind, tmp_path / f"{number}.{kind}", table)
    with pytest.raises(DataError, match=r"0\.\w+: no rows; the source has none at all"):
        open_files(kind, tmp_path)
    write(kind, tmp_path / f"3.{kind}", pa.table({"label": [1]}))
    (split,) = open_files(kind, tmp_path).extents()
    assert split == Extent(str(tmp_path / f"3.{kind}"), 0, 1)


@pytest.mark.parametrize("rows", [[5, -1], [2**62, 2**62], [-3]])
def test_counts_that_no_file_has(tmp_path, monkeypatch, rows):
    write_many("parquet", tmp_path, 1)
    layout = Layout(pa.schema([("label", pa.int64())]), np.array(rows))
    monkeypatch.setattr(ParquetFormat, "layout", lambda self, opened: layout)
    with pytest.raises(DataError, match=r"000.parquet: counts of rows that no file has"):
        open_files("parquet", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_rows_than_were_counted(tmp_path, monkeypatch, kind):
    """Whoever counts wrongly, no row is missed in silence."""
    write_many(kind, tmp_path, 1)
    source = open_files(kind, tmp_path)
    plain = type(source._format).read

    def read(self, opened, groups, columns):
        yield from (table[:9] for table in plain(self, opened, groups, columns))

    monkeypatch.setattr(type(source._format), "read", read)
    with pytest.raises(DataError, match=r"cannot be read: it has fewer rows than it says"):
        list(source.read(source.extents()[0], ["label"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_size_is_another_file(tmp_path, kind):
    write_many(kind, tmp_path, 1)
    source = open_files(kind, tmp_path)
    write_many(kind, tmp_path, 1, rows=2000)
    with pytest.raises(
        DataError, match=r"cannot be read: it has [\d,]+ bytes, and had [\d,]+ when"
    ):
        list(source.read(source.extents()[0], ["label"]))


@pytest.mark.parametrize(
    ("most", "sizes"), [(9, [10, 10]), (10, [10, 10]), (19, [10, 10]), (20, [20])]
)
def test_groups_are_joined_up_to_the_rows_of_an_extent(tmp_path, monkeypatch, most, sizes):
    """Positions in checkpoints name extents: where one ends must never change."""
    write_many("parquet", tmp_path, 1)
    monkeypatch.setattr(columnar, "EXTENT_ROWS", most)
    extents = open_files("parquet", tmp_path).extents()
    assert [one.stop - one.start for one in extents] == sizes


def test_footers_are_kept_within_bounds(tmp_path, monkeypatch):
    write_many("parquet", tmp_path, 30)
    size = pq.read_metadata(tmp_path / "000.parquet").serialized_size
    monkeypatch.setattr("penstock.data.formats.parquet._MOST_FOOTERS", 5)
    source = open_files("parquet", tmp_path)
    extents = list(source.extents())
    for number in (7, 8, 9, 10, 11, 7, 12):
        list(source.read(extents[number], ["label"]))
    assert [path[-11:-8] for path in source._format._footers] == ["009", "010", "011", "007", "012"]
    for most_files, most_bytes, kept in [(5, 1 << 30, 5), (64, 3 * size + 9, 3), (64, 1, 1)]:
        monkeypatch.setattr("penstock.data.formats.parquet._MOST_FOOTERS", most_files)
        monkeypatch.setattr("penstock.data.formats.parquet._MOST_FOOTER_BYTES", most_bytes)
        source = open_files("parquet", tmp_path)
        extents = list(source.extents())
        assert len(source._format._footers) == kept
        for split in (extents[3], extents[29], extents[3]):
            assert next(source.read(split, ["label"])).table.num_rows == 20
        assert len(source._format._footers) == kept
        assert extents[3].path in source._format._footers


def test_a_footer_that_is_read_again_takes_no_more_room(tmp_path, monkeypatch):
    write_many("parquet", tmp_path, 3)
    size = pq.read_metadata(tmp_path / "000.parquet").serialized_size
    monkeypatch.setattr("penstock.data.formats.parquet._MOST_FOOTER_BYTES", 3 * size + 9)
    source = open_files("parquet", tmp_path)
    paths = sorted(extent.path for extent in source.extents())
    for path in [paths[1]] * 5:
        source._layout(path)
    assert sorted(source._format._footers) == paths


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_same_size_may_be_another_one(tmp_path, kind):
    path = tmp_path / f"0.{kind}"
    write(kind, path, pa.table({"label": pa.array([1, 2, 3, 4], pa.int8())}))
    source = open_files(kind, tmp_path)
    (name,) = source.paths
    content, before = path.read_bytes(), source.identify(name)
    assert source.holds(name, before) and not source.may_grow(name)
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert not source.holds(name, before)
    path.write_bytes(content)
    assert source.holds(name, before)


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.int64()), pa.binary()])
@pytest.mark.parametrize("makes", [ipc.new_file, ipc.new_stream])
def test_offsets_of_arrow_are_looked_at_one_by_one(tmp_path, kind, makes):
    """Those at both ends are as they should be."""
    values = [[7], [8], [9], [10]] if pa.types.is_list(kind) else ["aa", "bb", "cc", "dd"]
    path = tmp_path / "0.arrow"
    with makes(path, pa.schema([("c", kind)])) as out:
        out.write_batch(pa.record_batch([pa.array(values, kind)], names=["c"]))
    step = 1 if pa.types.is_list(kind) else 2
    offsets = np.arange(0, 5 * step, step, dtype=np.int32)
    content, plain = path.read_bytes(), offsets.tobytes()
    assert content.count(plain) == 1
    for wrong in (1 << 30, -5):
        offsets[2] = wrong
        path.write_bytes(content.replace(plain, offsets.tobytes()))
        source = open_files("arrow", tmp_path)
        with pytest.raises(DataError, match=r"0\.arrow: cannot be read: "):
            list(source.read(source.extents()[0], ["c"]))


@pytest.mark.parametrize("makes", [ipc.new_file, ipc.new_stream])
def test_arrow_without_columns(tmp_path, makes):
    with makes(tmp_path / "0.arrow", pa.schema([])) as out:
        out.write_batch(pa.record_batch([], schema=pa.schema([])))
    with (
        pytest.raises(DataError, match=r"0\.arrow: no rows")
        if makes is ipc.new_file
        else nullcontext()
    ):
        open_files("arrow", tmp_path)


def test_where_extents_end_never_changes():
    # FORMAT: positions in checkpoints count them.
    assert (columnar.EXTENT_ROWS, BLOCK_BYTES) == (131_072, 8 << 20)


def test_splits_found_by_several_threads():
    batches = [[Extent("a", n, n + 1) for n in range(low, low + 7)] for low in range(0, 70, 7)]
    answers = [batches[0], [], *batches[1:], None]
    given = 0

    def more():
        nonlocal given
        answer = answers[given]
        time.sleep(0.001)  # another thread that may come in would get the same answer
        given += 1
        return answer

    extents = LazyExtents([], more)
    found = [None] * 8

    def read(number):
        found[number] = list(extents)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one == sum(batches, []) for one in found)
    assert extents[-1].start == 69
    assert extents[60:] == batches[8][4:] + batches[9]
    with pytest.raises(IndexError):
        extents[70]


def test_splits_after_an_error():
    answers = iter([[Extent("a", 0, 1)], OSError("away"), [Extent("a", 1, 2)], None])

    def more():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    extents = LazyExtents([], more)
    assert bool(extents)
    with pytest.raises(OSError, match="away"):
        list(extents)
    assert [split.start for split in extents] == [0, 1]


def test_a_name_that_is_there_twice():
    twice = pa.schema([("a", pa.int64()), ("a", pa.int64())])
    with pytest.raises(DataError, match="x: column 'a' is there twice"):
        check_schema("x", twice, "x", twice)


@pytest.mark.parametrize("kind", KINDS)
def test_times_in_ns_need_no_pandas(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "pandas", None)  # an import of it fails
    first = 1_700_000_000_000_000_000
    table = pa.table({
        "label": np.arange(40) % 2,
        "C1": np.arange(40),
        "time": pa.array(first + np.arange(40) * 1_000_000_007, pa.timestamp("ns")),
    })
    write(kind, tmp_path / f"rows.{kind}", table)
    data = {
        "source": {"format": kind, "path": str(tmp_path)},
        "label": {"column": "label"},
        "event_time": "time",
        "split": {"by": "time", "at": 1_700_000_020_000},
        "shuffle": {"block_rows": 0},
    }
    dataset = Dataset.open(parse_job({"data": data, "features": [{"columns": ["C1"]}]}))
    keys = []
    for part in dataset.parts:
        with dataset.batches(part, batch_size=64) as batches:
            (batch,) = batches
        keys.append(batch.sparse["C1"].values.tolist())
        times = np.array(first // 10**6 + np.array(keys[-1]) * 1_000_000_007 // 10**6)
        assert batch.event_time.tolist() == times.tolist()
    assert keys == [list(range(20)), list(range(20, 40))]
