"""Parquet: row groups, how many rows each has, and between which times they lie."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penstock.data.formats.columnar import Bounds, Layout, OpenFile
from penstock.data.source import CHUNK_ROWS, chunk_rows

_MOST_FOOTERS = 64
_MOST_FOOTER_BYTES = 8 << 20
"""As they lie in the files; in memory they take several times as much."""
_LARGE_GROUP_BYTES = 128 << 20
"""Columns of larger row groups of local files are read piece by piece, to bound what lies ahead."""
_PIECE_BYTES = 1 << 20
_PEEK_BYTES = 4096
"""Read of a column where no more than its first value is wanted."""
_MS_PER_DAY = 86_400_000
# Of Parquet's logical types.
_TICKS_PER_MS = {"milliseconds": 1, "microseconds": 1_000, "nanoseconds": 1_000_000}


class ParquetFormat:
    """Reads Parquet with pyarrow. Footers that were read last are kept."""

    name = "a readable Parquet"

    def __init__(self, time_column: str | None = None) -> None:
        """`time_column`: of which layouts tell the bounds."""
        self._time_column = time_column
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._footer_bytes = 0
        self._lock = threading.Lock()

    def layout(self, opened: OpenFile) -> Layout:
        """Reads the footer."""
        with pq.ParquetFile(opened.file, buffer_size=_PEEK_BYTES) as parquet:
            footer = parquet.metadata
            self._keep(opened.path, footer)
            name = self._time_column
            times = None if name is None else _time_bounds(parquet, name)
            return Layout(parquet.schema_arrow, _group_rows(footer), times)

    def read(
        self, opened: OpenFile, groups: Sequence[int] | None, columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Reads row groups, some rows at a time, which may be of two groups."""
        footer = self._footer(opened)
        if groups is None:
            groups = range(footer.num_row_groups)
        most = max((footer.row_group(group).total_byte_size for group in groups), default=0)
        with pq.ParquetFile(
            opened.file,
            metadata=footer,
            # It hides the latency of a remote store, and costs a copy.
            pre_buffer=not opened.is_local,
            buffer_size=_PIECE_BYTES if opened.is_local and most > _LARGE_GROUP_BYTES else 0,
            # Pages without a checksum read as they are.
            page_checksum_verification=True,
        ) as parquet:
            # A name with a dot may stand for a column, for a field within one, or for both.
            for batch in parquet.iter_batches(
                chunk_rows(len(columns), CHUNK_ROWS),
                row_groups=groups,
                columns=columns,
                use_threads=False,
            ):
                yield pa.Table.from_batches([batch]).select(list(columns))

    def _footer(self, opened: OpenFile) -> pq.FileMetaData:
        with self._lock:
            footer = self._footers.get(opened.path)
            if footer is not None:
                self._footers.move_to_end(opened.path)
                return footer
        footer = pq.read_metadata(opened.file)
        self._keep(opened.path, footer)
        return footer

    def _keep(self, path: str, footer: pq.FileMetaData) -> None:
        with self._lock:
            before = self._footers.pop(path, None)
            self._footer_bytes -= 0 if before is None else before.serialized_size
            self._footers[path] = footer
            self._footer_bytes += footer.serialized_size
            while len(self._footers) > 1 and (
                self._footer_bytes > _MOST_FOOTER_BYTES or len(self._footers) > _MOST_FOOTERS
            ):
                self._footer_bytes -= self._footers.popitem(last=False)[1].serialized_size


def _group_rows(footer: pq.FileMetaData) -> NDArray[np.int64]:
    groups = range(footer.num_row_groups)
    return np.array([footer.row_group(group).num_rows for group in groups], dtype=np.int64)


def _time_bounds(parquet: pq.ParquetFile, column: str) -> list[Bounds | None] | None:
    """Bounds of each row group; None where the file does not tell them, or of all."""
    footer = parquet.metadata
    paths = [footer.schema.column(leaf).path for leaf in range(footer.num_columns)]
    if column not in paths:
        return None
    leaf = paths.index(column)
    rounded = _rounding(footer.schema.column(leaf))
    if rounded is None:
        return None
    bounds: list[Bounds | None] = []
    for group in range(footer.num_row_groups):
        # Asked what a damaged footer says of a column, pyarrow ends the process. Asked to read the
        # column, it raises an error.
        next(parquet.iter_batches(1, row_groups=[group], columns=[column], use_threads=False), None)
        given = footer.row_group(group).column(leaf).statistics
        # A time that is missing must be found and named.
        known = given is not None and given.has_min_max and given.has_null_count
        if known and given.null_count == 0:
            # Raw: pyarrow needs pandas to show a time in ns.
            bounds.append(rounded(given.min_raw, given.max_raw))
        else:
            bounds.append(None)
    return bounds


def _rounding(column: pq.ColumnSchema) -> Callable[[int, int], Bounds] | None:
    """What makes bounds of the raw minimum and maximum; None: they are no times or integers."""
    if column.physical_type not in {"INT32", "INT64"}:
        return None
    kind = json.loads(column.logical_type.to_json())
    if kind["Type"] == "Timestamp" and kind["timeUnit"] in _TICKS_PER_MS:
        ticks = _TICKS_PER_MS[kind["timeUnit"]]
        return lambda least, greatest: Bounds(least // ticks, -(-greatest // ticks))
    if kind["Type"] == "Date":
        return lambda least, greatest: Bounds(least * _MS_PER_DAY, greatest * _MS_PER_DAY)
    if kind["Type"] == "Int" and not kind["isSigned"]:
        bits = 2**32 - 1 if column.physical_type == "INT32" else 2**64 - 1
        return lambda least, greatest: Bounds(least & bits, greatest & bits)
    return Bounds if kind["Type"] in {"Int", "None"} else None
