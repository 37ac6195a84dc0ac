"""Jobs on a GPU, or in Triton's interpreter where there is none."""

from itertools import islice

import pytest
import torch
from run_contents import contents, differences
from stopped_runs import crash, with_rules

from penstock import run as story
from penstock.config import parse_job
from penstock.training.steps.feed import steps_of

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
STEPS = 200 if ON_GPU else 6


def on(device, job, **training):
    """The job on a device, short enough for the interpreter."""
    changes = {
        "deterministic": True,
        "max_steps": STEPS,
        "epochs": 10,
        **training,
    }
    fields = job.model_dump(mode="json")
    fields["training"] |= changes
    fields["run"]["device"] = device
    fields["evaluation"]["every_steps"] = None
    fields["checkpoint"] = {"every_steps": STEPS // 2}
    fields["data"]["source"]["rows"] = 6000 if ON_GPU else 1500
    return parse_job(fields)


@pytest.fixture
def small_job(small_job):
    """With narrow rows."""
    defaults = small_job.table_defaults.model_copy(update={"dtype": "bfloat16"})
    return small_job.model_copy(update={"table_defaults": defaults})


def log_losses(out):
    return [line["log_loss"] for line in contents(out)["lines"] if "log_loss" in line]


def test_a_job_learns_the_same_on_either_device(small_job, tmp_path, quiet):
    for device in ("cpu", "cuda"):
        story.train(on(device, small_job), tmp_path / device, console=quiet)
    if not ON_GPU:
        # The dense part runs on the CPU in both: not a bit differs.
        assert not differences(contents(tmp_path / "cpu"), contents(tmp_path / "cuda"))
    losses = [torch.tensor(log_losses(tmp_path / device)) for device in ("cpu", "cuda")]
    assert len(losses[0])
    # fp32 matrix products in another order, and bfloat16 rows rounded from what they give.
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-3, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"clip_gradient_norm": 0.1}, {"accumulate_batches": 2}])
def test_no_step_waits_for_the_gpu(small_job, tmp_path, quiet, changes):
    """But for room for new rows, which the first steps make, and for what is seen steps later."""
    job = on("cuda", small_job, deterministic=False, autocast="bfloat16", **changes)
    with story.open_run(job, tmp_path / "run", console=quiet) as run:
        run.begin(resume=False)
        with run.remaining_batches() as batches:
            steps = list(islice(steps_of(batches, job.training.accumulate_batches), 30))
            for fed in steps[:10]:
                run.step(fed)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for fed in steps[10:]:
                    run.step(fed)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        run.log()
    assert run.state.step == 30


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_moves_between_devices(small_job, tmp_path, quiet, first, then):
    story.train(on(first, small_job, max_steps=STEPS // 2), tmp_path / "run", console=quiet)
    before = contents(tmp_path / "run")
    job = on(then, small_job, max_steps=STEPS // 2 + 1)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert contents(tmp_path / "run")["step"] == before["step"] + 1
    whole = tmp_path / "whole"
    story.train(on(first, small_job, max_steps=STEPS // 2 + 1), whole, console=quiet)
    if not ON_GPU:
        # Two runs log at other steps than one.
        assert set(differences(contents(tmp_path / "run"), contents(whole))) <= {"/lines"}
    for name, table in contents(whole)["tables"].items():
        keys = contents(tmp_path / "run")["tables"][name]["keys"]
        assert torch.equal(keys, table["keys"])


def test_kill_and_resume_have_the_bits_of_one_run(small_job, tmp_path, quiet, monkeypatch):
    job = on("cuda", with_rules(small_job))
    story.train(job, tmp_path / "whole", console=quiet)
    crash(job, tmp_path / "run", STEPS - 2, monkeypatch, quiet)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole"))


def test_dropout_autocast_and_accumulation_resume_with_the_same_bits(
    small_fields, tmp_path, quiet, monkeypatch
):
    small_fields["model"] |= {"dropout": 0.2, "batch_norm": True}
    job = on(
        "cuda", parse_job(small_fields), autocast="bfloat16", accumulate_batches=2, batch_size=64
    )
    story.train(job, tmp_path / "whole", console=quiet)
    crash(job, tmp_path / "run", STEPS // 2 + 1, monkeypatch, quiet)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole"))
