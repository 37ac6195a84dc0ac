"""Files by hour or day: found as one would find them by looking at every file there is."""

import re
import threading
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from pyarrow import fs

from penstock.config.streams import fields_of_path
from penstock.data.windows.calendar import moment_ms
from penstock.data.windows.folders import Folders
from penstock.data.windows.patterns import PathPattern
from penstock.data.windows.periods import Periods
from penstock.errors import DataError

DAY = 86_400_000
PATTERNS = [
    "{YYYY}/{MM}/{DD}/{HH}/*.parquet",
    "{YYYY}-{MM}-{DD}/{HH}.csv",
    "dt={YYYY}{MM}{DD}/*/part-*.orc",
    "*/{YYYY}/{MM}-{DD}_{HH}.csv.gz",
    "{YYYY}/{YYYY}{MM}{DD}.jsonl",
    "log.{YYYY}{MM}{DD}{HH}.?.csv",
    "{DD}.{MM}.{YYYY}/*/{HH}.csv",
]


def path_at(pattern, moment, rng):
    text = pattern
    for field, value in zip(
        ("YYYY", "MM", "DD", "HH"),
        (f"{moment:%Y}", f"{moment:%m}", f"{moment:%d}", f"{moment:%H}"),
        strict=True,
    ):
        text = text.replace("{" + field + "}", value)
    while "*" in text or "?" in text:
        text = re.sub(r"[*?]", lambda _: str(rng.integers(0, 4)), text, count=1)
    return text


def found(folder, pattern, zone, start, end, store=None):
    store = store or Folders(fs.LocalFileSystem())
    path = PathPattern(f"{folder}/{pattern}")
    periods = list(Periods(store, path, ZoneInfo(zone), start, end))
    assert [one.begin_ms for one in periods] == sorted(one.begin_ms for one in periods)
    return {one.key: list(one.files.paths) for one in periods}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(4))
def test_random_trees(tmp_path, pattern, seed):
    rng = np.random.default_rng(seed)
    zone = ["UTC", "Europe/Paris", "Australia/Lord_Howe", "Pacific/Auckland"][seed]
    first = datetime(2024, 12, 30)
    expected = {}
    start = moment_ms(first + timedelta(hours=int(rng.integers(0, 60))), ZoneInfo(zone))
    end = start + int(rng.integers(DAY // 2, 5 * DAY))
    for _ in range(80):
        moment = first + timedelta(hours=int(rng.integers(0, 24 * 8)))
        path = tmp_path / path_at(pattern, moment, rng)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * int(rng.integers(1, 9)))
        key = (moment.year, moment.month, moment.day, moment.hour)[: len(fields_of_path(pattern))]
        begin = moment.replace(hour=moment.hour if len(key) == 4 else 0)
        if start <= moment_ms(begin, ZoneInfo(zone)) < end:
            expected.setdefault(key, set()).add(str(path))
    for name in ("_hidden", ".part", "other.txt", "2024", "20241231.csv~"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "1.parquet").write_bytes(b"x")
    assert found(tmp_path, pattern, zone, start, end) == {
        key: sorted(paths) for key, paths in sorted(expected.items())
    }


def written(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")


def test_periods_begin_with_their_hour_or_day(tmp_path):
    written(tmp_path, "2025/03/07.csv", "2025/03/07/05.csv")
    zone = ZoneInfo("Europe/Paris")
    for pattern, hour in (("{YYYY}/{MM}/{DD}.csv", 0), ("{YYYY}/{MM}/{DD}/{HH}.csv", 5)):
        begin = moment_ms(datetime(2025, 3, 7, hour), zone)
        for start, end, number in ((begin, begin + 1, 1), (begin + 1, 2**42, 0), (0, begin, 0)):
            assert len(found(tmp_path, pattern, "Europe/Paris", start, end)) == number


def test_files_of_several_folders_are_in_order_of_path(tmp_path):
    written(tmp_path, "a/20250307.csv", "a-b/20250307.csv", "a/b20250307.csv")
    (paths,) = found(tmp_path, "*/*{YYYY}{MM}{DD}.csv", "UTC", 0, 2**42).values()
    names = [path.removeprefix(f"{tmp_path}/") for path in paths]
    assert names == ["a-b/20250307.csv", "a/20250307.csv", "a/b20250307.csv"]


def test_hidden_names_are_passed_over(tmp_path):
    kept = "a/2025-03-07/1.csv"
    written(tmp_path, kept, "a/2025-03-07/_1.csv", "a/2025-03-07/.1.csv", "_a/2025-03-07/1.csv")
    written(tmp_path, "a/2025-03-07/1.csv~")
    (paths,) = found(tmp_path, "*/{YYYY}-{MM}-{DD}/*", "UTC", 0, 2**42).values()
    assert paths == [f"{tmp_path}/{kept}"]


def test_listings_do_not_depend_on_the_number_of_windows_and_far_folders_are_not_listed(tmp_path):
    for day in range(1, 29):
        for month in (1, 2, 3):
            folder = tmp_path / "2025" / f"{month:02}" / f"{day:02}"
            folder.mkdir(parents=True)
            (folder / "00.csv").write_bytes(b"x")
    start = moment_ms(datetime(2025, 2, 10), ZoneInfo("UTC"))
    store = Folders(fs.LocalFileSystem())
    pattern = "{YYYY}/{MM}/{DD}/{HH}.csv"
    assert len(found(tmp_path, pattern, "UTC", start, start + 3 * DAY, store)) == 3
    assert store.listings <= 2 + 1 + 3 + 2 * 3
    before = store.listings
    found(tmp_path, pattern, "UTC", start, start + 3 * DAY, store)
    assert store.listings == before


@pytest.mark.parametrize("name", ["2025/02/30.csv", "2025/13/01.csv"])
def test_a_day_that_there_is_not_is_named(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=re.escape(name)):
        found(tmp_path, "{YYYY}/{MM}/{DD}.csv", "UTC", 0, 4_000_000_000_000)


def test_paths_that_contradict_themselves_are_named(tmp_path):
    (tmp_path / "2025").mkdir()
    (tmp_path / "2025" / "20240101.csv").write_bytes(b"x")
    with pytest.raises(DataError, match=r"2025/20240101\.csv: its path says two times"):
        found(tmp_path, "{YYYY}/{YYYY}{MM}{DD}.csv", "UTC", 0, 4_000_000_000_000)


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("year={YYYY}/month={MM}/day={DD}/h{HH}.csv", ["year=2025/month=3/day=7/h5.csv"]),
        ("{YYYY}/{MM}/{DD}.{HH}.csv", ["2025/3/7.5.csv", "2025/03/7.05.csv", "2025/3/07.5.csv"]),
        ("{YYYY}-{MM}-{DD}/{HH}/*.csv", ["2025-3-7/5/1.csv", "2025-03-07/5/1.csv"]),
        # Where a digit could follow or precede, a number has two.
        ("{YYYY}{MM}{DD}/{HH}*.csv", ["20250307/05-1.csv"]),
        ("{YYYY}/{MM}/{DD}/*{HH}.csv", ["2025/3/7/105.csv"]),
        ("{YYYY}/{MM}/{DD}/[0-9]{HH}?.csv", ["2025/3/7/1051.csv"]),
        ("{YYYY}/{MM}/{DD}/1{HH}2.csv", ["2025/3/7/1052.csv"]),
    ],
)
def test_numbers_of_one_digit_are_read_where_they_end_without_doubt(tmp_path, pattern, files):
    for path in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    key = (2025, 3, 7, 5)
    assert found(tmp_path, pattern, "UTC", 0, 4_000_000_000_000) == {
        key: sorted(f"{tmp_path}/{path}" for path in files)
    }


