"""The ledger of a run: a SQLite file of which lane took which extents, and what blocks have.

One process writes it. It is written before what it says can have an effect, and a checkpoint does
not need it: without it a run goes on exactly, but in another order than it went before.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from penstock.errors import DataError, JobNote
from penstock.locking import FileLock, Held

Result = TypeVar("Result")
ExtentPlace: TypeAlias = tuple[int, int]
"""Of an extent: number of its file, and where it starts there."""

# FORMAT: a change of the tables gets a number of its own.
_FORMAT = 1
_TABLES = """
CREATE TABLE leases (
    epoch INTEGER NOT NULL,
    file INTEGER NOT NULL,
    start INTEGER NOT NULL,
    lane INTEGER NOT NULL,
    turn INTEGER NOT NULL,
    PRIMARY KEY (epoch, file, start)
) WITHOUT ROWID;
CREATE UNIQUE INDEX turns ON leases (epoch, lane, turn);
CREATE TABLE blocks (
    epoch INTEGER NOT NULL,
    number INTEGER NOT NULL,
    sizes TEXT NOT NULL,
    rows TEXT NOT NULL,
    PRIMARY KEY (epoch, number)
) WITHOUT ROWID;
"""
_BUSY_S = 30.0
_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse", "lustre", "gpfs", "beegfs", "ceph", "gluster")


class LedgerFile:
    """Keeps a ledger in a file or, for a run without a folder, in memory. Safe to share by threads.

    See `penstock.data.batches.turns.Ledger` for what it is asked.
    """

    def __init__(self, path: Path | None) -> None:
        """Opens the file, or makes it.

        Args:
          path: of the file, in a folder that is there; None: in memory.

        Raises:
          DataError: another process has it, it is none of ours, or the disk fails.
        """
        self._path, self._lock = path, threading.Lock()
        self._held = None if path is None else _hold(path)
        try:
            self._connection = self._asked(self._open)
        except BaseException:
            self._let_go()
            raise

    def _open(self) -> sqlite3.Connection:
        name = ":memory:" if self._path is None else str(self._path)
        connection = sqlite3.connect(
            name, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            # Write-ahead files are shared memory between processes, which no network carries.
            is_near = self._path is None or not is_on_network(self._path)
            if not is_near:
                warnings.warn(
                    f"{name}: on a network file system, where a ledger is slower", JobNote, 2
                )
            connection.execute(f"PRAGMA journal_mode = {'WAL' if is_near else 'TRUNCATE'}")
            # What a process wrote outlives it; a crash of the machine may take the last of it.
            connection.execute("PRAGMA synchronous = NORMAL")
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            if found == 0:
                connection.executescript(
                    f"BEGIN; {_TABLES} PRAGMA user_version = {_FORMAT}; COMMIT;"
                )
            elif found != _FORMAT:
                raise DataError(
                    f"{name}: a ledger of format {found}, and this version reads {_FORMAT}; remove "
                    "it to read on in another order, or use the version that wrote it"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def history(self, epoch: int, lane: int) -> list[ExtentPlace]:
        """All that a lane has taken in an epoch, in its order."""
        sql = "SELECT file, start FROM leases WHERE epoch = ? AND lane = ? ORDER BY turn"
        return self._run(lambda of: of.execute(sql, (epoch, lane)).fetchall())

    def take(
        self, epoch: int, lane: int, turn: int, upcoming: Iterable[Sequence[int]]
    ) -> ExtentPlace | None:
        """Gives a lane the first of some extents that nobody has; None: all are taken."""

        def given(of: sqlite3.Connection) -> ExtentPlace | None:
            before = of.execute(
                "SELECT file, start FROM leases WHERE epoch = ? AND lane = ? AND turn = ?",
                (epoch, lane, turn),
            ).fetchone()
            if before is not None:
                return before[0], before[1]
            for file, start in upcoming:
                done = of.execute(
                    "INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?, ?)",
                    (epoch, file, start, lane, turn),
                )
                if done.rowcount:
                    return file, start
            return None

        return self._run(given)

    def block(self, epoch: int, number: int, sizes: Sequence[int]) -> list[int] | None:
        """Rows that each lane gave to a block; None: it was not dealt, or for other sizes.

        Those of other sizes are forgotten, with the blocks behind.
        """

        def found(of: sqlite3.Connection) -> list[int] | None:
            row = of.execute(
                "SELECT sizes, rows FROM blocks WHERE epoch = ? AND number = ?", (epoch, number)
            ).fetchone()
            if row is None:
                return None
            if row[0] != json.dumps(list(sizes)):
                of.execute("DELETE FROM blocks WHERE (epoch, number) >= (?, ?)", (epoch, number))
                return None
            rows: list[int] = json.loads(row[1])
            return rows

        return self._run(found)

    def add_block(self, epoch: int, number: int, sizes: Sequence[int], rows: Sequence[int]) -> None:
        """Takes note of a block, and forgets those that were dealt behind another one."""
        content = json.dumps(list(sizes)), json.dumps(list(rows))

        def add(of: sqlite3.Connection) -> None:
            known = of.execute(
                "SELECT sizes, rows FROM blocks WHERE epoch = ? AND number = ?", (epoch, number)
            ).fetchone()
            if known == content:
                return  # who asks a second time may do so late
            of.execute("DELETE FROM blocks WHERE (epoch, number) >= (?, ?)", (epoch, number))
            of.execute("INSERT INTO blocks VALUES (?, ?, ?, ?)", (epoch, number, *content))

        self._run(add)

    def close(self) -> None:
        """Lets the file go; may be called more than once."""
        with self._lock:
            self._connection.close()
            self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None

    def _run(self, do: Callable[[sqlite3.Connection], Result]) -> Result:
        with self._lock:
            return self._asked(lambda: do(self._connection))

    def _asked(self, do: Callable[[], Result]) -> Result:
        try:
            return do()
        except sqlite3.Error as error:
            raise DataError(
                f"{self._path or 'ledger'}: the ledger of the run cannot be read or written: "
                f"{error}; make room on its disk, or remove it, to read on in another order"
            ) from None


def copy_ledger(path: Path, to: Path, sizes: Sequence[int], lanes: int) -> None:
    """Copies a ledger, also one that is being written, to follow it from its first block on.

    Args:
      path: of the ledger.
      to: the copy, which is there as a whole or not at all.
      sizes: of the blocks that are to be dealt.
      lanes: that are to give their rows.

    Raises:
      DataError: there is none, it cannot be read, the disk fails, or its blocks are not of these
        sizes and lanes, from the first one on.
    """
    if not path.is_file():
        raise DataError(f"{path}: no ledger; runs with `data.policy: elastic` leave one")
    part = to.with_name(f"{to.name}.part")
    try:
        part.unlink(missing_ok=True)
        with (
            closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as old,
            closing(sqlite3.connect(part)) as new,
        ):
            old.backup(new)
            _check_blocks(path, new, sizes, lanes)
        part.replace(to)
    except (sqlite3.Error, OSError) as error:
        raise DataError(f"{path}: cannot be copied to {to}: {error}") from None


def _check_blocks(path: Path, ledger: sqlite3.Connection, sizes: Sequence[int], lanes: int) -> None:
    first = ledger.execute("SELECT min(number) FROM blocks WHERE epoch = 0").fetchone()[0]
    if first != 0:
        has = "no block" if first is None else f"no block before number {first} of epoch 0"
        raise DataError(
            f"{path}: {has}, so that there is no order to follow from the start; name another run, "
            "or remove data.replay"
        )
    wanted = [*sizes, lanes]
    for text, found_lanes in ledger.execute(
        "SELECT DISTINCT sizes, json_array_length(rows) FROM blocks"
    ):
        found = [*json.loads(text), found_lanes]
        if found != wanted:
            raise DataError(
                f"{path}: has blocks of {found[0]:,} rows, in batches of {found[1]:,}, of "
                f"{found[2]} lanes; this run has {wanted[0]:,}, {wanted[1]:,} and {wanted[2]}; set "
                "data.shuffle.block_rows, training.batch_size and data.lanes as that run had them, "
                "or remove data.replay"
            )


def _hold(path: Path) -> FileLock:
    lock = path.with_name(f"{path.name}.lock")
    try:
        return FileLock.take(lock, signed=True)
    except Held as held:
        raise DataError(
            f"{path}: {held or 'another process'} keeps this ledger; of a run, one process does"
        ) from None
    except OSError as error:
        raise DataError(f"{lock}: cannot be made: {error.strerror}") from None


def is_on_network(path: Path, mounts: str | None = None) -> bool:
    """Whether a file is on a file system of other machines.

    Args:
      path: of a file; it need not be there.
      mounts: as `/proc/self/mounts` has them; None: this machine's. Without any: False.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text("utf-8", errors="replace")
        except OSError:
            return False
    found, kind = -1, ""
    whole = path.absolute()
    for line in mounts.splitlines():
        fields: list[Any] = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if whole.is_relative_to(point) and len(point.parts) >= found:
            found, kind = len(point.parts), fields[2]
    return kind.startswith(_NETWORK)
