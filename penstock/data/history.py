"""Adds to each row of a log what its user did before: columns of lists, for sequence features.

The history of a row holds the last values of the rows before it that have its group (user), in the
order of time; rows of one time come in the order of the files. No loop over rows: the rows sorted
by group and time, each history is a stretch of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from penstock.config import Source as SourceConfig
from penstock.config import format_of_path
from penstock.data.columns.checks import is_one_key, nearest
from penstock.data.columns.transforms import one_array
from penstock.data.opening import open_source
from penstock.data.output import whole_file
from penstock.data.source import Chunk, Source
from penstock.errors import ConfigError, DataError

no_partitions: Mapping[str, str] = MappingProxyType({})
ROW_GROUP_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class HistoryColumns:
    """What is gathered."""

    by: str
    """Column of integers or text: whose history. A row without a value has none, and is in none."""
    of: tuple[str, ...]
    """Columns whose values are gathered; nulls too, so that their lists have equal lengths."""
    order: str
    """Column of the time: integers, timestamps or dates."""
    last: int
    """Longest history."""

    @property
    def names(self) -> list[str]:
        """Columns that are read to gather, each once."""
        return list(dict.fromkeys([self.by, self.order, *self.of]))

    @property
    def new_names(self) -> list[str]:
        """Of the columns of lists, in the order of `of`."""
        return [f"{name}_history" for name in self.of]


class Histories:
    """For each of n rows, the rows before it that are of its group."""

    def __init__(self, groups: NDArray[np.int64], times: NDArray[np.integer], last: int) -> None:
        """Sorts the rows.

        Args:
          groups: [n] equal where the group is; negative: of no group.
          times: [n]
          last: rows of a history at most.
        """
        n = len(groups)
        # Sorting is stable: rows of one time stay in the order of the files.
        self._by_group = np.lexsort((times, groups))
        sorted_groups = groups[self._by_group]
        is_first = np.ones(n, dtype=bool)
        is_first[1:] = sorted_groups[1:] != sorted_groups[:-1]
        first = np.flatnonzero(is_first)
        begins = np.repeat(first, np.diff(first, append=n))
        lengths = np.minimum(np.arange(n) - begins, last)
        lengths[sorted_groups < 0] = 0
        self._lengths = np.empty(n, dtype=np.int32)
        self._lengths[self._by_group] = lengths
        self._places = np.empty(n, dtype=np.int64)
        self._places[self._by_group] = np.arange(n)

    def of_rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Histories of rows [m], oldest first.

        Returns:
          offsets [m + 1] of each history among the rows, and the rows.
        """
        lengths = self._lengths[rows]
        offsets = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths, out=offsets[1:])
        begins = self._places[rows] - lengths - offsets[:-1]
        return offsets, self._by_group[np.repeat(begins, lengths) + np.arange(offsets[-1])]


class _Gathered(NamedTuple):
    """The columns of all rows that histories are made of."""

    histories: Histories
    by_time: NDArray[np.int64] | None
    """Rows in the order of time; None: they are in it already."""
    values: Sequence[pa.Array]
    """[n] of each of `HistoryColumns.of`."""


