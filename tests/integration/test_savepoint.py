"""Savepoints: where a run is, kept and gone on from, by its own job and another one."""

import errno
import os
import shutil

import pytest

from penstock.embedding.durable_files import read_tensors
from penstock.training.checkpoint import savepoint
from penstock.training.checkpoint.files import read_manifest


def newest(run):
    return max((run / "checkpoints").iterdir())


def content(run):
    """Step, place and bits of the newest checkpoint; rows of a table in the order of their keys."""
    path = newest(run)
    manifest = read_manifest(path)
    found = {}
    for name, one in manifest.files.items():
        found[name] = one.blake2b
        if name.startswith("table-"):
            tensors = read_tensors(path / name)
            order = tensors["keys"].argsort()
            found[name] = {
                part: tensor[order].numpy().tobytes()
                for part, tensor in tensors.items()
                if len(tensor) == len(order)
            }
    return manifest.step, manifest.position, found


@pytest.fixture
def begun(small_yaml, tmp_path, penstock):
    run = tmp_path / "run"
    code, _, errors = penstock("train", small_yaml, "--out", run, "--set", "training.max_steps=20")
    assert code == 0, errors
    return run


def test_a_run_goes_on_from_a_savepoint_with_the_same_bits(begun, small_yaml, tmp_path, penstock):
    kept, again = tmp_path / "saved" / "here", tmp_path / "again"
    code, shown, errors = penstock("savepoint", "create", begun, "--out", kept)
    assert (code, errors) == (0, "") and "step-000000020" in shown
    more = ("--set", "training.max_steps=35")
    assert penstock("train", small_yaml, "--out", begun, "--resume", *more)[0] == 0
    assert content(kept)[0] == 20, "a savepoint stays as it is"
    code, shown, errors = penstock("savepoint", "restore", kept, "--out", again)
    assert code == 0 and f"penstock train {again / 'job.yaml'}" in shown, errors
    code, _, errors = penstock("train", again / "job.yaml", "--out", again, "--resume", *more)
    assert code == 0, errors
    assert content(again) == content(begun)
    assert content(kept)[0] == 20
    assert penstock("data", "audit", kept)[0] == 0
    assert penstock("inspect", kept, "--no-plots")[0] == 0


def test_another_job_goes_on_if_it_may(begun, small_yaml, tmp_path, penstock):
    again = tmp_path / "again"
    step = newest(begun)
    assert penstock("savepoint", "restore", step, "--out", again)[0] == 0
    train = ("train", small_yaml, "--out", again, "--resume", "--set", "training.max_steps=25")
    code, _, errors = penstock(*train, "--set", "table_defaults.dim=12")
    assert code == 2 and "dim" in errors
    code, _, errors = penstock(*train, "--set", "name=other", "--set", "training.batch_size=33")
    assert code == 0, errors
    assert content(again)[0] == 25


@pytest.mark.parametrize("linked", [True, False])
def test_what_is_wrong_leaves_nothing(begun, tmp_path, penstock, monkeypatch, linked):
    out = tmp_path / "out"
    if not linked:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "")))
    damaged = tmp_path / "damaged"
    shutil.copytree(begun, damaged)
    table = next(newest(damaged).glob("table-*"))
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    code, _, errors = penstock("savepoint", "create", damaged, "--out", out)
    assert code == 2 and table.name in errors
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, errors = penstock("savepoint", "create", begun, "--out", tmp_path / "full")
    assert code == 2 and "there is something already" in errors
    code, _, errors = penstock("savepoint", "create", tmp_path / "no", "--out", out)
    assert code == 2 and "no such run" in errors
    monkeypatch.setattr(savepoint, "sync_directory", lambda _: (_ for _ in ()).throw(
        OSError(errno.ENOSPC, "No space left on device")
    ))  # fmt: skip
    code, _, errors = penstock("savepoint", "create", begun, "--out", out)
    assert code == 2 and "No space left" in errors
    assert not out.exists() and not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    if not linked:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "")))
    out.mkdir()
    assert penstock("savepoint", "create", begun, "--out", out)[0] == 0
    assert content(out) == content(begun)


def test_a_checkpoint_that_a_run_removes_meanwhile_is_not_needed(
    begun, small_yaml, tmp_path, penstock, monkeypatch
):
    first, read = newest(begun), savepoint.read_manifest

    def trained_on(path):
        manifest = read(path)
        if first.exists():
            later = first.with_name("step-000000099")
            shutil.copytree(first, later)
            shutil.rmtree(first)
        return manifest

    monkeypatch.setattr(savepoint, "read_manifest", trained_on)
    code, shown, errors = penstock("savepoint", "create", begun, "--out", tmp_path / "out")
    assert code == 0 and "step-000000099" in shown, errors
