"""A loss that is not a number stops the run before it can spoil anything.

On a GPU the host learns of it some steps later; here it does so where `AHEAD` says so.
"""

import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_contents import contents, differences

from penstock import run as story
from penstock.config import parse_job
from penstock.errors import BatchError, NonFiniteError
from penstock.training.steps import in_flight

BAD_ROWS = slice(1800, 1864)  # in batch 14 of 128 rows


@pytest.fixture
def poisoned(small_fields, tmp_path):
    """A job whose numbers overflow float32 in the first layer at some rows."""
    random = np.random.default_rng(0)
    n0, n1 = (random.normal(size=3000).astype(np.float32) for _ in range(2))
    n0[BAD_ROWS], n1[BAD_ROWS] = random.choice(np.float32([-3e38, 3e38]), size=(2, 64))
    path = tmp_path / "poisoned.parquet"
    columns = {"click": random.integers(0, 2, 3000), "n0": n0, "n1": n1}
    columns |= {f"c{c}": random.integers(0, 100, 3000) for c in range(2)}
    pq.write_table(pa.table(columns), path)
    small_fields["data"] |= {
        "source": {"format": "parquet", "path": str(path)},
        "shuffle": {"block_rows": 0},
        "split": None,
    }
    return parse_job(small_fields)


def test_the_run_stops_and_names_the_batch(poisoned, tmp_path, quiet):
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError) as caught:
        story.train(poisoned, out, console=quiet)
    message = str(caught.value)
    assert message.startswith("step 14: the loss is ")
    assert "stopped before any update" in message
    assert "poisoned.parquet rows 1792-1919" in message
    assert "epoch 0, samples 1792 to 1919 of the run" in message
    # The checkpoint after step 12 is untouched and usable.
    found = contents(out)
    assert found["step"] == 12
    assert all(value.isfinite().all() for value in found["dense"].values())
    story.train(
        poisoned.model_copy(update={"training": stop_at(poisoned, 13)}),
        out,
        resume=True,
        console=quiet,
    )


def stop_at(job, step):
    return job.training.model_copy(update={"max_steps": step})


def test_nothing_is_updated(poisoned, tmp_path, quiet):
    with story.open_run(poisoned, tmp_path / "run", console=quiet) as run:
        run.begin(resume=False)
        with run.remaining_batches() as batches:
            for fed in batches:
                batch = fed.batch
                if batch.start.samples <= BAD_ROWS.start < batch.end.samples:
                    break
                run.step([fed])
        before = snapshot(run.state)
        with pytest.raises(NonFiniteError):
            run.step([fed])
        after = snapshot(run.state)
    assert before["step"] == after["step"]
    assert all(torch.equal(a, b) for a, b in zip(before["dense"], after["dense"], strict=True))
    # Rows of keys that this batch was the first to meet may exist, with their initial values.
    for name, rows in before["rows"].items():
        for key, row in rows.items():
            assert torch.equal(row, after["rows"][name][key]), (name, key)


@pytest.mark.parametrize("error", [NonFiniteError, BatchError])
def test_a_step_after_one_that_failed_is_that_of_its_batch_alone(small_job, tmp_path, quiet, error):
    """What the tables were to learn from the batch that failed is dropped."""
    found = []
    for fails in (False, True):
        with story.open_run(small_job, tmp_path / f"run-{fails}", console=quiet) as run:
            run.begin(resume=False)
            with run.remaining_batches() as batches:
                fed = next(iter(batches))
            if fails:
                weight = next(run.state.model.parameters())
                if error is NonFiniteError:
                    hook = weight.register_hook(lambda grad: grad * torch.nan)
                else:
                    hook = run.trainer.optimizer.register_step_pre_hook(broken)
                with pytest.raises(error):
                    run.step([fed])
                hook.remove()
                run.state.model.zero_grad()
            run.step([fed])
            found.append(snapshot(run.state)["rows"])
    for name, rows in found[0].items():
        assert all(torch.equal(row, found[1][name][key]) for key, row in rows.items())


