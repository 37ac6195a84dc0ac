"""The windows of a job: every file in one of them, in the order of a plain loop over all files."""

import threading
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from penstock.config import StreamsSource
from penstock.data.windows import graph, periods
from penstock.data.windows.calendar import moment_ms, windows
from penstock.data.windows.folders import Entries
from penstock.data.windows.graph import StoredPaths, TaskGraph
from penstock.data.windows.patterns import PathPattern
from penstock.errors import DataError

HOUR = 3_600_000


class Store:
    """Folders in memory; those of some sources answer when they are let."""

    def __init__(self, paths):
        self.below = {"": (set(), set())}
        for path in paths:
            folder, _, name = path.rpartition("/")
            self.below.setdefault(folder, (set(), set()))[1].add(name)
            while folder:
                parent, _, name = folder.rpartition("/")
                self.below.setdefault(parent, (set(), set()))[0].add(name)
                folder = parent
        self.sizes = {}
        """Of paths whose size is not the length of their name."""
        self.held = {}
        self.asked = []

    def entries(self, folder):
        self.asked.append(folder)
        for prefix, gate in self.held.items():
            if folder.startswith(prefix):
                assert gate.wait(20)
        if folder not in self.below:
            return None
        folders, files = self.below[folder]
        prefix = folder + "/" if folder else ""
        sizes = [self.sizes.get(prefix + name, len(name)) for name in files]
        return Entries.of(list(folders), list(files), sizes)


def graph_of(store, streams, **fields):
    config = StreamsSource(streams=streams, **fields)
    stored = {
        f"{stream.name}/{source.name}": StoredPaths(
            store,
            PathPattern(source.files.path),
            None if source.marker is None else PathPattern(source.marker),
        )
        for stream in config.streams
        for source in stream.sources
    }
    return TaskGraph(config, stored)


def source(name, path, **fields):
    return {"name": name, "files": {"format": "parquet", "path": path}, **fields}


def hour_paths(folder, moments, rng):
    return [
        f"{folder}/{one:%Y-%m-%d}/{one:%H}/{part}.parquet"
        for one in moments
        for part in range(int(rng.integers(1, 3)))
    ]


def moments_of(store, name, zone):
    """Of all files of a source, by their path."""
    for folder, (_, files) in store.below.items():
        if not folder.startswith(name + "/"):
            continue
        for file in files:
            day, hour = folder.split("/")[1:3]
            at = datetime.fromisoformat(day).replace(hour=int(hour))
            yield moment_ms(at, zone), f"{folder}/{file}"


def naive(store, streams, together):
    """Every file looked at for every window."""
    found = []
    for stream in streams:
        zone = ZoneInfo(stream.zone)
        for window in windows(stream.unit, zone, stream.start_ms, stream.end_ms):
            files = [
                path
                for one in stream.sources
                for at, path in sorted(moments_of(store, one.name, zone))
                if window.start_ms <= at + one.delay_ms < window.stop_ms
            ]
            found.append((window.stop_ms, stream.name, files))
    return sorted(found, key=lambda one: one[0]) if together else found


@pytest.mark.parametrize("seed", range(40))
def test_random_jobs(seed):
    rng = np.random.default_rng(seed)
    zone = ["UTC", "Europe/Paris", "Australia/Lord_Howe"][seed % 3]
    # At the ends of a month and a year, and where clocks change.
    first = datetime.fromisoformat(
        str(rng.choice(["2025-12-30", "2026-02-27", "2026-03-28", "2026-04-04", "2026-10-24"]))
    )
    names = ["a", "b", "c"][: int(rng.integers(1, 4))]
    moments = [first + timedelta(hours=n) for n in range(5 * 24)]
    store = Store([
        path
        for name in names
        for path in hour_paths(name, [one for one in moments if rng.random() < 0.7], rng)
    ])
    streams = [
        {
            "name": name,
            "window": str(rng.choice(["hour", "day", "90min", "6h"])),
            "zone": zone,
            "start": (first + timedelta(hours=int(rng.integers(0, 30)))).isoformat(),
            "end": (first + timedelta(hours=int(rng.integers(31, 130)))).isoformat(),
            "sources": [
                source(
                    one,
                    one + "/{YYYY}-{MM}-{DD}/{HH}/*.parquet",
                    delay=str(rng.choice(["0s", "1h", "30min", "26h"])),
                )
                for one in names
            ],
        }
        for name in ("x", "y")[: int(rng.integers(1, 3))]
    ]
    together = bool(seed % 2)
    made = graph_of(store, streams, together=together)
    found = [
        (
            one.window.stop_ms,
            one.stream.name,
            [path for part in one.sources for path in part.files.paths],
        )
        for one in made
    ]
    assert found == naive(store, StreamsSource(streams=streams).streams, together)
    assert threading.active_count() < 50


