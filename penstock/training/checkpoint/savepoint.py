"""Savepoints: a run folder of its own that begins where another one is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from penstock.embedding.durable_files import sync_directory
from penstock.errors import ConfigError
from penstock.training.checkpoint.files import read_manifest, verify

_BESIDE = ("job.yaml", "quarantine.jsonl")
"""What a run folder has that its checkpoint goes on with."""


def copy_run(checkpoint: Path, run: Path, to: Path) -> None:
    """Makes a run folder of a checkpoint, with what belongs to it; whole under its name, or absent.

    Files are hard links where both are on one file system: nobody ever writes to one again.

    Args:
      checkpoint: complete; every byte of it is read and compared with its checksum.
      run: the run folder that it is of.
      to: new, or an empty directory.

    Raises:
      CheckpointError: it is damaged.
      ConfigError: there is something in `to`, or it cannot be written.
      FileNotFoundError: the checkpoint was removed meanwhile.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to}: there is something already; name a new folder")
    manifest = read_manifest(checkpoint)
    part = to.with_name(f".{to.name}.part-{os.getpid()}")
    try:
        into = part / "checkpoints" / f"step-{manifest.step:09}"
        into.mkdir(parents=True)
        for path in checkpoint.iterdir():
            _link(path, into / path.name)
        for name in _BESIDE:
            if (run / name).is_file():
                # That of the run goes on being written.
                shutil.copyfile(run / name, part / name)
        verify(into)
        for folder in (into, into.parent, part):
            sync_directory(folder)
        os.rename(part, to)
        sync_directory(to.absolute().parent)
    except FileNotFoundError:
        raise  # a process that trains removes checkpoints
    except OSError as error:
        raise ConfigError(f"{to}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another file system, or one without links
        with path.open("rb") as source, to.open("xb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
            target.flush()
            os.fsync(target.fileno())
