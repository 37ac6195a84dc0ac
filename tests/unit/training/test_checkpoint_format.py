"""docs/checkpoint_format.md is held true."""

import fnmatch
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from penstock.config import Optimizer
from penstock.embedding.rules.optimizer import rule_of
from penstock.training.checkpoint.files import Manifest
from penstock.training.checkpoint.job_difference import MAY_CHANGE
from tests.unit.training.test_checkpoint import Run

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "checkpoint_format.md").read_text()


def section(title):
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def saved(tmp_path):
    run = Run(tmp_path / "checkpoints").train(2)
    return run, run.save()


def test_the_pages_lines_read_a_table(saved, tmp_path):
    run, path = saved
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    code = code.replace("runs/demo/checkpoints/step-000000100", str(path)).replace('"user"', '"b"')
    names = {}
    exec(code, names)
    expected = {}
    for rows in run.state.collection.export_table("b"):
        expected.update(zip(rows.keys.tolist(), rows.values.numpy(), strict=True))
    assert names["embedding_of"].keys() == expected.keys()
    assert all(np.array_equal(names["embedding_of"][key], expected[key]) for key in expected)


def test_every_field_of_the_manifest_is_documented():
    rows = re.findall(r"^\| (`[^|]*) \|", section("manifest.json"), re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert documented[:2] == ["format", "version"]
    assert documented[2:] == list(Manifest.__dataclass_fields__)


def test_every_file_is_documented(saved):
    _, path = saved
    for file in path.iterdir():
        name = re.sub(r"table-\d{4}-\w+-(\d{5})", r"table-0000-user-\1", file.name)
        assert f"    {name}" in section("Directory")


@pytest.mark.parametrize("optimizer", get_args(get_args(Optimizer)[0]))
def test_columns_of_state_are_as_documented(optimizer):
    config = optimizer()
    (shown,) = re.findall(rf"^\| `{config.kind}` \| ([^|]*) \|", section("Tables"), re.MULTILINE)
    expected = {"0": 0, "1": 1, "dim": 7, "dim + 1": 8, "2 dim": 14}[shown]
    assert rule_of(config).state_dim(7) == expected


def test_every_field_that_may_change_is_documented():
    rows = re.findall(
        r"^\| (`[^|]*) \|", section("Which jobs may resume from a checkpoint"), re.MULTILINE
    )
    documented = set()
    for row in rows:
        prefix = ""
        for name in re.findall(r"`([\w.]+)`", row):
            # `training.a`, `b`: the second has the first one's prefix.
            prefix = name.rpartition(".")[0] if "." in name else prefix
            name = name if "." in name or not prefix else f"{prefix}.{name}"
            documented.add(name.replace(".N.", ".*."))
    for pattern in MAY_CHANGE:
        if not pattern.startswith("table *"):
            name = pattern.removesuffix(".*")
            assert any(fnmatch.fnmatchcase(item, name) for item in documented), pattern
    marked = {name.removesuffix(".*") for name in MAY_CHANGE if not name.startswith("table *")}
    inside = {name for name in documented if any(name.startswith(f"{m}.") for m in marked)}
    assert documented - inside == marked
