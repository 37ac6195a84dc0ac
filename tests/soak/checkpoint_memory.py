"""Memory that ranks take to write and read a checkpoint: does the first one's grow with the others?

    python -m tests.soak.checkpoint_memory

Tables of 1 and 8 times a size, with a budget and eviction, on 2 and 8 ranks (Gloo). Of each rank
the most memory during a save, and a restore, above what it holds before it (after it, of a
restore). The first rank may take 32 MiB more than any other, whatever the rows. Prints JSON lines.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

from penstock import EmbeddingCollection, FeatureConfig, TableConfig
from penstock.config import Adagrad, Eviction, parse_job
from penstock.embedding.store import TableRows
from penstock.interruption import Interruption
from penstock.position import LanePosition, Position
from penstock.ranks.environment import end_with_launcher
from penstock.ranks.group import Group
from penstock.ranks.join import joined
from penstock.ranks.launch import launch
from penstock.training.checkpoint.checkpoint import Checkpoints, TrainState

ROWS, DIM, CHUNK = 250_000, 16, 20_000
MOST_MORE = 32 << 20
JOB = parse_job({
    "data": {"source": {"format": "synthetic"}, "label": {"column": "click"}},
    "features": [{"columns": ["c0"]}],
    "model": {"kind": "dlrm"},
})


def kib(name: str) -> int:
    """A number of this process, as Linux tells it."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def state_of(group: Group) -> TrainState:
    """Of an untrained run."""
    table = TableConfig(
        name="t", dim=DIM, optimizer=Adagrad(), eviction=Eviction(order="lru"), max_bytes="2GiB"
    )
    features = [FeatureConfig(name="f", table="t", pooling="sum")]
    collection = EmbeddingCollection([table], features, num_threads=1, group=group.tables)
    model = torch.nn.Linear(4, 1)
    return TrainState(0, Position(lanes=(LanePosition(),) * 8), collection, model)


def of_rank(folder: Path, rows: int) -> None:
    """Fills, saves and restores a table; the first rank writes what each took."""
    with joined("cpu") as group:
        state = state_of(group)
        for first in range(0, rows, CHUNK):
            keys = torch.arange(first, min(rows, first + CHUNK))
            n = len(keys)
            given = torch.ones(n, DIM), torch.ones(n, DIM), torch.ones(n, 1, dtype=torch.int64)
            state.collection.import_rows("t", TableRows(keys, *given))
        checkpoints = Checkpoints(folder / "checkpoints", 1, JOB, group=group)
        taken = []
        for act in ("save", "restore"):
            if act == "restore":
                del state
                state = state_of(group)
            group.gathered(torch.tensor(0))
            Path("/proc/self/clear_refs").write_text("5")
            before = kib("VmRSS")
            if act == "save":
                path = checkpoints.save(state)
                taken.append(kib("VmHWM") - before)
            else:
                checkpoints.restore(path, state)
                taken.append(kib("VmHWM") - max(before, kib("VmRSS")))
        every = group.gathered(torch.tensor(taken) * 1024)
        if group.rank == 0:
            (folder / "told").write_text(json.dumps(every.t().tolist()))


def measured(ranks: int, rows: int) -> list[list[int]]:
    """Bytes for a save and for a restore, of each rank."""
    with tempfile.TemporaryDirectory() as name:
        told = Path(name) / "told"
        command = [sys.executable, "-m", "tests.soak.checkpoint_memory", name, str(rows)]
        ended = launch(command, ranks, Interruption())
        if ended.status:
            raise SystemExit(ended.words)
        found: list[list[int]] = json.loads(told.read_text())
        return found


def main() -> None:
    if "RANK" in os.environ:
        end_with_launcher()
        of_rank(Path(sys.argv[1]), int(sys.argv[2]))
        return
    for ranks in (2, 8):
        for rows in (ROWS, 8 * ROWS):
            found = measured(ranks, rows)
            for act, of_ranks in zip(("save", "restore"), found, strict=True):
                first, *others = (round(one / 2**20) for one in of_ranks)
                said = {"first_mib": first, "others_mib": [min(others), max(others)]}
                print(json.dumps({"ranks": ranks, "rows": rows, "act": act, **said}), flush=True)
                assert first << 20 <= (max(others) << 20) + MOST_MORE, said


if __name__ == "__main__":
    main()