PATTERNS = [
    "{n}/{YYYY}-{MM}-{DD}/{HH}/*.parquet",
    "{n}/{YYYY}/{n}-{MM}{DD}{HH}-*.parquet",
    "{n}.{YYYY}{MM}{DD}.*.parquet",
    "{n}/*/{YYYY}-{MM}/part?{DD}_{HH}.parquet",
    "{n}/h*/{YYYY}{MM}{DD}/x*/*.parquet",
]
CHANGES = [
    ("Europe/Paris", "2026-03-28"),
    ("Europe/Paris", "2026-10-24"),
    ("Australia/Lord_Howe", "2026-10-03"),
    ("Australia/Lord_Howe", "2026-04-04"),
    ("America/Sao_Paulo", "2017-10-14"),
    ("America/Havana", "2026-10-31"),
    ("America/St_Johns", "2025-12-30"),
    ("UTC", "2024-02-27"),
]


def path_at(pattern, moment, rng):
    path = moment.strftime(
        pattern
        .replace("{YYYY}", "%Y").replace("{MM}", "%m").replace("{DD}", "%d").replace("{HH}", "%H")
    )  # fmt: skip
    while "*" in path or "?" in path:
        # `-` comes before the `/` behind the name of a folder, `a` after it.
        glob, texts = ("*", ["a", "a-", "a.b", "0"]) if "*" in path else ("?", ["-", ".", "a"])
        path = path.replace(glob, str(rng.choice(texts)), 1)
    return path


