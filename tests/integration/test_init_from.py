"""`training.init_from`: what of another run is taken, what is refused by name, and the resume."""

import shutil

import pytest
import torch
from run_contents import contents, differences
from stopped_runs import crash, with_rules

from penstock import run as story
from penstock.config import parse_job
from penstock.embedding.rules.optimizer import initial_state
from penstock.errors import CheckpointError, ConfigError


@pytest.fixture
def teacher(small_job, tmp_path, quiet):
    story.train(small_job, tmp_path / "teacher", console=quiet)
    return tmp_path / "teacher"


def begun(job, out, quiet):
    """State of a run of the job before its first step."""
    with story.open_run(job, out, console=quiet) as run:
        run.begin(resume=False)
        return run.state


def rows_of(collection, table):
    parts = list(collection.export_table(table))
    if not parts:
        return {}
    keys = torch.cat([one.keys for one in parts])
    order = keys.argsort()
    names = ("keys", "values", "state")
    return {name: torch.cat([getattr(one, name) for one in parts])[order] for name in names}


def job_from(fields, run, **more):
    taken = {"run": str(run), **more}
    return parse_job({**fields, "training": {**fields["training"], "init_from": taken}})


def test_rows_and_weights(small_fields, teacher, tmp_path, quiet):
    before = contents(teacher)
    state = begun(job_from(small_fields, teacher), tmp_path / "new", quiet)
    for name, table in before["tables"].items():
        got = rows_of(state.collection, name)
        assert len(table["keys"]) > 100
        assert not differences(
            {"keys": got["keys"], "values": got["values"]},
            {"keys": table["keys"], "values": table["values"]},
        )
        assert (got["state"] == initial_state(state.collection.tables[0].optimizer)).all()
    assert not differences(dict(state.model.state_dict()), before["dense"])
    assert (state.step, state.collection.step, state.position.samples) == (0, 0, 0)
    assert not state.optimizer.state


def test_with_optimizer_state(small_fields, teacher, tmp_path, quiet):
    before = contents(teacher)
    job = job_from(small_fields, teacher, optimizer_state=True)
    state = begun(job, tmp_path / "new", quiet)
    for name, table in before["tables"].items():
        assert not differences(rows_of(state.collection, name), table)
    assert (state.step, state.collection.step) == (0, before["collection_step"])
    parameters = dict(state.model.named_parameters())
    for key, tensor in before["optimizer_tensors"].items():
        name, _, what = key.rpartition("/")
        assert torch.equal(state.optimizer.state[parameters[name]][what], tensor)


def test_marks_and_counts_go_on(small_job, tmp_path, quiet):
    job = with_rules(small_job)
    story.train(job, tmp_path / "teacher", console=quiet)
    before = contents(tmp_path / "teacher")
    fields = job.model_dump()
    state = begun(
        job_from(fields, tmp_path / "teacher", optimizer_state=True), tmp_path / "new", quiet
    )
    table = next(iter(before["tables"]))
    parts = list(state.collection.export_table(table))
    order = torch.cat([one.keys for one in parts]).argsort()
    usage = torch.cat([one.usage for one in parts])[order]
    assert torch.equal(usage, before["tables"][table]["usage"])


def test_rows_age_on_by_the_clock_of_that_run(small_fields, tmp_path, quiet):
    small_fields["data"]["event_time"] = "event_time"
    small_fields["table_defaults"]["eviction"] = {"ttl": 10**8, "unit": "seconds"}
    story.train(parse_job(small_fields), tmp_path / "teacher", console=quiet)
    clock = contents(tmp_path / "teacher")["row_clock"]
    assert clock["recent_s"]
    job = job_from(small_fields, tmp_path / "teacher", optimizer_state=True)
    state = begun(job, tmp_path / "new", quiet)
    assert state.collection.row_clock.state() == clock


def test_parts_alone(small_fields, teacher, tmp_path, quiet):
    job = job_from(small_fields, teacher, tables=["c0"], dense=False)
    state = begun(job, tmp_path / "new", quiet)
    sizes = {one.name: one.rows for one in state.collection.table_stats()}
    assert sizes["c0"] > 100 and sum(sizes.values()) == sizes["c0"]
    fresh = begun(parse_job(small_fields), tmp_path / "fresh", quiet)
    assert not differences(dict(state.model.state_dict()), dict(fresh.model.state_dict()))


def test_a_text_is_the_run(small_fields, teacher):
    small_fields["training"]["init_from"] = str(teacher)
    assert parse_job(small_fields).training.init_from.run == str(teacher)


