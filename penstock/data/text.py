"""CSV and TSV files; a split is a block of bytes, or of lines where the file is compressed.

A block covers the lines that begin in it, so that any block reads alone and blocks parse in
parallel. One line is one row. A gzip file has one block, which streams.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from penstock import _core
from penstock.config import TextSource
from penstock.data.files import list_files
from penstock.data.line_index import LineIndex
from penstock.data.quarantine import MalformedRow, Quarantine
from penstock.data.source import Chunk, Span, Split
from penstock.data.text_parser import LineParser
from penstock.errors import ConfigError, DataError

BLOCK_BYTES = 8 << 20
"""FORMAT: positions in checkpoints count blocks; never change."""
READ_BYTES = 2 << 20
"""Bytes parsed at once; bounds the memory of a reader."""
MAX_LINE_BYTES = 64 << 20
END = 2**63 - 1
"""`Split.stop` of a gzip file whose lines were not counted."""

_TYPES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
_BOM = b"\xef\xbb\xbf"
_NAME_RANGE = re.compile(r"^(.*)\{(\d+)\.\.(\d+)\}(.*)$")


class TextFiles:
    """Source over CSV/TSV files.

    A `Split` is [start, stop) in bytes of a plain file, in data lines of a gzip file.
    """

    def __init__(
        self,
        config: TextSource,
        default_types: Mapping[str, Literal["int64", "float64"]],
        quarantine: Quarantine,
    ) -> None:
        self.paths: Sequence[str]
        self._filesystem, self.paths = list_files(config.path)
        self._delimiter = "\t" if config.format == "tsv" else ","
        self._has_header = config.columns is None
        self._quarantine = quarantine if config.on_malformed_row == "quarantine" else None
        names = expand_names(config.columns) if config.columns else self._header(self.paths[0])
        _check_names(names, self.paths[0])
        self.schema = pa.schema(_column_types(names, config, default_types))
        if self._has_header:
            for path in self.paths[1:]:
                self._check_header(path, names)
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
        parser = LineParser(self.schema, columns, self._delimiter)
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
        start = self._header_bytes(path)
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
            if start == 0 and file.read(len(_BOM)) == _BOM:
                start = len(_BOM)
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
        with self._open(split.path) as stream:
            carried: bytes = stream.read(READ_BYTES).removeprefix(_BOM)
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

    def _open(self, path: str) -> pa.NativeFile:
        return self._filesystem.open_input_stream(
            path, compression="gzip" if _is_gzip(path) else None
        )

    def _first_line(self, path: str) -> bytes:
        try:
            with self._open(path) as stream:
                line: bytes = stream.read(1 << 20)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        newline = line.find(b"\n")
        return line if newline < 0 else line[: newline + 1]

    def _header_bytes(self, path: str) -> int:
        return len(self._first_line(path)) if self._has_header else 0

    def _header(self, path: str) -> list[str]:
        line = self._first_line(path).removeprefix(_BOM)
        if not line.strip():
            raise DataError(f"{path}: the first line, the header, is empty")
        options = csv.ParseOptions(delimiter=self._delimiter)
        try:
            return list(csv.read_csv(pa.BufferReader(line), parse_options=options).column_names)
        except pa.ArrowException as error:
            raise DataError(f"{path}:1: header cannot be read: {error}") from None

    def _check_header(self, path: str, names: list[str]) -> None:
        for position, (name, expected) in enumerate(zip(self._header(path), names, strict=False)):
            if name != expected:
                raise DataError(
                    f"{path}: column {name!r} stands where {self.paths[0]} has {expected!r} "
                    f"(column {position + 1}); all files of a source have one header"
                )
        if len(self._header(path)) != len(names):
            raise DataError(
                f"{path}: {len(self._header(path))} columns, but {len(names)} in {self.paths[0]}; "
                "all files of a source have one header"
            )


@dataclass(frozen=True)
class _FirstLine:
    """Number in the file of the first line of a piece, counted only when asked for."""

    source: TextFiles
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


def expand_names(names: Sequence[str]) -> list[str]:
    """Expands `I{1..13}` to I1, I2, ... I13; other names stay."""
    out = []
    for name in names:
        match = _NAME_RANGE.match(name)
        if match is None:
            out.append(name)
            continue
        before, low, high, after = match.groups()
        if int(high) < int(low):
            raise ConfigError(f"data.source.columns: {name!r} is an empty range")
        out += [f"{before}{number}{after}" for number in range(int(low), int(high) + 1)]
    return out


def _check_names(names: Sequence[str], path: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{path}: column {name!r} is named twice; give each its own name")
        seen.add(name)


def _column_types(
    names: Sequence[str],
    config: TextSource,
    default_types: Mapping[str, Literal["int64", "float64"]],
) -> Iterator[tuple[str, pa.DataType]]:
    for pattern in config.types:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"data.source.types: {pattern!r} matches no column")
    for name in names:
        declared = [kind for pattern, kind in config.types.items() if fnmatchcase(name, pattern)]
        default = next(
            (k for p, k in default_types.items() if name == p or fnmatchcase(name, p)), "string"
        )
        # An exact name wins over globs; among globs the last one does.
        kind = config.types.get(name) or (declared[-1] if declared else default)
        yield name, _TYPES[kind]


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
