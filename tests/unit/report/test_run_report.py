"""What a run tells, in its folder and on the terminal, without a run."""

import io
import json
import logging

import pytest
from rich.console import Console

from penstock.config import parse_job
from penstock.errors import ConfigError, DataError
from penstock.report.folder import RunFolder
from penstock.report.json_lines import JsonLines, read_events
from penstock.report.run_report import RunReport
from penstock.types import Position

JOB = {
    "name": "small",
    "data": {"source": {"format": "synthetic", "rows": 10}, "label": {"column": "click"}},
    "features": [{"columns": ["c[0-9]*"]}],
    "model": {"kind": "dlrm"},
}


@pytest.fixture
def shown():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def report(tmp_path, shown):
    made = RunReport(RunFolder(tmp_path / "run"), parse_job(JOB), lambda: None, shown)
    yield made
    made.close()


def kinds(path):
    return [(event.kind, event.step) for event in read_events(path)]


def window(step):
    return {"samples": 10 * step, "samples_per_s": 5.0, "loss": 1 / step}


def test_what_loggers_of_the_package_warn_of_is_told(report, shown, tmp_path):
    log = logging.getLogger("penstock.training.checkpoint.checkpoint")
    log.warning("%s is passed over", "before")
    report.start(0, Position())
    log.warning("%s is passed over", "step-7")
    log.info("more")
    report.close()
    log.warning("%s is passed over", "after")
    events = read_events(tmp_path / "run" / "metrics.jsonl")
    assert [event.values["text"] for event in events if event.kind == "warning"] == [
        "step-7 is passed over"
    ]
    assert "warning: step-7 is passed over" in shown.file.getvalue()
    assert (tmp_path / "run" / "run.log").read_text().endswith(": step-7 is passed over\n")


def test_a_full_disk_is_told_once_and_the_rest_is_still_heard(report, shown, tmp_path):
    report.start(0, Position())
    lines = tmp_path / "run" / "metrics.jsonl"
    lines.unlink()
    lines.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="run: cannot write the run folder: .*No space left"):
        report.tell("train", 1, window(1))
    report.failed(1, DataError("first of all"))
    report.stopped(1, is_whole=True)
    assert "loss 1.0000" in shown.file.getvalue()
    assert "stopped after step 1; the checkpoint is complete" in shown.file.getvalue()
    assert "first of all" in (tmp_path / "run" / "run.log").read_text()


def test_an_error_on_its_way_is_not_replaced_by_a_full_disk(report, tmp_path):
    report.start(0, Position())
    lines = tmp_path / "run" / "metrics.jsonl"
    lines.unlink()
    lines.symlink_to("/dev/full")
    report.failed(1, DataError("first of all"))
    log = (tmp_path / "run" / "run.log").read_text()
    assert "first of all" in log and "No space left" in log


def test_lines_of_later_steps_are_taken_back_and_what_happened_stays(tmp_path):
    path, told = tmp_path / "metrics.jsonl", []
    for kind, step in (
        ("start", 0),
        ("train", 4),
        ("evaluation", 4),
        ("checkpoint", 6),
        ("train", 8),
        ("failed", 9),
    ):
        told.append({"kind": kind, "step": step})
    path.write_text("".join(json.dumps(line) + "\n" for line in told) + '{"kind": "tr')
    kept = JsonLines(path, {"train": 6, "evaluation": 3}).kept
    assert [(event.kind, event.step) for event in kept] == kinds(path)
    assert kinds(path) == [("start", 0), ("train", 4), ("checkpoint", 6), ("failed", 9)]
    JsonLines(path, {"train": 6, "evaluation": 3}).take(kept[0])
    assert kinds(path)[-1] == ("start", 0)  # behind a whole line


def test_lines_that_are_none_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ('{"kind": "of later", "step": 1}\n', "{\n", "[1]\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: "):
            JsonLines(path, {})
        assert path.read_text() == text


@pytest.mark.parametrize(("open_window", "expected"), [(False, [2, 4]), (True, [2])])
def test_a_report_goes_on_where_another_ended(tmp_path, shown, open_window, expected):
    def opened(step, window_is_open=False):
        made = RunReport(RunFolder(tmp_path / "run"), parse_job(JOB), lambda: None, shown)
        made.start(step, Position(), window_is_open)
        return made

    first = opened(0)
    for step in (2, 4, 6):
        first.tell("train", step, window(step))
    first.tell("evaluation", 4, {"samples": 5, "auc": float("nan")})
    first.close()
    again = opened(4, open_window)
    assert again.measured_at(4)
    assert again.final_metrics(4)["measured_on"] == "held-out part"
    assert not again.measured_at(6)
    again.close()
    told = kinds(tmp_path / "run" / "metrics.jsonl")
    assert [step for kind, step in told if kind == "train"] == expected
    assert [at for at in told if at[0] != "train"] == [
        ("start", 0),
        ("evaluation", 4),
        ("start", 4),
    ]
