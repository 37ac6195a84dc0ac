"""What runs tell: stopped, resumed, finished, and folders that were written before."""

import json
import re
import shutil
from pathlib import Path

import pytest

from penstock import run as story
from penstock.errors import DataError
from penstock.events.event import check, measurements
from penstock.events.registry import KINDS
from penstock.report.json_lines import read_events

PAGE = Path(__file__).resolve().parents[2] / "docs" / "events.md"


@pytest.fixture
def stopped(small_job, tmp_path, quiet, monkeypatch):
    """A run that ended at step 20."""
    real = story.Run.step

    def step(self, fed):
        if self.state.step == 20:
            raise DataError("a.parquet: the disk is gone")
        real(self, fed)

    with monkeypatch.context() as patch:
        patch.setattr(story.Run, "step", step)
        with pytest.raises(DataError):
            story.train(small_job, tmp_path / "run", console=quiet)
    return tmp_path / "run"


def test_all_that_a_run_tells_is_registered_documented_and_in_order(stopped, small_job, quiet):
    for _ in range(2):
        story.train(small_job, stopped, resume=True, console=quiet)
    events = read_events(stopped / "metrics.jsonl")
    documented = set(re.findall(r"^\| `([^`/]+)/?`", PAGE.read_text("utf-8"), re.MULTILINE))
    for event in events:
        check(event)
        for _, name, quantity, _ in measurements(event):
            assert quantity.unit
            assert set(name) <= documented
    assert {event.kind for event in events} == set(KINDS) - {
        "warning",
        "pretrained",
        "stopped_early",
        "waiting",
        "profile",
    }
    assert {str(event.role) for event in events} == {"trainer 0"}
    times = [event.time_s for event in events]
    assert times == sorted(times)
    for kind in ("train", "evaluation"):
        steps = [event.step for event in events if event.kind == kind]
        assert steps == sorted(set(steps))
    happened = [event.kind for event in events if not KINDS[event.kind].is_computed]
    assert [kind for kind in happened if kind != "checkpoint"] == [
        *("start", "failed", "stopped", "start", "summary", "start", "nothing_new")
    ]
    summary = next(event for event in events if event.kind == "summary")
    written = json.loads((stopped / "summary.json").read_text())
    assert json.loads(json.dumps(summary.values)) == written


def test_folders_of_before_are_read_and_go_on(stopped, small_job, tmp_path, quiet, penstock):
    """They had lines of two kinds, without time and role."""
    path = stopped / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    old = [
        {name: one for name, one in line.items() if name not in ("time_s", "role", "rows_ahead")}
        for line in lines
        if line["kind"] in ("train", "evaluation")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    code, shown, errors = penstock("inspect", stopped)
    assert (code, errors) == (0, "") and "training curves" in shown
    summary = story.train(small_job, stopped, resume=True, console=quiet)
    assert summary["steps"] == 36
    new = [json.loads(line) for line in path.read_text().splitlines()]
    assert new[: len(old)] == old
    trained = [line["step"] for line in new if line["kind"] == "train"]
    assert trained == [7, 14, 21, 28, 35, 36]
    # Of the summary of before, too.
    file = stopped / "summary.json"
    fields = json.loads(file.read_text())
    del fields["rows_ahead_of_time"], fields["counts"]
    file.write_text(json.dumps(fields))
    shutil.copytree(stopped, tmp_path / "other")
    code, shown, errors = penstock("inspect", stopped, "--no-plots")
    assert (code, errors) == (0, "") and "measured on the held-out part" in shown
    code, shown, errors = penstock("compare", stopped, tmp_path / "other", "--no-plots")
    assert (code, errors) == (0, "") and "the jobs are equal in every field" in shown
