"""Whoever reads a run while it trains finds a checkpoint, though old ones are removed."""

import os
import shutil

import pytest

from penstock.errors import CheckpointError
from penstock.training.trained import read_newest


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.training.checkpoint.directory.is_complete", lambda path: True)
    folder = tmp_path / "checkpoints"

    def make(step):
        made = folder / f"step-{step:09d}"
        made.mkdir(parents=True)
        (made / "manifest.json").write_text(str(step), encoding="utf-8")
        return made

    return make


def content(checkpoint):
    return (checkpoint / "manifest.json").read_text(encoding="utf-8")


def test_one_that_is_removed_is_passed_over(make, tmp_path):
    make(1)
    seen = []

    def read(checkpoint):
        seen.append(checkpoint.name)
        if len(seen) < 3:
            make(len(seen) + 1)
            shutil.rmtree(checkpoint)
        return content(checkpoint)

    assert read_newest(tmp_path, read) == "3"
    assert seen == ["step-000000001", "step-000000002", "step-000000003"]


def test_one_that_is_replaced_is_read_again(make, tmp_path):
    make(1)
    seen = []

    def read(checkpoint):
        seen.append(checkpoint.name)
        if len(seen) == 1:
            os.rename(checkpoint, tmp_path / "replaced")
            make(1)
            raise CheckpointError("another checksum")
        return content(checkpoint)

    assert read_newest(tmp_path, read) == "1"
    assert len(seen) == 2


def test_damage_is_not_taken_for_removal(make, tmp_path):
    make(1)
    seen = []

    def read(checkpoint):
        seen.append(checkpoint)
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError, match="^damaged$"):
        read_newest(tmp_path, read)
    assert len(seen) == 1


def test_it_ends(make, tmp_path):
    one = make(1)
    seen = []

    def read(checkpoint):
        seen.append(checkpoint)
        make(len(seen) + 1)
        shutil.rmtree(checkpoint)
        raise CheckpointError("no file")

    with pytest.raises(CheckpointError, match="was removed or replaced while it was read"):
        read_newest(tmp_path, read)
    assert len(seen) == 5
    shutil.rmtree(tmp_path / "checkpoints")
    seen.clear()
    make(1)
    with pytest.raises(CheckpointError, match="name the run folder"):
        read_newest(one, read)
    assert len(seen) == 1
