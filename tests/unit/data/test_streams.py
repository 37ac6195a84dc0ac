"""Streams as the source of a job: windows in their order, lanes that stay at one of them."""

import os
from dataclasses import replace
from datetime import date, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from penstock.config import Source, files_of, parse_job
from penstock.data import Dataset
from penstock.data.files import paths_like
from penstock.data.formats import columnar
from penstock.data.opening import open_source
from penstock.data.windows.planned import planned
from penstock.errors import ConfigError, DataError, JobNote
from penstock.position import LanePosition, Position
from tests.world.ranks import World, in_world

DAY = 1_000_000
"""Ids of a day begin with its number times this."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    in_world(monkeypatch)
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 20)


def write(path, first, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.arange(first, first + rows)
    columns = {"label": np.zeros(rows, np.int64), "id": ids}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=10)
    else:
        path.write_text("\n".join(["label,id", *(f"0,{one}" for one in ids), ""]))


@pytest.fixture
def days(tmp_path):
    """Ten days of unlike sizes, of two sources; one day lacks the first, one has nothing."""
    rng = np.random.default_rng(0)
    for day in range(10):
        date = datetime(2026, 2, 24) + timedelta(days=day)
        for part in range(int(rng.integers(1, 4))) if day not in (3, 6) else ():
            path = tmp_path / f"new/{date:%Y/%m/%d}/{part}.parquet"
            write(path, DAY * day + 1000 * part, int(rng.integers(1, 90)))
        if day != 6:
            write(tmp_path / f"old.{date:%Y%m%d}.csv", DAY * day + 9000, int(rng.integers(1, 50)))
    return tmp_path


def config(folder, *, sources=None, **stream):
    both = [
        {"name": "new", "files": {"format": "parquet",
                                  "path": f"{folder}/new/{{YYYY}}/{{MM}}/{{DD}}/*.parquet"}},
        {"name": "old", "files": {"format": "csv", "types": {"id": "int64"},
                                  "path": f"{folder}/old.{{YYYY}}{{MM}}{{DD}}.csv"}},
    ]  # fmt: skip
    times = {"start": "2026-02-24", "end": "2026-03-06"}
    return {
        "format": "streams",
        "streams": [{"name": "clicks", **times, "sources": sources or both, **stream}],
    }


def opened(source, block=40, **data):
    fields = {
        "data": {
            "source": source,
            "label": {"column": "label"},
            "shuffle": {"block_rows": block},
            **data,
        },
        "features": [{"columns": ["id"]}],
    }
    return Dataset.open(parse_job(fields))


def parsed(source):
    return TypeAdapter(Source).validate_python(source)


def in_lanes(number):
    return Position(lanes=(LanePosition(),) * number)


def ids_in(loader):
    with loader:
        return [batch.sparse.values.tolist() for batch in loader]


def all_ids(folder):
    found = [one for path in folder.rglob("*.parquet") for one in pq.read_table(path)["id"]]
    ids = [one.as_py() for one in found]
    for path in folder.glob("*.csv"):
        ids += [int(line.split(",")[1]) for line in path.read_text().split()[1:]]
    return sorted(ids)


@pytest.mark.parametrize("lanes", [1, 2, 5, 8])
@pytest.mark.parametrize("block", [0, 40])
def test_each_row_comes_once_and_no_window_before_another(days, lanes, block):
    dataset = opened(config(days), block)
    batches = ids_in(dataset.batches("train", batch_size=20, seed=1, start=in_lanes(lanes)))
    found = [one for batch in batches for one in batch]
    assert sorted(found) == all_ids(days)
    # A batch is of one window, and only a window's last one is short.
    windows = [{one // DAY for one in batch} for batch in batches]
    assert all(len(one) == 1 for one in windows)
    in_order = [one.pop() for one in windows]
    assert in_order == sorted(in_order)
    for batch, window, after in zip(batches, in_order, in_order[1:], strict=False):
        assert len(batch) == 20 or window != after


@pytest.mark.parametrize("lanes", [1, 4])
def test_one_goes_on_from_any_batch(days, lanes):
    dataset = opened(config(days))
    kwargs = {"batch_size": 20, "seed": 3, "epochs": 2}
    with dataset.batches("train", start=in_lanes(lanes), **kwargs) as loader:
        batches = [(batch.sparse.values.tolist(), batch.end) for batch in loader]
    for number in range(0, len(batches), 3):
        again = opened(config(days))
        rest = ids_in(again.batches("train", start=batches[number][1], **kwargs))
        assert rest == [ids for ids, _ in batches[number + 1 :]]


def test_what_is_no_file_is_named_once_and_counted(days):
    folder = days / "new/2026/02/24"
    os.symlink(days / "nowhere", folder / "a.parquet")
    os.mkfifo(folder / "b.parquet")
    os.mkfifo(folder / "c.txt")  # which no path matches
    os.symlink(days / "nowhere", days / "new/2026/02/25b")
    with pytest.warns(JobNote) as notes:
        opened(config(days))
    (note,) = [str(one.message) for one in notes]
    assert note.startswith(f"{folder}/a.parquet and 1 more: neither a file nor a folder")
    with pytest.warns(JobNote, match=r"a.parquet and 1 more: .* 2 so far"):
        opened(config(days, end="now"))


def test_any_number_of_ranks_has_the_same_batches(days):
    kwargs = {"batch_size": 20, "seed": 3, "start": in_lanes(4)}
    whole = ids_in(opened(config(days)).batches("train", **kwargs))
    for size in (2, 3):
        parts = World(size).run(
            lambda group: ids_in(opened(config(days)).batches("train", ranks=group, **kwargs))
        )
        joined = [
            sorted(one for part in of_ranks for one in part)
            for of_ranks in zip(*parts, strict=True)
        ]
        assert joined == [sorted(batch) for batch in whole]


def test_the_end_may_move_on_and_what_was_read_is_not_read_again(days):
    early = opened(config(days, end="2026-02-28"))
    with early.batches("train", batch_size=16, start=in_lanes(4)) as loader:
        first = [batch.sparse.values.tolist() for batch in loader]
        end = loader.position
    dataset = opened(config(days))
    rest = ids_in(dataset.batches("train", batch_size=16, start=replace(end, epoch=0)))
    found = [one for batch in first + rest for one in batch]
    assert sorted(found) == all_ids(days)


def test_a_delay_serves_a_source_beside_younger_rows(days):
    sources = config(days)["streams"][0]["sources"]
    sources[1]["delay"] = "2d"
    dataset = opened(config(days, sources=sources, end="2026-03-08"), 0)
    found = [one for batch in ids_in(dataset.batches("train", batch_size=10)) for one in batch]
    assert sorted(found) == all_ids(days)
    served = [one // DAY + (2 if one % DAY >= 9000 else 0) for one in found]
    assert served == sorted(served)


def test_streams_come_one_after_the_other_or_side_by_side(days):
    new, old = config(days)["streams"][0]["sources"]
    times = {"start": "2026-02-24", "end": "2026-03-06"}
    streams = [{"name": "n", **times, "sources": [new]}, {"name": "o", **times, "sources": [old]}]
    source = {"format": "streams", "streams": streams}
    one_by_one = sum(ids_in(opened(source, 0).batches("train", batch_size=10)), [])
    assert sorted(one_by_one) == all_ids(days)
    kinds = [one % DAY >= 9000 for one in one_by_one]
    assert kinds == sorted(kinds)
    beside = sum(ids_in(opened(source | {"together": True}, 0).batches("train", batch_size=10)), [])
    assert sorted(beside) == all_ids(days)
    assert [one // DAY for one in beside] == sorted(one // DAY for one in beside)


def test_rows_are_counted_and_divided_as_those_of_files(days):
    dataset = opened(config(days), split={"by": "file", "evaluation": "old.*"})
    total = len(all_ids(days))
    held_out = sum(len(batch) for batch in ids_in(dataset.batches("evaluation", batch_size=64)))
    assert dataset.num_rows("train") + dataset.num_rows("evaluation") == total
    assert held_out == dataset.num_rows("evaluation") > 0


def test_the_plan_says_what_each_window_has(days):
    source = open_source(parsed(config(days)), {"label": "float64"})
    told = []
    plan = list(planned(source, lambda rows, share: told.append((rows, share))))
    assert [one.window[:10] for one in plan if one.source != "old"][:8] == [
        *("2026-02-24", "2026-02-25", "2026-02-26"),
        *("2026-02-28", "2026-03-01", "2026-03-02"),
        *("2026-03-03", "2026-03-04"),
    ]
    assert [(one.files, one.rows) for one in plan if not one.source] == [(0, 0)]
    paths = [*days.rglob("*.parquet"), *days.glob("*.csv")]
    assert sum(one.files for one in plan) == len(paths)
    assert sum(one.bytes for one in plan) == sum(path.stat().st_size for path in paths)
    assert sum(one.extents for one in plan) == len(source.extents())
    for one in plan:
        files = days.glob(f"new/{one.window[:10].replace('-', '/')}/*.parquet")
        rows = sum(pq.read_metadata(path).num_rows for path in files)
        assert one.rows == {"new": rows, "old": None, "": 0}[one.source]
    assert told[-1][1] == 1.0


def test_a_plan_without_windows_is_one_line(days):
    source = open_source(parsed({"format": "parquet", "path": f"{days}/new"}), {})
    (one,) = planned(source, lambda rows, share: None)
    rows = sum(pq.read_metadata(path).num_rows for path in days.rglob("*.parquet"))
    assert (one.stream, one.window, one.rows) == ("", "", rows)


def test_a_uri_is_read_as_a_path(days):
    new, _ = config(days)["streams"][0]["sources"]
    files = new["files"] | {"path": "file://" + new["files"]["path"]}
    found = ids_in(
        opened(config(days, sources=[new | {"files": files}])).batches("train", batch_size=10)
    )
    assert sorted(sum(found, [])) == [one for one in all_ids(days) if one % DAY < 9000]


def test_what_does_not_fit_is_named(days):
    new, old = config(days)["streams"][0]["sources"]
    late = config(days, start="2031-01-01", end="2031-02-01")
    with pytest.raises(DataError, match="no file of it lies between 2031-01-01 and 2031-02-01"):
        opened(late)
    write(days / "old.20260225.csv", 0, 3)
    (days / "old.20260226.csv").write_text("label,other\n0,1\n")
    with pytest.raises(DataError, match=r"old\.20260226\.csv"):
        opened(config(days))
    (days / "old.20260226.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"old\.20260226\.csv: empty file"):
        opened(config(days))
    twice = [new, new | {"name": "again"}]
    with pytest.raises(DataError, match="a file of two sources"):
        opened(config(days, sources=twice))
    text = days / "text"
    write(text / "2026/02/24.csv", 0, 4)
    texts = {
        "format": "csv",
        "types": {"id": "string"},
        "path": f"{text}/{{YYYY}}/{{MM}}/{{DD}}.csv",
    }
    with pytest.raises(DataError, match=r"24\.csv: column 'id' is string, but int64"):
        opened(config(days, sources=[new, {"name": "text", "files": texts}]))
    with pytest.raises(ConfigError, match="is in data.source, too"):
        (days / "old.20260226.csv").unlink()
        same = {"format": "csv", "types": {"id": "int64"}, "path": f"{days}/old.2026022[7]*.csv"}
        opened(config(days), evaluation_source=same)


PATH = "x/{YYYY}{MM}{DD}/{HH}.parquet"


def test_the_longest_and_the_nearest_are_taken():
    fields = config("x", window="366d", end="2026-02-24T00:00:01")
    fields["streams"][0]["sources"][0]["delay"] = "366d"
    (stream,) = parsed(fields).streams
    assert stream.unit == stream.sources[0].delay_ms == 366 * 86_400_000
    assert stream.end_ms - stream.start_ms == 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": "1 week"}, "no duration"),
        ({"window": "week"}, "one like hour, day, 90s"),
        ({"window": "0s"}, "some length"),
        ({"window": "59min"}, "shorter than the hours"),
        ({"window": "400d"}, "more than 366d"),
        ({"zone": "Mars/Olympus"}, "no time zone"),
        ({"start": "soon"}, "no ISO 8601 time"),
        ({"start": "2026-03-06", "end": "2026-03-06"}, "is not after start"),
        ({"path": "x/*.parquet"}, "must say the year, month and day"),
        ({"path": "x/{YYYY}{MM}.parquet"}, "must say the year, month and day"),
        ({"path": "x/{YYYY}{MM}{DD}{mm}.parquet"}, "has a field {mm}"),
        ({"path": "x/**/{YYYY}{MM}{DD}.parquet"}, r"has \*\*"),
        ({"path": "x/{YYYY}{MM}{HH}.parquet"}, "must say the year, month and day"),
        ({"path": "{MM}/{YYYY}/{DD}.parquet"}, "stands below a finer field"),
        ({"path": "{YYYY}/{DD}/{MM}/{HH}.parquet"}, "{MM} stands below a finer field"),
        ({"path": "x/{YYYY}{MM}{DD}/{HH/*.parquet"}, "a { that belongs to no field"),
        ({"path": "x/{YYYY}{MM}{DD}/HH}/*.parquet"}, "a } that belongs to no field"),
        ({"path": "x/{YYYY-MM}/{YYYY}{MM}{DD}/*"}, "a { that belongs to no field"),
        ({"path": "x/{YYYY}{MM}{DD}//{HH}.parquet"}, "has '' for a name"),
        ({"path": "x/{YYYY}{MM}{DD}/./{HH}.parquet"}, "has '.' for a name"),
        ({"path": "x/{YYYY}{MM}{DD}/{HH}/"}, "has '' for a name"),
        ({"end": "9000-01-01"}, "at most 1,000,000; set end"),
        ({"end": "0001-01-01", "zone": "Europe/Paris"}, "of the years 1 to 9999"),
        ({"start": 20260224}, "20260224 is a number"),
        ({"source": "a/b"}, "a name has no /"),
        ({"stream": "a/b"}, "a name has no /"),
        ({"path": ["a", "b"]}, "give one path"),
        ({"marker": "x/_SUCCESS"}, "must say the year"),
        ({"marker": "x/{YYYY}{MM}{DD}/_SUCCESS"}, "must have the date fields of the path"),
        ({"marker": "x/{YYYY}{MM}{DD}/{HH}*"}, "has no"),
        ({"delay": "-1h"}, "no duration"),
    ],
)
def test_wrong_streams_are_refused_by_name(change, words):
    source, name = change.get("source", "a"), change.get("stream", "s")
    one = {"name": source, "files": {"format": "parquet", "path": change.get("path", PATH)}}
    one |= {name: change[name] for name in ("marker", "delay") if name in change}
    stream = {"name": name, "window": "hour", "start": "2026-02-24", "end": "2026-03-06",
              "sources": [one]}  # fmt: skip
    stream |= {name: change[name] for name in ("window", "zone", "start", "end") if name in change}
    with pytest.raises(ConfigError, match=words.replace("{", r"\{")):
        parse_job({
            "data": {
                "source": {"format": "streams", "streams": [stream]},
                "label": {"column": "label"},
            },
            "features": [{"columns": ["id"]}],
        })


def test_nothing_to_read_is_refused():
    for source, words in (
        ({"format": "streams", "streams": []}, "streams: there is none"),
        (
            config("x") | {"streams": [config("x")["streams"][0] | {"sources": []}]},
            "sources: there",
        ),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            opened(source)
        assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize("window", ["hour", "23h", "1439min"])
def test_days_are_too_long_for_shorter_windows(days, window):
    with pytest.raises(ConfigError, match="shorter than the days"):
        opened(config(days, window=window))


def test_names_are_there_once(days):
    (stream,) = config(days)["streams"]
    twice = [stream["sources"][0], stream["sources"][1] | {"name": "new"}]
    with pytest.raises(ConfigError, match="two sources are named 'new'"):
        opened(config(days, sources=twice))
    with pytest.raises(ConfigError, match="two streams are named 'clicks'"):
        opened({"format": "streams", "streams": [stream, stream | {"start": "2025-01-01"}]})


def one_source(path, **fields):
    return [{"name": "new", "files": {"format": "parquet", "path": path}, **fields}]


@pytest.mark.parametrize(
    "name", ["a b%20c é 名.parquet", "[x]*.parquet", "{YYYY}?.parquet", "new\nline.parquet"]
)
@pytest.mark.parametrize("begin", ["", "file://"])
def test_names_of_files_may_have_any_character(tmp_path, name, begin):
    write(tmp_path / "d/2026/02/24" / name, 0, 30)
    sources = one_source(f"{begin}{tmp_path}/d/{{YYYY}}/{{MM}}/{{DD}}/*.parquet")
    found = ids_in(opened(config(tmp_path, sources=sources)).batches("train", batch_size=10))
    assert sorted(sum(found, [])) == list(range(30))


def test_folders_of_a_uri_are_percent_encoded(tmp_path):
    write(tmp_path / "d é%20 x/2026/02/24.parquet", 0, 30)
    encoded = f"file://{tmp_path}/d%20%C3%A9%2520%20x/{{YYYY}}/{{MM}}/{{DD}}.parquet"
    dataset = opened(config(tmp_path, sources=one_source(encoded)))
    assert len(sum(ids_in(dataset.batches("train", batch_size=10)), [])) == 30


@pytest.mark.parametrize(
    ("given", "inner", "path", "taken"),
    [
        ("/d/*.csv", "/d/*.csv", "/d/a b.csv", "/d/a b.csv"),
        ("file:///d%20e/*.csv", "/d e/*.csv", "/d e/a%b.csv", "/d e/a%b.csv"),
        ("s3://b/{YYYY}.csv", "b/{YYYY}.csv", "b/a b%?.csv", "s3://b/a%20b%25%3F.csv"),
        ("s3://k:s@b/d%20e/*", "b/d e/*", "b/d e/f", "s3://k:s@b/d%20e/f"),
        ("hdfs://host:1/d/*", "/d/*", "/d/é", "hdfs://host:1/d/%C3%A9"),
    ],
)
def test_paths_are_given_as_their_glob_was(given, inner, path, taken):
    assert paths_like(given, inner, [path]) == [taken]


def test_a_file_of_two_sources_is_found_under_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d/2026/02/24.parquet", 0, 3)
    write(tmp_path / "e/2026/02/25.parquet", 9, 3)
    os.link(tmp_path / "d/2026/02/24.parquet", tmp_path / "e/2026/02/24.parquet")
    names = ["./d", "d/../d", f"{tmp_path}/d", f"file://{tmp_path}/d", "e"]
    for other in names:
        sources = one_source("d/{YYYY}/{MM}/{DD}.parquet")
        sources += [one_source(f"{other}/{{YYYY}}/{{MM}}/{{DD}}.parquet")[0] | {"name": "other"}]
        with pytest.raises(DataError, match=r"a file of two sources .*the same as d/2026/02/24"):
            opened(config(tmp_path, sources=sources))


def test_where_nothing_is_found_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "d/2026/02/24.parquet", 0, 3)
    for path, words in (
        ("e/{YYYY}/{MM}/{DD}.parquet", f"no such directory: e; a relative .*{tmp_path}"),
        ("d/{YYYY}/{MM}/{DD}.parq", f"no file of it lies between .* a relative .*{tmp_path}"),
        ("~/{YYYY}/{MM}/{DD}.parquet", "a ~ is not expanded"),
    ):
        with pytest.raises(DataError, match=words):
            opened(config(tmp_path, sources=one_source(path)))
    late = one_source("d/{YYYY}/{MM}/{DD}.parquet", delay="30d")
    with pytest.raises(DataError, match="2026-03-06 .UTC., less its delay of 30d; "):
        opened(config(tmp_path, sources=late))


def test_a_file_that_goes_after_it_was_listed_is_named(tmp_path):
    for day in (24, 25, 26):
        write(tmp_path / f"d/2026/02/{day}.parquet", 100 * day, 30)
    dataset = opened(
        config(tmp_path, sources=one_source(f"{tmp_path}/d/{{YYYY}}/{{MM}}/{{DD}}.parquet"))
    )
    (tmp_path / "d/2026/02/26.parquet").unlink()
    found = []
    with (
        pytest.raises(DataError, match=r"02/26\.parquet"),
        dataset.batches("train", batch_size=10) as loader,
    ):
        found += [batch.sparse.values.tolist() for batch in loader]


def test_a_path_may_say_its_day_again(tmp_path):
    write(tmp_path / "d/2026/02/24/2026022407.parquet", 0, 30)
    path = f"{tmp_path}/d/{{YYYY}}/{{MM}}/{{DD}}/{{YYYY}}{{MM}}{{DD}}{{HH}}.parquet"
    dataset = opened(config(tmp_path, sources=one_source(path)))
    assert len(sum(ids_in(dataset.batches("train", batch_size=10)), [])) == 30
    write(tmp_path / "d/2026/02/24/2026022500.parquet", 0, 30)
    with pytest.raises(DataError, match=r"2026022500\.parquet: its path says two times, .*{DD}"):
        opened(config(tmp_path, sources=one_source(path)))


def two_sources(folder, first, second):
    """Two sources of one file each, of these columns."""
    sources = []
    for name, columns in (("a", first), ("b", second)):
        path = folder / name / "20260224.parquet"
        path.parent.mkdir()
        pq.write_table(pa.table(columns), path)
        sources += [one_source(f"{path.parent}/{{YYYY}}{{MM}}{{DD}}.parquet")[0] | {"name": name}]
    return config(folder, sources=sources)


@pytest.mark.parametrize("extra", [0, 1])
def test_a_column_that_one_source_lacks_is_named(tmp_path, extra):
    columns = [{"label": [0], "id": [1]}, {"label": [0], "id": [1]}]
    columns[extra]["more"] = [2]
    path = tmp_path / "ba"[extra] / "20260224.parquet"
    with pytest.raises(DataError, match=f"{path}: column 'more' of .* is missing"):
        opened(two_sources(tmp_path, *columns))


def test_values_are_those_of_the_types_that_all_sources_have_in_common(tmp_path):
    ids = np.array([7, 2**40])
    times = np.array(["2026-02-24T01:00:00", "2026-02-24T02:00:00"], "datetime64[s]")
    columns = [
        {"label": [0, 0], "id": ids % 100, "at": times},
        {"label": [0, 0], "id": ids, "at": (times + 1).astype("datetime64[us]")},
    ]
    columns[0]["id"] = columns[0]["id"].astype(np.int32)
    source = two_sources(tmp_path, *columns)
    dataset = opened(source, 0, event_time="at")
    with dataset.batches("train", batch_size=4) as loader:
        (batch,) = loader
    assert batch.sparse.values.tolist() == [7, 2**40 % 100, 7, 2**40]
    seconds = times.astype(np.int64).tolist()
    assert batch.event_time.tolist() == [1000 * (one + late) for late in (0, 1) for one in seconds]


def test_a_file_that_cannot_be_read_does_not_become_the_end_of_the_data(tmp_path):
    for day in range(10, 28):
        write(tmp_path / f"d/202602{day}.parquet", 100 * day, 30)
    source = one_source(f"{tmp_path}/d/{{YYYY}}{{MM}}{{DD}}.parquet")
    streams = open_source(parsed(config(tmp_path, sources=source, start="2026-02-10")), {})
    (tmp_path / "d/20260226.parquet").write_bytes(b"no Parquet")
    for _ in range(3):
        with pytest.raises(DataError, match=r"20260226\.parquet"):
            list(streams.extents())


@pytest.mark.parametrize(
    ("start", "zone", "is_at"),
    [
        ("2026-02-24", "UTC", "2026-02-24T00:00"),
        (date(2026, 2, 24), "Europe/Paris", "2026-02-23T23:00"),
        (datetime(2026, 2, 24, 6), "Asia/Kathmandu", "2026-02-24T00:15"),
        ("2026-02-24T00:00+05:00", "Europe/Paris", "2026-02-23T19:00"),
        ("2026-02-24T00:00Z", "Europe/Paris", "2026-02-24T00:00"),
    ],
)
def test_start_and_end_are_moments_of_the_zone_unless_they_say_another(start, zone, is_at):
    (stream,) = parsed(config("x", start=start, zone=zone)).streams
    assert stream.start_ms == datetime.fromisoformat(f"{is_at}Z").timestamp() * 1000


@pytest.mark.parametrize(
    "path", ["new/2026/02/25/0.parquet", "old.20260225.csv", "old.20260305.csv"]
)
@pytest.mark.parametrize("is_longer", [False, True])
def test_a_file_that_was_read_and_is_another_one_now_is_named_on_going_on(days, path, is_longer):
    with opened(config(days)).batches("train", batch_size=16, start=in_lanes(2)) as loader:
        batches = [batch.end for batch in loader]
    file = days / path
    before = file.read_bytes()
    write(file, 90, 40)
    content = file.read_bytes()
    file.write_bytes((content * 9)[: len(before) + 100 * is_longer])
    with pytest.raises(DataError, match=rf"{path}: "):
        ids_in(opened(config(days)).batches("train", batch_size=16, start=batches[-2]))


def test_paths_and_formats_are_those_of_all_sources(days):
    source = parsed(config(days))
    assert [one.format for one in files_of(source)] == ["parquet", "csv"]
    assert list(source.globs) == [f"{days}/new/*/*/*/*.parquet", f"{days}/old.***.csv"]


def test_the_last_batch_of_a_block_ends_behind_it(days):
    """So that going on there reads nothing of the block again."""
    with opened(config(days)).batches("train", batch_size=16, start=in_lanes(3)) as loader:
        batches = list(loader)
    ends = [one.end for one, after in zip(batches, batches[1:], strict=False)
            if after.start.block > one.start.block]  # fmt: skip
    assert len(ends) > 5
    for end in [*ends, batches[-1].end]:
        assert end.block_row == 0
        assert not any(lane.pieces for lane in end.lanes)
