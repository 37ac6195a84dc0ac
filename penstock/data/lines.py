"""Files of one row a line; a split is a block of bytes, or of lines where the file is compressed.

A block covers the lines that begin in it, so that any block reads alone and blocks parse in
parallel. A gzip file has one block, which streams. What a line holds is the parser's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from penstock import _core
from penstock.data.line_index import LineIndex
from penstock.data.quarantine import MalformedRow, Quarantine
from penstock.data.source import Chunk, Span, Split
from penstock.errors import DataError

BLOCK_BYTES = 8 << 20
"""FORMAT: positions in checkpoints count blocks; never change."""
READ_BYTES = 2 << 20
"""Bytes parsed at once; bounds the memory of a reader."""
MAX_LINE_BYTES = 64 << 20
END = 2**63 - 1
"""`Split.stop` of a gzip file whose lines were not counted."""
BOM = b"\xef\xbb\xbf"


class LineParser(Protocol):
    """Turns lines into tables. Has no state, so threads may share it."""

    def parse(self, lines: bytes, fail_fast: bool) -> tuple[pa.Table, list[MalformedRow]]:
        """Parses lines, each ended by a line feed.

        Args:
          lines: the lines.
          fail_fast: stop at the first malformed row; the table is then of no use.

        Returns:
          The columns asked for of the good rows, and the malformed rows in order.
        """


class LineFiles:
    """Source over files of lines.

    A `Split` is [start, stop) in bytes of a plain file, in data lines of a gzip file.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        paths: Sequence[str],
        schema: pa.Schema,
        make_parser: Callable[[Sequence[str]], LineParser],
        *,
        has_header: bool,
        quarantine: Quarantine | None,
    ) -> None:
        """Lists the splits.

        Args:
          filesystem: of the paths.
          paths: the files, in the order of reading.
          schema: of the tables that the parsers give.
          make_parser: makes a parser that gives the columns named.
          has_header: the first line of every file is no row.
          quarantine: takes the malformed rows; None: the first one is an error.

        Raises:
          DataError: a file cannot be read, or there is no row at all.
        """
        self.paths = paths
        self.schema = schema
        self.num_groups: int | None = None
        self._filesystem = filesystem
        self._make_parser = make_parser
        self._has_header = has_header
        self._quarantine = quarantine
        self._splits = [split for path in self.paths for split in self._blocks(path)]
        if not self._splits:
            raise DataError(f"{self.paths[0]}: no rows; the source has none at all")
        self._lines: dict[Split, int] = {}
        self._line_index = LineIndex(self._filesystem.open_input_file)

    def splits(self) -> Sequence[Split]:
        """All splits, in the order of reading."""
        return self._splits

    def count_rows(self, split: Split) -> int:
        """Lines of the split; reads it once."""
        if split not in self._lines:
            if _is_gzip(split.path) and split.stop != END:
                return split.stop - split.start
            self._lines[split] = sum(_core.count_newlines(_view(p)) for _, p in self._pieces(split))
        return self._lines[split]

    def cut(self, split: Split, row: int) -> tuple[Split, Split]:
        """Cuts a split before its line `row`, at the line's first byte."""
        if _is_gzip(split.path):
            middle = split.start + row
        else:
            for start, piece in self._pieces(split):
                lines = _core.count_newlines(_view(piece))
                if row < lines:
                    ends = np.flatnonzero(_view(piece) == 10)
                    middle = start + int(ends[row - 1]) + 1 if row else start
                    break
                row -= lines
        return Split(split.path, split.start, middle), Split(split.path, middle, split.stop)

    def read(self, split: Split, columns: Sequence[str]) -> Iterator[Chunk]:
        """Parses the lines of a split in order."""
        parser = self._make_parser(columns)
        unit = "lines" if _is_gzip(split.path) else "bytes"
        lines_before = split.start
        for start, piece in self._pieces(split):
            first_line = _FirstLine(self, split.path, start, lines_before)
            table, malformed = parser.parse(piece, fail_fast=self._quarantine is None)
            lines = _core.count_newlines(_view(piece))
            if malformed:
                self._refuse(split.path, first_line, malformed)
            skipped = np.array([row.line for row in malformed], dtype=np.int64)
            extent = (start, start + len(piece)) if unit == "bytes" else (start, start + lines)
            if unit == "lines":
                lines_before += lines
            if table.num_rows:
                yield Chunk(table, LinePlace(first_line, skipped, Span(split.path, unit, *extent)))

    def may_hold(self, split: Split, column: str, low: int | None, high: int | None) -> bool:
        """Text keeps no statistics."""
        return True

    def line_number(self, path: str, start: int) -> int:
        """Number (from 1) of the line that begins at byte `start` of a plain file."""
        return self._line_index.number(path, start)

    def header_lines(self) -> int:
        """Lines of a file before its first row."""
        return int(self._has_header)

    def _refuse(self, path: str, first: _FirstLine, malformed: list[MalformedRow]) -> None:
        if self._quarantine is None:
            row = malformed[0]
            raise DataError(
                f"{path}:{first.number + row.line}: {row.reason}: {row.shown()}; mend the file or "
                "set data.source.on_malformed_row: quarantine"
            )
        self._quarantine.add(path, first.number, malformed)

    def _blocks(self, path: str) -> Iterator[Split]:
        if _is_gzip(path):
            yield Split(path, 0, END)
            return
        size: int = self._filesystem.get_file_info(path).size
        start = len(first_bytes(self._filesystem, path)) if self._has_header else 0
        # Where lines begin is found when a block is read, so nothing is read here.
        for stop in range(BLOCK_BYTES, size + BLOCK_BYTES, BLOCK_BYTES):
            if min(stop, size) > start:
                yield Split(path, start, min(stop, size))
                start = stop

    def _pieces(self, split: Split) -> Iterator[tuple[int, bytes]]:
        """Whole lines of a split, a few MB at a time: (byte or line at which they begin, lines)."""
        try:
            if _is_gzip(split.path):
                yield from self._gzip_pieces(split)
            else:
                yield from self._plain_pieces(split)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{split.path}: cannot be read: {error}") from None

    def _plain_pieces(self, split: Split) -> Iterator[tuple[int, bytes]]:
        with self._filesystem.open_input_file(split.path) as file:
            size = file.size()
            start = self._line_start(file, split.start, size)
            if start == 0 and file.read(len(BOM)) == BOM:
                start = len(BOM)
            # The block's lines end where the first line of the next block begins.
            end = self._line_start(file, split.stop, size)
            file.seek(start)
            carried = b""
            while start + len(carried) < end:
                piece = carried + file.read(min(READ_BYTES, end - start - len(carried)))
                stop = len(piece) if start + len(piece) >= end else piece.rfind(b"\n") + 1
                if stop == 0 and len(piece) > MAX_LINE_BYTES:
                    raise DataError(f"{split.path}: line of over {MAX_LINE_BYTES} bytes; no text?")
                carried = piece[stop:]
                if stop:
                    whole = piece[:stop] if carried else piece
                    yield start, whole if whole.endswith(b"\n") else whole + b"\n"
                start += stop

    def _line_start(self, file: pa.NativeFile, at: int, size: int) -> int:
        """First byte at or after `at` where a line begins; `size` where none does."""
        if at == 0:
            return 0
        file.seek(at - 1)
        passed = at - 1
        while passed < size:
            piece: bytes = file.read(1 << 16)
            newline = piece.find(b"\n")
            if newline >= 0:
                return min(passed + newline + 1, size)
            passed += len(piece)
            if not piece or passed - at > MAX_LINE_BYTES:
                break
        return size

    def _gzip_pieces(self, split: Split) -> Iterator[tuple[int, bytes]]:
        """Lines [start, stop) of the data lines of a gzip file."""
        line = -self.header_lines()
        with open_stream(self._filesystem, split.path) as stream:
            carried: bytes = stream.read(READ_BYTES).removeprefix(BOM)
            while line < split.stop:
                read = stream.read(READ_BYTES)
                piece = carried + read
                if not read and piece and not piece.endswith(b"\n"):
                    piece += b"\n"
                if not piece:
                    return
                stop = piece.rfind(b"\n") + 1
                carried = piece[stop:]
                if len(carried) > MAX_LINE_BYTES:
                    raise DataError(f"{split.path}: line of over {MAX_LINE_BYTES} bytes; no text?")
                whole = piece[:stop]
                lines = _core.count_newlines(_view(whole))
                low, high = max(split.start - line, 0), min(split.stop - line, lines)
                if low < high:
                    yield line + low, _line_range(whole, low, high, lines)
                line += lines


