"""Streams that grow while they are read: the same batches as if all had been there."""

import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.config.streams import StreamsSource
from penstock.data import Dataset
from penstock.data.windows import folders, growing
from penstock.errors import ConfigError, DataError, ListingError
from tests.unit.data.test_streams import (
    all_ids,
    config,
    days,  # noqa: F401 (a fixture)
    ids_in,
    in_lanes,
    small_pieces,  # noqa: F401 (a fixture)
    write,
)
from tests.world.ranks import World

KWARGS = {"batch_size": 20, "seed": 3}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(StreamsSource, "poll_s", 0.002)
    monkeypatch.setattr(growing, "_MOST_FILES", 5)


class Shown:
    """A folder in which the days of another one appear, two each time that somebody waits."""

    def __init__(self, whole, folder):
        self.whole, self.folder, self.days = whole, folder, 0
        for number in range(10, 13):  # what says that the days before are complete
            day = datetime(2026, 2, 24) + timedelta(days=number)
            write(whole / f"new/{day:%Y/%m/%d}/0.parquet", 1000_000_000 + number, 5)
            write(whole / f"old.{day:%Y%m%d}.csv", 1000_000_100 + number, 5)
        (folder / "new").mkdir()
        self.show()

    def show(self, *_):
        for number in (self.days, self.days + 1):
            day = datetime(2026, 2, 24) + timedelta(days=number)
            for pattern in (f"new/{day:%Y/%m/%d}/*.parquet", f"old.{day:%Y%m%d}.csv"):
                for path in sorted(self.whole.glob(pattern)):
                    to = self.folder / path.relative_to(self.whole)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, to)
        self.days += 2


@pytest.fixture
def shown(days, tmp_path_factory):  # noqa: F811
    return Shown(days, tmp_path_factory.mktemp("shown"))


def job(source, **data):
    return parse_job({
        "data": {
            "source": source,
            "label": {"column": "label"},
            "shuffle": {"block_rows": 40},
            **data,
        },
        "features": [{"columns": ["id"]}],
    })


def taken(loader, number):
    """So many batches, with where they end; more may come."""
    with loader:
        return [(one.sparse.values.tolist(), one.end) for one in islice(loader, number)]


def growing_job(shown):
    return job(config(shown.folder, end="now"))


def opened(shown, **kwargs):
    while True:
        try:
            dataset = Dataset.open(growing_job(shown), **kwargs)
        except DataError as error:
            assert "no window is complete yet" in str(error)
            shown.show()
            continue
        dataset.tell_of_waits(shown.show)
        return dataset


@pytest.fixture
def whole(shown):
    """The batches of all that is complete in the end."""

    def batches(lanes):
        dataset = Dataset.open(job(config(shown.whole)))
        return ids_in(dataset.batches("train", start=in_lanes(lanes), **KWARGS))

    return batches


@pytest.mark.parametrize("lanes", [1, 4])
def test_batches_are_those_of_streams_that_were_there(shown, whole, lanes):
    expected = whole(lanes)
    dataset = opened(shown)
    assert dataset.grows and dataset.expected_samples("train") is None
    loader = dataset.batches("train", start=in_lanes(lanes), **KWARGS)
    assert loader.waited_s == 0
    found = taken(loader, len(expected))
    assert [ids for ids, _ in found] == expected
    assert sorted(one for ids, _ in found for one in ids) == [
        one for one in all_ids(shown.whole) if one < 1000_000_000
    ]
    assert shown.days > 8
    assert loader.waited_s > 0
    files = [len(end.files) for _, end in found]
    assert max(files) < 12, "a position lists the files of its span alone"