def other(fields):
    fields["features"] = [{"columns": ["c0", "c1", "c2"]}, {"columns": ["c3"], "table": "new"}]
    fields["tables"] = [{"name": "new", "dim": 8}, {"name": "c1", "dim": 8, "dtype": "bfloat16"}]
    fields["model"]["top"] = [8]
    return fields


def test_what_does_not_match_is_refused_by_name(small_fields, teacher, tmp_path, quiet):
    with pytest.raises(ConfigError) as raised:
        begun(job_from(other(small_fields), teacher), tmp_path / "new", quiet)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("training.init_from: not all of ")
    assert lines[1] == "  table new: not in that run"
    assert any(line.startswith("  top.") and "in that run" in line for line in lines)
    assert lines[-1] == (
        "take less (tables, dense, optimizer_state), or set unmatched: skip, which begins these "
        "anew"
    )
    assert not (tmp_path / "new").exists()


def test_or_skipped_and_told(small_fields, teacher, tmp_path, quiet):
    job = job_from(other(small_fields), teacher, unmatched="skip")
    state = begun(job, tmp_path / "new", quiet)
    sizes = {one.name: one.rows for one in state.collection.table_stats()}
    assert sizes["new"] == 0 and sizes["c0"] > 0
    # Of another dtype, the values are rounded.
    got = rows_of(state.collection, "c1")
    assert torch.equal(got["values"], contents(teacher)["tables"]["c1"]["values"].bfloat16())
    log = (tmp_path / "new" / "run.log").read_text(encoding="utf-8")
    assert "training.init_from: table new: not in that run: begins with initial values" in log


def test_of_weights_that_begin_anew_the_optimizer_knows_nothing(
    small_fields, teacher, tmp_path, quiet
):
    small_fields["model"]["top"] = [8]
    job = job_from(small_fields, teacher, optimizer_state=True, unmatched="skip")
    state = begun(job, tmp_path / "new", quiet)
    known = {name for name, one in state.model.named_parameters() if one in state.optimizer.state}
    taken = contents(teacher)["dense"]
    assert known == {
        name for name, one in state.model.named_parameters() if taken[name].shape == one.shape
    }
    assert 0 < len(known) < len(taken)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"optimizer": {"kind": "sgd"}}, "  table c0: optimizer adam in that run, sgd in the job"),
        ({"dtype": "float16"}, "  table c0: dtype float32 in that run, float16 in the job"),
        ({"dim": 16}, "  table c0: dim 8 in that run, 16 in the job"),
        (
            {"max_bytes": 200 * 200, "eviction": {"order": "lru"}},
            "  table c0: eviction is another than in that run",
        ),
    ],
)
def test_optimizer_state_needs_the_same_rules(more, text, small_fields, teacher, tmp_path, quiet):
    small_fields["table_defaults"] |= more
    with pytest.raises(ConfigError) as raised:
        begun(
            job_from(small_fields, teacher, optimizer_state=True, dense=False),
            tmp_path / "new",
            quiet,
        )
    assert text in str(raised.value).splitlines()


def test_another_dense_optimizer(small_fields, teacher, tmp_path, quiet):
    small_fields["training"]["optimizer"] = {"kind": "sgd"}
    with pytest.raises(ConfigError, match=r"training.optimizer: Adam in that run, SGD in the job"):
        begun(job_from(small_fields, teacher, optimizer_state=True), tmp_path / "new", quiet)


def test_budgets_and_times(small_fields, teacher, tmp_path, quiet):
    small_fields["table_defaults"]["max_bytes"] = 200 * 200
    small_fields["table_defaults"]["eviction"] = {"order": "lru"}
    with pytest.raises(ConfigError, match=r"rows in that run, and max_bytes holds"):
        begun(job_from(small_fields, teacher), tmp_path / "new", quiet)


def test_no_such_run(small_fields, tmp_path, quiet):
    with pytest.raises(CheckpointError) as raised:
        begun(job_from(small_fields, tmp_path / "none"), tmp_path / "new", quiet)
    assert str(raised.value) == (f"training.init_from: {tmp_path}/none: no such run or checkpoint")


@pytest.mark.parametrize("step", [9, 20])
def test_a_resumed_run_does_not_need_it(small_fields, teacher, tmp_path, quiet, monkeypatch, step):
    job = job_from(small_fields, teacher, optimizer_state=True)
    story.train(job, tmp_path / "whole", console=quiet)
    crash(job, tmp_path / "run", step, monkeypatch, quiet)
    shutil.rmtree(teacher)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole"))
