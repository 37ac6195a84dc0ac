"""Runs that go on: with the next day's files, with other metrics, from older checkpoints."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from run_contents import contents, differences
from stopped_runs import crash

from penstock import run as story
from penstock.config import parse_job
from penstock.embedding.durable_files import seal
from penstock.errors import DataError
from penstock.training.checkpoint.checkpoint import read_manifest
from penstock.training.checkpoint.files import read_position
from penstock.training.trained import newest_of_run

DAY = 256


def write_day(folder, day, rows=DAY):
    rng = np.random.default_rng(day)
    table = {
        "click": rng.integers(0, 2, rows),
        "user": rng.integers(0, 40, rows) + 1000 * day,
        "item": rng.integers(0, 90, rows),
        "weight": rng.integers(1, 9, rows) / 4,
        "all": np.zeros(rows, np.int64),
    }
    pq.write_table(pa.table(table), folder / f"day_{day}.parquet")


def job_of(folder, **changes):
    fields = {
        "data": {
            "source": {"format": "parquet", "path": str(folder / "day_*.parquet")},
            "label": {"column": "click"},
            "weight": "weight",
            "shuffle": {"block_rows": 100},
        },
        "features": [{"columns": ["user", "item"]}],
        "table_defaults": {"dim": 4, "optimizer": {"kind": "adam"}},
        "model": {"kind": "wide_deep"},
        "training": {"batch_size": 32},
        "run": {"threads": 1},
        "report": {"every_steps": 3},
    }
    for name, value in changes.items():
        at = fields
        *way, last = name.split("__")
        for part in way:
            at = at.setdefault(part, {})
        at[last] = value
    return parse_job(fields)


def train(job, out, resume=False):
    """The summary, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    summary = story.train(job, out, resume=resume, console=console)
    return summary, console.file.getvalue()


def position_of(out):
    checkpoint = newest_of_run(out)
    return read_position(checkpoint, read_manifest(checkpoint))


def test_a_finished_run_trains_files_that_were_added_and_nothing_else(tmp_path):
    out = tmp_path / "run"
    write_day(tmp_path, 0)
    first, _ = train(job_of(tmp_path), out)
    files = {path: path.read_bytes() for path in out.rglob("*.json*")}
    told = files.pop(out / "metrics.jsonl")
    again, shown = train(job_of(tmp_path), out, resume=True)
    assert "nothing new to train: the run has finished at step 8: every row was trained on" in shown
    assert again == json.loads((out / "summary.json").read_text())
    assert all(path.read_bytes() == before for path, before in files.items())
    more_told = (out / "metrics.jsonl").read_bytes().removeprefix(told).splitlines()
    assert [json.loads(line)["kind"] for line in more_told] == ["start", "nothing_new"]
    write_day(tmp_path, 1)
    more, shown = train(job_of(tmp_path), out, resume=True)
    assert "nothing new" not in shown
    assert (first["steps"], more["steps"]) == (8, 16)
    assert more["counts"] == {"read": 512, "filtered": 0, "quarantined": 0, "applied": 512}
    # Each row once: the users of a day are its own.
    assert more["tables"]["user"]["rows"] == sum(
        len(set(pq.read_table(tmp_path / f"day_{day}.parquet")["user"].to_pylist()))
        for day in (0, 1)
    )
    assert [tag.path for tag in position_of(out).files] == [
        str(tmp_path / f"day_{day}.parquet") for day in (0, 1)
    ]
    limited, shown = train(job_of(tmp_path, training__max_steps=16), out, resume=True)
    assert "the run has finished at step 16: training.max_steps is 16" in shown
    assert limited["steps"] == 16


def test_a_run_that_was_stopped_between_checkpoint_and_summary_writes_it(tmp_path):
    out = tmp_path / "run"
    write_day(tmp_path, 0)
    job = job_of(tmp_path, data__split={"by": "fraction", "evaluation": 0.25})
    first, _ = train(job, out)
    (out / "summary.json").unlink()
    again, shown = train(job, out, resume=True)
    assert "nothing new" not in shown
    assert again["auc"] == first["auc"] and (out / "summary.json").exists()


