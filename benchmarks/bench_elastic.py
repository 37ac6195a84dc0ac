"""One quarter of the readers slowed tenfold: lanes with pieces of their own, and lanes in turn.

    python benchmarks/bench_elastic.py             # a JSON line a case
    python benchmarks/bench_elastic.py --check     # and fails below the goals

A source in memory waits before it gives a piece of 256 rows, as storage does: 40 ms in six lanes,
400 ms in two of the eight. Nothing is computed with the batches. `limit` is the sum of what each
lane can do: measured in the same run, of one lane alone at either pace. `ordered` and `elastic`
take turns; figures are medians, `spread` the least and the most. `by_slow` is the share of the
pieces that the slow lanes took. Then the ledger alone: pieces a second that one lane after the
other takes, sixteen offered at a time, in this process and from 1, 2 and 4 threads of clients of
the service; `commits_per_s` beside it is how often SQLite writes a row and commits.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from circumstances import commit, end_check, hardware

from penstock.config import Job, parse_job
from penstock.data import Dataset
from penstock.ledger.client import LedgerClient, Service
from penstock.ledger.file import LedgerFile
from penstock.position import LanePosition, Position

ROWS, LANES, SLOW = 256, 8, (3, 6)
PACES_S = {"fast": 0.04, "slow": 0.4}


class Slow:
    """A source whose pieces take time, by the lane that reads."""

    def __init__(self, pieces: int, pace: str) -> None:
        self._pieces, self._pace = pieces, pace

    def schema(self) -> pa.Schema:
        """A label and an id."""
        return pa.schema([("label", pa.int64()), ("id", pa.int64())])

    def parts(self) -> list[str]:
        """All pieces."""
        return [f"{number:06}" for number in range(self._pieces)]

    def version(self, part: str) -> str:
        """They never change."""
        return "1"

    def rows(self, part: str) -> int:
        """Of each."""
        return ROWS

    def read(self, part: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Waits, and gives the piece."""
        pace = self._pace
        if pace == "mixed":
            lane = int(threading.current_thread().name.split("-")[2])
            pace = "slow" if lane in SLOW else "fast"
        time.sleep(PACES_S[pace])
        ids = np.arange(ROWS) + int(part) * ROWS
        table = pa.table({"label": np.zeros(ROWS, np.int64), "id": ids})
        yield table.select(list(columns))


def job_of(policy: str, pieces: int, pace: str) -> Job:
    """Reads all pieces once."""
    source = {
        "format": "python",
        "factory": f"{Path(__file__).stem}:Slow",
        "arguments": {"pieces": pieces, "pace": pace},
    }
    return parse_job({
        "data": {
            "source": source,
            "label": {"column": "label"},
            "shuffle": {"block_rows": 4096},
            "policy": policy,
        },
        "features": [{"columns": ["id"]}],
        "run": {"reader_threads": 1 if pace in PACES_S else LANES},
    })


def read_s(policy: str, pieces: int, pace: str, lanes: int, ledger: Path) -> float:
    """Seconds from the first batch asked for to the last one."""
    dataset = Dataset.open(job_of(policy, pieces, pace))
    dataset.keep_ledger(ledger)
    start = Position(lanes=(LanePosition(),) * lanes)
    rows = 0
    began_s = time.perf_counter()
    with dataset.batches("train", batch_size=1024, start=start) as loader:
        for batch in loader:
            rows += batch.batch_size
    assert rows == pieces * ROWS, "a row is missing"
    return time.perf_counter() - began_s


def by_slow(ledger: Path) -> float:
    """Share of the pieces that slow lanes took."""
    kept = LedgerFile(ledger)
    taken = [len(kept.history(0, lane)) for lane in range(LANES)]
    kept.close()
    return sum(taken[lane] for lane in SLOW) / sum(taken)


