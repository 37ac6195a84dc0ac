"""A loss that is not a number stops the run before it can spoil anything."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_contents import contents

from penstock import run as story
from penstock.config import parse_job
from penstock.errors import BatchError, NonFiniteError

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
