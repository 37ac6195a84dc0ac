"""The source of docs/data.md, as it stands there: trains, goes on, and refuses what changed."""

import re
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from penstock.job_file import parse_yaml

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
ROWS = 700


def blocks(language):
    text = PAGE.read_text(encoding="utf-8").split("\n## A source of your own\n")[1]
    return re.findall(rf"```{language}\n(.*?)```", text.split("\n## ")[0], re.DOTALL)


def add_clicks(database, days):
    rng = np.random.default_rng(0)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS clicks (day, click, user, price)")
        rows = [
            (day, int(rng.random() < 0.3), user, None if user % 5 == 0 else float(user))
            for day in days
            for user in rng.integers(0, 50, ROWS).tolist()
        ]
        connection.executemany("INSERT INTO clicks VALUES (?, ?, ?, ?)", rows)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The job's file; the class is where the page says."""
    (code,) = blocks("python")
    assert len(code.splitlines()) < 50
    (tmp_path / "clicks_by_day.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "clicks_by_day", raising=False)
    add_clicks("clicks.db", ["2026-01-01", "2026-01-02", "2026-01-03"])
    (text,) = blocks("yaml")
    fields = parse_yaml(text, "docs/data.md")
    fields["training"] = {"batch_size": 100}
    fields["run"] = {"threads": 1}
    fields["table_defaults"] = {"dim": 4}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def test_it_trains_goes_on_and_refuses_what_changed(penstock, job):
    code, shown, errors = penstock("train", job, "--out", "run")
    assert (code, errors) == (0, ""), shown
    assert yaml.safe_load(Path("run/summary.json").read_text())["samples"] == 3 * ROWS

    add_clicks("clicks.db", ["2026-01-04"])
    code, shown, errors = penstock("train", job, "--out", "run", "--resume")
    assert (code, errors) == (0, ""), shown
    assert yaml.safe_load(Path("run/summary.json").read_text())["samples"] == 4 * ROWS

    add_clicks("clicks.db", ["2026-01-02", "2026-01-05"])
    code, _, errors = penstock("train", job, "--out", "run", "--resume")
    assert code == 2 and "2026-01-02: changed after rows of it were trained on" in errors


def test_plan_and_a_fraction_held_out(penstock, job):
    code, shown, errors = penstock("data", "plan", job)
    assert (code, errors) == (0, "") and "3" in shown
    split = ["--set", "data.split={by: fraction, evaluation: 0.5}"]
    code, shown, errors = penstock("train", job, "--out", "run", *split)
    assert (code, errors) == (0, ""), shown
    assert yaml.safe_load(Path("run/summary.json").read_text())["samples"] == 3 * ROWS // 2
    code, shown, errors = penstock("evaluate", "run")
    assert (code, errors) == (0, ""), shown


def test_what_a_user_meets_first(penstock, job):
    Path("clicks.db").unlink()
    code, _, errors = penstock("train", job, "--out", "run")
    assert code == 2
    assert "ClicksByDay': parts() failed: OSError: clicks.db: unable to open" in errors


def test_looking_at_a_run_imports_nothing(penstock, job):
    assert penstock("train", job, "--out", "run")[0] == 0
    Path("clicks_by_day.py").write_text("raise SystemExit('imported')")
    sys.modules.pop("clicks_by_day")
    assert penstock("inspect", "run")[0] == 0
