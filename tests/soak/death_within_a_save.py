"""Kills a rank, and all of them, at every point at which a save of two ranks changes the disk.

    python -m tests.soak.death_within_a_save

Each time the newest complete checkpoint must be whole and have its bits, and be gone on from.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.unit.training.test_death_within_a_save import tried
from tests.world.ranks import in_world


def main() -> None:
    points = {}
    for takes_all in (False, True):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            in_world(patch)
            points["all" if takes_all else "one"] = tried(Path(folder), takes_all=takes_all)
    print(json.dumps({"soak": "death_within_a_save", "points": points}))


if __name__ == "__main__":
    main()
