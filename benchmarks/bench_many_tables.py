"""What many tables in one store cost: look-ups with eviction, exports, construction.

    python benchmarks/bench_many_tables.py           # prints one JSON object
    python benchmarks/bench_many_tables.py --check   # and fails where a goal is missed

Two ratios of one run: a look-up that evicts in 1,000 tables of 300 rows against one in a single
table with as many rows and keys; and the export of a million rows of 4,000 tables against one of as
many rows of 10. Both stores of a ratio take their turns one after the other. Also the time to build
a collection of 10,000 tables and features. Seconds are of this process (one thread), so that other
work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from circumstances import commit, end_check, hardware

from penstock.config import SGD, Eviction, FeatureConfig, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock, overhead_bytes
from penstock.embedding.store import CURSOR_START, PooledFeature, PoolingPlan, RowLayout
from penstock.types import KeyedJagged

DIM = 8
GOALS = {"lookup_ratio": 2.0, "export_ratio": 3.0, "build_10000_tables_s": 1.0}


def seconds_of(call: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


class Evicting:
    """A store whose every look-up brings new keys, and evicts once it is full."""

    def __init__(self, tables: int, rows: int, new_keys: int) -> None:
        """Fills it.

        Args:
          tables: their number.
          rows: of all tables.
          new_keys: of a look-up, in all tables.
        """
        free = TableConfig(name="t", dim=DIM, optimizer=SGD(), eviction=Eviction(ttl=10**9))
        row_bytes = RowLayout.of(free).row_bytes + overhead_bytes(free)
        size = rows // tables * row_bytes
        configs = [
            free.model_copy(update={"name": f"t{n}", "max_bytes": size}) for n in range(tables)
        ]
        self.store = HostStore(configs, num_threads=1)
        features = (PooledFeature(n, n, "sum", DIM * n) for n in range(tables))
        self.plan = PoolingPlan(tuple(features), DIM * tables)
        self.names = tuple(f"f{n}" for n in range(tables))
        self.size = new_keys // tables
        self.out = torch.empty(self.size, DIM * tables)
        self.step = 0
        while self.store.memory().rows + new_keys <= rows:
            self.look_up()

    def look_up(self) -> None:
        """The next keys, which nobody has seen."""
        tables = len(self.names)
        first = self.step * self.size
        keys = torch.arange(first, first + self.size).repeat(tables) * 0x5851F42D4C957F2D
        batch = KeyedJagged(self.names, keys, torch.arange(tables * self.size + 1))
        self.store.advance(Clock(self.step))
        self.store.pooled_lookup(self.plan, batch, insert=True, out=self.out)
        self.step += 1


def exporting(tables: int, rows: int) -> HostStore:
    """A store of tables without rules."""
    configs = [TableConfig(name=f"t{n}", dim=DIM, optimizer=SGD()) for n in range(tables)]
    store = HostStore(configs, num_threads=1)
    for number in range(tables):
        store.find_or_insert(number, torch.arange(rows // tables))
    return store


def export(store: HostStore) -> None:
    """Every row, as a checkpoint takes it."""
    # What a former export left is dropped.
    store.find_or_insert(0, torch.tensor([-store.num_rows(0)]))
    for number in range(len(store.tables)):
        cursor = CURSOR_START
        while True:
            rows, cursor = store.export_batch(number, cursor, 1 << 18)
            if not len(rows.keys):
                break


def build(tables: int) -> float:
    """Seconds to make a collection, one feature a table."""
    configs = [TableConfig(name=f"t{n}", dim=DIM, optimizer=SGD()) for n in range(tables)]
    features = [FeatureConfig(name=f"f{n}", table=f"t{n}") for n in range(tables)]
    return seconds_of(lambda: EmbeddingCollection(configs, features, num_threads=1))


def measure(turns: int) -> dict[str, object]:
    """Medians of some turns, and the least and most of each ratio."""
    result: dict[str, object] = {"case": "many tables in one host store, D8, one thread"}
    pairs: dict[str, list[tuple[float, float]]] = {"lookup": [], "export": []}
    many, one = Evicting(1000, 300_000, 16_000), Evicting(1, 300_000, 16_000)
    small, large = exporting(4000, 1_000_000), exporting(10, 1_000_000)
    for _ in range(turns):
        pairs["lookup"].append((seconds_of(many.look_up), seconds_of(one.look_up)))
        pairs["export"].append((
            seconds_of(lambda: export(small)),
            seconds_of(lambda: export(large)),
        ))
    for name, times in pairs.items():
        ratios = [in_many / in_few for in_many, in_few in times]
        result[f"{name}_many_tables_ms"] = round(float(np.median([a for a, _ in times])) * 1e3, 2)
        result[f"{name}_few_tables_ms"] = round(float(np.median([b for _, b in times])) * 1e3, 2)
        result[f"{name}_ratio"] = round(float(np.median(ratios)), 2)
        result[f"{name}_ratio_range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    result["build_10000_tables_s"] = round(min(build(10_000) for _ in range(3)), 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--check", action="store_true", help="fail where a goal is missed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.turns)
    print(json.dumps({**result, "commit": commit(), "hardware": hardware("one thread")}))
    if arguments.check:
        end_check([
            f"{name}: {result[name]}, goal {goal}"
            for name, goal in GOALS.items()
            if float(result[name]) > goal  # type: ignore[arg-type]
        ])


if __name__ == "__main__":
    main()
