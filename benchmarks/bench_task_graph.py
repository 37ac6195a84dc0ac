"""The task graph at scale: tasks a second, the first one, calls of the store, memory.

    python benchmarks/bench_task_graph.py                    # a JSON line a case
    python benchmarks/bench_task_graph.py --check            # and fails below the goals
    python benchmarks/bench_task_graph.py --days 2 --turns 1 --held-days 0     # a short one

A simulated store makes the names of 20 days x 2 sources on the fly: 58,338 files an hour and
source, 56 M in all. A task is a run of 14 files of one window and source, 4 M in all. The store
answers at once, or in 1 or 10 ms for each 1,000 names, as object stores give them, one answer after
the other in one folder. Each turn of a case is a process of its own, held to one core; a case of
two processes gives each half of the days and a core of its own. Figures are medians of the turns,
`spread` the least and the most; `tasks_per_cpu_s` is by the processor's time, which other work on
the machine touches less. `peak_growth_mb` is what a process takes more than before its first call.
Beside the graph, in the same run:

- `naive`: one file at a time, each path matched by a regular expression, its hour made of it, and
  compared with the window; over few hours, since its rate does not depend on how many there are;
- `store alone`: what the simulation costs, and nothing done with its names;
- `arrow lists` and `arrow lists, as arrays`: a folder in pyarrow's file system in memory, whose
  listing makes a Python object a file; and what we make of it: no store that pyarrow lists is
  faster than that;
- `80 M tasks held` (`--held-days 400`): all of them in one table, without their names.

What only generates says so in `stage`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
from circumstances import commit, end_check, hardware
from pyarrow import fs

from penstock.config import StreamsSource
from penstock.data.windows.calendar import moment_ms
from penstock.data.windows.folders import Entries, Folders, listed
from penstock.data.windows.graph import StoredPaths, TaskGraph
from penstock.data.windows.patterns import PathPattern
from penstock.data.windows.tasks import Tasks

FILES_A_TASK = 14
FILES_AN_HOUR = 4167 * FILES_A_TASK
PAGE = 1000
SOURCES = ("clicks", "views")
FIRST = datetime(2026, 1, 1)
UTC = ZoneInfo("UTC")
GOAL_TASKS_S = 250_000
GOAL_FIRST_S = 1.0
GOAL_HELD_MB = 1000
GOAL_GROWTH_MB = 200

Figures: TypeAlias = dict[str, float]


class SimulatedStore:
    """Folders source/YYYY-MM-DD/HH with files part-NNNNNN-XXXXXXXX.parquet of unlike sizes."""

    def __init__(self, days: int, latency_s: float, first: datetime = FIRST) -> None:
        dates = [f"{first + timedelta(days=day):%Y-%m-%d}" for day in range(days)]
        self._latency_s = latency_s
        self._days = Entries.of(dates, [], [])
        self._hours = Entries.of([f"{hour:02}" for hour in range(24)], [], [])
        numbers = np.arange(FILES_AN_HOUR)
        # A name of 28 bytes; only the eight digits that tell folders apart are made anew.
        first_name = np.frombuffer(b"part-000000-00000000.parquet", np.uint8)
        self._text = np.tile(first_name, (len(numbers), 1))
        for place in range(6):
            self._text[:, 5 + place] = ord("0") + numbers // 10 ** (5 - place) % 10
        self._ends = pa.py_buffer(np.arange(len(numbers) + 1, dtype=np.int64) * 28)
        self._sizes = 1_000_000 + numbers * 7919 % 500_000

    def entries(self, folder: str) -> Entries | None:
        """What a folder holds, after the time that a store would take."""
        depth = folder.count("/")
        if depth < 2:
            time.sleep(self._latency_s)
            return self._hours if depth else self._days
        for _ in range(-(-FILES_AN_HOUR // PAGE) if self._latency_s else 0):
            time.sleep(self._latency_s)
        text = self._text.copy()
        text[:, 12:20] = np.frombuffer(b"%08x" % zlib.crc32(folder.encode()), np.uint8)
        names = pa.LargeStringArray.from_buffers(FILES_AN_HOUR, self._ends, pa.py_buffer(text))
        return Entries(self._hours.files, names, self._sizes)


def graph_over(store: Folders, days: int, windows: tuple[str, ...], first: datetime = FIRST):
    """A graph of one stream for each unit of windows, side by side, all over the same folders."""
    streams = [
        {
            "name": window,
            "window": window,
            "start": first.isoformat(),
            "end": (first + timedelta(days=days)).isoformat(),
            "sources": [
                {
                    "name": name,
                    "files": {
                        "format": "parquet",
                        "path": name + "/{YYYY}-{MM}-{DD}/{HH}/*.parquet",
                    },
                }
                for name in SOURCES
            ],
        }
        for window in windows
    ]
    config = StreamsSource.model_validate({"streams": streams, "together": len(streams) > 1})
    stored = {
        f"{stream.name}/{source.name}": StoredPaths(
            store, PathPattern(str(source.files.path)), None
        )
        for stream in config.streams
        for source in stream.sources
    }
    return TaskGraph(config, stored), stored


def peak_mb() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident_mb() -> float:
    """Of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def generated(
    days: int,
    latency_s: float,
    windows: tuple[str, ...] = ("hour",),
    part_of: tuple[int, int] = (0, 1),
    with_names: bool = False,
) -> Figures:
    """Every task numbered, in order, and those of an hour let go before the next.

    Args:
      days: of all processes.
      latency_s: of the store, for a page.
      windows: their units, of a stream each.
      part_of: which of how many equal parts of the days this process has.
      with_names: each task's paths are made, as for a reader.
    """
    days //= part_of[1]
    first = FIRST + timedelta(days=days * part_of[0])
    store = Folders(SimulatedStore(days, latency_s, first).entries)
    graph, stored = graph_over(store, days, windows, first)
    tasks = Tasks(stored, FILES_A_TASK)
    resident, peak = resident_mb(), peak_mb()
    begin = time.monotonic()
    first_s = 0.0
    files = 0
    for part in graph.parts():
        numbers = tasks.add(part)
        if not numbers.start:
            assert len(list(tasks.files(0))) == FILES_A_TASK
            first_s = time.monotonic() - begin
        for number in numbers if with_names else ():
            assert len(list(tasks.files(number))) == FILES_A_TASK
        files += len(part.files)
    seconds = time.monotonic() - begin
    assert len(tasks) == 4167 * 24 * days * len(SOURCES) * len(windows)
    assert files == len(tasks) * FILES_A_TASK
    figures = {
        "tasks": len(tasks),
        "seconds": seconds,
        "first_task_s": first_s,
        "listings": store.listings,
        "peak_growth_mb": peak_mb() - peak,
        "held_mb": resident_mb() - resident,
    }
    begin = time.monotonic()
    assert len(list(tasks.files(0))) == FILES_A_TASK  # of a folder that must be listed again
    return figures | {"names_again_ms": 1e3 * (time.monotonic() - begin)}


