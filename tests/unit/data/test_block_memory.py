"""Blocks are bounded in bytes as well as in rows: by the rows alone, whatever reads them."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.formats import columnar
from tests.contract.data_cases import (
    assert_resumes_everywhere,
    assert_same_batches,
    read_all,
    rows_of,
)

ROWS = 700


@pytest.fixture
def path(tmp_path):
    """Lists of very different lengths, and none at all; a column of one key that some rows lack."""
    rng = np.random.default_rng(3)
    lengths = np.where(rng.random(ROWS) < 0.05, 60, rng.integers(0, 5, ROWS))
    table = pa.table({
        "label": rng.integers(0, 2, ROWS),
        "row": np.arange(ROWS, dtype=np.float64),
        "item": pa.array(rng.integers(0, 50, ROWS), mask=np.arange(ROWS) % 300 == 299),
        "basket": [rng.integers(0, 99, n).tolist() for n in lengths],
    })
    with ipc.new_file(tmp_path / "rows.arrow", table.schema) as out:
        out.write_table(table, max_chunksize=90)
    return tmp_path / "rows.arrow"


def open_job(path, block_bytes, threads=2, block_rows=256, **data):
    return Dataset.open(
        parse_job({
            "data": {
                "source": {"format": "arrow", "path": str(path)},
                "numeric": [{"columns": ["row"]}],
                "shuffle": {"block_rows": block_rows, "block_bytes": block_bytes},
                "label": {"column": "label"},
                **data,
            },
            "run": {"reader_threads": threads},
            "features": [{"columns": ["item"]}, {"columns": ["basket"], "pooling": "mean"}],
        })
    )


def blocks(batches):
    """The rows of each block, ascending."""
    found = {}
    for batch in batches:
        found.setdefault(batch.start.block, []).extend(batch.dense[:, 0].long().tolist())
    return [sorted(rows) for rows in found.values()]


def row_bytes(path):
    """dense 4, label 4, an offset 8 for each bag and 8 for each key."""
    with ipc.open_file(path) as reader:
        table = reader.read_all()
    keys = [len(one) for one in table["basket"].to_pylist()]
    ones = [one is not None for one in table["item"].to_pylist()]
    return np.array([4 + 4 + 16 + 8 * (n + one) for n, one in zip(keys, ones, strict=True)])


@pytest.mark.parametrize("bound", [1, 900, 2_000, 6_000, 20_000])
def test_a_block_takes_the_whole_batches_that_fit(path, bound):
    sizes = row_bytes(path)
    expected, start = [], 0
    while start < ROWS:
        fit = int(np.searchsorted(np.cumsum(sizes[start:]), bound, side="right"))
        fit = min(max(fit // 16, 1) * 16, 256) if start + fit < ROWS else fit
        expected.append(list(range(start, min(start + fit, ROWS))))
        start += fit
    batches = read_all(open_job(path, bound), batch_size=16, seed=2)
    assert blocks(batches) == expected
    assert [batch.batch_size for batch in batches[:-1]] == [16] * (len(batches) - 1)
    shuffled = [row for batch in batches for row in batch.dense[:, 0].long().tolist()]
    assert shuffled != sorted(shuffled)


def test_the_default_bound_cuts_no_block_of_narrow_rows(path):
    expected = read_all(open_job(path, 2**62), seed=1)
    assert_same_batches(read_all(open_job(path, 1 << 30), seed=1), expected)
    assert parse_default() == 1 << 30


def parse_default():
    job = parse_job({
        "data": {"source": {"format": "synthetic"}, "label": {"column": "click"}},
        "features": [{"columns": ["c0"]}],
    })
    return job.data.shuffle.block_bytes


def test_chunks_and_threads_do_not_change_the_blocks(path, monkeypatch):
    runs = []
    for chunk, threads in [(37, 1), (256, 2), (1, 4)]:
        monkeypatch.setattr(columnar, "CHUNK_ROWS", chunk)
        monkeypatch.setattr(columnar, "EXTENT_ROWS", 90 if threads == 1 else 180)
        found = read_all(open_job(path, 3_000, threads), batch_size=16, epochs=2, seed=4)
        runs.append((blocks(found), rows_of(found)))
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0][0]) > 5


@pytest.mark.parametrize("block_rows", [0, 256])
def test_resumes_at_every_batch(path, block_rows):
    dataset = open_job(path, 2_500, block_rows=block_rows)
    assert_resumes_everywhere(dataset, batch_size=16, epochs=2, seed=3)


def test_no_block_that_draws_negatives_is_short(path):
    negatives = {"per_positive": 3, "columns": ["item"]}
    dataset = open_job(path, 2_500, negatives=negatives, label=None)
    batches = read_all(dataset, batch_size=32, seed=5)
    sizes = [len(rows) // 4 for rows in blocks(batches)]
    assert sum(sizes) == ROWS
    assert len(sizes) > 5
    # One of another item is always there.
    assert min(sizes) >= 8
    assert sizes[-1] >= 8
    assert_resumes_everywhere(dataset, batch_size=32, seed=5)


@pytest.mark.parametrize("bounds", [(2**62, 1_000), (1_000, 2**62), (3_000, 2_000)])
def test_another_bound_at_resume_neither_loses_nor_repeats(path, bounds):
    before, after = (open_job(path, bound) for bound in bounds)
    whole = read_all(before, batch_size=16)
    for taken in (1, 10, 25):
        rest = read_all(after, batch_size=16, start=whole[taken - 1].end)
        rows = sum(blocks([*whole[:taken]]) + blocks(rest), [])
        assert sorted(rows) == list(range(ROWS))