BATCH = 8


def job_that_fails_at(step, fields, tmp_path):
    """A job whose loss or gradient overflows at a step, from 0; there are steps after it."""
    random = np.random.default_rng(step)
    rows = (step + 9) * BATCH
    n0 = random.normal(size=rows).astype(np.float32)
    n0[step * BATCH : (step + 1) * BATCH] = random.choice(np.float32([-3e38, 3e38]), size=BATCH)
    columns = {"click": random.integers(0, 2, rows), "n0": n0}
    columns |= {f"c{c}": random.integers(0, 100, rows) for c in range(2)}
    path = tmp_path / f"fails-{step}.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=256)
    fields["data"] |= {
        "source": {"format": "parquet", "path": str(path)},
        "shuffle": {"block_rows": 0},
        "split": None,
    }
    fields["data"]["lanes"] = 1
    fields["training"]["batch_size"] = BATCH
    fields["checkpoint"] = {"every_steps": 10 if step < 100 else 500}
    return parse_job(fields)


@pytest.fixture(params=[0, 4])
def ahead(request, monkeypatch):
    """Steps that the host is ahead of what it knows."""
    monkeypatch.setitem(in_flight.AHEAD, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("step", [1, 37, 1001])
@pytest.mark.gpu
def test_nothing_of_that_step_or_after_it_is_kept_on_a_gpu(small_fields, tmp_path, quiet, step):
    small_fields["run"]["device"] = "cuda"
    small_fields["training"]["deterministic"] = True
    nothing_is_kept(small_fields, tmp_path, quiet, step)


@pytest.mark.parametrize(
    ("ahead", "step"), [(0, 1), (0, 37), (4, 1), (4, 37), (4, 1001)], indirect=["ahead"]
)
def test_nothing_of_that_step_or_after_it_is_kept(small_fields, tmp_path, quiet, ahead, step):
    nothing_is_kept(small_fields, tmp_path, quiet, step)


def nothing_is_kept(small_fields, tmp_path, quiet, step):
    job = job_that_fails_at(step, small_fields, tmp_path)
    out, whole, every = tmp_path / "run", tmp_path / "whole", job.checkpoint.every_steps
    with (
        pytest.raises(NonFiniteError) as caught,
        story.open_run(job, out, console=quiet) as run,
    ):
        run.begin(resume=False)
        with run.kept(), run.remaining_batches() as batches:
            for fed in batches:
                run.step([fed])
                if run.is_due(every):
                    run.log()
                    run.save()
    named = f"rows {step * BATCH}-{(step + 1) * BATCH - 1}"
    assert str(caught.value).startswith(f"step {step}: the ")
    assert named in str(caught.value)
    # What is in memory is what the steps before made of it, and no step after is counted.
    assert (run.state.step, run.state.collection.step) == (step, step)
    assert run.state.position.samples == step * BATCH
    story.train(stopping(job, step), whole, console=quiet)
    before = contents(whole)
    assert before["step"] == step
    rows = snapshot(run.state)["rows"]
    for name, table in before["tables"].items():
        of_table = (table[part] for part in ("keys", "values", "state"))
        for key, value, state in zip(*of_table, strict=True):
            assert torch.equal(rows[name][int(key)].cpu(), torch.cat((value, state)))
    for name, value in run.state.model.state_dict().items():
        assert torch.equal(value.cpu(), before["dense"][name])
    # The newest checkpoint is of the last step before it, and it goes on from there.
    kept = step // every * every
    if kept:
        assert contents(out)["step"] == kept
        with pytest.raises(NonFiniteError) as again:
            story.train(job, out, resume=True, console=quiet)
        assert str(again.value) == str(caught.value)
        story.train(stopping(job, step), out, resume=True, console=quiet)
        assert set(differences(contents(out), before)) <= {"/lines"}
    else:
        assert not list(out.glob("checkpoints/*"))


def stopping(job, step):
    return job.model_copy(update={"training": stop_at(job, step)})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_in_flight_have_the_bits_of_steps_one_by_one(
    small_job, tmp_path, quiet, monkeypatch, accumulate
):
    job = small_job.model_copy(
        update={
            "training": small_job.training.model_copy(update={"accumulate_batches": accumulate})
        }
    )
    for ahead in (0, 5):
        monkeypatch.setitem(in_flight.AHEAD, "cpu", ahead)
        story.train(job, tmp_path / str(ahead), console=quiet)
    assert not differences(contents(tmp_path / "0"), contents(tmp_path / "5"))


@pytest.mark.parametrize("what", ["error", "signal", "end"])
def test_whatever_ends_the_run_meanwhile_the_loss_is_told(
    small_fields, tmp_path, quiet, monkeypatch, what
):
    """Two steps behind the one that is not finite, which nobody knows of by then."""
    monkeypatch.setitem(in_flight.AHEAD, "cpu", 4)
    job = job_that_fails_at(12, small_fields, tmp_path)
    real = story.train_step

    def train_step(training, batches, step):
        if step == 14 and what == "error":
            raise BatchError("broken")
        if step == 14 and what == "signal":
            signal.raise_signal(signal.SIGTERM)
        return real(training, batches, step)

    monkeypatch.setattr(story, "train_step", train_step)
    if what == "end":
        job = stopping(job, 15)
    with pytest.raises(NonFiniteError, match="step 12: the "):
        story.train(job, tmp_path / "run", console=quiet)
    found = contents(tmp_path / "run")
    assert found["step"] == 10
    assert max(line["step"] for line in found["lines"]) <= 12


def test_a_gradient_that_is_not_finite_is_told_later_too(small_fields, tmp_path, quiet, ahead):
    with story.open_run(parse_job(small_fields), tmp_path / "run", console=quiet) as run:
        run.begin(resume=False)
        weight = next(run.state.model.parameters())
        with run.remaining_batches() as batches:
            run.step([next(batches)])
            hook = weight.register_hook(lambda grad: grad * torch.nan)
            with pytest.raises(NonFiniteError, match=r"step 1: the gradient of '.*' is NaN"):
                for _ in range(1 + ahead):
                    run.step([next(batches)])
            hook.remove()
            assert run.state.step == 1
            # It was looked at, and nothing of it is left: the run could go on.
            run.step([next(batches)])
            run.progress.settle()
            assert run.state.step == 2


def test_what_is_finite_when_computed_again_is_told_all_the_same(small_job, tmp_path, quiet, ahead):
    with story.open_run(small_job, tmp_path / "run", console=quiet) as run:
        run.begin(resume=False)
        calls = []

        def once(grad):
            calls.append(grad)
            return grad * (torch.nan if len(calls) == 1 else 1.0)

        next(run.state.model.parameters()).register_hook(once)
        words = "step 0: the loss or a gradient was NaN or infinite .*, with other random numbers"
        with pytest.raises(NonFiniteError, match=words) as caught, run.remaining_batches() as them:
            for _ in range(1 + ahead):
                run.step([next(them)])
        assert "rows 0-127" in str(caught.value) or "samples 0 to 127" in str(caught.value)


def broken(*_):
    raise RuntimeError("broken")


def snapshot(state):
    rows = {}
    for table in state.collection.tables:
        parts = list(state.collection.export_table(table.name))
        rows[table.name] = {
            int(key): torch.cat((value, extra))
            for part in parts
            for key, value, extra in zip(part.keys, part.values, part.state, strict=True)
        }
    dense = [value.detach().clone() for value in state.model.parameters()]
    return {
        "step": state.step,
        "dense": dense,
        "rows": {k: {i: r.clone() for i, r in v.items()} for k, v in rows.items()},
    }