def test_changed_files_are_refused_before_anything_is_written(tmp_path, monkeypatch, quiet):
    out = tmp_path / "run"
    for day in (0, 1):
        write_day(tmp_path, day)
    job = job_of(tmp_path, checkpoint__every_steps=2)
    crash(job, out, 6, monkeypatch, quiet)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    write_day(tmp_path, 0, rows=DAY - 1)
    with pytest.raises(DataError, match=r"day_0\.parquet: changed after rows of it were trained"):
        train(job_of(tmp_path, training__epochs=7), out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    write_day(tmp_path, 0)
    train(job, out, resume=True)
    train(job, tmp_path / "whole")
    assert not differences(contents(out), contents(tmp_path / "whole"))


def test_held_out_rows_stay_held_out_for_evaluate(tmp_path):
    out = tmp_path / "run"
    for day in (0, 1):
        write_day(tmp_path, day)
    job = job_of(tmp_path, data__split={"by": "fraction", "evaluation": 0.25})
    train(job, out)
    before = story.evaluate(out)
    write_day(tmp_path, 2)
    assert story.evaluate(out) == before
    more, _ = train(job, out, resume=True)
    assert more["evaluation_samples"] == before["samples"] == 128
    assert more["samples"] == 512 - 128 + DAY
    assert story.evaluate(out)["samples"] == 128


def test_metrics_asked_for_later_are_measured(tmp_path, penstock):
    out = tmp_path / "run"
    for day in (0, 1):
        write_day(tmp_path, day)
    split = {"by": "file", "evaluation": "day_1.parquet"}
    first, _ = train(job_of(tmp_path, data__split=split), out)
    assert "grouped_auc" not in first
    wanted = {"grouped_auc": ["item"], "slices": [{"by": "all", "top": 1}]}
    again, shown = train(
        job_of(tmp_path, data__split=split, evaluation__metrics=wanted), out, resume=True
    )
    assert "nothing new" not in shown
    assert set(again["grouped_auc"]) == {"item"} and set(again["slices"]) == {"all"}
    assert (again["auc"], again["steps"]) == (first["auc"], first["steps"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [8]
    third, shown = train(
        job_of(tmp_path, data__split=split, evaluation__metrics=wanted), out, resume=True
    )
    assert "nothing new" in shown and third["grouped_auc"] == again["grouped_auc"]
    # The checkpoint is the first run's, whose job asks for none of them.
    assert "grouped_auc" not in story.evaluate(out)
    found = story.evaluate(out, sets=["evaluation.metrics.grouped_auc=[item]"])
    assert found["grouped_auc"] == again["grouped_auc"]
    code, shown, _ = penstock("evaluate", out, "--set", "evaluation.metrics.grouped_auc=[user]")
    assert code == 0 and "user" in shown
    code, _, errors = penstock("evaluate", out, "--set", "table_defaults.dim=8")
    assert code == 2 and "table user.dim: 4 in the checkpoint, 8 in the job" in errors
    code, _, errors = penstock("evaluate", out, "--set", "training.seed=8")
    assert code == 2
    assert "what was trained cannot be changed:\n  training.seed: 0 in the checkpoint, 8" in errors


def test_groups_and_slices_weigh_their_samples(tmp_path):
    """Of one group that is all, they are what is measured of all."""
    for day in (0, 1):
        write_day(tmp_path, day)
    job = job_of(
        tmp_path,
        data__split={"by": "file", "evaluation": "day_1.parquet"},
        evaluation__metrics={"grouped_auc": ["all"], "slices": [{"by": "all", "top": 1}]},
    )
    found, _ = train(job, tmp_path / "run")
    assert found["grouped_auc"]["all"]["auc"] == pytest.approx(found["auc"], abs=1e-12)
    (of_all,) = found["slices"]["all"]["values"].values()
    for name in ("auc", "log_loss", "calibration", "normalized_entropy"):
        assert of_all[name] == pytest.approx(found[name], rel=1e-12), name
    plain, _ = train(
        job.model_copy(update={"data": job.data.model_copy(update={"weight": None})}),
        tmp_path / "plain",
    )
    assert plain["grouped_auc"]["all"]["auc"] != found["grouped_auc"]["all"]["auc"]


def test_the_logged_learning_rate_is_that_of_the_step(tmp_path, monkeypatch):
    write_day(tmp_path, 0)
    used = []
    real = story.train_step

    def train_step(*arguments):
        result = real(*arguments)
        used.append(arguments[0].trainer.optimizer.param_groups[0]["lr"])
        return result

    monkeypatch.setattr(story, "train_step", train_step)
    job = job_of(tmp_path, training__optimizer={"schedule": {"warmup_steps": 100}})
    train(job, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert [line["learning_rate"] for line in lines] == [used[2], used[5], used[7]]
    assert len(set(used)) == 8


@pytest.fixture
def malformed(tmp_path):
    """A job over text with malformed rows everywhere, and how many rows and bad ones there are."""
    rng = np.random.default_rng(5)
    rows = [f"{rng.integers(0, 2)},{rng.integers(0, 50)}" for _ in range(600)]
    bad = sorted({0, 1, 599, *rng.integers(0, 600, 60).tolist()})
    for at in bad:
        rows[at] = "bad"
    path = tmp_path / "x.csv"
    path.write_text("click,user\n" + "\n".join(rows) + "\n")
    fields = {
        "data": {
            "source": {"format": "csv", "path": str(path), "on_malformed_row": "quarantine"},
            "label": {"column": "click"},
            "shuffle": {"block_rows": 64},
        },
        "features": [{"columns": ["user"], "transforms": [{"kind": "hash"}]}],
        "table_defaults": {"dim": 4},
        "model": {"kind": "wide_deep"},
        "training": {"batch_size": 16, "epochs": 2},
        "run": {"threads": 1, "prefetch_batches": 64},
        "checkpoint": {"every_steps": 5},
    }
    return parse_job(fields), 600, len(bad)


@pytest.mark.parametrize("step", [7, 12, 28, 40, 62])
def test_rows_are_counted_once_over_a_crash(malformed, step, tmp_path, monkeypatch, quiet):
    job, rows, bad = malformed
    whole, _ = train(job, tmp_path / "whole")
    assert whole["quarantined_rows"] == bad
    good = rows - bad
    assert whole["counts"] == {
        "read": 2 * rows,
        "filtered": 0,
        "quarantined": 2 * bad,
        "applied": 2 * good,
    }
    out = tmp_path / "run"
    crash(job, out, step, monkeypatch, quiet)
    counts = position_of(out).counts
    assert counts.applied == position_of(out).samples > 0
    assert counts.read == counts.filtered + counts.quarantined + counts.applied
    again, shown = train(job, out, resume=True)
    assert not differences(contents(out), contents(tmp_path / "whole"))
    for name in ("counts", "quarantined_rows"):
        assert again[name] == whole[name]
    assert f"{2 * rows:,} read: {2 * good:,} applied, 0 filtered, {2 * bad} quarantined" in shown
    entries = (out / "quarantine.jsonl").read_text()
    assert entries == (tmp_path / "whole" / "quarantine.jsonl").read_text()
    lines = [json.loads(line)["line"] for line in entries.splitlines()]
    assert len(lines) == len(set(lines)) == bad
    assert lines == sorted(lines)


def test_rows_that_are_all_left_out_are_counted_with_the_run(malformed, tmp_path):
    job, rows, bad = malformed
    out = tmp_path / "run"
    path = job.data.source.path
    source = job.data.source.model_copy(update={"path": str(tmp_path / "*.csv")})
    job = job.model_copy(update={"data": job.data.model_copy(update={"source": source})})
    first, _ = train(job, out)
    (tmp_path / "y.csv").write_text("click,user\nbad\nbad\n")
    again, shown = train(job, out, resume=True)
    assert path.endswith("x.csv") and "nothing new" not in shown
    assert again["steps"] == first["steps"]
    assert again["counts"]["read"] == 2 * rows + 2
    assert again["quarantined_rows"] == bad + 2
    assert position_of(out).counts == tuple(again["counts"].values())
    assert "nothing new" in train(job, out, resume=True)[1]
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == bad + 2


def to_version_1(out, position):
    """Makes the newest checkpoint one of version 1, which had no list of files."""
    path = newest_of_run(out)
    content = json.loads((path / "manifest.json").read_bytes())
    content["version"] = 1
    shuffle = content["job"]["data"]["shuffle"]
    shuffle["window_rows"] = shuffle.pop("block_rows")
    content["position"] = position
    del content["files"]["input.json"]
    (path / "input.json").unlink()
    raw = json.dumps(content, indent=1).encode() + b"\n"
    (path / "manifest.json").write_bytes(raw)
    (path / "manifest.b2sum").write_bytes(seal(raw))


def test_a_checkpoint_of_version_1_resumes_with_a_warning(
    small_job, tmp_path, monkeypatch, quiet, penstock
):
    out = tmp_path / "run"
    data = small_job.data.model_copy(update={"lanes": 1})  # version 1 knew no others
    small_job = small_job.model_copy(update={"data": data})
    story.train(small_job, tmp_path / "whole", console=quiet)
    crash(small_job, out, 20, monkeypatch, quiet)
    # As version 1 wrote it after 18 steps of 128: blocks are 1,024 rows, of which two are done.
    place = {"split": 0, "split_row": 2048}
    to_version_1(out, {"epoch": 0, "window": 2, "window_row": 256, **place, "samples": 18 * 128})
    code, shown, _ = penstock("inspect", out, "--no-plots")
    assert code == 0 and "epoch 0, block 2, 256 samples of it" in shown
    assert story.evaluate(out)["samples"] == 1500
    _, shown = train(small_job, out, resume=True)
    assert "warning: the checkpoint is of an older version" in shown
    assert not differences(contents(out), contents(tmp_path / "whole"))
    # From here on the data is known.
    assert position_of(out).files and position_of(out).version_1 is None
    assert position_of(out) == position_of(tmp_path / "whole")


def test_a_checkpoint_of_version_2_goes_on_in_its_one_lane(small_job, tmp_path, monkeypatch, quiet):
    data = small_job.data.model_copy(update={"lanes": 1})
    in_one_lane = small_job.model_copy(update={"data": data})
    out = tmp_path / "run"
    story.train(in_one_lane, tmp_path / "whole", console=quiet)
    crash(in_one_lane, out, 20, monkeypatch, quiet)
    # As it was written before there were lanes: in the middle of a block.
    path = newest_of_run(out)
    content = json.loads((path / "manifest.json").read_bytes())
    content["version"] = 2
    del content["job"]["data"]["lanes"]
    (lane,) = content["position"].pop("lanes")
    assert lane["pieces"]
    content["position"] |= {
        "block_size": lane["samples"],
        "pieces": lane["pieces"],
        "cursor": lane["cursor"],
    }
    raw = json.dumps(content, indent=1).encode() + b"\n"
    (path / "manifest.json").write_bytes(raw)
    (path / "manifest.b2sum").write_bytes(seal(raw))
    train(small_job, out, resume=True)
    assert len(position_of(out).lanes) == 1
    assert not differences(contents(out), contents(tmp_path / "whole"))


def test_another_batch_size_at_resume_trains_each_row_once(tmp_path):
    for day in (0, 1):
        write_day(tmp_path, day)
    for number, (before, after) in enumerate([(32, 40), (64, 24), (16, 500)]):
        out = tmp_path / f"run-{number}"
        train(job_of(tmp_path, training__batch_size=before, training__max_steps=3), out)
        done, _ = train(job_of(tmp_path, training__batch_size=after), out, resume=True)
        assert done["samples"] == done["counts"]["applied"] == done["counts"]["read"] == 512
        assert yaml.safe_load((out / "job.yaml").read_text())["training"]["batch_size"] == after
