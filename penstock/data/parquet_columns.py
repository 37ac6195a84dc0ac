"""Columns of plain numbers of local Parquet files, decoded by the core (csrc/parquet_pages.h).

Their values are what pyarrow reads; in a third of its time, because most columns of a log are
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
_ENCODINGS = {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}
_CODECS = {"UNCOMPRESSED": None, "SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd"}


class PlainColumn(NamedTuple):
    """A column that the core can decode."""

    leaf: int
    """Its number among the columns that have values."""
    kind: pa.DataType
    word_bytes: int
    optional: bool


def plain_columns(footer: pq.FileMetaData) -> dict[str, PlainColumn]:
    """The columns of plain numbers, by name, whatever their pages are."""
    schema, arrow = footer.schema, footer.schema.to_arrow_schema()
    found = {}
    for leaf in range(footer.num_columns):
        column = schema.column(leaf)
        word_bytes, kinds = _WORDS.get(column.physical_type, (0, set()))
        # What lies in a struct has the struct's name in its path.
        index = arrow.get_field_index(column.name) if column.path == column.name else -1
        flat = column.max_repetition_level == 0 and column.max_definition_level <= 1
        if flat and index >= 0 and arrow.field(index).type in kinds:
            optional = column.max_definition_level == 1
            kind = arrow.field(index).type
            found[column.name] = PlainColumn(leaf, kind, word_bytes, optional)
    return found


class ChunkPlace(NamedTuple):
    """Where a column of a row group lies in its file."""

    begin: int
    size: int
    rows: int
    codec: str | None


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
        chunk = next(self._chunks)
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
    footer: pq.FileMetaData,
    known: Mapping[str, PlainColumn],
    names: Sequence[str],
    groups: Sequence[int],
) -> dict[str, ColumnReader]:
    """Readers of those of the columns `names` that the core can decode in these row groups."""
    chunks: dict[str, list[ChunkPlace]] = {name: [] for name in names if name in known}
    for group in map(footer.row_group, groups):
        rows = group.num_rows
        for name in list(chunks):
            place = _place_of(group.column(known[name].leaf), rows)
            if place is None:
                del chunks[name]
            else:
                chunks[name].append(place)
    return {name: ColumnReader(file, known[name], places) for name, places in chunks.items()}


def _place_of(chunk: pq.ColumnChunkMetaData, rows: int) -> ChunkPlace | None:
    """None where the core cannot decode it."""
    codec = chunk.compression
    good = codec in _CODECS and _ENCODINGS.issuperset(chunk.encodings)
    if not good or chunk.num_values != rows:
        return None
    begin = chunk.data_page_offset
    if chunk.has_dictionary_page:
        begin = min(begin, chunk.dictionary_page_offset)
    return ChunkPlace(begin, chunk.total_compressed_size, rows, _CODECS[codec])