def test_one_digit_where_two_must_be_is_another_name(tmp_path):
    for name in ("2025307", "20250307"):
        (tmp_path / f"{name}.csv").write_bytes(b"x")
    assert list(found(tmp_path, "{YYYY}{MM}{DD}.csv", "UTC", 0, 2**42)) == [(2025, 3, 7)]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="no such directory: .*nowhere"):
        found(tmp_path, "nowhere/{YYYY}{MM}{DD}.csv", "UTC", 0, DAY)


def test_relative_paths_begin_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("20250101.csv").write_bytes(b"x")
    store = Folders(fs.LocalFileSystem())
    periods = Periods(store, PathPattern("{YYYY}{MM}{DD}.csv"), ZoneInfo("UTC"), 0, 2**42)
    assert [list(one.files.paths) for one in periods] == [["20250101.csv"]]


def test_the_next_day_is_looked_into_before_the_last_hour_of_this_one_is_known(tmp_path):
    for day in ("01", "02", "03"):
        for hour in ("00", "01", "02", "03"):
            (tmp_path / f"202501{day}" / hour).mkdir(parents=True)
            (tmp_path / f"202501{day}" / hour / "a.csv").write_bytes(b"x")
    gate, asked = threading.Event(), []
    store = Folders(fs.LocalFileSystem())

    class Held:
        def entries(self, folder):
            asked.append(folder.removeprefix(f"{tmp_path}/"))
            if asked[-1] == "20250101/03":
                assert gate.wait(20)
            return store.entries(folder)

    pattern = PathPattern(f"{tmp_path}/{{YYYY}}{{MM}}{{DD}}/{{HH}}/*.csv")
    found = iter(Periods(Held(), pattern, ZoneInfo("UTC"), 0, 2**42))
    assert [next(found).key[2:] for _ in range(3)] == [(1, 0), (1, 1), (1, 2)]
    for _ in range(1000):
        if "20250102/00" in asked:
            break
        threading.Event().wait(0.01)
    assert "20250102/00" in asked
    gate.set()
    assert [one.key[2:] for one in found] == [
        (1, 3), *((day, hour) for day in (2, 3) for hour in range(4)),
    ]  # fmt: skip


def test_a_day_that_a_zone_left_out_is_in_the_next_one(tmp_path):
    # Samoa went from the 29th to the 31st of December 2011.
    for day in (29, 30, 31):
        (tmp_path / f"201112{day}.csv").write_bytes(b"x")
    start = moment_ms(datetime(2011, 12, 31), ZoneInfo("Pacific/Apia"))
    days = found(tmp_path, "{YYYY}{MM}{DD}.csv", "Pacific/Apia", start, start + DAY)
    assert list(days) == [(2011, 12, 30), (2011, 12, 31)]


def test_what_comes_before_a_folder_that_cannot_be_listed_is_given(tmp_path):
    for day in ("01", "02"):
        for hour in ("00", "01", "02", "03"):
            (tmp_path / f"202501{day}" / hour).mkdir(parents=True)
            (tmp_path / f"202501{day}" / hour / "a.csv").write_bytes(b"x")
    store = Folders(fs.LocalFileSystem())

    class Broken:
        def entries(self, folder):
            if folder.endswith("20250102"):
                raise DataError("20250102: cannot be listed")
            return store.entries(folder)

    pattern = PathPattern(f"{tmp_path}/{{YYYY}}{{MM}}{{DD}}/{{HH}}/*.csv")
    days = iter(Periods(Broken(), pattern, ZoneInfo("UTC"), 0, 2**42))
    assert [next(days).key[3] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(DataError, match="cannot be listed"):
        next(days)
