"""Columns of plain numbers of local Parquet files, decoded by the core (csrc/parquet_pages.h).

Their values are what pyarrow reads, in about half its time: most columns of a log are
indices into a dictionary, which pyarrow expands value by value. What is not plain (texts, lists,
other encodings) is left to pyarrow.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penstock import _core

_WORDS = {
    "INT32": (4, {pa.int32(), pa.uint32()}),
    "INT64": (8, {pa.int64(), pa.uint64()}),
    "FLOAT": (4, {pa.float32()}),
    "DOUBLE": (8, {pa.float64()}),
}
"""Physical types, their bytes, and the Arrow types that have the same bits."""
# FORMAT: numbers of parquet.thrift; never change.
_ENCODINGS = sum(1 << number for number in (0, 2, 3, 4, 8))
"""Plain, dictionaries, runs; packed bits are named where flat columns have no levels."""
_CODECS = {0: None, 1: "snappy", 2: "gzip", 6: "zstd"}


class PlainColumn(NamedTuple):
    """A column that the core can decode, in the row groups where it is good for that."""

    kind: pa.DataType
    word_bytes: int
    optional: bool
    chunks: Sequence[ChunkPlace | None]
    """Where it lies, by row group; None: the core cannot decode it there."""


class ChunkPlace(NamedTuple):
    """Where a column of a row group lies in its file."""

    begin: int
    size: int
    rows: int
    codec: str | None


def plain_columns(file: pa.NativeFile, footer: pq.FileMetaData) -> dict[str, PlainColumn]:
    """The columns of plain numbers of a file, by name."""
    schema, arrow = footer.schema, footer.schema.to_arrow_schema()
    found: dict[str, tuple[int, pa.DataType]] = {}
    for leaf in range(footer.num_columns):
        column = schema.column(leaf)
        kinds = _WORDS.get(column.physical_type, (0, set()))[1]
        # What lies in a struct has the struct's name in its path.
        index = arrow.get_field_index(column.name) if column.path == column.name else -1
        flat = column.max_repetition_level == 0 and column.max_definition_level <= 1
        if flat and index >= 0 and arrow.field(index).type in kinds:
            found[column.name] = leaf, arrow.field(index).type
    chunks = _read_chunks(file, footer, [leaf for leaf, _ in found.values()])
    columns = {}
    for number, (name, (leaf, kind)) in enumerate(found.items() if chunks else ()):
        column = schema.column(leaf)
        columns[name] = PlainColumn(
            kind,
            _WORDS[column.physical_type][0],
            column.max_definition_level == 1,
            [of_group[number] for of_group in chunks],
        )
    return columns


def _read_chunks(
    file: pa.NativeFile, footer: pq.FileMetaData, leaves: Sequence[int]
) -> list[list[ChunkPlace | None]]:
    """By row group, where those columns lie; nothing where the footer does not say it.

    pyarrow's own answers end the process if the footer is damaged.
    """
    file_size = file.size()
    tail = file.read_at(8, file_size - 8)
    if not leaves or tail[4:] != b"PAR1":  # else it is encrypted
        return []
    size = int.from_bytes(tail[:4], "little")
    given = np.frombuffer(file.read_at(size, file_size - 8 - size), dtype=np.uint8)
    try:
        fields = _core.column_chunks(given, leaves).tolist()
    except ValueError:
        return []  # pyarrow says what is wrong, or reads it
    if len(fields) != footer.num_row_groups:
        return []
    rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return [
        [_place_of(chunk, n, file_size) for chunk in of_group]
        for n, of_group in zip(rows, fields, strict=True)
    ]


def _place_of(chunk: Sequence[int], rows: int, file_size: int) -> ChunkPlace | None:
    """None where the core cannot decode it."""
    num_values, begin, dictionary, size, codec, encodings = chunk
    if dictionary > 0:
        begin = min(begin, dictionary)
    inside = 0 < begin <= begin + size <= file_size
    if num_values != rows or codec not in _CODECS or encodings & ~_ENCODINGS or not inside:
        return None
    return ChunkPlace(begin, size, rows, _CODECS[codec])


class ColumnReader:
    """Reads one column of several row groups in order. Use it from one thread."""

    def __init__(
        self, file: pa.NativeFile, column: PlainColumn, chunks: Sequence[ChunkPlace]
    ) -> None:
        self._file = file
        self._kind = column.kind
        self._chunks = iter(chunks)
        self._codec: pa.Codec | None = None
        self._reader = _core.ColumnReader(column.word_bytes, column.optional)

    def read(self, n: int) -> pa.Array:
        """The next `n` values, at most as many as there are.

        Raises:
          ValueError: the file is damaged; what pyarrow raises where it cannot be read.
        """
        values, valid, nulls = self._reader.read(n, self._next_chunk, self._open_page)
        bits = pa.py_buffer(valid) if nulls else None
        return pa.Array.from_buffers(self._kind, n, [bits, pa.py_buffer(values)], nulls)

    def _next_chunk(self) -> tuple[NDArray[np.uint8], int, int]:
        chunk = next(self._chunks, None)
        if chunk is None:
            raise ValueError("columns of a row group are of different length")
        if chunk.codec is None:
            self._codec = None
        elif self._codec is None or self._codec.name != chunk.codec:
            self._codec = pa.Codec(chunk.codec)
        given = self._file.read_at(chunk.size, chunk.begin)
        codec = {None: 0, "snappy": 1}.get(chunk.codec, 2)
        return np.frombuffer(given, dtype=np.uint8), chunk.rows, codec

    def _open_page(
        self, page: NDArray[np.uint8], skip: int, plain_bytes: int | None, checksum: int | None
    ) -> NDArray[np.uint8]:
        if checksum is not None and zlib.crc32(page.data) != checksum:
            raise ValueError("a page does not match its checksum")
        if skip:
            page = page[skip:]
        if plain_bytes is None or self._codec is None:
            return page
        return np.frombuffer(self._codec.decompress(page, plain_bytes), dtype=np.uint8)


def open_columns(
    file: pa.NativeFile,
    known: Mapping[str, PlainColumn],
    names: Sequence[str],
    groups: Sequence[int],
) -> dict[str, ColumnReader]:
    """Readers of those of the columns `names` that the core can decode in these row groups."""
    readers = {}
    for name in names:
        if name in known:
            chunks = [known[name].chunks[group] for group in groups]
            if None not in chunks:
                readers[name] = ColumnReader(file, known[name], [c for c in chunks if c])
    return readers
