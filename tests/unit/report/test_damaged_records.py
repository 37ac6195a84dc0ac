"""metrics.jsonl and summary.json that were changed or damaged: shown, or refused by name."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.report.comparison import metrics_side_by_side
from penstock.report.inspection import _metrics
from penstock.report.json_lines import JsonLines
from penstock.report.record import RunRecord
from penstock.report.terminal_curves import curve_tables

RUN = Path(__file__).resolve().parents[2] / "integration" / "run_of_version_1" / "run"
LINES = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text("utf-8").splitlines()]
SUMMARY = json.loads((RUN / "summary.json").read_text("utf-8"))
GONE = object()
OTHERS = (GONE, None, True, -1, 10**400, 1e308, "x", "Infinity", [], [[1]], {}, {"a": [1]})


@pytest.fixture
def folder(tmp_path):
    for name in ("job.yaml", "metrics.jsonl", "summary.json"):
        shutil.copy(RUN / name, tmp_path)
    return tmp_path


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inner = enumerate(value[:1])
    for name, one in inner:
        yield from places(one, (*path, name))


def changed(whole, path, other):
    whole = copy.deepcopy(whole)
    if not path:
        return other
    inside = whole
    for name in path[:-1]:
        inside = inside[name]
    if other is GONE:
        del inside[path[-1]]
    else:
        inside[path[-1]] = other
    return whole


def look(folder):
    """Whether all that is shown of a run folder could be shown; else it was refused."""
    try:
        record = RunRecord.read(folder)
        shown = [*curve_tables(record), metrics_side_by_side({"a": record, "b": record})]
        shown.append(_metrics(record.summary))
    except ConfigError as error:
        assert str(folder) in str(error)
        return False
    return len(shown) > 1


def test_what_was_written_is_shown(folder):
    assert look(folder)


@pytest.mark.parametrize("number", [0, 4])
def test_a_changed_line_is_shown_or_refused(folder, number):
    assert {"train", "evaluation"} == {LINES[0]["kind"], LINES[4]["kind"]}
    outcomes = set()
    for turn, path in enumerate(path for path in places(LINES[number]) if path):
        for other in OTHERS[turn % 4 :: 4]:
            lines = [*LINES]
            lines[number] = changed(lines[number], path, other)
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text, "utf-8")
            outcomes.add(look(folder))
    assert outcomes == {True, False}


def test_a_changed_summary_is_shown_or_refused(folder):
    outcomes = set()
    for turn, path in enumerate(places(SUMMARY)):
        for other in OTHERS[turn % 6 or 6 :: 6]:
            text = json.dumps(changed(SUMMARY, path, other))
            (folder / "summary.json").write_text(text, "utf-8")
            outcomes.add(look(folder))
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"kind": "train", "step": 1, "time_s": {}}', "time_s: {} is no time"),
        ('{"kind": "train", "step": true}', "'train' at step True is no event"),
        ('{"kind": "train", "step": 1.5}', "'train' at step 1.5 is no event"),
        ('{"kind": "train", "step": 1, "auc": "good"}', "auc: 'good' is no value in '1'"),
        ('{"kind": "train", "step": 1, "auc": true}', "auc: True is no value in '1'"),
        ('{"kind": "train", "step": 1, "tables": [1]}', "[1] is no group of values"),
        ('{"kind": "warning", "step": 1, "text": 1}', "text: 1 is no value in 'text'"),
        (
            '{"kind": "evaluation", "step": 1, "calibration_buckets": [[1, 2]]}',
            "calibration_buckets: [[1, 2]] is no value in 'list of (prediction, label, weight)'",
        ),
        ("[" * 100_000, "a line is nested too deeply to be an event"),
        ('{"kind": "later", "step": 1}', "'later' at step 1 is no event; was it written by a lat"),
        ("\x00" * 8, "Expecting value"),
    ],
)
def test_a_run_does_not_go_on_over_what_is_no_event(folder, line, told):
    path = folder / "metrics.jsonl"
    before = f"{line}\n" + path.read_text("utf-8")
    path.write_text(before, "utf-8")
    with pytest.raises(ConfigError) as caught:
        JsonLines(path, {})
    assert str(caught.value).startswith(f"{path}: cannot be read: ")
    assert told in str(caught.value) and str(caught.value).endswith("; move it away")
    assert path.read_text("utf-8") == before
    assert not look(folder)


def test_what_a_later_version_adds_to_an_event_stays(folder):
    path = folder / "metrics.jsonl"
    line = json.dumps({"kind": "train", "step": 1, "samples": 9, "new": {"a": [None]}})
    path.write_text(f"{line}\n", "utf-8")
    (event,) = JsonLines(path, {}).kept
    assert event.values["new"] == {"a": [None]} and math.isnan(event.time_s)
    assert path.read_text("utf-8") == f"{line}\n"
    assert look(folder)