def write_history(
    paths: Sequence[str],
    columns: HistoryColumns,
    out: Path,
    *,
    partitions: Mapping[str, str] = no_partitions,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes a Parquet file with all columns of the rows and, for each of `of`, `<of>_history`.

    Rows are in the order of time. Memory: the columns that are gathered, about 45 bytes a row, and
    a row group of the others; where the rows are not in the order of time, all columns.

    Args:
      paths: files, directories or globs of one format and schema, in the order of the rows.
      columns: what is gathered.
      out: the file; it appears under its name when it is complete.
      partitions: types by name of columns that folders name, which are written as others.
      overwrite: whether `out` may exist.
      progress: called with what is done, and of how much.

    Returns:
      Number of rows.

    Raises:
      ConfigError: `out` exists, is one of the files, or cannot be written, or a column is there
        already.
      DataError: the files cannot be read, a column is missing or of a wrong type, or a time is.
    """
    with whole_file(out, reads=paths, overwrite=overwrite) as part:
        return _write_history(paths, partitions, columns, part, progress)


def _write_history(
    paths: Sequence[str],
    partitions: Mapping[str, str],
    columns: HistoryColumns,
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> int:
    source = _open(paths, partitions, columns.order)
    _check(columns, source)
    extents = source.extents()
    total = sum(source.count_rows(extent) for extent in extents)
    if not total:
        raise DataError(f"{source.paths[0]}: no rows; the source has none at all")
    done = 0

    def read(names: Sequence[str]) -> Iterator[Chunk]:
        nonlocal done
        for extent in extents:
            for chunk in source.read(extent, names):
                yield chunk
                done += chunk.table.num_rows
                if progress is not None:
                    # Each row is read twice.
                    progress(done, 2 * total)

    gathered = _gather(read(columns.names), columns)
    tables = (chunk.table for chunk in read(source.schema.names))
    _write(_in_time_order(tables, gathered.by_time), gathered, columns, path)
    return total


def _open(paths: Sequence[str], partitions: Mapping[str, str], order: str) -> Source:
    kinds = {format_of_path(path) or "parquet" for path in paths}
    if len(kinds) > 1:
        raise ConfigError(
            f"files of several formats ({', '.join(sorted(kinds))}); give those of one"
        )
    fields = {"path": tuple(paths), "format": kinds.pop(), "partitions": partitions}
    config: SourceConfig = TypeAdapter(SourceConfig).validate_python(fields)
    return open_source(config, {order: "int64"})


def _check(columns: HistoryColumns, source: Source) -> None:
    schema, origin = source.schema, source.paths[0]
    for flag, name in (
        ("--by", columns.by),
        ("--order", columns.order),
        *(("--of", name) for name in columns.of),
    ):
        if name not in schema.names:
            raise DataError(f"{origin}: no column {name!r} ({flag}){nearest(name, schema.names)}")
    for name, new in zip(columns.of, columns.new_names, strict=True):
        if new in schema.names or columns.of.count(name) > 1:
            raise ConfigError(
                f"{origin}: two columns would be named {new!r}; give each column of --of once, and "
                "rename the one that is there"
            )

    def wrong(name: str, remedy: str) -> DataError:
        return DataError(f"{origin}: column {name!r} is {schema.field(name).type}; {remedy}")

    if not is_one_key(schema.field(columns.by).type):
        raise wrong(columns.by, "--by takes a column of integers or text")
    order = schema.field(columns.order).type
    if not (pa.types.is_integer(order) or pa.types.is_timestamp(order) or pa.types.is_date(order)):
        raise wrong(columns.order, "--order takes a column of integers, timestamps or dates")
    for name in columns.of:
        if pa.types.is_nested(schema.field(name).type):
            raise wrong(name, "--of takes columns of one value a row")


def _gather(chunks: Iterable[Chunk], columns: HistoryColumns) -> _Gathered:
    tables, times = [], []
    for chunk in chunks:
        times.append(_times(chunk, columns.order))
        tables.append(chunk.table.select([columns.by, *columns.of]))
    table = pa.concat_tables(tables)
    groups = _plain(table.column(0)).dictionary_encode().indices.fill_null(-1)
    of_rows = np.concatenate(times)
    in_order = bool((of_rows[1:] >= of_rows[:-1]).all())
    return _Gathered(
        Histories(groups.to_numpy().astype(np.int64), of_rows, columns.last),
        None if in_order else np.argsort(of_rows, kind="stable"),
        [_plain(column) for column in table.columns[1:]],
    )


def _times(chunk: Chunk, name: str) -> NDArray[np.integer]:
    array = one_array(chunk.table.column(name))
    if array.null_count:
        row = int(array.is_null().to_numpy(zero_copy_only=False).argmax())
        raise DataError(
            f"{chunk.place.locate(row)}, column {name!r}: the time is missing; leave such rows out "
            "of the file"
        )
    if not pa.types.is_integer(array.type):
        array = array.cast(pa.int32() if pa.types.is_date32(array.type) else pa.int64())
    times: NDArray[np.integer] = array.to_numpy()
    return times


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """As one array, of whatever size, without a dictionary."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    wider = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
    return one_array(column.cast(wider.get(column.type, column.type)))


def _in_time_order(
    tables: Iterable[pa.Table], by_time: NDArray[np.int64] | None
) -> Iterator[tuple[pa.Table, NDArray[np.int64]]]:
    """Row groups in the order of time, and the numbers of their rows."""
    if by_time is not None:
        whole = pa.concat_tables(tables).combine_chunks()
        for low in range(0, len(by_time), ROW_GROUP_ROWS):
            rows = by_time[low : low + ROW_GROUP_ROWS]
            yield whole.take(pa.array(rows)), rows
        return
    waiting: list[pa.Table] = []
    first = size = 0
    for table in tables:
        waiting.append(table)
        size += table.num_rows
        if size >= ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting), np.arange(first, first + size)
            first, size, waiting = first + size, 0, []
    if size:
        yield pa.concat_tables(waiting), np.arange(first, first + size)


def _write(
    groups: Iterable[tuple[pa.Table, NDArray[np.int64]]],
    gathered: _Gathered,
    columns: HistoryColumns,
    path: Path,
) -> None:
    writer: pq.ParquetWriter | None = None
    try:
        for table, rows in groups:
            offsets, taken = gathered.histories.of_rows(rows)
            indices = pa.array(taken)
            for name, values in zip(columns.new_names, gathered.values, strict=True):
                lists = pa.ListArray.from_arrays(pa.array(offsets), values.take(indices))
                table = table.append_column(name, lists)
            if writer is None:
                # What other programs noted about the file's columns is not true of this one's.
                schema = table.schema.remove_metadata()
                writer = pq.ParquetWriter(path, schema, compression="zstd")
            writer.write_table(table.replace_schema_metadata(None))
    finally:
        if writer is not None:
            writer.close()
