"""The directory of a run's checkpoints: which are there, and what dead writers left.

The names say all: `step-000000123` is complete, `step-000000123.tmp-<pid>` is being written.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from penstock.embedding.durable_files import MANIFEST
from penstock.errors import CheckpointError
from penstock.training.checkpoint.files import is_complete

# FORMAT: never change these; see docs/checkpoint_format.md.
_NAME = re.compile(r"step-(\d{9,})(\.replaced)?")
_UNFINISHED = re.compile(r"step-\d{9,}\.tmp-(\d+)")
REPLACED = ".replaced"

_log = logging.getLogger(__name__)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in a directory of them; None where there is none.

    Whether its files are undamaged is for `restore` to say. A directory of a checkpoint's name
    without a readable manifest is passed over with a warning in the log.
    """
    for _, path in reversed(list_checkpoints(directory)):
        if is_complete(path):
            return path
        _log.warning("%s is not a complete checkpoint: no readable %s", path, MANIFEST)
    return None


def checkpoint_of_step(directory: Path, step: int) -> Path:
    """The checkpoint of a step.

    Raises:
      CheckpointError: it is not there, or not complete.
    """
    path = dict(list_checkpoints(directory)).get(step)
    if path is None or not is_complete(path):
        raise CheckpointError(f"{directory}: the checkpoint of step {step:,} is gone")
    return path


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, directory) of each checkpoint, by step; complete ones, unless damaged since."""
    found: dict[int, Path] = {}
    # By name, `step-1.replaced` comes after `step-1`, which is the newer of the two.
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match:
            found.setdefault(int(match[1]), path)
    return sorted(found.items())


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that half of one never bears its name."""
    name = checkpoint.name.removesuffix(REPLACED)
    doomed = checkpoint.with_name(f"{name}.tmp-{os.getpid()}")
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def _is_other_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def tidy(directory: Path) -> None:
    """Removes what writers left that died, and finishes a replacement that one began."""
    for path in directory.iterdir():
        unfinished = _UNFINISHED.fullmatch(path.name)
        if unfinished and not _is_other_process(int(unfinished[1])):
            shutil.rmtree(path)
        elif _NAME.fullmatch(path.name) and path.name.endswith(REPLACED):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if final.exists():
                remove(path)
            else:
                os.rename(path, final)
