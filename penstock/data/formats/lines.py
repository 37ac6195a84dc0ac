"""Files of rows that end with lines; an extent is a block of bytes, or of rows where compressed.

A block covers the rows that begin in it, so that any block reads alone and blocks parse in
parallel. A compressed file has one block, which streams. What a row holds is the parser's business,
where it ends that of `RowEnds`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from penstock import _core
from penstock.config import compression_of_path
from penstock.data.formats.compressed import ByteStream
from penstock.data.formats.row_ends import (
    BOM,
    FIELD_START,
    LINES,
    LineIndex,
    QuoteStates,
    RowEnds,
    TextRows,
    view,
)
from penstock.data.identity import tag_of
from penstock.data.quarantine import MalformedRow
from penstock.data.source import Chunk, Extent, RowCount, Span
from penstock.errors import DataError, MalformedRowError
from penstock.position import FileTag

BLOCK_BYTES = 8 << 20
"""FORMAT: positions in checkpoints count blocks; never change."""
READ_BYTES = 2 << 20
"""Bytes parsed at once; bounds the memory of a reader."""
MAX_ROW_BYTES = 64 << 20
END = 2**63 - 1
"""`Extent.stop` of a compressed file whose rows were not counted."""


class OpenQuote(DataError):
    """A quoted value does not close on its line, where lines are rows."""


class LineParser(Protocol):
    """Turns rows into tables. Has no state, so threads may share it."""

    def parse(self, rows: TextRows, fail_fast: bool) -> tuple[pa.Table, list[MalformedRow]]:
        """Parses rows.

        Args:
          rows: the rows.
          fail_fast: stop at the first malformed row; the table is then of no use.

        Returns:
          The columns asked for of the good rows, and the malformed rows in order, by their number
          among the rows.
        """


class LineFiles:
    """Source over files of lines.

    An `Extent` is [start, stop) in bytes of a plain file, in data rows of a compressed file.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        paths: Sequence[str],
        schema: pa.Schema,
        make_parser: Callable[[Sequence[str]], LineParser],
        *,
        row_ends: RowEnds = LINES,
        has_header: bool,
        keeps_malformed: bool,
    ) -> None:
        """Lists the extents.

        Args:
          filesystem: of the paths.
          paths: the files, in the order of reading.
          schema: of the tables that the parsers give.
          make_parser: makes a parser that gives the columns named.
          row_ends: where rows end.
          has_header: the first row of every file is none of the data's.
          keeps_malformed: chunks tell which rows were left out; False: the first is an error.

        Raises:
          DataError: a file cannot be read.
        """
        self.paths = paths
        self.schema = schema
        self.num_groups: int | None = None
        self._filesystem = filesystem
        self._make_parser = make_parser
        self._row_ends = row_ends
        self._has_header = has_header
        self._keeps_malformed = keeps_malformed
        infos = filesystem.get_file_info(list(paths))
        self._sizes = {path: info.size or 0 for path, info in zip(paths, infos, strict=True)}
        self._splits = [extent for path in self.paths for extent in self._blocks(path)]
        self._rows = _RowsSeen()
        self._line_index = LineIndex(filesystem.open_input_file)
        self._states = (
            QuoteStates(filesystem.open_input_file, row_ends.quoting, BLOCK_BYTES)
            if row_ends.quoting is not None
            else None
        )

    def extents(self) -> Sequence[Extent]:
        """All extents, in the order of reading."""
        return self._splits

    def count_rows(self, extent: Extent) -> int:
        """Rows of the extent; reads it once."""
        known = self.known_rows(extent)
        return sum(self.row_counts(extent)) if known is None else known

    def known_rows(self, extent: Extent) -> int | None:
        """Rows of an extent that was read to its end, or is a range of rows."""
        if extent.stop != END and is_compressed(extent.path):
            return extent.stop - extent.start
        return self._rows.of_split(extent)

    def row_counts(self, extent: Extent) -> Iterator[int]:
        """Rows of successive pieces."""
        for piece in self._pieces(extent):
            yield piece.rows.count

    def expected_rows(self, extents: Sequence[Extent]) -> RowCount | None:
        """Rows of the extents as far as they are known, else by the rows a byte read so far."""
        return self._rows.expected({extent: self._stored_bytes(extent) for extent in extents})

    def cut(self, extent: Extent, row: int) -> tuple[Extent, Extent]:
        """Cuts an extent before its row `row`, at the row's first byte."""
        middle = extent.start + row
        if not is_compressed(extent.path):
            before = row
            for piece in self._pieces(extent):
                if before < piece.rows.count:
                    middle = piece.start + (int(piece.rows.ends[before - 1]) if before else 0)
                    break
                before -= piece.rows.count
        parts = Extent(extent.path, extent.start, middle), Extent(extent.path, middle, extent.stop)
        self._rows.cut(extent, parts, row)
        return parts

    def read(self, extent: Extent, columns: Sequence[str]) -> Iterator[Chunk]:
        """Parses the rows of an extent in order."""
        parser = self._make_parser(columns)
        unit = "bytes"
        if is_compressed(extent.path):
            unit = "lines" if self._states is None else "rows"
        for start, line, rows in self._pieces(extent):
            table, malformed = parser.parse(rows, fail_fast=not self._keeps_malformed)
            first_line = _FirstLine(self, extent.path, start, line)
            lines = rows.first_lines()
            skipped = np.array([row.line for row in malformed], dtype=np.int64)
            size = len(rows.text) if unit == "bytes" else rows.count
            span = Span(extent.path, unit, start, start + size)
            until = span.stop if self.may_grow(extent.path) else 0
            chunk = Chunk(table, LinePlace(first_line, skipped, lines, span), until=until)
            if malformed:
                at = skipped if lines is None else lines[skipped]
                chunk = chunk._replace(
                    stretch=rows.count,
                    kept=np.delete(np.arange(rows.count), skipped),
                    malformed=malformed,
                    malformed_lines=(first_line.number + at).tolist(),
                )
                if not self._keeps_malformed:
                    row = malformed[0]
                    raise MalformedRowError(
                        f"{extent.path}:{chunk.malformed_lines[0]}: {row.reason}: {row.shown()}"
                    )
            yield chunk

    def may_hold(self, extent: Extent, column: str, low: int | None, high: int | None) -> bool:
        """Text keeps no statistics."""
        return True

    def identify(self, path: str, until: int = 0) -> FileTag:
        """The identity of a file, of a plain one of its bytes before `until`."""
        return tag_of(self._filesystem, path, until if until and self.may_grow(path) else None)

    def holds(self, path: str, before: FileTag) -> bool:
        """Whether the lines of before are the first ones of the file, whole."""
        if self.identify(path, before.size).digest != before.digest:
            return False
        with self._filesystem.open_input_file(path) as file:
            return before.size >= file.size() or b"\n" in file.read_at(2, before.size - 1)

    def window(self, path: str) -> int:
        """There is one."""
        return 0

    def may_grow(self, path: str) -> bool:
        """Plain files may have lines added at their end."""
        return not is_compressed(path)

    def line_number(self, path: str, start: int) -> int:
        """Number (from 1) of the line that begins at byte `start` of a plain file."""
        return self._line_index.number(path, start)

    def _blocks(self, path: str) -> Iterator[Extent]:
        if is_compressed(path):
            yield Extent(path, 0, END)
            return
        size = self._sizes[path]
        start = 0
        if self._has_header:
            start = len(first_bytes(self._filesystem, path, row_ends=self._row_ends))
        # Where rows begin is found when a block is read, so nothing is read here.
        for stop in range(BLOCK_BYTES, size + BLOCK_BYTES, BLOCK_BYTES):
            if min(stop, size) > start:
                yield Extent(path, start, min(stop, size))
                start = stop

    def _stored_bytes(self, extent: Extent) -> int:
        if is_compressed(extent.path):
            return self._sizes[extent.path]
        return extent.stop - extent.start

    def _pieces(self, extent: Extent) -> Iterator[_Piece]:
        """The rows of an extent, a few MB at a time."""
        count = 0
        find = self._compressed_pieces if is_compressed(extent.path) else self._plain_pieces
        try:
            for piece, stored in find(extent):
                line = self._row_ends.open_quote(piece.rows.text)
                if line is not None:
                    first = _FirstLine(self, extent.path, piece.start, piece.line).number
                    raise open_quote(extent.path, first + line, piece.rows.split()[line])
                count += piece.rows.count
                self._rows.add(piece.rows.count, stored)
                yield piece
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{extent.path}: cannot be read: {error}") from None
        self._rows.set_split(extent, count)

    def _plain_pieces(self, extent: Extent) -> Iterator[tuple[_Piece, int]]:
        """Pieces of a plain file, and how many bytes of it each took."""
        with self._filesystem.open_input_file(extent.path) as file:
            size = file.size()
            if size < extent.stop:
                raise self._became_shorter(extent.path)
            start = self._row_start(file, extent.path, extent.start, size)
            if start == 0 and file.read(len(BOM)) == BOM:
                start = len(BOM)
            # The block's rows end where the first row of the next block begins.
            end = self._row_start(file, extent.path, extent.stop, size)
            file.seek(start)
            carried = b""
            while start + len(carried) < end:
                read = file.read(min(READ_BYTES, end - start - len(carried)))
                if not read:
                    raise self._became_shorter(extent.path)
                text = carried + read
                is_last = start + len(text) >= end
                taken = len(text)
                if is_last and not text.endswith(b"\n"):
                    text += b"\n"
                rows = self._row_ends.take(text)
                carried = text[len(rows.text) :] if len(rows.text) < len(text) else b""
                self._check_row_size(extent.path, len(carried))
                if is_last and carried:
                    unclosed = start + len(rows.text)
                    raise _unclosed(extent.path, self.line_number(extent.path, unclosed))
                if rows.count:
                    taken -= len(carried)
                    yield _Piece(start, None, rows), taken
                    start += taken

    def _row_start(self, file: pa.NativeFile, path: str, at: int, size: int) -> int:
        """First byte at or after `at` where a row begins; `size` where none does."""
        if at in {0, size}:
            file.seek(at)
            return at
        state = FIELD_START if self._states is None else self._states.at(path, at)
        file.seek(at - 1)
        if file.read(1) == b"\n" and state == FIELD_START:
            return at
        place = at
        while place < size and place - at <= MAX_ROW_BYTES:
            text: bytes = file.read(1 << 16)
            if not text:
                raise self._became_shorter(path)
            end, state = self._row_ends.first_end(text, state)
            if end:
                return place + end
            place += len(text)
        return size

    def _compressed_pieces(self, extent: Extent) -> Iterator[tuple[_Piece, int]]:
        """The rows [start, stop) of the data of a file, and how many stored bytes each took."""
        row, line, stored = -int(self._has_header), 1, 0
        with ByteStream(self._filesystem, extent.path) as stream:
            carried = stream.read_whole(max(READ_BYTES, len(BOM))).removeprefix(BOM)
            while row < extent.stop:
                read = stream.read(READ_BYTES)
                text = carried + read
                if not read and text and not text.endswith(b"\n"):
                    text += b"\n"
                if not text:
                    return
                rows = self._row_ends.take(text)
                carried = text[len(rows.text) :]
                self._check_row_size(extent.path, len(carried))
                lines = _core.count_newlines(view(rows.text))
                if not read and carried:
                    raise _unclosed(extent.path, line + lines)
                low, high = max(extent.start - row, 0), min(extent.stop - row, rows.count)
                if low < high:
                    some = rows.range(low, high)
                    before = rows.range(0, low).text if low else b""
                    first = line + _core.count_newlines(view(before))
                    yield _Piece(row + low, first, some), stream.bytes_read - stored
                    stored = stream.bytes_read
                row += rows.count
                line += lines

    def _check_row_size(self, path: str, size: int) -> None:
        if size > MAX_ROW_BYTES:
            what = "line" if self._states is None else "row"
            why = "no text?" if self._states is None else "is a quote missing or stray?"
            raise DataError(f"{path}: {what} of over {MAX_ROW_BYTES} bytes; {why}")

    def _became_shorter(self, path: str) -> DataError:
        return DataError(
            f"{path}: became shorter than the {self._sizes[path]:,} bytes that it had when it was "
            "opened; files must not change while they are read"
        )


