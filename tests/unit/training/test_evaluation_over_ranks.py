"""Evaluations of few samples over ranks: each is scored and counted once, whoever has it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.interruption import Interruption
from penstock.ranks.group import ALONE
from penstock.ranks.in_step import in_step
from penstock.training.evaluation import Evaluator
from penstock.training.metrics.binary import BinaryMetrics
from penstock.training.setup import build
from tests.world.ranks import World, in_world


@pytest.fixture(autouse=True)
def world(monkeypatch):
    in_world(monkeypatch)


def write(path, ids, *, positives):
    """Rows of unlike weights, in row groups of 10; scores repeat, as keys do."""
    rng = np.random.default_rng(len(ids))
    columns = {
        "label": (rng.random(len(ids)) < positives).astype(np.int64),
        "weight": rng.integers(0, 5, len(ids)).astype(np.float32),
        "key": ids % 37,
        "group": ids % 3,
    }
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=10)
        return
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    text = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join([*text, ""]))


def job_of(folder, samples, files):
    """A job that holds `samples` out, of which some files have few positives and some many."""
    kind = "parquet" if samples else "csv"
    write(folder / f"train.{kind}", np.arange(40), positives=0.5)
    ids = np.arange(samples)
    for number in range(files):
        share, path = 0.5 if number % 2 else 0.05, folder / f"held-{number}.{kind}"
        write(path, ids[number::files], positives=share)
        if not samples:  # or nothing is held out, which is refused
            path.write_text(f"{path.read_text()}x,1.0,1,1\n")
    source = {"format": kind, "path": str(folder / f"*.{kind}")}
    if not samples:
        source |= {"on_malformed_row": "quarantine", "types": {"label": "int64", "key": "int64"}}
    return parse_job({
        "data": {
            "source": source,
            "split": {"by": "file", "evaluation": "*held-*"},
            "label": {"column": "label"},
            "weight": "weight",
        },
        "features": [{"columns": ["key"]}],
        "table_defaults": {"dim": 4},
        "model": {"kind": "dlrm", "bottom": [4], "top": [4]},
        "training": {"deterministic": True},
        "evaluation": {
            "batch_size": 64,
            "metrics": {"grouped_auc": ["group"], "slices": [{"by": "group"}]},
        },
        "run": {"threads": 1},
    })


def measured(job, group):
    """What an evaluation of the untrained model finds, and how many samples each batch had here."""
    dataset = Dataset.open(job)
    made = build(job, dataset, group=group)
    generator = torch.Generator().manual_seed(1)
    for one in made.state.model.parameters():  # ranks of a world share torch's generator
        one.detach().copy_(torch.randn(one.shape, generator=generator))
    evaluator = Evaluator(
        dataset,
        made.state.model,
        made.objective,
        made.state.collection,
        job.evaluation,
        made.division,
    )
    here = []

    def noted(batches):
        for batch in batches:
            here.append(batch.batch_size)
            yield batch

    with evaluator.held_out(group.beside()) as batches:
        metrics = evaluator.measure(noted(in_step(batches, group, Interruption())))
    return metrics, here


def assert_same(one, other):
    """NaN is NaN."""
    assert repr(one) == repr(other)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("files", [1, 5])
@pytest.mark.parametrize("samples", ["none", "one", "one less", "as many", "one more", 1003])
def test_metrics_are_those_of_one_process(tmp_path, monkeypatch, ranks, files, samples):
    """Also where ranks have none: one file of one row group is one rank's alone."""
    number = {"none": 0, "one": 1, "one less": ranks - 1, "as many": ranks, "one more": ranks + 1}
    samples = number.get(samples, samples)
    job = job_of(tmp_path, samples, files)
    scored = []
    update = BinaryMetrics.update

    def noted(metrics, scores, labels, weights=None):
        scored.append(len(labels))
        return update(metrics, scores, labels, weights)

    with monkeypatch.context() as patch:
        patch.setattr(BinaryMetrics, "update", noted)
        expected, sizes = measured(job, ALONE)
    assert sum(sizes) == expected["samples"] == samples
    ended = World(ranks).run(lambda group: measured(job, group))
    for metrics, _ in ended:
        assert_same(metrics, expected)
    assert np.sum([here for _, here in ended], axis=0).tolist() == sizes
    if samples == 1003:
        assert 0 < expected["auc"] < 1 and 0 < expected["grouped_auc"]["group"]["auc"] < 1
