"""Which windows of streams that grow are complete."""

import time

import pytest

from penstock.config.streams import StreamsSource
from penstock.data.windows import growing
from penstock.data.windows.graph import StoredPaths
from penstock.data.windows.growing import Listing, begins, has_ended, next_span
from penstock.data.windows.patterns import PathPattern
from penstock.errors import DataError
from penstock.position import Position, Span
from tests.unit.windows.test_graph import Store, source

HOURS = "logs/{YYYY}-{MM}-{DD}/{HH}.parquet"
DAYS = "daily/{YYYY}{MM}{DD}.parquet"
MARKERS = "logs/{YYYY}-{MM}-{DD}/_{HH}"


def streams(*sources, **fields):
    common = {"name": "s", "window": "hour", "start": "2026-03-01", "end": "now"}
    return {**common, **fields, "sources": list(sources)}


def listed(paths, *of, since=None, first=0, **fields):
    """The next span of some streams; of each window, its start in hours from March 1."""
    config, store = StreamsSource(streams=list(of), **fields), Store(paths)
    stored = {
        f"{stream.name}/{one.name}": StoredPaths(
            store,
            PathPattern(one.files.path),
            None if one.marker is None else PathPattern(one.marker),
        )
        for stream in config.streams
        for one in stream.sources
    }
    return next_span(config, stored, since or begins(config), first)


def hours(numbers, names=("",)):
    return [
        f"logs/2026-03-{1 + n // 24:02}/{name}{n % 24:02}.parquet"
        for n in numbers
        for name in names
    ]


def markers(numbers):
    return [f"logs/2026-03-{1 + n // 24:02}/_{n % 24:02}" for n in numbers]