class _Piece(NamedTuple):
    """Some rows of a file."""

    start: int
    """Byte of a plain file, data row of a compressed one, with which they begin."""
    line: int | None
    """Number (from 1) of their first line; None: not counted."""
    rows: TextRows


class _RowsSeen:
    """How many rows extents have, as far as they were read. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_splits: dict[Extent, int] = {}
        self._rows = 0
        self._bytes = 0

    def add(self, rows: int, stored: int) -> None:
        """Takes note of rows that were read."""
        with self._lock:
            self._rows += rows
            self._bytes += stored

    def set_split(self, extent: Extent, rows: int) -> None:
        """Takes note of an extent that was read to its end."""
        with self._lock:
            self._of_splits[extent] = rows

    def of_split(self, extent: Extent) -> int | None:
        """Rows of an extent; None: it was not read to its end."""
        with self._lock:
            return self._of_splits.get(extent)

    def cut(self, extent: Extent, parts: tuple[Extent, Extent], row: int) -> None:
        """Takes note of an extent's two parts, if the rows of the extent are known."""
        with self._lock:
            if extent in self._of_splits:
                self._of_splits[parts[0]] = row
                self._of_splits[parts[1]] = self._of_splits[extent] - row

    def expected(self, stored: dict[Extent, int]) -> RowCount | None:
        """Rows of extents of so many stored bytes."""
        with self._lock:
            known = {extent: self._of_splits.get(extent) for extent in stored}
            rate = self._rows / self._bytes if self._bytes else None
        unknown = [extent for extent, rows in known.items() if rows is None]
        rows = sum(rows for rows in known.values() if rows is not None)
        if not unknown:
            return RowCount(rows, is_exact=True)
        if rate is None:
            return None
        for extent in unknown:
            if is_compressed(extent.path):
                in_file = round(stored[extent] * rate)
                rows += max(min(in_file, extent.stop) - extent.start, 0)
            else:
                rows += round(stored[extent] * rate)
        return RowCount(rows, is_exact=False)


