"""Variables by which a launcher tells a process which rank it is; no torch.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are torchrun's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from penstock.errors import ConfigError

MEETING = "PENSTOCK_MEETING"
"""The file where ranks that `penstock train --nproc` started find each other."""
RANK = "RANK"
LAUNCHER = "PENSTOCK_LAUNCHER"
"""The number of the process that started them."""
LOST = 3
"""Exit status of a rank that ends because of another one, which says why."""
_PR_SET_PDEATHSIG = 1


def whole_number(environment: Mapping[str, str], name: str) -> int | None:
    """The value of a variable, 0 or more; None: it is not set.

    Raises:
      ConfigError: it is no such number.
    """
    text = environment.get(name)
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"{name} is {text!r}: a launcher sets it to a whole number, 0 or more")
    return int(text)


def is_started_by_us(environment: Mapping[str, str]) -> bool:
    """Whether `penstock train --nproc` started this process."""
    return MEETING in environment


def leave_words(words: str) -> bool:
    """Leaves with our launcher why this rank ends; returns whether there is one that has it."""
    meeting = os.environ.get(MEETING)
    if meeting is None:
        return False
    try:
        _words_file(Path(meeting).parent, int(os.environ[RANK])).write_text(
            words, "utf-8", errors="backslashreplace"
        )
    except OSError:
        return False
    return True


def words_of(folder: Path, rank: int) -> str | None:
    """What a rank has left; None: nothing."""
    try:
        return _words_file(folder, rank).read_text("utf-8")
    except OSError:
        return None


def _words_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}-ended"


def end_with_launcher() -> None:
    """Ends this process when that of our launcher ends, however: what a rank calls first of all.

    By a call of Linux; elsewhere only a launcher that has ended before is noticed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ[LAUNCHER]):
        os._exit(LOST)  # it died before that call
