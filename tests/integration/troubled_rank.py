"""`penstock` with a rank that comes to grief: PLACE TROUBLE RANK, then the arguments of `penstock`.

At the place the rank is killed (`kill`), sends its launcher a signal (`SIGINT`), finds the disk
full (`full`), or goes no further (`hang`); ranks then wait for each other for some seconds only.
"""

import errno
import importlib
import os
import signal
import sys
import time
from pathlib import Path

from penstock.cli import main
from penstock.ranks.environment import LAUNCHER

PLACES = {
    "start": ("penstock.ranks.join", "_meet", 1),
    "opening": ("penstock.data.dataset", "divide", 1),
    "building": ("penstock.run", "build", 1),
    "reading": ("penstock.data.batches.reader.Reader", "_read", 3),
    "forward": ("penstock.training.steps.division.Division", "begin_part", 30),
    "exchange": ("penstock.embedding.sharded.exchange.Collective", "to_all", 90),
    "gradients": ("penstock.training.steps.division.Division", "sum_gradients", 13),
    "save": ("penstock.embedding.durable_files", "write_durably", 2),
    "evaluation": ("penstock.training.evaluation", "_outputs", 2),
    "end": ("penstock.run.Run", "finish", 1),
}
"""Each by the call of what, and the number of the call."""
WAITS_S = 3.0
AT = "TROUBLED_AT"
"""Names the file that gets the time of the trouble."""


def trouble(kind):
    Path(os.environ[AT]).write_text(str(time.monotonic()))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    elif kind == "hang":
        while True:
            time.sleep(0.1)
    else:
        os.kill(int(os.environ[LAUNCHER]), signal.Signals[kind])


def plant(place, kind):
    """Puts the trouble where it is to be."""
    path, name, number = PLACES[place]
    try:
        owner = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, inner = path.rpartition(".")
        owner = getattr(importlib.import_module(module), inner)
    called, calls = getattr(owner, name), 0

    def troubled(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == number:
            trouble(kind)
        return called(*arguments, **named)

    setattr(owner, name, troubled)


if __name__ == "__main__":
    planted, its_kind, its_rank = sys.argv[1:4]
    sys.argv[1:4] = []
    if "RANK" in os.environ:
        if its_kind == "hang":
            join = importlib.import_module("penstock.ranks.join")
            join.COLLECTIVE_S = WAITS_S
            importlib.import_module("penstock.ranks.watch").PATIENCE_S = WAITS_S / 3
        if os.environ["RANK"] == its_rank:
            plant(planted, its_kind)
    main()
