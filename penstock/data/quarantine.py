"""Keeps the rows that a text source leaves out: counted once each, written as JSON lines."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from penstock.errors import DataError


class MalformedRow(NamedTuple):
    """A line that is no row."""

    line: int
    """From 0, within the piece that was parsed."""
    reason: str
    text: str

    def shown(self) -> str:
        """The text for a message, shortened."""
        return repr(self.text if len(self.text) <= 120 else self.text[:117] + "...")


class Quarantine:
    """Counts malformed rows and appends them to a file. Safe to use from several threads.

    A row is counted and written once, however often it is read: later epochs and resumed runs
    find it already there.
    """

    def __init__(self, path: Path | None) -> None:
        """Takes up the file at `path` where a former run left it; None: only counts."""
        self._path = path
        self._lock = threading.Lock()
        self._seen: dict[str, bytearray] = {}
        """By file a bit for each line: all of a long file may be malformed."""
        self._rows = 0
        if path is not None and path.exists():
            self._take_up(path)

    @property
    def rows(self) -> int:
        """Rows quarantined so far."""
        return self._rows

    def add(self, file: str, first_line: int, rows: Sequence[MalformedRow]) -> None:
        """Adds rows whose line numbers count from `first_line` of `file`."""
        with self._lock:
            fresh = [row for row in rows if self._mark(file, first_line + row.line)]
            if self._path is None or not fresh:
                return
            entries = [
                {
                    "file": file,
                    "line": first_line + row.line,
                    "reason": row.reason,
                    "text": row.text,
                }
                for row in fresh
            ]
            try:
                with self._path.open("a", encoding="utf-8") as out:
                    out.writelines(json.dumps(entry) + "\n" for entry in entries)
            except OSError as error:
                raise DataError(f"{self._path}: quarantine cannot be written: {error}") from None

    def _mark(self, file: str, line: int) -> bool:
        """Counts a line if it is new, and says whether it was."""
        bits = self._seen.setdefault(file, bytearray())
        byte, bit = line >> 3, 1 << (line & 7)
        if byte >= len(bits):
            bits.extend(bytes(byte + 1 - len(bits)))
        if bits[byte] & bit:
            return False
        bits[byte] |= bit
        self._rows += 1
        return True

    def _take_up(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            # A run that was killed may leave half a line; its row will come again.
            path.write_bytes(whole)
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                file, row = str(entry["file"]), int(entry["line"])
                if row < 0:
                    raise ValueError(row)
                self._mark(file, row)
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}:{number}: not a quarantine entry; move the file") from None
