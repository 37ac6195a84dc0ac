"""Opening reads next to nothing; how many rows there are is learnt while they are read."""

import io
import threading
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from penstock.data import Dataset
from penstock.data.formats import compressed, lines
from penstock.data.plan.counting import in_parallel
from penstock.data.source import RowCount
from penstock.errors import DataError
from penstock.events.event import Event, Role
from penstock.report.display import Display
from penstock.training.planned import planned_samples
from tests.contract.data_cases import make_job, make_table, read_all, write_case

ROWS = 2000
KINDS = ("csv", "csv.gz", "jsonl", "quoted csv.zst")


@pytest.fixture
def pieces(monkeypatch):
    """The pieces of text that are read, by the first byte or row of each."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(lines, "READ_BYTES", 1500)
    read, original = [], lines.LineFiles._pieces

    def spied(self, split):
        for piece in original(self, split):
            read.append(piece.start)
            yield piece

    monkeypatch.setattr(lines.LineFiles, "_pieces", spied)
    # What is decompressed ahead counts as read.
    whole = compressed._Counted.read
    monkeypatch.setattr(compressed._Counted, "read", lambda self, size: whole(self, min(size, 500)))
    return read


@pytest.mark.parametrize("kind", KINDS)
def test_opening_reads_one_piece_and_the_rest_is_learnt(kind, tmp_path, pieces):
    job = make_job(write_case(kind, make_table(ROWS), tmp_path), split=None)
    dataset = Dataset.open(job)
    assert planned_samples(job, dataset) is None or not planned_samples(job, dataset).is_exact
    assert len(pieces) <= 1
    with dataset.batches("train", batch_size=32) as batches:
        for _ in range(20):
            next(batches)
        learnt = dataset.expected_samples("train")
        assert not learnt.is_exact
        # A block of zstd is as large as this file.
        assert kind.endswith("zst") or 0.4 * ROWS < learnt.rows < 1.6 * ROWS
        list(batches)
    assert dataset.expected_samples("train") == (ROWS, True)
    assert planned_samples(job, dataset) == (ROWS * job.training.epochs, True)


@pytest.mark.parametrize("kind", ["parquet", "orc", "arrow", "arrow stream"])
def test_what_is_expected_of_other_formats(kind, tmp_path):
    dataset = Dataset.open(make_job(write_case(kind, make_table(ROWS), tmp_path), split=None))
    expected = dataset.expected_samples("train")
    if kind == "arrow stream":
        assert expected is None
    else:
        assert expected == (ROWS, len(dataset._parts["train"].source._groups) == 2)
        list(dataset._parts["train"].extents)
        assert dataset.expected_samples("train") == (ROWS, True)
    read_all(dataset)
    assert dataset.num_rows("train") == ROWS
    assert dataset.expected_samples("train") == (ROWS, True)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_range_of_times_is_estimated_by_the_share_so_far(kind, tmp_path):
    source = write_case(kind, make_table(ROWS), tmp_path)
    split = {"by": "time", "at": 1_700_000_000_000 + 1000 * ROWS // 4}
    dataset = Dataset.open(make_job(source, split=split))
    read_all(dataset)
    expected = dataset.expected_samples("train")
    assert not expected.is_exact
    assert abs(expected.rows - ROWS // 4) <= ROWS // 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_fraction_is_counted_once_and_says_so(kind, tmp_path, pieces):
    job = make_job(write_case(kind, make_table(ROWS), tmp_path))
    told = []

    def stages(name):
        told.append(name)
        return lambda rows, share: told.append((rows, share))

    dataset = Dataset.open(job, stages=stages)
    assert told[0] == "rows, to divide them"
    # Each piece once, and those of the split that is cut once more.
    assert len(pieces) <= 2 * len(set(pieces))
    before = len(pieces)
    assert dataset.expected_samples("train") == (round(ROWS * 0.8), True)
    assert dataset.num_rows("evaluation") == round(ROWS * 0.2)
    assert len(pieces) == before
    told.clear()
    (tmp_path / "other").mkdir()
    Dataset.open(make_job(write_case("parquet", make_table(50), tmp_path / "other")), stages=stages)
    assert not told


def test_work_in_parallel_comes_in_order():
    taken = []

    def items():
        for number in range(200):
            taken.append(number)
            yield number

    with closing(in_parallel(lambda n, stopped: n * n, items())) as squares:
        for number in range(50):
            assert next(squares) == number**2
        assert len(taken) < 150, "taken far ahead"
    assert list(in_parallel(lambda n, stopped: n, [])) == []


def test_work_in_parallel_fails_where_it_fails_and_stops():
    unwanted = threading.Event()

    def work(number, is_unwanted):
        if number == 3:
            raise DataError("three")
        while number > 3 and not is_unwanted():
            pass
        if number > 3:
            unwanted.set()
        return number

    found = []
    with pytest.raises(DataError, match="three"):
        found += in_parallel(work, range(5))
    assert unwanted.wait(10)


def test_who_waits_for_parallel_work_is_called():
    ticks = threading.Event()

    def work(number, is_unwanted):
        assert ticks.wait(10)
        return number

    assert list(in_parallel(work, [1], ticks.set)) == [1]


def shown(total, samples):
    out = io.StringIO()
    display = Display(Console(file=out, width=200), lambda: total, Path("run"))
    values = {"samples": samples, "samples_per_s": 100.0, "loss": 0.5}
    display.take(Event("train", 10, 0.0, Role("trainer", 0), values))
    return out.getvalue()


def test_lines_say_how_sure_the_rest_is():
    assert "ETA 0:01:00" in shown(RowCount(7000, is_exact=True), 1000)
    assert "ETA about 0:01:00" in shown(RowCount(7000, is_exact=False), 1000)
    assert "ETA about 0:00:00" in shown(RowCount(700, is_exact=False), 1000)
    assert "ETA unknown" in shown(None, 1000)


@pytest.mark.parametrize(
    ("total", "share"),
    [(RowCount(4000, is_exact=True), " 25 %"), (RowCount(4000, is_exact=False), "~25 %")],
)
def test_the_bar_says_how_sure_the_share_is(total, share):
    out = io.StringIO()
    known = [None]
    console = Console(file=out, force_terminal=True, width=100)
    display = Display(console, lambda: known[0], Path("run"))
    display.take(Event("start", 0, 0.0, Role("trainer", 0), {"samples": 0}))
    display.advance(1, 1000)
    display._progress.refresh()
    assert "%" not in out.getvalue()
    known[0] = total
    display._next_total_s = 0.0
    display.advance(2, 1000)
    display._progress.refresh()
    display.close()
    assert share in out.getvalue()
