"""One suite for every source: the same rows, resumed at every batch, whatever the threads do."""

import threading

import numpy as np
import pyarrow as pa
import pytest

from penstock.data import Dataset, source
from penstock.data.formats import columnar, lines, parquet, synthetic, users_source
from tests.contract.data_cases import (
    assert_resumes_everywhere,
    assert_same_batches,
    make_job,
    make_table,
    read_all,
    rows_of,
    synthetic_job,
    write_case,
)

KINDS = [
    "parquet",
    "orc",
    "arrow",
    "arrow stream",
    "csv",
    "tsv",
    "csv.gz",
    "tsv.bz2",
    "quoted csv",
    "quoted csv.zst",
    "jsonl",
    "jsonl.gz",
    "users",
    "users uncounted",
]
ROWS = 517


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Extents, blocks and chunks so small that every boundary is met."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(lines, "READ_BYTES", 1500)
    monkeypatch.setattr(parquet, "CHUNK_ROWS", 37)
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 100)
    monkeypatch.setattr(columnar, "CHUNK_ROWS", 37)
    monkeypatch.setattr(users_source, "CHUNK_ROWS", 37)
    monkeypatch.setattr(synthetic, "BLOCK_ROWS", 64)
    monkeypatch.setattr(synthetic, "EXTENT_ROWS", 128)
    assert source.CHUNK_ROWS > 0


def open_case(kind, path, rows=ROWS, **data):
    if kind == "synthetic":
        return Dataset.open(synthetic_job(rows, **data))
    return Dataset.open(make_job(write_case(kind, make_table(rows), path), **data))


@pytest.mark.parametrize("kind", [*KINDS, "synthetic"])
@pytest.mark.parametrize("block", [0, 100])
def test_resumes_at_every_batch(kind, block, tmp_path):
    dataset = open_case(kind, tmp_path, shuffle={"block_rows": block})
    assert_resumes_everywhere(dataset, epochs=2, seed=5)
    assert_resumes_everywhere(dataset, "evaluation")


@pytest.mark.parametrize("kind", [*KINDS, "synthetic"])
def test_threads_do_not_change_the_batches(kind, tmp_path):
    runs = [
        read_all(
            open_case(kind, tmp_path, reader_threads=threads, prefetch_batches=ahead), epochs=2
        )
        for threads, ahead in [(1, 1), (2, 8), (5, 3)]
    ]
    assert_same_batches(runs[1], runs[0])
    assert_same_batches(runs[2], runs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_delivers_every_row_of_the_file_in_order(kind, tmp_path):
    table = make_table(ROWS)
    dataset = open_case(kind, tmp_path)
    train = read_all(dataset, shuffle=False, batch_size=50)
    held_out = read_all(dataset, "evaluation", batch_size=50)
    cut = ROWS - round(ROWS * 0.2)
    assert (dataset.num_rows("train"), dataset.num_rows("evaluation")) == (cut, ROWS - cut)
    assert [batch.batch_size for batch in train] == [50] * (cut // 50) + [cut % 50]
    rows = rows_of(train) + rows_of(held_out)
    assert [row[0] for row in rows] == table["label"].to_pylist()
    for number in range(3):
        column = np.array([v or 0 for v in table[f"I{number + 1}"].to_pylist()], dtype=np.float64)
        expected = np.float32(np.sign(column) * np.log1p(np.abs(column)))
        found = np.array([row[1][number] for row in rows], dtype=np.float32)
        np.testing.assert_array_max_ulp(found, expected, maxulp=2)  # as much as log promises
    for number in range(4):
        expected = [() if v is None else (v,) for v in table[f"C{number + 1}"].to_pylist()]
        assert [row[2][number] for row in rows] == expected
    times = np.concatenate([batch.event_time.numpy() for batch in train + held_out])
    assert times.tolist() == table["time"].to_pylist()
    weights = np.concatenate([batch.weights.numpy() for batch in train + held_out])
    assert weights.tolist() == table["weight"].to_pylist()


@pytest.mark.parametrize("kind", [*KINDS, "synthetic"])
def test_shuffling_permutes_within_blocks(kind, tmp_path):
    dataset = open_case(kind, tmp_path)
    plain = rows_of(read_all(dataset, shuffle=False))
    first, second = (rows_of(read_all(dataset, seed=seed)) for seed in (1, 2))
    assert plain != first != second
    # 100 rows rounded up to whole batches of 32.
    for start in range(0, len(plain), 128):
        assert sorted(first[start : start + 128]) == sorted(plain[start : start + 128])
    two_epochs = rows_of(read_all(dataset, seed=1, epochs=2))
    assert two_epochs[: len(plain)] == first != two_epochs[len(plain) :]


@pytest.mark.parametrize("kind", [*KINDS, "synthetic"])
def test_split_by_time_equals_a_filter(kind, tmp_path):
    name = "event_time" if kind == "synthetic" else "time"
    at = 1_700_000_200_500 if kind != "synthetic" else synthetic.FIRST_TIME_MS + 200_999
    dataset = open_case(kind, tmp_path, split={"by": "time", "at": at})
    everything = open_case(kind, tmp_path, split=None)
    times = np.concatenate([b.event_time.numpy() for b in read_all(everything, shuffle=False)])
    for part, expected in (("train", times[times < at]), ("evaluation", times[times >= at])):
        got = [b.event_time.numpy() for b in read_all(dataset, part, shuffle=False)]
        assert np.concatenate(got).tolist() == expected.tolist(), name
        assert dataset.num_rows(part) == len(expected)
        assert_resumes_everywhere(dataset, part)


@pytest.mark.parametrize("kind", [*KINDS, "synthetic"])
def test_splits_read_alone_and_cut_anywhere(kind, tmp_path):
    dataset = open_case(kind, tmp_path, split=None)
    rows = dataset._parts["train"]
    names = ["label", "C4"] if kind != "synthetic" else ["click", "c0"]

    def read(split):
        return pa.concat_tables([c.table for c in rows.source.read(split, names)]).to_pylist()

    extents = list(rows.source.extents())
    assert len(extents) > 1 or "." in kind
    in_order = [read(split) for split in extents]
    backwards = [read(split) for split in extents[::-1]][::-1]
    assert in_order == backwards
    assert [len(part) for part in in_order] == [rows.source.count_rows(s) for s in extents]
    for split, part in zip(extents, in_order, strict=True):
        for cut in {1, len(part) // 2, len(part) - 1} - {0, len(part)}:
            before, after = rows.source.cut(split, cut)
            assert read(before) == part[:cut]
            assert read(after) == part[cut:]
            assert rows.source.count_rows(before) == cut


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "jsonl", "csv.gz", "synthetic"])
def test_close_stops_the_threads_at_once(kind, tmp_path):
    before = threading.active_count()
    dataset = open_case(kind, tmp_path, prefetch_batches=1, reader_threads=3)
    for taken in (0, 1, 3):
        batches = dataset.batches("train", batch_size=8, epochs=1000)
        for _ in range(taken):
            next(batches)
        batches.close()
        batches.close()
        assert threading.active_count() == before
        with pytest.raises(
            ValueError, match="the loader is closed; ask the dataset for new batches"
        ):
            next(batches)


def test_iteration_ends_and_stays_ended(tmp_path):
    with open_case("parquet", tmp_path).batches("train", batch_size=100) as batches:
        assert len(list(batches)) == 5
        assert list(batches) == []
    end = end_of_epoch(tmp_path)
    assert (end.epoch, end.block) == (0, 4)
    assert read_all(open_case("parquet", tmp_path), start=end) == []


def end_of_epoch(path):
    return read_all(open_case("parquet", path))[-1].end
