"""Parquet files of one schema; a split is a run of row groups of one file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from penstock.config import ParquetSource
from penstock.data.columnar import check_schema, group_rows, groups_of
from penstock.data.files import list_files
from penstock.data.parquet_columns import PlainColumn, open_columns, plain_columns
from penstock.data.source import CHUNK_ROWS, Chunk, RowPlace, Split, chunk_rows
from penstock.errors import DataError

SPLIT_ROWS = 131_072
"""Small row groups are read together up to this many rows.

FORMAT: positions in checkpoints count splits; never change.
"""

_LEAST_GROUP_ROWS = 8_192
"""Of smaller row groups pyarrow reads a column faster: it does less for each chunk."""


class ParquetFiles:
    """Source over Parquet files. A `Split` is [start, stop) in rows of its file."""

    def __init__(self, config: ParquetSource) -> None:
        self.paths: Sequence[str]
        self._filesystem, self.paths = list_files(config.path)
        # Footers of wide tables are large: only those of files being read are kept.
        self._footer = lru_cache(maxsize=16)(self._read_footer)
        self._plain = lru_cache(maxsize=16)(self._plain_columns)
        self._splits: list[Split] = []
        self.schema: pa.Schema = self._schema(self.paths[0]).remove_metadata()
        num_groups = 0
        for path in self.paths:
            footer = self._footer(path)
            num_groups += footer.num_row_groups
            check_schema(path, self._schema(path), self.paths[0], self.schema)
            self._splits += group_rows(path, _group_rows(footer), SPLIT_ROWS)
        self.num_groups: int | None = num_groups
        if not self._splits:
            raise DataError(f"{self.paths[0]}: no rows; the source has none at all")

    def splits(self) -> Sequence[Split]:
        """All splits, in the order of reading."""
        return self._splits

    def count_rows(self, split: Split) -> int:
        """Rows of the split."""
        return split.stop - split.start

    def cut(self, split: Split, row: int) -> tuple[Split, Split]:
        """Cuts a split before its row `row`."""
        middle = split.start + row
        return Split(split.path, split.start, middle), Split(split.path, middle, split.stop)

    def read(self, split: Split, columns: Sequence[str]) -> Iterator[Chunk]:
        """Reads the rows of a split in order."""
        footer = self._footer(split.path)
        groups, first = groups_of(_group_rows(footer), split)
        try:
            with self._filesystem.open_input_file(split.path) as file:
                for table in self._tables(file, split.path, groups, columns):
                    start = max(split.start - first, 0)
                    stop = min(split.stop - first, table.num_rows)
                    if start < stop:
                        rows = table.slice(start, stop - start).select(list(columns))
                        yield Chunk(rows, RowPlace(split.path, first + start))
                    first += table.num_rows
                    if first >= split.stop:
                        break
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{split.path}: cannot be read: {error}") from None

    def _tables(
        self, file: pa.NativeFile, path: str, groups: Sequence[int], columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """The columns of row groups, in any order, some rows at a time."""
        footer, local = self._footer(path), isinstance(self._filesystem, LocalFileSystem)
        size = chunk_rows(len(columns), CHUNK_ROWS)
        left = sum(footer.row_group(group).num_rows for group in groups)
        readers = {}
        # Elsewhere pyarrow reads what lies together at once, which hides latency.
        if local and left >= _LEAST_GROUP_ROWS * len(groups):
            readers = open_columns(file, self._plain(path), columns, groups)
        names = [name for name in columns if name not in readers]
        if readers and not names:
            while left:
                rows = min(size, left)
                yield pa.table({name: reader.read(rows) for name, reader in readers.items()})
                left -= rows
            return
        with pq.ParquetFile(
            file,
            metadata=footer,
            # It hides the latency of a remote store, and costs a copy.
            pre_buffer=not local,
            # Pages without a checksum read as they are.
            page_checksum_verification=True,
        ) as parquet:
            for batch in parquet.iter_batches(
                size, row_groups=groups, columns=names, use_threads=False
            ):
                arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
                for name, reader in readers.items():
                    arrays[name] = reader.read(batch.num_rows)
                yield pa.table(arrays)
                left -= batch.num_rows
        if left:
            raise ValueError("row groups have fewer rows than the footer says")

    def may_hold(self, split: Split, column: str, low: int | None, high: int | None) -> bool:
        """Looks at the minima and maxima that the files keep."""
        footer = self._footer(split.path)
        for group in groups_of(_group_rows(footer), split)[0]:
            bounds = _time_bounds(footer.row_group(group), column)
            if bounds is None:
                return True
            if (high is None or bounds[0] < high) and (low is None or bounds[1] >= low):
                return True
        return False

    def _schema(self, path: str) -> pa.Schema:
        try:
            return self._footer(path).schema.to_arrow_schema()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from None

    def _plain_columns(self, path: str) -> dict[str, PlainColumn]:
        with self._filesystem.open_input_file(path) as file:
            return plain_columns(file, self._footer(path))

    def _read_footer(self, path: str) -> pq.FileMetaData:
        try:
            with self._filesystem.open_input_file(path) as file:
                return pq.read_metadata(file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _group_rows(footer: pq.FileMetaData) -> list[int]:
    return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def _time_bounds(group: pq.RowGroupMetaData, column: str) -> tuple[int, int] | None:
    """Least and greatest time of a row group in ms, rounded outwards; None where unknown."""
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema == column:
            statistics = chunk.statistics
            if statistics is None or not statistics.has_min_max or statistics.null_count:
                return None
            low, high = _milliseconds(statistics.min), _milliseconds(statistics.max)
            return None if low is None or high is None else (low, high + 1)
    return None


def _milliseconds(value: object) -> int | None:
    if isinstance(value, int):
        return value
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return math.floor(aware.timestamp() * 1000)
    if isinstance(value, date):
        return int(datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()) * 1000
    return None