def naive(hours: int) -> Figures:
    """A plain loop: one file at a time."""
    store = SimulatedStore(1, 0)
    path = re.compile(r"(\w+)/(\d{4})-(\d{2})-(\d{2})/(\d{2})/[^/]*\.parquet")
    begin = time.monotonic()
    tasks: list[tuple[int, list[tuple[str, int]]]] = []
    for hour in range(hours):
        start = moment_ms(FIRST + timedelta(hours=hour), UTC)
        for source in SOURCES:
            folder = f"{source}/{FIRST:%Y-%m-%d}/{hour:02}"
            entries = store.entries(folder)
            assert entries is not None
            run: list[tuple[str, int]] = []
            for name, size in zip(entries.files.to_pylist(), entries.sizes.tolist(), strict=True):
                found = path.fullmatch(f"{folder}/{name}")
                if found is None or name.startswith((".", "_")):
                    continue
                at = moment_ms(datetime(*(int(part) for part in found.groups()[1:])), UTC)
                if start <= at < start + 3_600_000:
                    run.append((found[0], size))
                if len(run) == FILES_A_TASK:
                    tasks.append((start, run))
                    run = []
    return {"tasks": len(tasks), "seconds": time.monotonic() - begin}


def store_alone(hours: int) -> Figures:
    """The simulation, and nothing done with it."""
    store = SimulatedStore(1, 0)
    begin = time.monotonic()
    for hour in range(hours):
        for source in SOURCES:
            store.entries(f"{source}/2026-01-01/{hour:02}")
    return {"tasks": 4167 * hours * len(SOURCES), "seconds": time.monotonic() - begin}


