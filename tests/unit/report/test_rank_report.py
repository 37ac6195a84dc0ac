"""The run folder of several ranks: one holds it, all hear whether they may, one writes."""

import io
from functools import partial

import pytest
from rich.console import Console

from penstock.config import parse_job
from penstock.embedding.collection.table_stores import RetentionStats, TableStats
from penstock.errors import ConfigError, FailedElsewhere
from penstock.ranks.group import ALONE
from penstock.ranks.table_totals import over_ranks
from penstock.report.folder import RunFolder
from penstock.report.rank_report import held, report_of
from penstock.report.run_report import Report, RunReport
from tests.world.ranks import World

JOB = {
    "data": {
        "source": {"path": "day_*.parquet", "format": "parquet"},
        "label": {"column": "click"},
    },
    "features": [{"columns": ["C*"]}],
    "model": {"kind": "dlrm"},
}


def over(size, act):
    return World(size).run(act)


def test_the_first_rank_holds_the_folder_for_all(tmp_path):
    job, checked = parse_job(JOB), []

    def act(group):
        folder = RunFolder(tmp_path / "run")
        with held(folder, job, group, partial(checked.append, group.rank)):
            group.gathered_bytes(b"")  # all are in it
            assert (tmp_path / "run" / "run.lock").read_text().startswith("process")
            group.gathered_bytes(b"")
        return folder.has_lock

    assert over(3, act) == [True] * 3
    assert checked == [0, 0]
    assert not (tmp_path / "run").exists()  # nothing was written


def test_a_folder_that_is_refused_is_refused_on_all_by_the_first(tmp_path):
    job, out = parse_job(JOB), tmp_path / "run"
    out.mkdir()
    (out / "file").touch()

    def act(group):
        folder = RunFolder(out)
        with (
            pytest.raises(ConfigError if group.rank == 0 else FailedElsewhere) as raised,
            held(folder, job, group, folder.refuse_unless_new),
        ):
            raise AssertionError("it may not be used")
        return str(raised.value)

    first, second = over(2, act)
    assert "is not empty; name another folder" in first
    assert second == f"1 of 2 ranks cannot train in {out}, which say why"


def test_a_folder_that_another_run_trains_in_is_refused_on_all(tmp_path):
    job, out = parse_job(JOB), tmp_path / "run"

    def act(group):
        folder = RunFolder(out)
        with (
            pytest.raises((ConfigError, FailedElsewhere)),
            held(folder, job, group, lambda: None),
        ):
            raise AssertionError("it may not be used")

    with held(RunFolder(out), job, ALONE, lambda: None):
        over(2, act)


def test_ranks_with_another_job_or_folder_are_refused(tmp_path):
    def act(group, named, trained):
        job = parse_job({**JOB, "name": "other" if trained and group.rank else "same"})
        folder = RunFolder(tmp_path / ("other" if named and group.rank else "same"))
        with pytest.raises(ConfigError) as raised, held(folder, job, group, lambda: None):
            raise AssertionError("they may not begin")
        return str(raised.value)

    for error in over(2, partial(act, named=True, trained=False)):
        assert error.startswith("the run folder is another one on rank 1 than on rank 0")
    for error in over(2, partial(act, named=False, trained=True)):
        assert error.startswith("the job is another one on rank 1 than on rank 0")
    assert not list(tmp_path.iterdir())


def test_a_rank_that_does_not_see_the_folder_ends_all(tmp_path, monkeypatch):
    """As on a machine with a file system of its own."""
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    monkeypatch.setattr("penstock.report.rank_report.check_alike", lambda *given: None)

    def act(group):
        folder = RunFolder(tmp_path / str(group.rank) / "run")
        with (
            pytest.raises((ConfigError, FailedElsewhere)) as raised,
            held(folder, parse_job(JOB), group, lambda: None),
        ):
            raise AssertionError("it may not be used")
        return str(raised.value)

    first, second = over(2, act)
    assert "1 of 2 ranks cannot see" in first
    assert "does not see the run folder that rank 0 holds" in second
    assert not (tmp_path / "0" / "run").exists()


def test_ranks_but_the_first_write_nothing(tmp_path):
    job, folder = parse_job(JOB), RunFolder(tmp_path / "run")
    shown = Console(file=io.StringIO())

    def act(group):
        report = report_of(group, folder, job, lambda: None, shown)
        if group.rank:
            report.warn("odd")
            report.failed(3, ConfigError("wrong"))
            report.tell("warning", 3, {"text": "odd"})
        report.close()
        return type(report)

    assert over(3, act) == [RunReport, Report, Report]
    assert not list(tmp_path.iterdir())
    assert not shown.file.getvalue()


def test_sizes_of_tables_are_those_of_all_ranks():
    def stats(rank):
        rules = RetentionStats(
            admitted=10 * rank,
            refused=1,
            evicted=rank,
            evicted_age=4.0 * rank,
            dropped=2,
            candidates=3,
            budget_used=0.25 * rank,
        )
        return [
            TableStats("plain", rows=5 + rank, bytes=100, memory_bytes=1),
            TableStats("ruled", rows=rank, bytes=8, memory_bytes=1, retention=rules),
            TableStats("whole", 1, 1, 1, retention=rules, is_whole=True),
        ]

    expected = {
        "plain": {"rows": 18, "bytes": 300},
        "ruled": {
            "rows": 3,
            "bytes": 24,
            "admitted": 30,
            "refused": 3,
            "evicted": 3,
            "evicted_age": (1 * 4.0 + 2 * 8.0) / 3,
            "dropped": 6,
            "candidates": 9,
            "budget_used": 0.25,  # of equal parts of the budget
        },
    }
    expected["whole"] = {**expected["ruled"], "bytes": 3, "budget_used": 0.75}
    assert over(3, lambda group: over_ranks(group, stats(group.rank))) == [expected] * 3
    assert over_ranks(ALONE, stats(1))["ruled"] == stats(1)[1].values()