@pytest.mark.parametrize("lanes", [1, 4])
def test_one_goes_on_from_any_batch(shown, whole, lanes):
    expected = whole(lanes)
    dataset = opened(shown)
    found = taken(dataset.batches("train", start=in_lanes(lanes), **KWARGS), len(expected))
    for number in range(0, len(found), 2):
        after = found[number][1]
        again = Dataset.open(growing_job(shown), after=after)
        rest = taken(again.batches("train", start=after, **KWARGS), len(expected) - number - 1)
        assert [ids for ids, _ in rest] == expected[number + 1 :]
        # With an end, by now, the run comes to it.
        again = Dataset.open(job(config(shown.folder)), after=after)
        assert ids_in(again.batches("train", start=after, **KWARGS)) == expected[number + 1 :]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_read_what_the_first_has_listed(shown, whole, size):
    expected = whole(4)
    first = opened(shown)._spans.first.span

    def of_rank(group):
        dataset = opened(shown)
        assert dataset._spans.first.span == first
        found = taken(
            dataset.batches("train", start=in_lanes(4), ranks=group, **KWARGS), len(expected)
        )
        return [ids for ids, _ in found]

    parts = World(size).run(of_rank)
    joined = [sorted(sum(of_ranks, [])) for of_ranks in zip(*parts, strict=True)]
    assert joined == [sorted(batch) for batch in expected]


def test_one_that_waits_can_be_closed(shown):
    dataset = opened(shown)
    waits = []
    dataset.tell_of_waits(waits.append)
    loader = dataset.batches("train", start=in_lanes(2), **KWARGS)
    with loader:
        while not loader.is_waiting:
            taken_one = next(loader)
            assert taken_one.batch_size
            if loader.position.samples >= sum(1 for _ in all_ids(shown.folder)) // 2:
                break
    assert not loader._assembler.is_alive()
    assert len(waits) <= 1


def test_a_file_of_a_later_span_without_a_column_is_named(shown):
    dataset = opened(shown)
    day = datetime(2026, 2, 24) + timedelta(days=4)
    path = shown.whole / f"new/{day:%Y/%m/%d}/0.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"label": [0]}), path)
    with (
        dataset.batches("train", start=in_lanes(2), **KWARGS) as loader,
        pytest.raises(DataError, match=r"2026/02/28.*'id'|'id'.*2026/02/28"),
    ):
        for _ in loader:
            pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"split": {"evaluation": 0.1}}}, "data.split"),
        ({"training": {"epochs": 2}}, "training.epochs 2"),
        (
            {"training": {"optimizer": {"schedule": {"decay": "linear", "decay_steps": "end"}}}},
            "end of the run",
        ),
        ({"stream": {"start": "2027-13-01"}}, "start"),
        ({"source": {"poll": "0s"}}, "poll 0s"),
    ],
)
def test_what_needs_an_end_is_refused(tmp_path, change, message):
    source = config(tmp_path, end="now", **change.get("stream", {})) | change.get("source", {})
    fields = {
        "data": {"source": source, "label": {"column": "label"}, **change.get("data", {})},
        "features": [{"columns": ["id"]}],
        "training": change.get("training", {}),
    }
    with pytest.raises(ConfigError, match=message):
        parse_job(fields)


@pytest.mark.parametrize("lanes", [1, 4])
def test_the_rows_of_the_files_are_those_that_a_position_counts(shown, whole, lanes):
    number = len(whole(lanes))
    found = taken(opened(shown).batches("train", start=in_lanes(lanes), **KWARGS), number)
    spans = set()
    for _, end in found[::3]:
        spans.add(end.span.first_file)
        audit = Dataset.open(growing_job(shown), after=end).audit(end)
        assert audit.is_right and audit.in_files > 0
        wrong = replace(end, counts=end.counts._replace(read=end.counts.read - 1))
        assert not Dataset.open(growing_job(shown), after=wrong).audit(wrong).is_right
    assert len(spans) > 2