def arrow_lists(as_arrays: bool) -> Figures:
    """A folder of pyarrow's file system in memory, of as many files as an hour has."""
    filesystem = fs._MockFileSystem()
    filesystem.create_dir("a")
    for number in range(FILES_AN_HOUR):
        filesystem.open_output_stream(f"a/part-{number:06d}-00000000.parquet").close()
    begin, cpu = time.monotonic(), time.process_time()
    for _ in range(4):
        if as_arrays:
            listed(filesystem, "a")
        else:
            filesystem.get_file_info(fs.FileSelector("a"))
    seconds = time.monotonic() - begin
    return {"tasks": 4 * 4167, "seconds": seconds, "cpu_seconds": time.process_time() - cpu}


def worker(
    call: Callable[[], Figures], core: int, start: Barrier, results: multiprocessing.Queue[Any]
) -> None:
    """One process of a turn."""
    os.sched_setaffinity(0, {core})
    start.wait()
    begin, cpu = time.monotonic(), time.process_time()
    figures = call()
    figures.setdefault("cpu_seconds", time.process_time() - cpu)
    results.put(figures | {"begin": begin, "end": begin + figures["seconds"]})


def turn(calls: Sequence[Callable[[], Figures]]) -> Figures:
    """One turn of a case: each call in a process of its own, on a core of its own."""
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    if len(calls) > len(cores):
        raise SystemExit(f"{len(calls)} processes need as many cores; there are {len(cores)}")
    start, results = context.Barrier(len(calls)), context.Queue()
    processes = [
        context.Process(target=worker, args=(call, cores[-1 - n], start, results))
        for n, call in enumerate(calls)
    ]
    for process in processes:
        process.start()
    found: list[Figures] = [results.get(timeout=3600) for _ in processes]
    for process in processes:
        process.join()
    sums = ("tasks", "cpu_seconds", "listings", "peak_growth_mb", "held_mb")
    figures = {
        name: sum(one[name] for one in found) if name in sums else max(one[name] for one in found)
        for name in found[0]
    }
    seconds = max(one["end"] for one in found) - min(one["begin"] for one in found)
    return figures | {"seconds": seconds}


def line(case: str, stage: str, turns: Sequence[Figures], **more: object) -> dict[str, object]:
    """A line of results."""
    rates = sorted(one["tasks"] / one["seconds"] for one in turns)
    record: dict[str, object] = {
        "case": case,
        "stage": stage,
        "tasks": turns[0]["tasks"],
        "tasks_per_s": round(statistics.median(rates)),
        "spread": [round(rates[0]), round(rates[-1])],
        "tasks_per_cpu_s": round(
            statistics.median(one["tasks"] / one["cpu_seconds"] for one in turns)
        ),
        "turns": len(turns),
    }
    for name, digits in (
        ("first_task_s", 3),
        ("listings", 0),
        ("peak_growth_mb", 0),
        ("held_mb", 0),
        ("names_again_ms", 1),
    ):
        if name in turns[0]:
            value = statistics.median(one[name] for one in turns)
            record[name] = round(value, digits) if digits else round(value)
    return record | more


