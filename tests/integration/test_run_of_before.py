"""A run folder of version 1, as the program of then wrote it: everything can still be done with it.

`run_of_version_1/run` came of `penstock train before.yaml --out run`, at the last commit whose
checkpoints were of version 1, with the TensorBoard files left out. Never make it anew.
"""

import json
import shutil
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from penstock import run as story
from penstock.config.moved import MOVED
from penstock.errors import JobNote
from penstock.job_file import load_job
from penstock.training.checkpoint.checkpoint import latest_checkpoint, read_manifest

HERE = Path(__file__).parent / "run_of_version_1"
# What the program of then came to when it went on to step 12; another machine rounds otherwise.
AT_STEP_12 = {"auc": 0.46296296296296297, "log_loss": 0.7572255725887991}
CLOSE = 1e-5


@pytest.fixture
def before(tmp_path, monkeypatch):
    shutil.copytree(HERE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    return Path("run")


def evaluations(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return {line["step"]: line for line in lines if line["kind"] == "evaluation"}


def test_the_folder_is_of_version_1():
    manifest = json.loads(
        (latest_checkpoint(HERE / "run/checkpoints") / "manifest.json").read_text()
    )
    assert manifest["version"] == 1


def test_each_moved_field_of_its_job_is_named_and_read(before):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", JobNote)
        job = load_job("before.yaml")
    # That version had no bytes of a window.
    moved = [f"{old} is now {new}" for old, new in MOVED.items() if "bytes" not in old]
    assert [str(note.message) for note in notes] == [f"before.yaml: {one}" for one in moved]
    run, evaluation = job.run, job.evaluation
    assert (run.device, run.threads, run.reader_threads, run.prefetch_batches) == ("cpu", 1, 1, 2)
    assert (evaluation.every_steps, evaluation.batch_size) == (4, 16)
    assert (evaluation.metrics.exact_auc, evaluation.metrics.grouped_auc) == (True, ("user",))
    assert (job.checkpoint.every_steps, job.checkpoint.keep_last) == (3, 1)
    assert (job.report.every_steps, job.data.shuffle.block_rows) == (2, 32)


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["evaluation.metrics.grouped_auc=[user, item]", "run.threads=2"],
        ["training.metrics.grouped_auc=[user, item]", "training.threads=2"],
    ],
)
def test_it_is_evaluated_as_then(before, sets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if sets else "error", JobNote)
        found = story.evaluate(before, sets=sets)
    then = evaluations(before)[5]
    for name in ("auc", "log_loss", "normalized_entropy", "calibration"):
        assert found[name] == pytest.approx(then[name], rel=CLOSE)
    assert found["samples"] == then["samples"]
    assert list(found["grouped_auc"]) == (["user", "item"] if sets else ["user"])


def test_it_scores(before):
    assert story.predict(before, "clicks.tsv", Path("scores.parquet")) == 96
    scores = pq.read_table("scores.parquet").column("score").to_numpy()
    assert ((scores > 0) & (scores < 1)).all() and len(set(scores)) > 10


def test_it_is_looked_at_and_compared(before, penstock):
    code, shown, errors = penstock("inspect", before, "--no-plots")
    assert (code, errors) == (0, "")
    assert "training curves" in shown and "all checksums verified" in shown
    shutil.copytree(before, "other")
    code, shown, errors = penstock("compare", before, "other", "--no-plots")
    assert (code, errors) == (0, "") and "the jobs are equal in every field" in shown


def test_it_goes_on_to_what_it_came_to_then(before, penstock):
    told = evaluations(before)
    code, shown, errors = penstock(*(
        "train",
        "before.yaml",
        "--out",
        before,
        "--resume",
        "--set",
        "training.max_steps=12",
    ))
    assert code == 0, errors
    assert "the checkpoint is of an older version" in shown
    now = evaluations(before)
    assert {step: now[step] for step in told} == told
    for name, value in AT_STEP_12.items():
        assert now[12][name] == pytest.approx(value, rel=CLOSE)
    assert read_manifest(latest_checkpoint(before / "checkpoints")).step == 12
    job = load_job(before / "job.yaml")  # of this version: nothing to note
    assert job.training.max_steps == 12
