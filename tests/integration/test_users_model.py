"""A user's model that fails names the batch and its place, and costs nothing that was trained."""

import os
import re
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import users_model
from run_contents import contents, differences

from penstock import run as story
from penstock.config import parse_job
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.errors import BatchError, CapacityError, Interrupted
from penstock.training.steps.dense import DenseTrainer

ROWS = 1537


@pytest.fixture
def job(small_fields, tmp_path, monkeypatch):
    """Twelve steps of 128 samples and one of a single sample; checkpoints after 6 and 12."""
    monkeypatch.setattr(users_model.UsersModel, "acts", {})
    random = np.random.default_rng(0)
    columns = {"click": random.integers(0, 2, ROWS), "n0": random.normal(size=ROWS)}
    # Every batch is a day and more after the one before: the row clock goes by jumps.
    columns["time"] = np.arange(ROWS) // 128 * 90_000_000 + 1_767_225_600_000
    columns |= {f"c{c}": random.integers(0, 100, ROWS) for c in range(2)}
    log = tmp_path / "log.parquet"
    pq.write_table(pa.table(columns), log)
    small_fields["data"] |= {
        "source": {"format": "parquet", "path": str(log)},
        "shuffle": {"block_rows": 0},
        "split": None,
        "event_time": "time",
        "evaluation_source": {"format": "parquet", "path": str(copy_of(log))},
    }
    small_fields["model"] = {"kind": "custom", "factory": "users_model:make"}
    small_fields["evaluation"] = {}
    small_fields["training"]["max_steps"] = 12
    return parse_job(small_fields)


def copy_of(log):
    copy = log.with_name("other.parquet")
    pq.write_table(pq.read_table(log).slice(0, 300), copy)
    return copy


def fail():
    raise IndexError("no such thing")


def whole(job, tmp_path, quiet):
    story.train(job, tmp_path / "whole", console=quiet)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("place", "words"),
    [("forward", "the model's forward pass"), ("backward", "the backward pass")],
)
def test_training_goes_on_where_the_model_failed(job, tmp_path, quiet, monkeypatch, place, words):
    """Bit for bit: running statistics and drawn numbers of the failed batch are taken back."""
    expected = whole(job, tmp_path, quiet)
    out = tmp_path / "run"
    monkeypatch.setattr(users_model.UsersModel, "acts", {place: (9, fail)})
    with pytest.raises(BatchError) as caught:
        story.train(job, out, console=quiet)
    where = f"{tmp_path}/log.parquet rows 1024-1151 (epoch 0, samples 1024 to 1151 of the run)"
    assert re.fullmatch(
        rf"step 8: {words} failed: IndexError: no such thing \(.*test_users_model\.py:\d+ in "
        rf"fail\); at a batch of 128 samples, {re.escape(where)}",
        str(caught.value),
    )
    assert isinstance(caught.value.__cause__, IndexError)
    assert "stopped after step 8; the checkpoint is complete" in quiet.file.getvalue()
    log = (out / "run.log").read_text()
    assert "Traceback" in log and "in fail" in log and "no such thing" in log
    monkeypatch.setattr(users_model.UsersModel, "acts", {})
    story.train(job, out, resume=True, console=quiet)
    assert not differences(contents(out), expected)


