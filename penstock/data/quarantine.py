"""Keeps the rows that a text source leaves out: counted once each, written as JSON lines."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from os.path import basename
from pathlib import Path
from typing import Any, NamedTuple

from penstock.data.identity import Identified
from penstock.errors import DataError, TooManyMalformedError
from penstock.position import Counts, FileTag

_ROWS_OF_SHARE = 1_000
"""Of fewer rows read no share is taken."""


class MalformedRow(NamedTuple):
    """A line that is no row."""

    line: int
    """From 0, within the piece that was parsed."""
    reason: str
    text: str

    def shown(self) -> str:
        """The text for a message, shortened."""
        return repr(self.text if len(self.text) <= 120 else self.text[:117] + "...")


class LeftOut(NamedTuple):
    """A malformed row and where it stands."""

    file: FileTag
    line: int
    """In the file, from 1."""
    reason: str
    text: str


class Quarantine:
    """Counts malformed rows and appends them to a file. Safe to use from several threads.

    A row is counted and written once, however often and under whatever name its file is read:
    files are told apart by content. Rows come here with the batches behind which they lie, so that
    a run that goes on from a position knows which entries come later, and drops them.
    """

    def __init__(self, path: Path | None, *, writes: bool = True) -> None:
        """Touches nothing on disk.

        Args:
          path: JSON lines file; None: only counts.
          writes: False: another process, which gets the same rows, writes the file.
        """
        self._path, self._writes = path, writes
        self._lock = threading.Lock()
        self._seen: dict[str, bytearray] = {}
        """By digest of a file a bit for each line: all of a long file may be malformed."""
        self._same: dict[str, str] = {}
        """Digests of files that have grown, and of what they were before."""
        self._files: dict[str, set[FileTag]] = {}
        """Of the entries that were taken up, by name without folders."""
        self._rows = 0

    @property
    def rows(self) -> int:
        """Rows quarantined so far."""
        return self._rows

    def resume(self, quarantined: int | None) -> None:
        """Takes up the file that a former run left, without the entries beyond its position.

        Args:
          quarantined: malformed rows that training had read up to its position; None: not known,
            all entries stay.

        Raises:
          DataError: the file cannot be read or written, or is none of ours.

        Effects: the process that writes the file rewrites it where something of it goes: also half
          a line of a killed run.
        """
        if self._path is None or not self._path.exists():
            return
        try:
            data = self._path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
            kept = [
                line
                for number, line in enumerate(whole, start=1)
                if self._take_up(number, line, quarantined)
            ]
            if self._writes and sum(map(len, kept)) != len(data):
                part = self._path.with_name(f".{self._path.name}.part")
                part.write_bytes(b"".join(kept))
                part.replace(self._path)
        except OSError as error:
            raise DataError(f"{self._path}: quarantine cannot be read: {error}") from None

    def know(self, source: Identified, paths: Sequence[str]) -> None:
        """Finds the files of the entries taken up among those at `paths`, also if they have grown.

        Rows that they already had are counted no more.
        """
        for path in paths:
            for before in self._files.get(basename(path), ()):
                now = source.identify(path)
                if now.digest != before.digest and source.holds(path, before):
                    self._same[now.digest] = before.digest

    def add(self, rows: Sequence[LeftOut], first: int | None = None) -> None:
        """Adds rows.

        Args:
          rows: in the order of reading.
          first: number, from 1, of the first among all malformed rows that training reads, in all
            epochs; None: evaluation found them.
        """
        with self._lock:
            entries = []
            for number, row in enumerate(rows, start=first or 0):
                names = self._same.get(row.file.digest, row.file.digest), row.file.path
                if any(self._has(name, row.line) for name in names):
                    continue
                self._mark(names[0], row.line)
                entries.append({
                    "file": row.file.path,
                    "line": row.line,
                    "reason": row.reason,
                    "text": row.text,
                    "digest": row.file.digest,
                    "bytes": row.file.size,
                    **({} if first is None else {"number": number}),
                })
            if self._path is None or not self._writes or not entries:
                return
            try:
                with self._path.open("a", encoding="utf-8") as out:
                    out.writelines(json.dumps(entry) + "\n" for entry in entries)
            except OSError as error:
                raise DataError(f"{self._path}: quarantine cannot be written: {error}") from None

    def sync(self) -> None:
        """Returns once the disk has all entries.

        Raises:
          DataError: the disk fails.
        """
        if self._path is None or not self._writes or not self._path.exists():
            return
        try:
            with self._path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self._path}: quarantine cannot be written: {error}") from None

    def _has(self, name: str, line: int) -> bool:
        bits = self._seen.get(name, b"")
        return line >> 3 < len(bits) and bool(bits[line >> 3] & (1 << (line & 7)))

    def _mark(self, name: str, line: int) -> None:
        bits = self._seen.setdefault(name, bytearray())
        if line >> 3 >= len(bits):
            bits.extend(bytes((line >> 3) + 1 - len(bits)))
        bits[line >> 3] |= 1 << (line & 7)
        self._rows += 1

    def _take_up(self, number: int, line: bytes, quarantined: int | None) -> bool:
        """Marks the row of a line of the file and says whether it stays."""
        try:
            entry: dict[str, Any] = json.loads(line)
            # Those of version 1 say nothing of the content.
            name = str(entry.get("digest", entry["file"]))
            row, at = int(entry["line"]), int(entry.get("number", 0))
            if row < 0 or at < 0:
                raise ValueError(row)
            tag = FileTag(str(entry["file"]), int(entry.get("bytes", -1)), name)
        except (ValueError, KeyError, TypeError, AttributeError):
            where = f"{self._path}:{number}"
            raise DataError(f"{where}: not a quarantine entry; move the file") from None
        if quarantined is not None and at > quarantined or self._has(name, row):
            return False
        if tag.size >= 0:
            self._files.setdefault(basename(tag.path), set()).add(tag)
        self._mark(name, row)
        return True


def check_most(
    counts: Counts, rows: Sequence[LeftOut], most: tuple[int | None, float | None]
) -> None:
    """Refuses to read on where too many rows are malformed.

    Args:
      counts: of rows so far.
      rows: that were malformed last.
      most: how many may be, and which share of those read; None: any.

    Raises:
      TooManyMalformedError: more are.
    """
    most_rows, share = most
    by_rows = most_rows is not None and counts.quarantined > most_rows
    by_share = (
        share is not None
        and counts.read >= _ROWS_OF_SHARE
        and counts.quarantined > share * counts.read
    )
    if not (by_rows or by_share):
        return
    limit = f"rows is {most_rows:,}" if by_rows else f"share is {share:g}"
    last = f"{rows[-1].file.path}:{rows[-1].line}: {rows[-1].reason}; " if rows else ""
    raise TooManyMalformedError(
        f"{last}{counts.quarantined:,} of {counts.read:,} rows read are malformed, and "
        f"data.most_malformed.{limit}; mend the files (quarantine.jsonl in the run names the rows) "
        "or raise the limit, and go on with --resume"
    )