def cases(days: int, held_days: int) -> dict[str, list[Callable[[], Figures]]]:
    """By name: the calls of a turn, one a process."""
    of_graph = partial(generated, days)
    found: dict[str, list[Callable[[], Figures]]] = {
        "naive": [partial(naive, 1)],
        "store alone": [partial(store_alone, 24)],
        "arrow lists": [partial(arrow_lists, False)],
        "arrow lists, as arrays": [partial(arrow_lists, True)],
    }
    for ms in (0, 1, 10):
        found[f"{ms} ms, one process"] = [partial(of_graph, ms / 1e3)]
        found[f"{ms} ms, two processes"] = [
            partial(of_graph, ms / 1e3, part_of=(half, 2)) for half in range(2)
        ]
    found["0 ms, one process, day windows"] = [partial(of_graph, 0, ("day",))]
    found["0 ms, one process, hour and day windows together"] = [
        partial(of_graph, 0, ("hour", "day"))
    ]
    found["0 ms, one process, names of every task made"] = [
        partial(generated, min(days, 2), 0, with_names=True)
    ]
    if held_days:
        found[HELD] = [partial(generated, held_days, 0)]
    return found


ONE = "0 ms, one process"
HELD = "80 M tasks held"
BESIDE = ("naive", "store alone", "arrow lists", "arrow lists, as arrays")


def missed_goals(records: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each goal that is not reached."""
    missed = []
    one = records[ONE]
    if one["tasks_per_cpu_s"] < GOAL_TASKS_S:
        missed.append(f"{one['tasks_per_cpu_s']} tasks a second of one core, not {GOAL_TASKS_S}")
    for name, record in records.items():
        if record.get("first_task_s", 0) > GOAL_FIRST_S:
            missed.append(f"{name}: first task after {record['first_task_s']} s")
        growth = record.get("peak_growth_mb", 0)
        if growth > (GOAL_HELD_MB if name == HELD else 2 * GOAL_GROWTH_MB):
            missed.append(f"{name}: {growth} MB more than at first")
    listings = [records[name]["listings"] for name in (ONE, ONE + ", day windows")]
    if listings[0] != listings[1]:
        missed.append(f"listings depend on windows: {listings}")
    return missed


def main() -> None:
    """Prints one line of JSON a case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--days", type=int, default=20)
    parser.add_argument("--held-days", type=int, default=400, help="0: not that case")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose names have this")
    parser.add_argument("--check", action="store_true", help="fail where a goal is missed")
    given = parser.parse_args()
    of_case: dict[str, list[Figures]] = {}
    chosen = {
        name: calls
        for name, calls in cases(given.days, given.held_days).items()
        if given.only in name
    }
    for number in range(given.turns):  # by turns, so that all cases meet the same other work
        for name, calls in chosen.items():
            if name != HELD or number == 0:
                print(f"turn {number + 1}: {name}", file=sys.stderr)
                of_case.setdefault(name, []).append(turn(calls))
    records: dict[str, dict[str, Any]] = {}
    for name, turns in of_case.items():
        stage = "beside" if name in BESIDE else "generated"
        records[name] = record = line(name, stage, turns)
        if stage == "generated" and "naive" in records:
            ratio = record["tasks_per_cpu_s"] / records["naive"]["tasks_per_cpu_s"]
            record["over_naive_by_cpu"] = round(ratio, 1)
        record["files"] = record["tasks"] * FILES_A_TASK
        record["load"] = round(os.getloadavg()[0], 1)
        record["commit"], record["hardware"] = commit(), hardware(f"pyarrow {pa.__version__}")
        print(json.dumps(record), flush=True)
    if given.check:
        end_check(missed_goals(records))


if __name__ == "__main__":
    main()
