"""What a run tells, in its folder and on the terminal, without a run."""

import io
import json
import logging
import shlex

import pytest
from rich.console import Console

from penstock.config import parse_job
from penstock.errors import ConfigError, DataError
from penstock.position import Position
from penstock.report.folder import RunFolder
from penstock.report.json_lines import JsonLines, read_events
from penstock.report.run_report import RunReport

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
    lines = kinds(tmp_path / "run" / "metrics.jsonl")
    assert [step for kind, step in lines if kind == "train"] == expected
    assert [at for at in lines if at[0] != "train"] == [
        ("start", 0),
        ("evaluation", 4),
        ("start", 4),
    ]


def told(path, kind):
    return [event for event in read_events(path / "run" / "metrics.jsonl") if event.kind == kind]


def test_a_report_that_is_closed_leaves_no_handler_behind(report):
    log = logging.getLogger("penstock")
    before = list(log.handlers)
    report.start(0, Position())
    assert len(log.handlers) == len(before) + 1
    report.close()
    assert log.handlers == before


def test_a_warning_is_of_the_step_that_was_told_last(report, tmp_path):
    report.start(3, Position())
    report.warn("at first")
    report.tell("train", 5, window(5))
    logging.getLogger("penstock.data").warning("after a window")
    assert [(event.step, event.values["text"]) for event in told(tmp_path, "warning")] == [
        (3, "at first"),
        (5, "after a window"),
    ]


def test_where_an_error_came_up_is_told_of_those_with_a_cause_alone(report, tmp_path):
    report.start(0, Position())
    try:
        try:
            raise KeyError("within")
        except KeyError:
            raise DataError("on the way")  # noqa: B904 - has a context and no cause
    except DataError as error:
        report.failed(1, error)
    try:
        try:
            raise ZeroDivisionError("in the model")
        except ZeroDivisionError as error:
            raise DataError("of the model") from error
    except DataError as error:
        report.failed(2, error)
    plain, chain = (event.values["text"] for event in told(tmp_path, "failed"))
    assert plain == "on the way"
    assert "ZeroDivisionError: in the model" in chain and "test_run_report.py" in chain
    assert chain.endswith("penstock.errors.DataError: of the model")


def test_the_command_that_goes_on_can_be_typed_as_it_is(tmp_path, shown):
    folder = RunFolder(tmp_path / "my run" / "of $today")
    folder.path.mkdir(parents=True)
    report = RunReport(folder, parse_job(JOB), lambda: None, shown)
    report.start(0, Position())
    report.stopped(4, is_whole=False)
    report.close()
    (stopped,) = (one for one in read_events(folder.metrics_file) if one.kind == "stopped")
    assert stopped.values["is_whole"] is False
    assert shlex.split(stopped.values["command"]) == [
        *("penstock", "train", str(folder.job_file), "--out", str(folder.path), "--resume")
    ]


def test_the_newest_evaluation_is_the_one_that_a_run_goes_on_from(tmp_path, shown):
    first = RunReport(RunFolder(tmp_path / "run"), parse_job(JOB), lambda: None, shown)
    first.start(0, Position())
    for step in (2, 4):
        first.tell("train", step, window(step))
        first.tell("evaluation", step, {"samples": 5, "auc": step / 10})
    assert not first.measured_at(3) and first.measured(4)["auc"] == 0.4
    first.close()
    again = RunReport(RunFolder(tmp_path / "run"), parse_job(JOB), lambda: None, shown)
    again.start(4, Position())
    assert again.measured(4) == {"samples": 5, "auc": 0.4}
    assert again.final_metrics(4) == {
        "measured_on": "held-out part",
        "evaluation_samples": 5,
        "auc": 0.4,
    }
    assert again.final_metrics(5) == {
        "measured_on": "last training steps, before their update",
        "evaluation_samples": 0,
        "loss": 1 / 4,
    }
    again.close()


def test_what_other_metrics_are_asked_for_is_measured_anew(tmp_path, shown):
    for step, exact, kept in ((0, False, []), (4, False, [2, 4]), (4, True, [2]), (4, True, [2])):
        job = parse_job({**JOB, "evaluation": {"metrics": {"exact_auc": exact}}})
        report = RunReport(RunFolder(tmp_path / "run"), job, lambda: None, shown)
        report.start(step, Position())
        assert [event.step for event in told(tmp_path, "evaluation")] == kept
        assert report.measured_at(4) == (4 in kept)
        for at in (2, 4) if not step else ():
            report.tell("evaluation", at, {"samples": 5, "auc": 0.5})
        report.close()


@pytest.mark.parametrize(
    ("step", "most", "no_better", "why"),
    [
        (4, None, None, "every row was trained on; files that are added behind the others would"),
        (4, 9, None, "every row was trained on; "),
        (4, 4, None, "training.max_steps is 4"),
        (5000, 1234, None, "training.max_steps is 1,234"),
        (4, 4, "no better auc", "no better auc"),
        (4, 9, "no better auc", "no better auc"),
    ],
)
def test_why_a_finished_run_has_nothing_to_do(report, tmp_path, step, most, no_better, why):
    report.start(step, Position())
    assert not report.has_nothing_new(step)  # there is no summary
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": step, "auc": 0.5}))
    assert report.has_nothing_new(step) and not report.has_nothing_new(step + 1)
    assert report.nothing_new(step, most, no_better)["auc"] == 0.5
    assert told(tmp_path, "nothing_new")[0].values["text"].startswith(why)
    report.tell("evaluation", step, {"samples": 5, "auc": 0.5})
    assert not report.has_nothing_new(step)  # what was measured is new
