"""Files of one schema that hold their rows in groups: ORC stripes, Arrow record batches.

A split is a run of groups of one file; an Arrow stream, whose batches cannot be found without
reading those before, is one split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import pyarrow as pa

from penstock.config import FileSource
from penstock.data.files import list_files
from penstock.data.source import CHUNK_ROWS, Chunk, RowPlace, Split, chunk_rows
from penstock.errors import DataError

SPLIT_ROWS = 131_072
"""Small groups are read together up to this many rows.

FORMAT: positions in checkpoints count splits; never change.
"""
END = 2**63 - 1
"""`Split.stop` of a file whose rows were not counted."""


class Layout(NamedTuple):
    """What a file says of itself before its rows are read."""

    schema: pa.Schema
    group_rows: tuple[int, ...] | None
    """Rows of each group; None: known only by reading the file."""


class GroupFormat(Protocol):
    """Reads one format. May raise OSError and pyarrow's exceptions. Safe to share by threads."""

    name: str
    """For messages, with its article: `an ORC`."""

    def layout(self, file: pa.NativeFile) -> Layout:
        """Reads the schema, and where the groups are."""

    def read(
        self, file: pa.NativeFile, groups: Sequence[int] | None, columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Reads `columns` of groups, one table each; None: of the whole file."""


class GroupedFiles:
    """Source over files of groups. A `Split` is [start, stop) in rows of its file."""

    def __init__(self, config: FileSource, group_format: GroupFormat) -> None:
        self.paths: Sequence[str]
        self._filesystem, self.paths = list_files(config.path)
        self._format = group_format
        self._group_rows: dict[str, tuple[int, ...] | None] = {}
        self._counted: dict[str, int] = {}
        self._splits: list[Split] = []
        num_groups = 0
        for path in self.paths:
            layout = self._layout(path)
            if path == self.paths[0]:
                self.schema: pa.Schema = layout.schema.remove_metadata()
            check_schema(path, layout.schema, self.paths[0], self.schema)
            self._group_rows[path] = layout.group_rows
            if layout.group_rows is None:
                self._splits.append(Split(path, 0, END))
            else:
                num_groups += len(layout.group_rows)
                self._splits += group_rows(path, layout.group_rows, SPLIT_ROWS)
        counted = None not in self._group_rows.values()
        self.num_groups: int | None = num_groups if counted else None
        if not self._splits:
            raise DataError(f"{self.paths[0]}: no rows; the source has none at all")

    def splits(self) -> Sequence[Split]:
        """All splits, in the order of reading."""
        return self._splits

    def count_rows(self, split: Split) -> int:
        """Rows of the split; reads a stream once."""
        if split.stop != END:
            return split.stop - split.start
        if split.path not in self._counted:
            # One column, to read little.
            whole = self._tables(Split(split.path, 0, END), self.schema.names[:1])
            self._counted[split.path] = sum(table.num_rows for _, table in whole)
        return self._counted[split.path] - split.start

    def cut(self, split: Split, row: int) -> tuple[Split, Split]:
        """Cuts a split before its row `row`."""
        middle = split.start + row
        return Split(split.path, split.start, middle), Split(split.path, middle, split.stop)

    def read(self, split: Split, columns: Sequence[str]) -> Iterator[Chunk]:
        """Reads the rows of a split in order."""
        at_once = chunk_rows(len(columns), CHUNK_ROWS)
        for first, table in self._tables(split, columns):
            start = max(split.start - first, 0)
            stop = min(split.stop - first, table.num_rows)
            for low in range(start, stop, at_once):
                size = min(at_once, stop - low)
                yield Chunk(table.slice(low, size), RowPlace(split.path, first + low))

    def may_hold(self, split: Split, column: str, low: int | None, high: int | None) -> bool:
        """No statistics are read."""
        return True

    def _tables(self, split: Split, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Tables that hold the rows of the split, with the file's row at which each begins."""
        rows = self._group_rows[split.path]
        groups, first = (None, 0) if rows is None else groups_of(rows, split)
        try:
            with self._filesystem.open_input_file(split.path) as file:
                for table in self._format.read(file, groups, columns):
                    yield first, table
                    first += table.num_rows
                    if first >= split.stop:
                        return
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{split.path}: cannot be read: {error}") from None

    def _layout(self, path: str) -> Layout:
        try:
            with self._filesystem.open_input_file(path) as file:
                return self._format.layout(file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not {self._format.name} file: {error}") from None


def check_schema(path: str, schema: pa.Schema, first_path: str, first: pa.Schema) -> None:
    """Compares the columns of a file with those of the first.

    Raises:
      DataError: they differ, or a name stands for two columns.
    """
    try:
        schema.names  # noqa: B018 (decodes them)
    except UnicodeDecodeError:
        raise DataError(f"{path}: the name of a column is not UTF-8; is it damaged?") from None
    remedy = "all files of a source have one schema; name the files of one schema"
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: column {twice!r} is there twice; give each its own name")
    for field in first:
        index = schema.get_field_index(field.name)
        if index < 0:
            raise DataError(f"{path}: column {field.name!r} of {first_path} is missing; {remedy}")
        if schema.field(index).type != field.type:
            raise DataError(
                f"{path}: column {field.name!r} is {schema.field(index).type}, but "
                f"{field.type} in {first_path}; {remedy}"
            )
    for name in schema.names:
        if first.get_field_index(name) < 0:
            raise DataError(f"{path}: column {name!r} is not in {first_path}; {remedy}")


def group_rows(path: str, rows: Sequence[int], split_rows: int) -> Iterator[Split]:
    """Splits of runs of groups that have up to `split_rows` rows together."""
    start = stop = 0
    for group in rows:
        if stop > start and stop + group - start > split_rows:
            yield Split(path, start, stop)
            start = stop
        stop += group
    if stop > start:
        yield Split(path, start, stop)


def groups_of(rows: Sequence[int], split: Split) -> tuple[list[int], int]:
    """Groups that hold rows of the split, and the file's row at which the first begins."""
    groups: list[int] = []
    first = row = 0
    for group, size in enumerate(rows):
        stop = row + size
        if stop > split.start and row < split.stop:
            if not groups:
                first = row
            groups.append(group)
        row = stop
    return groups, first