@pytest.mark.parametrize("seed", range(40))
def test_random_trees_of_hours_and_days(seed, monkeypatch):
    """Hours and days in one stream, files anywhere, names that are none, small bounds."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(graph, "_FILES_AHEAD", int(rng.choice([1, 20, 1 << 20])))
    monkeypatch.setattr(periods, "_AHEAD", int(rng.choice([1, 3, 16])))
    zone, first = CHANGES[seed % len(CHANGES)]
    first = datetime.fromisoformat(first)
    sources, files = [], {}
    for name in ("a", "b", "c")[: int(rng.integers(1, 4))]:
        pattern = str(rng.choice(PATTERNS)).replace("{n}", name)
        sources.append(source(name, pattern, delay=str(rng.choice(["0s", "1h", "30min", "26h"]))))
        for hour in rng.integers(0, 4 * 24, 60):
            moment = first + timedelta(hours=int(hour))
            path = path_at(pattern, moment, rng)
            begin = moment if "{HH}" in pattern else moment.replace(hour=0)
            files[path] = (name, moment_ms(begin, ZoneInfo(zone)), begin)
    others = [path + "~" for path in files] + ["_" + path for path in files]
    others += [path.replace(".parquet", ".parque") for path in files]
    store = Store([*files, *rng.permutation(others)])
    stream = {
        "name": "s",
        "window": str(rng.choice(["day", "36h", "2d"])),
        "zone": zone,
        "start": (first + timedelta(hours=int(rng.integers(0, 30)))).isoformat(),
        "end": (first + timedelta(hours=int(rng.integers(31, 130)))).isoformat(),
        "sources": sources,
    }
    made = graph_of(store, [stream])
    config = StreamsSource(streams=[stream]).streams[0]
    expected = []
    for window in windows(config.unit, ZoneInfo(zone), config.start_ms, config.end_ms):
        for one in config.sources:
            of_source = sorted(
                (begin, path)
                for path, (name, at, begin) in files.items()
                if name == one.name and window.start_ms <= at + one.delay_ms < window.stop_ms
            )
            expected += [(window, one.name, path) for _, path in of_source]
    whole = [
        (found.window, part.source.name, path)
        for found in made
        for part in found.sources
        for path in part.files
    ]
    parts = [(one.window, one.source.name, path) for one in made.parts() for path in one.files]
    assert whole == expected
    assert parts == expected
    sizes = [size for found in made for part in found.sources for size in part.files.sizes]
    assert sizes == [len(path.rpartition("/")[2]) for _, _, path in expected]


DAYS = {
    "name": "s",
    "window": "day",
    "start": "2026-01-01",
    "end": "2026-01-04",
    "sources": [source("fast", "fast/{YYYY}{MM}{DD}.parquet"),
                source("slow", "slow/{YYYY}{MM}{DD}/*.parquet")],
}  # fmt: skip


def days_of(*months):
    return [f"slow/2026{month:02}{day:02}/1.parquet" for month in months for day in range(1, 29)]


def test_a_slow_source_holds_up_nobody_else():
    days = ("20260101", "20260102", "20260103")
    store = Store(
        [f"fast/{day}.parquet" for day in days] + [f"slow/{day}/1.parquet" for day in days]
    )
    gate = store.held["slow"] = threading.Event()
    made = graph_of(store, [DAYS])
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(made))
    thread.start()
    for _ in range(1000):
        if "fast" in store.asked:
            break
        threading.Event().wait(0.01)
    assert "fast" in store.asked
    assert not taken
    gate.set()
    thread.join(20)
    assert [len(one.sources) for one in taken] == [2, 2, 2]


def test_the_first_window_does_not_wait_for_the_last():
    store = Store([f"slow/202601{day:02}/1.parquet" for day in range(1, 29)])
    gate = store.held["slow/20260128"] = threading.Event()
    days = DAYS | {"end": "2026-01-29", "sources": [DAYS["sources"][1]]}
    found = iter(graph_of(store, [days]))
    assert list(next(found).sources[0].files.paths) == ["slow/20260101/1.parquet"]
    gate.set()
    assert len(list(found)) == 27


def test_one_that_is_not_taken_to_its_end_leaves_no_thread():
    store = Store([
        f"slow/2026{month:02}{day:02}/1.parquet" for month in (1, 2) for day in range(1, 29)
    ])
    days = DAYS | {"end": "2026-03-01", "sources": [DAYS["sources"][1]]}
    before = threading.active_count()
    found = iter(graph_of(store, [days]))
    next(found)
    found.close()
    for _ in range(1000):
        if threading.active_count() <= before:
            break
        threading.Event().wait(0.01)
    assert threading.active_count() <= before


def test_a_marker_that_is_missing_is_named():
    store = Store(["slow/20260101/1.parquet", "slow/20260101/_SUCCESS", "slow/20260102/1.parquet"])
    marked = DAYS["sources"][1] | {"marker": "slow/{YYYY}{MM}{DD}/_SUCCESS"}
    found = iter(graph_of(store, [DAYS | {"sources": [marked]}]))
    with pytest.raises(DataError, match="slow/20260102/_SUCCESS: missing"):
        next(found)


def test_a_window_that_may_lack_what_could_not_be_listed_is_not_given():
    store = Store(["slow/20260101/1.parquet", "slow/20260102/1.parquet"])

    def fails(folder):
        if folder.endswith("02"):
            raise DataError("slow/20260102: cannot be listed: gone")
        return Store.entries(store, folder)

    store.entries = fails
    found = iter(graph_of(store, [DAYS | {"sources": [DAYS["sources"][1]]}]))
    with pytest.raises(DataError, match="cannot be listed"):
        next(found)


def test_periods_wait_for_those_who_take_them(monkeypatch):
    monkeypatch.setattr(graph, "_PERIODS_AHEAD", 3)
    paths = [
        f"slow/2026{month:02}{day:02}/1.parquet" for month in range(1, 13) for day in range(1, 29)
    ]
    store = Store(paths)
    days = DAYS | {"end": "2027-01-01", "sources": [DAYS["sources"][1]]}
    found = iter(graph_of(store, [days]))
    next(found)
    threading.Event().wait(0.3)
    assert len(store.asked) < 60
    assert sum(len(one.sources) for one in found) == len(paths) - 1


def test_files_wait_for_those_who_take_them(monkeypatch):
    monkeypatch.setattr(graph, "_FILES_AHEAD", 100)
    paths = [
        f"slow/2026{month:02}{day:02}/{part}.parquet"
        for month in range(1, 13)
        for day in range(1, 29)
        for part in range(40)
    ]
    store = Store(paths)
    days = DAYS | {"end": "2027-01-01", "sources": [DAYS["sources"][1]]}
    found = iter(graph_of(store, [days]))
    next(found)
    threading.Event().wait(0.3)
    # The root, some within the bound, and as many that are listed when it is reached.
    assert len(store.asked) < 12
    assert sum(len(part.files) for one in found for part in one.sources) == len(paths) - 40


def test_large_folders_are_listed_few_at_a_time():
    paths = [f"slow/202601{day:02}/{part}.parquet" for day in range(1, 29) for part in range(30)]
    store = Store(paths)
    gate = store.held["slow/20260105"] = threading.Event()
    pattern = PathPattern("slow/{YYYY}{MM}{DD}/*.parquet")
    found = iter(periods.Periods(store, pattern, ZoneInfo("UTC"), 0, 2**42, most_ahead=70))
    assert [next(found).key[2] for _ in range(3)] == [1, 2, 3]
    threading.Event().wait(0.2)
    assert max(store.asked) <= "slow/20260106"
    gate.set()
    assert len(list(found)) == 25


def test_the_first_part_does_not_wait_for_its_window():
    store = Store([f"slow/2026010{day}/1.parquet" for day in (1, 2)] + ["fast/20260101.parquet"])
    gate = store.held["slow/20260102"] = threading.Event()
    both = {"window": "2d", "end": "2026-01-05", "sources": DAYS["sources"][::-1]}
    found = graph_of(store, [DAYS | both]).parts()
    assert list(next(found).files) == ["slow/20260101/1.parquet"]
    gate.set()
    assert [list(one.files) for one in found] == [
        ["slow/20260102/1.parquet"], ["fast/20260101.parquet"],
    ]  # fmt: skip


def test_streams_side_by_side_are_found_side_by_side():
    store = Store(["slow/20260101/1.parquet", "fast/20260101.parquet"])
    gate = store.held["slow"] = threading.Event()
    streams = [
        DAYS | {"name": "x", "sources": [DAYS["sources"][1]]},
        DAYS | {"name": "y", "sources": [DAYS["sources"][0]]},
    ]
    taken = []
    made = graph_of(store, streams, together=True)
    thread = threading.Thread(target=lambda: taken.extend(made))
    thread.start()
    for _ in range(1000):
        if "fast" in store.asked:
            break
        threading.Event().wait(0.01)
    assert "fast" in store.asked
    gate.set()
    thread.join(20)
    assert [(one.stream.name, len(one.sources)) for one in taken] == [
        ("x", 1), ("y", 1), ("x", 0), ("y", 0), ("x", 0), ("y", 0),
    ]  # fmt: skip


def test_folders_of_one_hour_are_listed_side_by_side():
    store = Store([f"slow/20260101/{shard}/1.parquet" for shard in range(5)])
    gate = store.held["slow/20260101/"] = threading.Event()
    one = source("slow", "slow/{YYYY}{MM}{DD}/*/*.parquet")
    taken = []
    made = graph_of(store, [DAYS | {"sources": [one]}])
    thread = threading.Thread(target=lambda: taken.extend(made.parts()))
    thread.start()
    for _ in range(1000):
        if len(store.asked) == 7:
            break
        threading.Event().wait(0.01)
    gate.set()
    thread.join(20)
    assert len(store.asked) == 7
    assert list(taken[0].files) == [f"slow/20260101/{shard}/1.parquet" for shard in range(5)]


def test_markers_of_many_days_in_one_folder_are_listed_once():
    days = [f"202601{day:02}" for day in range(1, 29)]
    store = Store([f"slow/{day}/1.parquet" for day in days] + [f"done/{day}" for day in days[:-1]])
    marked = DAYS["sources"][1] | {"marker": "done/{YYYY}{MM}{DD}"}
    found = graph_of(store, [DAYS | {"end": "2026-01-28", "sources": [marked]}])
    assert len(list(found.parts())) == 27
    assert store.asked.count("done") == 1
    with pytest.raises(DataError, match="done/20260128: missing"):
        list(graph_of(store, [DAYS | {"end": "2026-01-29", "sources": [marked]}]))
