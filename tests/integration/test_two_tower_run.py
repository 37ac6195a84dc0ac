"""Two towers from training to recall and scores, stopped and resumed on the way."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_contents import contents, differences
from stopped_runs import crash

from penstock import run as story
from penstock.config import parse_job

ROWS = 2000


@pytest.fixture
def fields(small_fields, tmp_path):
    """Views: a user's are of one kind of items, of which some are popular."""
    random = np.random.default_rng(0)
    user = random.integers(0, 50, ROWS)
    item = (user % 5) * 10 + np.minimum(random.geometric(0.3, ROWS) - 1, 9)
    pq.write_table(pa.table({"user": user, "item": item}), tmp_path / "views.parquet")
    small_fields["data"] |= {
        "source": {"format": "parquet", "path": str(tmp_path / "views.parquet")},
        "numeric": [],
    }
    del small_fields["data"]["label"]
    small_fields["features"] = [{"columns": ["user", "item"]}]
    small_fields["model"] = {"kind": "two_tower", "items": ["item"], "frequency_buckets": 64}
    small_fields["training"] |= {
        "epochs": 6,
        "optimizer": {"learning_rate": 0.005},
    }
    small_fields["evaluation"] = {"metrics": {"recall_at": [1, 10]}}
    return small_fields


def test_the_items_of_a_user_are_recalled(fields, tmp_path, quiet, penstock):
    out = tmp_path / "run"
    summary = story.train(parse_job(fields), out, console=quiet)
    # Ten of fifty items are of the user's kind: by chance 0.2.
    assert summary["recall_at_10"] > 0.9
    assert 45 <= summary["recall_candidates"] <= 50
    assert "auc" not in summary  # positives alone
    again = story.evaluate(out)
    assert again["recall_at_10"] == summary["recall_at_10"]
    assert again["samples"] == again["positives"] == 500
    story.predict(out, str(tmp_path / "views.parquet"), tmp_path / "scores.parquet")
    scores = pq.read_table(tmp_path / "scores.parquet")
    assert scores.column_names == ["row", "score"]
    assert scores["score"].to_numpy().max() > 1  # similarities over the temperature
    code, shown, errors = penstock("inspect", out)
    assert (code, errors) == (0, "")
    assert "recall@10" in shown and "training.png" in shown


def test_labels_choose_the_positives_and_give_an_auc(fields, tmp_path, quiet):
    table = pq.read_table(tmp_path / "views.parquet")
    user, item = table["user"].to_numpy(), table["item"].to_numpy()
    other = np.random.default_rng(1).permutation(item)
    likes = other // 10 == user % 5
    rated = pa.table({
        "user": np.concatenate((user, user)),
        "item": np.concatenate((item, other)),
        "liked": np.concatenate((np.ones(ROWS, int), likes.astype(int))),
    }).take(np.random.default_rng(2).permutation(2 * ROWS))
    pq.write_table(rated, tmp_path / "views.parquet")
    fields["data"]["label"] = {"column": "liked"}
    summary = story.train(parse_job(fields), tmp_path / "run", console=quiet)
    assert summary["auc"] > 0.9
    assert summary["recall_at_10"] > 0.8


def test_a_stopped_run_ends_with_the_same_bits(fields, tmp_path, quiet, monkeypatch):
    fields["training"]["max_steps"] = 20
    job = parse_job(fields)
    story.train(job, tmp_path / "whole", console=quiet)
    crash(job, tmp_path / "run", 15, monkeypatch, quiet)
    story.train(job, tmp_path / "run", resume=True, console=quiet)
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "run")
    assert int(whole["dense"]["frequencies.step"]) == 20
    assert not differences(resumed, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": {"column": "stars", "task": "regression"}},
            "job: model two_tower learns from a binary label that no row lacks, and 'stars' is "
            "none; use at_least, or leave data.label out if every row is a positive",
        ),
        (
            {"label": {"column": "bought", "missing": "ignore"}},
            "job: model two_tower learns from a binary label that no row lacks, and 'bought' is "
            "none; use at_least, or leave data.label out if every row is a positive",
        ),
    ],
)
def test_labels_that_choose_no_positives_are_refused(fields, change, message):
    fields["data"] |= change
    with pytest.raises(ValueError) as caught:
        parse_job(fields)
    assert str(caught.value) == message


def test_other_models_need_a_label_and_recall_nothing(fields):
    fields["model"] = {"kind": "dlrm"}
    with pytest.raises(ValueError) as caught:
        parse_job(fields)
    assert str(caught.value) == (
        "job: data: give `label`, the column of what to predict, or, if every row is a positive, "
        "`negatives`"
    )
    fields["data"]["label"] = {"column": "click"}
    with pytest.raises(ValueError) as caught:
        parse_job(fields)
    assert str(caught.value) == (
        "job: evaluation.metrics.recall_at: only the model two_tower ranks all items; remove it"
    )