def policies(pieces: int, turns: int, folder: Path) -> list[dict[str, Any]]:
    """Both policies in turn, and the limit."""
    read_s("ordered", 40, "fast", 1, folder / "-")  # loads what is loaded once
    alone = {
        pace: number / read_s("ordered", number, pace, 1, folder / "-")
        for pace, number in (("fast", 300), ("slow", 60))
    }
    limit = (LANES - len(SLOW)) * alone["fast"] + len(SLOW) * alone["slow"]
    rates: dict[str, list[float]] = {"ordered": [], "elastic": []}
    share = 0.0
    for turn in range(turns):
        for policy, found in rates.items():
            ledger = folder / f"{policy}-{turn}.db"
            found.append(pieces / read_s(policy, pieces, "mixed", LANES, ledger))
            if policy == "elastic":
                share = by_slow(ledger)
    static = statistics.median(rates["ordered"])
    return [
        {
            "case": policy,
            "pieces_per_s": round(statistics.median(found), 1),
            "spread": [round(min(found), 1), round(max(found), 1)],
            "over_ordered": round(statistics.median(found) / static, 2),
            "of_limit": round(statistics.median(found) / limit, 3),
            "limit": round(limit, 1),
            "by_slow": round(share, 3) if policy == "elastic" else len(SLOW) / LANES,
            "pieces": pieces,
            "turns": turns,
        }
        for policy, found in rates.items()
    ]


def taken_per_s(pieces: int, askers: Sequence[Callable[[int, int, list[Any]], Any]]) -> float:
    """Each asker takes for a lane of its own until all are taken."""
    places = [(number, 0) for number in range(pieces)]

    def work(lane: int) -> int:
        turn = first = 0
        while first < pieces:
            one = askers[lane](lane, turn, places[first : first + 16])
            if one is None:
                first += 16
                continue
            turn, first = turn + 1, one[0] + 1
        return turn

    began_s = time.perf_counter()
    with ThreadPoolExecutor(len(askers)) as threads:
        taken = sum(threads.map(work, range(len(askers))))
    assert taken == pieces, "a piece was taken twice, or not at all"
    return pieces / (time.perf_counter() - began_s)


def ledgers(pieces: int, folder: Path) -> list[dict[str, Any]]:
    """The ledger alone."""
    plain = sqlite3.connect(folder / "plain.db", isolation_level=None)
    plain.execute("PRAGMA journal_mode = WAL")
    plain.execute("PRAGMA synchronous = NORMAL")
    plain.execute("CREATE TABLE leases (number INTEGER PRIMARY KEY, lane INTEGER)")
    began_s = time.perf_counter()
    for number in range(pieces):
        plain.execute("INSERT INTO leases VALUES (?, 0)", (number,))
    commits = pieces / (time.perf_counter() - began_s)
    plain.close()
    found = []

    def add(case: str, rate: float) -> None:
        found.append({
            "case": case,
            "taken_per_s": round(rate),
            "commits_per_s": round(commits),
            "pieces": pieces,
        })

    ledger = LedgerFile(folder / "here.db")
    add("ledger in the process", taken_per_s(pieces, [lambda *one: ledger.take(0, *one)]))
    ledger.close()
    for number in (1, 2, 4):
        service = Service(folder / f"service-{number}.db", "127.0.0.1")
        clients = [LedgerClient(service.address) for _ in range(number)]
        askers = [lambda *one, client=client: client.take(0, *one) for client in clients]
        add(f"ledger of the service, {number} asking", taken_per_s(pieces, askers))
        for client in clients:
            client.close()
        service.close()
    return found


def main() -> None:
    """Prints a line a case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--taken", type=int, default=20_000)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    missed = []
    with TemporaryDirectory() as folder:
        for one in (
            *policies(given.pieces, given.turns, Path(folder)),
            *ledgers(given.taken, Path(folder)),
        ):
            print(json.dumps({**one, "commit": commit(), "hardware": hardware("sqlite")}))
            if one["case"] == "elastic" and (one["over_ordered"] < 1.25 or one["of_limit"] < 0.95):
                missed.append(f"elastic: {one['over_ordered']} of ordered, {one['of_limit']}")
    if given.check:
        end_check(missed)


if __name__ == "__main__":
    main()