def test_an_end_before_what_was_listed_is_kept(shown):
    dataset = opened(shown)
    for _ in range(5):
        shown.show()
    (_, first), *_, (ids, last) = taken(dataset.batches("train", start=in_lanes(2), **KWARGS), 16)
    reached = max(ids) // 1000_000
    assert reached > 2
    end = f"{datetime(2026, 2, 24) + timedelta(days=2):%Y-%m-%d}"
    fixed = job(config(shown.folder, end=end))
    rest = ids_in(Dataset.open(fixed, after=first).batches("train", start=first, **KWARGS))
    every = [one for one in all_ids(shown.folder) if one < 2_000_000]
    assert len(every) - first.samples == sum(map(len, rest)) > 0
    with pytest.raises(DataError, match=f"was begun, but stream 'clicks' ends at '{end}'"):
        Dataset.open(fixed, after=last)


def test_nothing_comes_behind_a_stream_without_an_end(tmp_path):
    source = config(tmp_path, end="now")
    source["streams"] *= 2
    source["streams"][1] = source["streams"][1] | {"name": "other", "end": "2026-05-01"}
    with pytest.raises(ConfigError, match="'clicks' has no end"):
        job(source)
    job(source | {"together": True})


def test_a_run_that_began_with_an_end_has_one(shown):
    fixed = Dataset.open(job(config(shown.whole)))
    (_, end), *_ = taken(fixed.batches("train", start=in_lanes(2), **KWARGS), 1)
    with pytest.raises(DataError, match="cannot go on with `end: now`"):
        Dataset.open(job(config(shown.whole, end="now")), after=end)


def test_what_is_no_file_is_told_once(shown, whole):
    expected, told = whole(2), []
    dataset = opened(shown)
    dataset.tell_of_left_out(told.append)
    for number in (4, 8):
        day = datetime(2026, 2, 24) + timedelta(days=number)
        path = shown.folder / f"new/{day:%Y/%m/%d}/x.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("nowhere")
    loader = dataset.batches("train", start=in_lanes(2), **KWARGS)
    assert [ids for ids, _ in taken(loader, len(expected))] == expected
    told = [text for text in told if "neither a file nor a folder" in text]
    assert 1 <= len(told) <= 2
    assert "2 so far" in told[-1]


def test_a_file_that_is_gone_is_named_with_a_remedy(shown):
    (_, end), *_ = taken(opened(shown).batches("train", start=in_lanes(2), **KWARGS), 1)
    begun = next(tag.path for tag in end.files if tag.is_begun)
    unread = next(tag.path for tag in reversed(end.files) if not tag.is_begun)
    for path, what in ((begun, "rows of it were read"), (unread, "it was still to be read")):
        shutil.move(path, f"{path}.away")
        with pytest.raises(DataError, match=rf"{path}: removed, and {what} .* put it back"):
            Dataset.open(growing_job(shown), after=end)
        shutil.move(f"{path}.away", path)
    Dataset.open(growing_job(shown), after=end)


class Failing:
    """Lists folders, but for some times."""

    def __init__(self, monkeypatch, times):
        self.times, self.failed = times, 0
        plain = folders.listed

        def listed(filesystem, folder):
            if self.failed < self.times and self.is_on:
                self.failed += 1
                raise ListingError(f"{folder}: cannot be listed: gone")
            return plain(filesystem, folder)

        self.is_on = False
        monkeypatch.setattr(folders, "listed", listed)


@pytest.mark.parametrize("times", [3, 200])
def test_a_listing_that_fails_is_tried_again_some_times(shown, whole, monkeypatch, times):
    expected, failing, told = whole(2), Failing(monkeypatch, times), []
    monkeypatch.setattr(StreamsSource, "poll_s", 0.0005)
    dataset = opened(shown)
    dataset.tell_of_left_out(told.append)
    failing.is_on = True
    loader = dataset.batches("train", start=in_lanes(2), **KWARGS)
    if times == 3:
        assert [ids for ids, _ in taken(loader, len(expected))] == expected
    else:
        with pytest.raises(ListingError, match="cannot be listed: gone"):
            taken(loader, len(expected))
    tries = [text for text in told if "it will be tried again (" in text]
    assert 0 < len(tries) <= 6
    assert "(1 of 6)" in tries[0]
