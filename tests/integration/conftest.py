"""A small job, and the command line called within this process."""

import io
import sys

import pytest
import yaml
from rich.console import Console

from penstock.cli import main
from penstock.config import parse_job

SMALL = {
    "name": "small",
    "data": {
        "source": {
            "format": "synthetic",
            "rows": 6000,
            "num_categorical": 4,
            "keys_per_feature": 500,
        },
        "split": {"by": "fraction", "evaluation": 0.25},
        "label": {"column": "click"},
        "numeric": [{"columns": ["n[0-9]*"]}],
        "shuffle": {"window_rows": 1000},
    },
    "features": [{"columns": ["c[0-9]*"]}],
    "table_defaults": {"dim": 8, "optimizer": {"kind": "adam", "learning_rate": 0.01}},
    "model": {"kind": "dlrm", "bottom": [8], "top": [16]},
    "training": {
        "batch_size": 128,
        "threads": 1,
        "log_every_steps": 7,
        "evaluate_every_steps": 10,
        "checkpoint": {"every_steps": 6, "keep_last": 2},
    },
}
"""36 steps in one epoch: 4,500 training rows in batches of 128."""
STEPS = 36


@pytest.fixture
def small_fields():
    return yaml.safe_load(yaml.safe_dump(SMALL))


@pytest.fixture
def small_job(small_fields):
    return parse_job(small_fields)


@pytest.fixture
def small_yaml(small_fields, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small_fields), encoding="utf-8")
    return path


@pytest.fixture
def penstock(monkeypatch, capsys):
    """Calls the command line; returns (exit status, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["penstock", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            main()
        shown = capsys.readouterr()
        return exit_.value.code or 0, shown.out, shown.err

    return call


@pytest.fixture
def quiet():
    """A console that keeps what is printed to itself."""
    return Console(file=io.StringIO(), width=200)