@dataclass(frozen=True)
class _FirstLine:
    """Number in the file of the first line of a piece, counted only when asked for."""

    source: LineFiles
    path: str
    start: int
    lines_before: int

    @cached_property
    def number(self) -> int:
        if _is_gzip(self.path):
            return self.source.header_lines() + self.start + 1
        return self.source.line_number(self.path, self.start)


@dataclass(frozen=True, slots=True)
class LinePlace:
    """Rows that are lines, less those left out."""

    first: _FirstLine
    skipped: NDArray[np.int64]
    """Lines of the piece that gave no row, ascending, from 0."""
    extent: Span

    def locate(self, row: int) -> str:
        """Gives file:line of one row; counts the lines before it."""
        line = row
        for skipped in self.skipped:
            line += int(skipped) <= line
        return f"{self.extent.path}:{self.first.number + line}"

    def span(self, start: int, stop: int) -> Span:
        """Names the bytes that hold the rows, roughly: those of the whole piece."""
        return self.extent


def open_stream(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """Opens a file to be read from the front, decompressed."""
    return filesystem.open_input_stream(path, compression="gzip" if _is_gzip(path) else None)


def first_bytes(filesystem: fs.FileSystem, path: str, num_lines: int = 1) -> bytes:
    """The first lines of a file, whole ones, of its first MB; at least one.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        with open_stream(filesystem, path) as stream:
            data: bytes = stream.read(1 << 20)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    ends = np.flatnonzero(_view(data) == 10)[:num_lines]
    return data[: int(ends[-1]) + 1] if ends.size else data


def _line_range(lines: bytes, low: int, high: int, count: int) -> bytes:
    if low == 0 and high == count:
        return lines
    ends = np.flatnonzero(_view(lines) == 10)
    begin = int(ends[low - 1]) + 1 if low else 0
    return lines[begin : int(ends[high - 1]) + 1]


def _is_gzip(path: str) -> bool:
    return path.endswith(".gz")


def _view(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)