def test_a_last_batch_of_one_sample(job, tmp_path, quiet, small_fields, penstock):
    small_fields["training"]["max_steps"] = None
    with pytest.raises(BatchError) as caught:
        story.train(parse_job(small_fields), tmp_path / "run", console=quiet)
    message = str(caught.value)
    assert message.startswith("step 12: the model's forward pass failed: ValueError: Expected more")
    assert f"a batch of a single sample, {tmp_path}/log.parquet row" in message
    assert "choose a training.batch_size that leaves none over" in message
    assert contents(tmp_path / "run")["step"] == 12


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (DenseTrainer, "step", "the update of the dense weights"),
        (EmbeddingCollection, "apply_gradients", "the update of the embeddings"),
    ],
)
def test_half_an_update_is_not_kept(job, tmp_path, quiet, monkeypatch, owner, name, words):
    real, calls = getattr(owner, name), []

    def wrapped(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("no more")
        return real(*arguments)

    monkeypatch.setattr(owner, name, wrapped)
    with pytest.raises(BatchError) as caught:
        story.train(job, tmp_path / "run", console=quiet)
    assert str(caught.value).startswith(f"step 8: {words} failed: RuntimeError: no more")
    assert str(caught.value).endswith("may be half done; the last checkpoint stays good")
    assert "stopped after step 8; the last checkpoint is an earlier one" in quiet.file.getvalue()
    assert contents(tmp_path / "run")["step"] == 6


@pytest.mark.parametrize("error", [CapacityError("no memory"), torch.OutOfMemoryError("no memory")])
def test_no_memory_for_a_batch(job, tmp_path, quiet, monkeypatch, error):
    real, calls = EmbeddingCollection.forward, []

    def forward(self, sparse):
        calls.append(1)
        if len(calls) == 9:
            raise error
        return real(self, sparse)

    monkeypatch.setattr(EmbeddingCollection, "forward", forward)
    with pytest.raises(BatchError) as caught:
        story.train(job, tmp_path / "run", console=quiet)
    assert str(caught.value).startswith("step 8: the look-up of its keys failed: ")
    assert str(caught.value).endswith("a smaller batch needs less memory (training.batch_size)")
    assert contents(tmp_path / "run")["step"] == 8


def test_a_model_that_fails_in_evaluation_only(job, tmp_path, quiet, monkeypatch, penstock):
    out = tmp_path / "run"
    # The first call tries the model.
    monkeypatch.setattr(users_model.UsersModel, "acts", {"evaluation": (2, fail)})
    with pytest.raises(BatchError) as caught:
        story.train(job, out, console=quiet)
    message = str(caught.value)
    assert message.startswith("the model's forward pass failed: IndexError: no such thing (")
    assert f"a batch of 300 samples, {tmp_path}/other.parquet rows 0-299" in message
    assert contents(out)["step"] == 12
    scores = tmp_path / "scores.parquet"
    for command in (
        ("evaluate", out),
        ("predict", out, "--data", tmp_path / "log.parquet", "--out", scores),
    ):
        code, shown, errors = penstock(*command)
        assert (
            (code, shown) == (2, "") and "no such thing" in errors and len(errors.split("\n")) == 2
        )
    assert not scores.exists()


@pytest.mark.parametrize(
    ("replaced", "got"),
    [
        (lambda logits: logits.unsqueeze(1), "float32 [128, 1]"),
        (lambda logits: logits[:-1], "float32 [127]"),
        (lambda logits: logits.sum(), "float32 []"),
        (lambda logits: [logits], "list"),
        (lambda logits: logits > 0, "bool [128]"),
    ],
)
@pytest.mark.parametrize("place", ["forward", "evaluation"])
def test_outputs_of_a_wrong_shape(job, tmp_path, quiet, monkeypatch, place, replaced, got):
    """They would broadcast against the labels."""
    monkeypatch.setattr(users_model.UsersModel, "acts", {place: (2, lambda: replaced)})
    with pytest.raises(BatchError) as caught:
        story.train(job, tmp_path / "run", console=quiet)
    got = got.replace("127", "299").replace("128", "300") if place == "evaluation" else got
    wanted = "[300]" if place == "evaluation" else "[128]"
    expected = f"ConfigError: it returned {got}; it must return logits {wanted}"
    assert expected in str(caught.value)


def test_outputs_that_are_no_numbers(job, tmp_path, quiet, monkeypatch, penstock):
    out, scores = tmp_path / "run", tmp_path / "scores.parquet"
    story.train(job, out, console=quiet)
    acts = {
        "evaluation": (2, lambda: lambda logits: logits.index_fill(0, torch.tensor([3]), torch.nan))
    }
    monkeypatch.setattr(users_model.UsersModel, "acts", acts)
    for command in (
        ("evaluate", out),
        ("predict", out, "--data", tmp_path / "log.parquet", "--out", scores),
    ):
        code, _, errors = penstock(*command)
        assert code == 2
        assert errors.startswith("error: 1 of ") and "parquet rows 0-" in errors
    assert not scores.exists()


def test_a_signal_within_the_model(job, tmp_path, quiet, monkeypatch):
    act = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(users_model.UsersModel, "acts", {"forward": (9, act)})
    with pytest.raises(Interrupted) as raised:
        story.train(job, tmp_path / "run", console=quiet)
    assert raised.value.exit_status == 130
    assert contents(tmp_path / "run")["step"] == 9


def test_buffers_too_large_to_keep_are_not_passed_off_as_whole(job, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr("penstock.training.steps.forward_state._MOST_BYTES", 8)
    monkeypatch.setattr(users_model.UsersModel, "acts", {"forward": (9, fail)})
    with pytest.raises(BatchError):
        story.train(job, tmp_path / "run", console=quiet)
    assert contents(tmp_path / "run")["step"] == 6
