"""Eight jobs that start at the same moment on one machine, of 1 and 2 ranks: none meets another.

    python -m tests.soak.many_launches

Each ends with the bits of one that was alone, and nothing is left behind. Prints a line of JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import yaml

from tests.soak.bits_over_ranks import (
    contents,
    differences,
    fields_of,
    left_behind,
    start,
    train,
    write_data,
)

RANKS = (2, 1, 2, 2, 1, 2, 2, 2)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_data(folder / "data")
        job, shared = folder / "job.yaml", set(Path("/dev/shm").iterdir())
        job.write_text(yaml.safe_dump(fields_of(folder / "data", "sgd", keeps=False, steps=20)))
        train(job, folder / "alone", 1)
        began_s = time.monotonic()
        outs = [folder / f"run-{number}" for number in range(len(RANKS))]
        jobs = [start(job, out, ranks) for out, ranks in zip(outs, RANKS, strict=True)]
        for process in jobs:
            _, errors = process.communicate(timeout=600)
            assert (process.returncode, errors) == (0, ""), errors
        taken_s = time.monotonic() - began_s
        for out in outs:
            unlike = differences(contents(folder / "alone"), contents(out))
            assert not unlike, unlike[:5]
        left = left_behind(outs[0], shared)
        assert not left, left
    result = {"jobs": len(RANKS), "ranks": sum(RANKS), "seconds": round(taken_s)}
    print(json.dumps({"soak": "many_launches", "outcome": "the same bits, nothing left", **result}))


if __name__ == "__main__":
    main()
