"""`penstock train --profile`: a trace of some steps, and what holds the run back."""

import json
from types import SimpleNamespace

import pytest
import torch
from run_contents import contents, differences
from torch._C._autograd import DeviceType

from penstock import run as story
from penstock.events.event import check, measurements
from penstock.report.json_lines import read_events
from penstock.training.steps import profile
from penstock.training.steps.profile import _Trace, held_back_by
from penstock.training.steps.step import STAGES, Clock

STAGES_OF_A_STEP = {
    "wait for data",
    "look-up",
    "forward",
    "backward",
    "gradients of the tables",
    "sum and norm of the gradients",
    "update of the dense model",
    "update of the tables",
    "wait for the device",
    "metrics",
}


def profiles(out):
    """What was told of them, as the registry has it."""
    events = [one for one in read_events(out / "metrics.jsonl") if one.kind == "profile"]
    for one in events:
        check(one)
        assert measurements(one)
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "profile"]


def test_steps_are_traced_and_the_stage_is_named(small_yaml, tmp_path, penstock, small_job, quiet):
    out = tmp_path / "run"
    status, shown, _ = penstock("train", small_yaml, "--out", out, "--profile", "7")
    assert status == 0
    (told,) = profiles(out)
    assert (told["step"], told["steps"]) == (27, 7)
    assert f"held back by {told['text']}" in shown and "7 steps of " in shown
    stages = told["stages"]
    assert set(stages) == STAGES_OF_A_STEP | {"checkpoint", "other"}
    # No stage is within another: together they are the step.
    assert sum(one["host_s"] for one in stages.values()) == pytest.approx(told["step_s"], rel=0.02)
    assert stages["other"]["host_s"] < 0.5 * told["step_s"]
    largest = max(stages, key=lambda name: stages[name]["host_s"])
    assert told["text"].startswith(largest)
    trace = json.loads((out / "profile-000000020.json").read_text())
    assert told["path"] == str(out / "profile-000000020.json")
    events = [one for one in trace["traceEvents"] if one.get("ph") == "X"]
    for name in ("forward", "update of the tables"):
        assert sum(one["name"] == STAGES + name for one in events) == 7
    assert any(one["name"].startswith("aten::") for one in events)
    assert not list(out.glob("*.part"))
    # It changes nothing of what is computed.
    story.train(small_job, tmp_path / "plain", console=quiet)
    assert not differences(contents(out), contents(tmp_path / "plain"))


@pytest.mark.parametrize(("steps", "number"), [(12, None), (25, 5)])
def test_a_run_that_ends_before_or_meanwhile(small_job, tmp_path, quiet, steps, number):
    training = small_job.training.model_copy(update={"max_steps": steps})
    job = small_job.model_copy(update={"training": training})
    story.train(job, tmp_path / "run", console=quiet, profile=50)
    found = profiles(tmp_path / "run")
    if number is None:
        assert not found
        assert "the run ended before step 20: there is no profile" in quiet.file.getvalue()
    else:
        assert [one["steps"] for one in found] == [number]


def test_an_error_meanwhile_ends_the_trace(small_job, tmp_path, quiet, monkeypatch):
    real = story.train_step

    def train_step(training, batches, step):
        if step == 22:
            raise RuntimeError("broken")
        return real(training, batches, step)

    monkeypatch.setattr(story, "train_step", train_step)
    with pytest.raises(RuntimeError, match="broken"):
        story.train(small_job, tmp_path / "run", console=quiet, profile=9)
    with torch.profiler.profile():  # one at a time: it would be refused
        pass
    assert not profiles(tmp_path / "run")


def event(name, start, end, number, *, on_device=False, is_annotation=False):
    place = DeviceType.CUDA if on_device else DeviceType.CPU
    return SimpleNamespace(
        name=name,
        id=number,
        time_range=SimpleNamespace(start=start, end=end),
        device_type=place,
        is_user_annotation=is_annotation,
    )


def test_kernels_are_of_the_stage_in_which_they_were_begun():
    trace = _Trace(Clock())
    trace.wall_s, trace.busy_s = 100e-6, 0.0
    trace._events = [
        event(STAGES + "forward", 0, 30, 1),
        event(STAGES + "backward", 40, 60, 2),
        event("cudaLaunchKernel", 10, 12, 3),
        event("cuLaunchKernel", 45, 46, 4),  # by another thread
        event("cudaMemcpyAsync", 20, 21, 5),
        event("cudaLaunchKernel", 35, 36, 6),  # between stages
        event("gemm", 50, 90, 3, on_device=True),
        event("relu", 90, 95, 4, on_device=True),
        event("Memcpy HtoD (Pinned -> Device)", 20, 27, 5, on_device=True),
        event("fill", 95, 96, 6, on_device=True),
        event("unknown", 96, 98, 99, on_device=True),
        event(STAGES + "forward", 50, 90, 1, on_device=True, is_annotation=True),
    ]
    stages = trace.stages(1)
    on_device = {name: round(one.get("device_s", 0) * 1e6) for name, one in stages.items()}
    assert on_device == {
        "forward": 40,
        "backward": 5,
        "copies to the device": 7,
        "other": 3,
    }
    assert round(stages["other"]["host_s"] * 1e6) == 50
    assert profile._covered_us(trace._events) == 7 + 48


def test_a_busy_gpu_is_the_limit_and_an_idle_one_is_not():
    stages = {
        "look-up": {"host_s": 0.004, "device_s": 0.001},
        "forward": {"host_s": 0.002, "device_s": 0.008},
        "other": {"host_s": 0.004},
    }
    values = {"step_s": 0.010}
    assert held_back_by(stages, values, {"device_busy": 0.9}) == (
        "forward, on the GPU, which is busy: 80% of the time of a step"
    )
    assert held_back_by(stages, values, {"device_busy": 0.5}) == (
        "look-up, on the host: 40% of the time of a step; the GPU is busy 50% of it"
    )
    assert held_back_by(stages, values, {}) == "look-up: 40% of the time of a step"
