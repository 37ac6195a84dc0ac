"""TensorBoard, summary.json and run.log as sinks, without a run."""

import json
import math
import threading
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from penstock.errors import ConfigError
from penstock.events.event import Event, Role
from penstock.report import sinks
from penstock.report.folder import RunFolder
from penstock.report.sinks import RunLog, SummaryFile, TensorBoard

WINDOW = {"samples": 40, "loss": 0.5, "auc": math.nan, "tables": {"user": {"rows": 7}}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def event(kind, step, values, time_s=1_700_000_000.25):
    return Event(kind, step, time_s, Role("trainer", 0), values)


def curves(folder):
    read = EventAccumulator(str(folder.tensorboard))
    read.Reload()
    return {
        name: [(point.step, point.value, point.wall_time) for point in read.Scalars(name)]
        for name in read.Tags()["scalars"]
    }


def test_curves_are_the_numbers_of_what_is_computed_at_the_time_it_was_told(folder):
    board = TensorBoard(folder, 0)
    board.take(event("train", 4, WINDOW))
    board.take(event("start", 4, {"samples": 40}))
    board.take(event("train", 8, {"samples": 80, "loss": math.inf}, 1_700_000_060.5))
    board.take(event("evaluation", 8, {"auc": 0.75, "calibration_buckets": [[0.1, 0.2, 3.0]]}))
    board.take(event("warning", 8, {"text": "no number"}))
    board.close()
    at, later = 1_700_000_000.25, 1_700_000_060.5
    assert curves(folder) == {
        "train/samples": [(4, 40, at), (8, 80, later)],
        "train/loss": [(4, 0.5, at)],
        "train/tables/user/rows": [(4, 7, at)],
        "evaluation/auc": [(8, 0.75, at)],
    }


def test_a_full_disk_is_an_error_where_it_comes_and_nothing_is_printed(folder, monkeypatch, capfd):
    threads, place = threading.active_count(), folder.path / "events"
    monkeypatch.setattr(sinks, "_event_file", lambda _: place)
    board = TensorBoard(folder, 0)
    board.take(event("train", 4, WINDOW))
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(board._records, "_writer", full)
        with pytest.raises(ConfigError, match="No space left"):
            board.take(event("train", 8, WINDOW))
    board.close()
    monkeypatch.setattr(sinks, "_event_file", lambda _: Path("/dev/full"))
    with pytest.raises(ConfigError, match="No space left"):
        TensorBoard(folder, 0)
    assert threading.active_count() == threads
    assert capfd.readouterr() == ("", "")


def test_where_a_run_goes_on_later_points_are_hidden_and_that_step_stays(folder):
    for begin, steps in ((0, (2, 4, 6)), (4, (8,))):
        board = TensorBoard(folder, begin)
        for step in steps:
            board.take(event("train", step, {"samples": 10 * step}, 1_700_000_000.0 + step))
        board.close()
    assert [step for step, *_ in curves(folder)["train/samples"]] == [2, 4, 8]


def test_a_disk_that_is_gone_is_told_and_at_the_end_noted(folder, monkeypatch):
    board = TensorBoard(folder, 0)
    records = board._records

    def gone(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(records, "write", gone)
    with pytest.raises(ConfigError, match="run: cannot write the run folder: .*Input/output error"):
        board.take(event("train", 4, WINDOW))
    close = records.close
    monkeypatch.setattr(records, "close", gone)
    board.close()
    close()
    assert folder.log_file.read_text(encoding="utf-8").endswith(
        f"{folder.tensorboard}: [Errno 5] Input/output error; its last numbers are in "
        "metrics.jsonl\n"
    )


def test_the_summary_is_json_that_every_reader_takes(folder):
    sink = SummaryFile(folder)
    sink.take(event("train", 4, WINDOW))
    assert not folder.summary_file.exists()
    for steps in (4, 8):
        sink.take(event("summary", steps, {"steps": steps, "auc": math.nan, "bias": -math.inf}))
    text = folder.summary_file.read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "steps": 8,
        "auc": None,
        "bias": "-Infinity",
    }
    read = folder.read_summary()
    assert math.isnan(read.pop("auc")) and read == {"steps": 8, "bias": -math.inf}
    folder.summary_file.unlink()
    folder.path.rmdir()
    with pytest.raises(ConfigError, match="run: cannot write the run folder: "):
        sink.take(event("summary", 8, {"steps": 8}))


def test_the_log_has_the_words_of_faults_alone(folder):
    sink = RunLog(folder)
    for kind in ("nothing_new", "warning", "failed", "stopped_early"):
        sink.take(event(kind, 4, {"text": f"of {kind}"}))
    lines = folder.log_file.read_text(encoding="utf-8").splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["of warning", "of failed"]
