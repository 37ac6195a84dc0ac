"""A small job, and the command line called within this process."""

import io
import sys

import pytest
import yaml
from rich.console import Console
from small import SMALL

from penstock.cli import main
from penstock.config import parse_job


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
