"""Files that come into windows that were read are named, each once; others are not."""

from datetime import datetime, timedelta

import pytest
from pydantic import TypeAdapter

from penstock.config import Source
from penstock.data.windows.growing import begins, next_span
from penstock.data.windows.late import LateFiles, words_of
from penstock.data.windows.stored import stored_paths


def config(folder, **source):
    files = {"format": "csv", "path": f"{folder}/{{YYYY}}-{{MM}}-{{DD}}/{{HH}}/*.csv"}
    stream = {
        "name": "clicks",
        "window": "hour",
        "start": "2026-01-01",
        "end": "now",
        "sources": [{"name": "new", "files": files, **source}],
    }
    return TypeAdapter(Source).validate_python({"format": "streams", "streams": [stream]})


def put(folder, hour, name="0.csv"):
    path = folder / f"{datetime(2026, 1, 1) + timedelta(hours=hour):%Y-%m-%d/%H}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("id\n1\n")
    return str(path)


def paths_of(source):
    return {name: one.paths for name, one in stored_paths(source).items()}


class Run:
    """Takes spans as a run does."""

    def __init__(self, source):
        self.source, self.late = source, LateFiles(source)
        self.since, self.first = begins(source), 0

    def goes_on(self):
        listing = next_span(self.source, paths_of(self.source), self.since, self.first)
        self.since, self.first = listing.span.until_ms, self.first + len(listing.paths)
        self.late.add(listing)

    def found(self):
        return [one.path for one in self.late.found(paths_of(self.source))]


@pytest.mark.parametrize("delay", ["0s", "5h"])
def test_a_late_file_is_named_once_and_no_other(tmp_path, delay):
    for hour in (0, 2, 3):
        put(tmp_path, hour)
    run = Run(config(tmp_path, delay=delay))
    run.goes_on()
    assert run.found() == []
    put(tmp_path, 3, "1.csv")  # not read yet
    late = [put(tmp_path, 0, "1.csv"), put(tmp_path, 1), put(tmp_path, 2, "z.csv")]
    assert run.found() == late  # one of them in an hour that had none
    assert run.found() == []
    for hour in (4, 5):
        put(tmp_path, hour)
    run.goes_on()
    late = [put(tmp_path, 2, "1.csv"), put(tmp_path, 4, "1.csv")]
    assert run.found() == late
    assert run.late.num_files == 5


def test_only_the_last_day_is_looked_at(tmp_path):
    for hour in range(40):
        put(tmp_path, hour)
    run = Run(config(tmp_path))
    run.goes_on()
    put(tmp_path, 5, "1.csv")
    assert run.found() == []
    late = put(tmp_path, 20, "1.csv")
    assert run.found() == [late]


def test_an_hour_without_its_marker_that_was_never_read_is_late_too(tmp_path):
    source = config(tmp_path, marker=f"{tmp_path}/{{YYYY}}-{{MM}}-{{DD}}/{{HH}}/_SUCCESS")
    for hour in (0, 2):
        put(tmp_path, hour)
        put(tmp_path, hour, "_SUCCESS")
    run = Run(source)
    run.goes_on()
    late = put(tmp_path, 1)
    found = run.late.found(paths_of(source))
    assert [one.path for one in found] == [late]
    assert words_of(found, 1) == (
        f"{late}: came after that window of source 'new' was read, so these rows are not trained "
        "on (1 so far); write its markers later"
    )