def found(listing):
    begin = StreamsSource(streams=[streams(source("x", HOURS))]).streams[0].start_ms
    return [(one.start_ms - begin) // 3_600_000 for one in listing.span.windows]


def test_an_hour_is_complete_when_a_later_one_has_a_file():
    x = streams(source("x", HOURS))
    assert listed(["logs/readme"], x) is None
    assert listed(hours([0]), x) is None
    assert found(listed(hours([0, 1]), x)) == [0]
    several = listed(hours([0, 1, 2, 30]), x, first=7)
    assert found(several) == [0, 1, 2]
    assert several.paths == hours([0, 1, 2])
    assert several.span.first_file == 7
    # Hours without a file are behind, too.
    assert listed(hours([0, 1, 2, 30]), x, since=several.span.until_ms) is None
    again = listed(hours([0, 1, 2, 5, 30, 31]), x, since=several.span.until_ms)
    assert found(again) == [30], "what comes late is in none"


def test_a_file_may_be_late_by_event_time():
    x = streams(source("x", HOURS, lateness="2h"))
    assert listed(hours([0, 1, 2]), x) is None
    assert found(listed(hours([0, 1, 2, 3]), x)) == [0]
    assert found(listed(hours([0, 5]), x)) == [0]


def test_markers_say_what_is_complete():
    x = streams(source("x", HOURS, marker=MARKERS))
    assert listed(hours([0, 1]), x) is None
    assert found(listed(hours([0, 1]) + markers([0]), x)) == [0]
    assert found(listed(hours([0, 1]) + markers([0, 1]), x)) == [0, 1]
    # One that is not complete holds up those behind it.
    assert found(listed(hours([0, 1, 2]) + markers([0, 2]), x)) == [0]
    assert listed(hours([0, 1]) + markers([1]), x) is None


def test_the_clock_closes_what_nothing_follows(monkeypatch):
    x = streams(source("x", HOURS, closes_after="30min"))
    begin = StreamsSource(streams=[x]).streams[0].start_ms
    for at_min, complete in ((149, [0]), (150, [0, 1]), (300, [0, 1])):
        monkeypatch.setattr(time, "time", lambda at=at_min: begin / 1000 + 60 * at)
        listing = listed(hours([0, 1]), x)
        assert found(listing) == complete
    # But not an hour that lacks its marker.
    y = streams(source("x", HOURS, closes_after="30min", marker=MARKERS))
    assert found(listed(hours([0, 1]) + markers([0]), y)) == [0]


def test_a_window_waits_for_all_of_its_sources():
    both = streams(source("x", HOURS), source("y", DAYS), window="day")
    assert listed([*hours(range(30)), "daily/20260301.parquet"], both) is None
    paths = [*hours(range(30)), "daily/20260301.parquet", "daily/20260302.parquet"]
    listing = listed(paths, both)
    assert [one.files for one in listing.span.windows] == [(24, 1)]
    assert listing.paths == [*hours(range(24)), "daily/20260301.parquet"]


def test_a_delay_is_counted():
    both = streams(source("x", HOURS), source("y", "late/{YYYY}{MM}{DD}{HH}.parquet", delay="3h"))
    late = [f"late/20260301{n:02}.parquet" for n in range(4)]
    # y is complete up to its hour 3, which is served as hour 6.
    listing = listed(hours(range(20)) + late, both)
    assert found(listing) == [0, 1, 2, 3, 4, 5]
    assert [one.files for one in listing.span.windows[2:5]] == [(1, 0), (1, 1), (1, 1)]


def test_streams_side_by_side_wait_for_each_other():
    x = streams(source("x", HOURS), name="x")
    y = streams(source("y", "other/{YYYY}{MM}{DD}{HH}.parquet"), name="y")
    other = [f"other/20260301{n:02}.parquet" for n in (0, 2)]
    listing = listed(hours(range(10)) + other, x, y, together=True)
    assert [(one.stream, one.files) for one in listing.span.windows] == [
        (0, (1,)), (1, (1,)), (0, (1,)),
    ]  # fmt: skip
    fixed = streams(source("x", HOURS), name="x", end="2026-03-01T04")
    one_by_one = listed(hours(range(10)) + other, fixed, y)
    assert [one.stream for one in one_by_one.span.windows] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_span_has_some_files_and_the_next_goes_on(monkeypatch, most):
    monkeypatch.setattr(growing, "_MOST_FILES", most)
    x = streams(source("x", "logs/{YYYY}-{MM}-{DD}/*{HH}.parquet"), name="x")
    y = streams(source("y", DAYS), name="y", window="day")
    paths = hours([0, 1, 5, 26, 40, 80], ("a", "b")) + [
        f"daily/202603{day:02}.parquet" for day in (1, 2, 3, 4)
    ]
    spans, since, first = [], None, 0
    while (listing := listed(paths, x, y, since=since, first=first, together=True)) is not None:
        assert Listing.from_plain(listing.to_plain()) == listing
        spans.append(listing)
        since, first = listing.span.until_ms, first + len(listing.paths)
        assert listing.span.first_file + len(listing.paths) == first
    every = [path for one in spans for path in one.paths]
    monkeypatch.setattr(growing, "_MOST_FILES", 10_000)
    whole = listed(paths, x, y, together=True)
    assert every == list(whole.paths)
    assert len(every) == len(set(every)) == 13
    assert [w for one in spans for w in one.span.windows] == list(whole.span.windows)
    assert since == whole.span.until_ms


def test_streams_with_an_end_come_to_it():
    config = StreamsSource(streams=[streams(source("x", HOURS), end="2026-03-01T03")])
    assert not has_ended(config, begins(config))
    assert has_ended(config, [begins(config)[0] + 3 * 3_600_000])
    assert not has_ended(StreamsSource(streams=[streams(source("x", HOURS))]), [2**60])
    # All that lies before it is complete.
    assert found(listed(hours([0, 2, 4]), streams(source("x", HOURS), end="2026-03-01T03"))) == [
        0,
        2,
    ]


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(DataError, match="nowhere"):
        listed(hours([0]), streams(source("x", "nowhere/{YYYY}{MM}{DD}.parquet"), window="day"))


def test_a_position_keeps_its_span():
    listing = listed(hours([0, 1, 2]), streams(source("x", HOURS)))
    position = Position(span=listing.span)
    assert Position.from_dict(position.to_dict()) == position
    assert isinstance(Position.from_dict(position.to_dict()).span, Span)
    fields = Position().to_dict()
    del fields["span"]  # of before
    assert Position.from_dict(fields) == Position()
