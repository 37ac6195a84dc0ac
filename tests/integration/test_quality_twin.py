"""Step by step, a run loses what the same network over nn.EmbeddingBag and torch's optimizers does.

The twin is that of benchmarks/bench_quality.py, which measures whole recipes.
"""

import json

import pytest

from benchmarks.embedding_bag_twin import Twin, keys_of
from penstock.config import parse_job
from penstock.data.dataset import Dataset
from penstock.run import train

STEPS = 50
OPTIMIZERS = {
    "adam": {"kind": "adam", "learning_rate": 0.02},
    "adagrad": {"kind": "adagrad", "learning_rate": 0.1, "initial_accumulator": 0.01},
}


def small_job_with(fields, optimizer):
    """50 steps in two epochs, so that rows are read again after they were updated."""
    fields["table_defaults"]["optimizer"] = optimizer
    fields["training"] |= {
        "batch_size": 128,
        "epochs": 2,
        "max_steps": STEPS,
        "seed": 3,
        "log_every_steps": 1,
        "evaluate_every_steps": None,
        "checkpoint": {},
    }
    return parse_job(fields)


def losses_of_a_run(job, out, quiet):
    train(job, out, console=quiet)
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["log_loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_losses_equal_those_of_embedding_bags(small_fields, kind, tmp_path, quiet):
    job = small_job_with(small_fields, OPTIMIZERS[kind])
    losses = losses_of_a_run(job, tmp_path / "run", quiet)
    dataset = Dataset.open(job)
    twin = Twin(job, dataset, keys_of(dataset), sparse=True)
    expected = list(twin.train())
    assert len(losses) == len(expected) == STEPS
    # float32 sums in another order, carried through 50 updates.
    assert losses == pytest.approx(expected, rel=1e-4)
    # The comparison means something: training moved the loss.
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_twin_with_another_rate_loses_differently(small_fields, tmp_path, quiet):
    job = small_job_with(small_fields, OPTIMIZERS["adam"])
    losses = losses_of_a_run(job, tmp_path / "run", quiet)
    other = small_job_with(small_fields, {"kind": "adam", "learning_rate": 0.021})
    dataset = Dataset.open(other)
    expected = list(Twin(other, dataset, keys_of(dataset), sparse=True).train())
    assert losses != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"kind": "row_wise_adagrad"}, "torch has no counterpart of the table optimizer"),
        ({"kind": "adam", "weight_decay": 0.1}, "torch's sparse optimizers have no weight decay"),
    ],
)
def test_the_twin_refuses_what_torch_cannot(small_fields, optimizer, message):
    job = small_job_with(small_fields, optimizer)
    dataset = Dataset.open(job)
    with pytest.raises(ValueError, match=message):
        Twin(job, dataset, keys_of(dataset), sparse=True)
