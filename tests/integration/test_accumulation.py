"""Several batches a step: the same as one batch of them all, counted in steps, and resumed."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from run_contents import contents, differences
from stopped_runs import crash

from penstock import run as story
from penstock.config import parse_job

ROWS = 1000


@pytest.fixture
def fields(tmp_path):
    """SGD over a log of two labels, one of which some rows lack, with sample weights."""
    rng = np.random.default_rng(0)
    rating = [None if rng.random() < 0.3 else float(x) for x in rng.normal(size=ROWS)]
    pq.write_table(
        pa.table({
            "user": rng.integers(0, 40, ROWS),
            "item": [rng.integers(0, 60, rng.integers(0, 4)).tolist() for _ in range(ROWS)],
            "n": rng.normal(size=ROWS),
            "click": rng.integers(0, 2, ROWS),
            "rating": rating,
            "w": rng.random(ROWS) * 3,
        }),
        tmp_path / "log.parquet",
        row_group_size=150,
    )
    return {
        "data": {
            "source": {"format": "parquet", "path": str(tmp_path / "log.parquet")},
            "label": [
                {"column": "click"},
                {"column": "rating", "task": "regression", "missing": "ignore"},
            ],
            "weight": "w",
            "numeric": [{"columns": ["n"]}],
            "shuffle": {"block_rows": 0},
        },
        "features": [{"columns": ["user", "item"]}],
        "table_defaults": {"dim": 4, "optimizer": {"kind": "sgd", "learning_rate": 0.5}},
        "model": {"kind": "shared_bottom", "bottom": [8], "towers": [4]},
        "training": {
            "batch_size": 32,
            "epochs": 2,
            "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        },
        "run": {"threads": 1},
    }


def trained(fields, out, quiet, **training):
    job = parse_job({**fields, "training": {**fields["training"], **training}})
    summary = story.train(job, out, console=quiet)
    return summary, contents(out)


def one_label(fields, **model):
    fields["data"]["label"] = {"column": "click"}
    fields["model"] = model


@pytest.mark.parametrize("case", ["two labels", "one label", "no weights"])
def test_equals_one_larger_batch(case, fields, tmp_path, quiet):
    if case != "two labels":
        one_label(fields, kind="dlrm", bottom=[4], top=[8])
    if case == "no weights":
        del fields["data"]["weight"]
    several, got = trained(fields, tmp_path / "a", quiet, accumulate_batches=4)
    one, expected = trained(fields, tmp_path / "b", quiet, batch_size=128)
    # 8 steps an epoch, the last of 104 samples: three batches of 32 and one of 8.
    assert several["steps"] == one["steps"] == 16
    assert got["position"].samples == expected["position"].samples == 2 * ROWS
    for name, table in expected["tables"].items():
        assert torch.equal(got["tables"][name]["keys"], table["keys"])
        # Sums in another order: some ulps of values near 1, over 16 steps.
        torch.testing.assert_close(
            got["tables"][name]["values"], table["values"], atol=2e-6, rtol=0
        )
    for name, weight in expected["dense"].items():
        torch.testing.assert_close(got["dense"][name], weight, atol=2e-6, rtol=0)
    _, small = trained(fields, tmp_path / "c", quiet)
    apart = small["tables"]["user"]["values"] - expected["tables"]["user"]["values"]
    assert apart.abs().max() > 1e-3, "a test of nothing"


def test_what_is_measured_is_every_batch(fields, tmp_path, quiet):
    one_label(fields, kind="dlrm", bottom=[4], top=[8])
    fields["table_defaults"]["optimizer"]["learning_rate"] = 1e-20
    fields["training"]["optimizer"]["learning_rate"] = 1e-20
    several, _ = trained(fields, tmp_path / "a", quiet, accumulate_batches=4)
    one, _ = trained(fields, tmp_path / "b", quiet, batch_size=128)
    assert several["log_loss"] == pytest.approx(one["log_loss"], rel=1e-6)


def test_two_towers_weigh_batches_by_their_positives(fields, tmp_path, quiet):
    # Cosine would tell a vector of zeros from one that is next to it.
    one_label(fields, kind="two_tower", items=["item"], dim=4, similarity="dot")
    fields["table_defaults"]["optimizer"]["learning_rate"] = 1e-20
    fields["training"]["optimizer"]["learning_rate"] = 1e-20
    several, _ = trained(fields, tmp_path / "a", quiet, accumulate_batches=3, epochs=1)
    one, _ = trained(fields, tmp_path / "b", quiet, epochs=1)
    assert (several["steps"], one["steps"]) == (11, 32)
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_steps_are_planned_by_it(small_fields, tmp_path, quiet):
    small_fields["training"] |= {
        "accumulate_batches": 5,
        "epochs": 2,
        "optimizer": {"schedule": {"decay": "linear", "decay_steps": "end"}},
    }
    small_fields["report"]["every_steps"] = 1
    summary = story.train(parse_job(small_fields), tmp_path, console=quiet)
    # 36 batches an epoch: 7 steps of five and one of one.
    assert summary["steps"] == 16
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in lines if line["kind"] == "train"]
    assert rates[-1] == pytest.approx(1e-3 * (1 - 0.99 * 15 / 16))


@pytest.mark.parametrize("step", [6, 11, 14])
def test_resumed_run_has_the_same_bits(small_fields, tmp_path, quiet, monkeypatch, step):
    small_fields["training"] |= {"accumulate_batches": 5, "epochs": 2}
    small_fields["checkpoint"]["every_steps"] = 3
    job = parse_job(small_fields)
    story.train(job, tmp_path / "whole", console=quiet)
    crash(job, tmp_path / "run", step, monkeypatch, quiet)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    assert not differences(contents(tmp_path / "run"), contents(tmp_path / "whole"))


def test_may_change_on_resume(small_fields, tmp_path, quiet):
    small_fields["training"]["max_steps"] = 6
    story.train(parse_job(small_fields), tmp_path, console=quiet)
    small_fields["training"] |= {"max_steps": None, "accumulate_batches": 10}
    summary = story.train(parse_job(small_fields), tmp_path, resume=True, console=quiet)
    assert (summary["steps"], summary["samples"]) == (6 + 3, 4500)
