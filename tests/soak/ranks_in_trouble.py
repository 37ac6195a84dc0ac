"""A rank that comes to grief at every place of a run: do all end, is it said, does it go on?

    python -m tests.soak.ranks_in_trouble [--only forward kill]

Two ranks train a deterministic job. At each place of `troubled_rank.py`, from the start to the end,
one of them is killed; Ctrl-C or SIGTERM comes; the disk is full; it hangs. Then all must be gone
within 15 s, nothing may be left behind, the words must say what it was, and the run that goes on
from what there is must end with the bits of one that had no trouble. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from penstock.training.checkpoint.checkpoint import latest_checkpoint
from tests.soak.bits_over_ranks import (
    LIMIT_S,
    differences,
    fields_of,
    left_behind,
    train,
    without_lines,
    write_data,
)

SCRIPT = Path(__file__).parents[1] / "integration" / "troubled_rank.py"
RANKS, STEPS = 2, 30
WAITS_S = 3.0
"""Of `troubled_rank.py`: how long ranks wait for one that hangs."""
STATUS = {"kill": 137, "full": 2, "hang": 2, "SIGINT": 130, "SIGTERM": 143}
PLACES = (
    "start",
    "opening",
    "building",
    "reading",
    "forward",
    "exchange",
    "gradients",
    "save",
    "evaluation",
    "end",
)


def cases() -> list[tuple[str, str, int]]:
    """Place, trouble and rank."""
    found = [(place, "kill", rank) for place in PLACES for rank in range(RANKS)]
    found += [(place, kind, 1) for place in PLACES for kind in ("SIGINT", "SIGTERM")]
    found += [("save", "full", rank) for rank in range(RANKS)]
    hangs = ("building", "reading", "forward", "save", "evaluation")
    return found + [(place, "hang", rank) for place in hangs for rank in range(RANKS)]


class Troubles:
    """Runs of one job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.job = folder, folder / "job.yaml"
        (folder / "data").mkdir()
        write_data(folder / "data")
        fields = fields_of(folder / "data", "adam", keeps=True, steps=STEPS)
        self.job.write_text(yaml.safe_dump({**fields, "evaluation": {"every_steps": 12}}))
        train(self.job, folder / "whole", RANKS)
        self.whole = without_lines(folder / "whole")
        self.shared = set(Path("/dev/shm").iterdir())

    def run(self, place: str, kind: str, rank: int, *, goes_on: bool = True) -> float:
        """Seconds from the trouble until all were gone; AssertionError where something is wrong."""
        out, at = self.folder / "run", self.folder / "at"
        shutil.rmtree(out, ignore_errors=True)
        at.unlink(missing_ok=True)
        command = [str(SCRIPT), place, kind, str(rank), "train", str(self.job)]
        process = subprocess.run(
            [sys.executable, *command, "--out", str(out), "--nproc", str(RANKS)],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(self.folder / "tmp"),
                "TROUBLED_AT": str(at),
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        ended_s = time.monotonic()
        case = f"{place}, {kind}, rank {rank}: {process.returncode}, {process.stderr}"
        assert at.exists(), case
        waited_s = ended_s - float(at.read_text())
        assert process.returncode == STATUS[kind], case
        # The readers' channel first, then that on which ranks tell each other how it was.
        limit_s = LIMIT_S + 2 * WAITS_S * (kind == "hang")
        assert waited_s < limit_s, f"{case}: all gone only after {waited_s:.1f} s"
        left = left_behind(out, self.shared)
        assert not left, f"{case}: {left}"
        self._check_words((place, kind, rank), process.stderr, case)
        if goes_on:
            has_any = latest_checkpoint(out / "checkpoints") is not None
            if not has_any:
                shutil.rmtree(out, ignore_errors=True)
            train(self.job, out, RANKS, *(["--resume"] if has_any else []))
            unlike = differences(self.whole, without_lines(out))
            assert not unlike, f"{case}: {unlike[:5]}"
        return waited_s

    def _check_words(self, trouble: tuple[str, str, int], words: str, case: str) -> None:
        place, kind, rank = trouble
        last = words.splitlines()[-1]
        if kind == "kill":
            assert last == f"error: rank {rank} of {RANKS} was killed by SIGKILL", case
        elif kind == "full":
            who = f"rank {rank} of {RANKS}: " if rank else ""  # the first says it for all
            assert last.startswith(f"error: {who}cannot write checkpoint"), case
            assert "No space left on device" in last, case
        elif kind == "hang":
            assert f"Still there was rank {rank}: it did not come to the others" in last, case
            if place != "building":  # only what has batches says at which one it is
                where = [line for line in words.splitlines() if " has been " in line]
                assert any(f"rank {rank} of {RANKS} has been" in line for line in where), case
        else:
            assert last == f"stopped by {kind}", case


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="places, kinds")
    wanted = set(parser.parse_args().only)
    longest, done, wrong = 0.0, 0, []
    with tempfile.TemporaryDirectory() as name:
        troubles = Troubles(Path(name))
        for place, kind, rank in cases():
            if wanted - {place, kind}:
                continue
            try:
                longest = max(longest, troubles.run(place, kind, rank))
            except AssertionError as error:
                wrong.append(str(error))
                print(error, flush=True)
                continue
            done += 1
            print(f"{place}, {kind}, rank {rank}: as it should be", flush=True)
    outcome = {"as it should be": done, "wrong": len(wrong), "longest_s": round(longest, 2)}
    print(json.dumps({"soak": "ranks_in_trouble", **outcome}))
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
