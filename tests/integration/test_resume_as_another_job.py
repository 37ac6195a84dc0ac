"""A run is not resumed as another job: the fields say so, before data or tables are opened."""

import pytest

from penstock import run as story
from penstock.config import parse_job
from penstock.errors import CheckpointError
from penstock.job_file import override


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from small import SMALL

    fields = override(SMALL, ["training.max_steps=3"])
    out = tmp_path_factory.mktemp("run") / "run"
    story.train(parse_job(fields), out)
    return fields, out


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["data.split=null"], "data.split: "),
        (["data.split={by: fraction, evaluation: 0.4}"], "data.split.evaluation: "),
        (["data.source.rows=7"], "data.source.rows: "),
        (["data.source={format: csv, path: there_is_none.csv}"], 'data.source.format: "synthetic"'),
        (["data.label.column=none"], "data.label.column: "),
        (["data.numeric=[{columns: [none]}]"], "data.numeric.0."),
        (["features=[{columns: [none]}]"], "features.0."),
        (["model={kind: deepfm}"], "model.kind: "),
        (["training.seed=9"], "training.seed: 0 in the checkpoint, 9 in the job"),
    ],
)
def test_what_cannot_change_is_told_by_field(whole, sets, told, monkeypatch):
    fields, out = whole
    job = parse_job(override(fields, ["training.max_steps=6", *sets]))

    def no_data(*_, **__):
        raise AssertionError("the data was opened")

    monkeypatch.setattr(story.Dataset, "open", no_data)
    with pytest.raises(CheckpointError) as refused:
        story.train(job, out, resume=True)
    first, *lines, last = str(refused.value).splitlines()
    assert first == f"checkpoint {out / 'checkpoints' / 'step-000000003'} is of another job:"
    assert any(line.startswith(f"  {told}") for line in lines), lines
    assert last == "resume with the job that wrote it, or train this one in a new run folder"