@dataclass(frozen=True)
class _FirstLine:
    """Number in the file of the first line of a piece, counted only when asked for."""

    source: LineFiles
    path: str
    start: int
    known: int | None

    @cached_property
    def number(self) -> int:
        """From 1."""
        return self.source.line_number(self.path, self.start) if self.known is None else self.known


@dataclass(frozen=True, slots=True)
class LinePlace:
    """The rows of a piece of text, less those left out."""

    first: _FirstLine
    skipped: NDArray[np.int64]
    """Rows of the piece that are left out, ascending, from 0."""
    lines: NDArray[np.int64] | None
    """The line, from 0, with which each row of the piece begins; None: rows are lines."""
    whole: Span

    def locate(self, row: int) -> str:
        """Gives file:line of one row; counts the lines before it."""
        return f"{self.whole.path}:{self.line(row)}"

    def line(self, row: int) -> int:
        """Line of one row; counts the lines before it."""
        number = row
        for skipped in self.skipped:
            number += int(skipped) <= number
        return self.first.number + (number if self.lines is None else int(self.lines[number]))

    def span(self, start: int, stop: int) -> Span:
        """Names the bytes that hold the rows, roughly: those of the whole piece."""
        return self.whole


def first_bytes(
    filesystem: fs.FileSystem, path: str, num_rows: int = 1, row_ends: RowEnds = LINES
) -> bytes:
    """The first rows of a file, whole ones, of its first MB; at least one.

    Raises:
      DataError: the file cannot be read.
    """
    with ByteStream(filesystem, path) as stream:
        data = stream.read_whole(1 << 20)
    mark = len(BOM) if data.startswith(BOM) else 0
    rows = row_ends.take(data[mark:])
    return data[: mark + len(rows.range(0, min(num_rows, rows.count)).text)] if rows.count else data


def is_compressed(path: str) -> bool:
    """Whether a file's name says so."""
    return compression_of_path(path) is not None


def open_quote(path: str, number: int, line: bytes) -> OpenQuote:
    """What is raised where a quoted value does not close on its line, with the remedies."""
    shown = MalformedRow(0, "", line.decode(errors="replace")).shown()
    return OpenQuote(
        f"{path}:{number}: a quoted value does not close on its line: {shown}; if values hold line "
        "breaks, set data.source.quoted_line_breaks: true; if quotes are text, "
        "data.source.quote: none; else mend the file"
    )


def _unclosed(path: str, line: int) -> DataError:
    return DataError(
        f"{path}:{line}: in the row that begins here a quoted value never closes; mend the file, "
        "or set data.source.quote: none if quotes are text"
    )
