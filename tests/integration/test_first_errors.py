"""What a first user meets: advice that helps, and none that does not."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.errors import DataError
from penstock.report.plots import can_draw, is_drawn

CSV = {
    "data": {
        "source": {"format": "csv", "path": "a.csv", "types": {"user": "int64"}},
        "label": {"column": "click"},
    },
    "features": [{"columns": ["user"]}],
    "run": {"threads": 1},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"{n % 9},{n % 2}" for n in range(100)]
    (tmp_path / "good.csv").write_text("\n".join(["user,click", *rows, ""]), encoding="utf-8")
    rows[40] = "1,0,7"
    (tmp_path / "a.csv").write_text("\n".join(["user,click", *rows, ""]), encoding="utf-8")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(CSV), encoding="utf-8")
    return tmp_path


def test_an_error_before_the_first_step_leaves_no_checkpoint(folder, penstock):
    code, out, errors = penstock("train", "job.yaml", "--out", "run")
    assert code == 2 and "3 fields, expected 2" in errors
    assert "--resume" not in out + errors
    assert "nothing was trained and there is no checkpoint" in " ".join(out.split())
    assert not (folder / "run" / "checkpoints").exists()
    shutil.rmtree(folder / "run")
    penstock("train", "job.yaml", "--out", "run", "--set", "data.source.path=good.csv")
    assert (folder / "run" / "summary.json").exists()


def test_a_malformed_row_in_prediction(folder, penstock):
    penstock("train", "job.yaml", "--out", "run", "--set", "data.source.path=good.csv")
    code, _, errors = penstock("predict", "run", "--data", "a.csv", "--out", "scores.parquet")
    assert code == 2
    assert errors == (
        "error: a.csv:42: 3 fields, expected 2: '1,0,7'; mend the file or leave the row out of "
        "it: in a prediction each row has its score\n"
    )
    assert not (folder / "scores.parquet").exists()


@pytest.mark.parametrize("path", ["none.csv", "none/*.csv", "none*.csv"])
def test_a_relative_path_that_is_not_there(path, folder):
    job = parse_job({**CSV, "data": {**CSV["data"], "source": {"format": "csv", "path": path}}})
    with pytest.raises(DataError) as raised:
        Dataset.open(job)
    assert str(raised.value).endswith(
        f"; a relative path begins in the working directory, {folder}"
    )
    whole = {"format": "csv", "path": str(folder / path)}
    with pytest.raises(DataError) as raised:
        Dataset.open(parse_job({**CSV, "data": {**CSV["data"], "source": whole}}))
    assert "working directory" not in str(raised.value)


@pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed")
def test_comparing_twice(folder, penstock):
    for name in ("a", "b"):
        penstock("train", "job.yaml", "--out", name, "--set", "data.source.path=good.csv")
    for _ in range(2):
        code, _, errors = penstock("compare", "a", "b")
        assert (code, errors) == (0, "")
    assert is_drawn(Path("compare.png"))
    Path("compare.png").write_bytes(b"a picture of somebody else")
    code, _, errors = penstock("compare", "a", "b")
    assert code == 2 and "compare.png: exists already" in errors


def test_unsigned_keys_of_json_are_their_bits(folder):
    keys = [2**64 - 1, 2**63, 2**63 - 1, 0]
    rows = [{"user": key, "click": n % 2} for n, key in enumerate(keys)]
    Path("u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = {**CSV, "data": {**CSV["data"], "source": {"format": "jsonl", "path": "u.jsonl"}}}
    fields["data"]["shuffle"] = {"block_rows": 0}
    with Dataset.open(parse_job(fields)).batches("train", batch_size=4) as batches:
        (batch,) = batches
    assert batch.sparse["user"].values.tolist() == [-1, -(2**63), 2**63 - 1, 0]
