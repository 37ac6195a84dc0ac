"""Runs over streams that grow, as people see them: what they are told while files come."""

import json
import threading
import time
from datetime import datetime, timedelta

import pytest

from penstock.config import StreamsSource, parse_job
from penstock.data import Dataset
from penstock.data.batches.channel import Closed
from penstock.data.columns.schema import default_text_types
from penstock.data.opening import open_source
from penstock.data.windows.growing import begins, next_span, waits_for
from penstock.data.windows.planned import planned
from penstock.data.windows.stored import stored_paths
from penstock.run import train
from tests.integration.small import SMALL

ROWS = 60


def put(folder, hour, name="0.csv"):
    path = folder / f"{datetime(2026, 1, 1) + timedelta(hours=hour):%Y-%m-%d/%H}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{name}")
    rows = [f"{n % 2},{hour * 1000 + n}" for n in range(ROWS)]
    whole.write_text("\n".join(["click,id", *rows, ""]))
    whole.rename(path)
    return path


def job_over(folder, **training):
    files = {"format": "csv", "path": f"{folder}/{{YYYY}}-{{MM}}-{{DD}}/{{HH}}/*.csv"}
    stream = {
        "name": "clicks",
        "window": "hour",
        "start": "2026-01-01",
        "end": "now",
        "sources": [{"name": "new", "files": files | {"types": {"id": "int64"}}}],
    }
    source = {"format": "streams", "poll": "1s", "streams": [stream]}
    data = {"source": source, "label": {"column": "click"}, "shuffle": {"block_rows": 60}}
    return parse_job(
        {key: SMALL[key] for key in ("name", "table_defaults", "run")}
        | {"data": data, "features": [{"columns": ["id"]}], "report": {"every_steps": 1}}
        | {"model": {"kind": "dlrm", "bottom": [8], "top": [16]}}
        | {"training": {"batch_size": 30, **training}}
    )


@pytest.fixture
def meanwhile():
    """Does things one after the other on another thread, each as soon as its time has come."""
    threads = []

    def begin(*steps):
        def work():
            for is_time, do in steps:
                end_s = time.monotonic() + 5
                while not is_time() and time.monotonic() < end_s:
                    time.sleep(0.02)
                do()

        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield begin
    for thread in threads:
        thread.join()


def test_people_hear_what_a_run_waits_for_and_what_came_too_late(tmp_path, capsys, meanwhile):
    files, run = tmp_path / "in", tmp_path / "run"
    files.mkdir()
    out = []

    def told(words):
        out.append(capsys.readouterr().out)
        return words in "".join(out)

    def both(*puts):
        return lambda: [put(files, *one) for one in puts]

    meanwhile(
        (lambda: told("no window is complete yet; waiting for a file of"), both((0,), (1,))),
        (lambda: told("\nwaiting after step"), both((0, "late.csv"), (2,))),
        (lambda: told("late.csv: came after that window"), both((3,), (4,))),
    )
    summary = train(job_over(files, max_steps=8), run)
    assert summary["samples"] == 4 * ROWS
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    waits = [event["step"] for event in events if event["kind"] == "waiting"]
    assert 1 <= len(waits) == len(set(waits))
    (warning,) = [event["text"] for event in events if event["kind"] == "warning"]
    assert warning.startswith(f"{files}/2026-01-01/00/late.csv: came after that window of source")
    assert warning in " ".join((run / "run.log").read_text().split("\n"))
    assert "".join(out).count("no window is complete yet") == 1


def test_a_wait_is_told_once_and_not_before_everything_is_taken(tmp_path):
    for hour in range(2):
        put(tmp_path, hour)
    dataset = Dataset.open(job_over(tmp_path))
    told, asked = [], []

    class Closing:
        """As a loader's, which is closed after five polls."""

        def wait(self, seconds):
            asked.append(list(told))
            return len(asked) == 5

    with dataset.batches("train", batch_size=30) as loader:
        next(loader)
        end = next(loader).end
    dataset.tell_of_waits(told.append)
    with pytest.raises(Closed):
        dataset._spans.after(end, lambda say: say(), Closing(), lambda: len(asked) > 1)
    assert [len(one) for one in asked] == [0, 0, 1, 1, 1]
    assert told == ["a file of a later time of source 'new' of stream 'clicks'"]


def test_only_who_holds_up_the_next_window_is_waited_for(tmp_path):
    for folder, hours in (("a", 4), ("b", 2)):
        for hour in range(hours):
            put(tmp_path / folder, hour)
    streams = [
        job_over(tmp_path / name).data.source.streams[0].model_copy(update={"name": name})
        for name in ("a", "b")
    ]
    config = StreamsSource(streams=tuple(streams), together=True)
    stored = {name: one.paths for name, one in stored_paths(config).items()}
    until = next_span(config, stored, begins(config), 0).span.until_ms
    found = waits_for(config, stored, until)
    assert found == "a file of a later time of source 'new' of stream 'b'"


def test_the_plan_says_the_bytes_of_streams_that_grow(tmp_path):
    paths = [put(tmp_path, hour) for hour in range(3)]
    job = job_over(tmp_path)
    source = open_source(job.data.source, default_text_types(job))
    found = [one.bytes for one in planned(source, lambda rows, share: None)]
    assert found == [path.stat().st_size for path in paths[:2]]
