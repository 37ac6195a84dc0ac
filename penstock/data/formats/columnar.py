"""Files of one schema that hold their rows in groups: Parquet, ORC stripes, Arrow record batches.

An extent is a run of groups of one file; an Arrow stream, whose batches cannot be found without
reading those before, is one extent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow.fs import LocalFileSystem

from penstock.config import FileSource
from penstock.data.columns.view_types import plain_table, without_views
from penstock.data.files import list_files
from penstock.data.identity import tag_of
from penstock.data.plan.lazy_extents import LazyExtents
from penstock.data.source import CHUNK_ROWS, Chunk, Extent, RowCount, RowPlace, chunk_rows
from penstock.errors import DataError
from penstock.position import FileTag

EXTENT_ROWS = 131_072
"""Small groups are read together up to this many rows.

FORMAT: positions in checkpoints count extents; never change.
"""
END = 2**63 - 1
"""`Extent.stop` of a file whose rows were not counted."""
_THREADS = 16
"""That read what files say of themselves: a remote store takes as long for many as for one."""
_MOST_FILES_AT_ONCE = 128
"""Of which that is read before the extents of the first can be had."""


class OpenFile(NamedTuple):
    """A file that a format reads."""

    file: pa.NativeFile
    path: str
    is_local: bool


class Bounds(NamedTuple):
    """Least and greatest time of a group, or what lies outside them both.

    Of a column of integers its values, of others ms since 1970 UTC.
    """

    least: int
    greatest: int


class Layout(NamedTuple):
    """What a file says of itself before its rows are read."""

    schema: pa.Schema
    group_rows: NDArray[np.int64] | None
    """[groups] rows of each; None: known only by reading the file."""
    group_times: Sequence[Bounds | None] | None = None
    """[groups]; None: not known."""
    file_bytes: int = -1
    """Added by who asks for the layout."""


class GroupFormat(Protocol):
    """Reads one format. May raise OSError and pyarrow's exceptions. Safe to share by threads."""

    name: str
    """For messages, with its article: `an ORC`."""

    def layout(self, opened: OpenFile) -> Layout:
        """Reads the schema, and where the groups are."""

    def read(
        self, opened: OpenFile, groups: Sequence[int] | None, columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Reads `columns` of groups, in order, as tables of any size; None: of the whole file."""


class _Groups(NamedTuple):
    """The groups of a file."""

    ends: NDArray[np.int64]
    """[groups] rows of the file up to the end of each."""
    times: Sequence[Bounds | None] | None
    file_bytes: int
    """Another size by the time of reading shows that it is another file."""

    def of(self, extent: Extent) -> range:
        """Those that hold rows of the extent."""
        first = int(np.searchsorted(self.ends, extent.start, side="right"))
        return range(first, int(np.searchsorted(self.ends, extent.stop, side="left")) + 1)

    def start(self, group: int) -> int:
        """The file's row at which a group begins."""
        return int(self.ends[group - 1]) if group else 0


class GroupedFiles:
    """Source over files of groups. An `Extent` is [start, stop) in rows of its file.

    What a file says of itself is read when its extents are asked for, of many files at once.
    """

    def __init__(self, config: FileSource, group_format: GroupFormat) -> None:
        self.paths: Sequence[str]
        self._filesystem, self.paths = list_files(config.path)
        self._is_local = isinstance(self._filesystem, LocalFileSystem)
        self._format = group_format
        self._counted: dict[str, int] = {}
        path = self.paths[0]
        layout = self._layout(path)
        self.schema: pa.Schema = layout.schema.remove_metadata()
        # Of files in the order of reading, as far as they are known.
        self._groups = {path: self._checked(path, layout)}
        self._splits = LazyExtents(_splits_of(path, self._groups[path]), self._more_splits)

    @property
    def num_groups(self) -> int | None:
        """Groups of all files; None: not counted."""
        len(self._splits)
        groups = [one for one in self._groups.values() if one is not None]
        return None if len(groups) < len(self._groups) else sum(len(one.ends) for one in groups)

    def extents(self) -> Sequence[Extent]:
        """All extents, in the order of reading; found when they are asked for."""
        return self._splits

    def count_rows(self, extent: Extent) -> int:
        """Rows of the extent; reads a stream once."""
        known = self.known_rows(extent)
        return sum(self.row_counts(extent)) if known is None else known

    def known_rows(self, extent: Extent) -> int | None:
        """Rows of the extent; None: of a stream that was not counted."""
        if extent.stop != END:
            return extent.stop - extent.start
        counted = self._counted.get(extent.path)
        return None if counted is None else counted - extent.start

    def row_counts(self, extent: Extent) -> Iterator[int]:
        """Rows of the extent, of a stream of each table."""
        if extent.stop != END:
            yield extent.stop - extent.start
            return
        # One column, to read little.
        first = end = 0
        for first, table in self._tables(extent, self.schema.names[:1]):
            end = first + table.num_rows
            yield max(end - max(first, extent.start), 0)
        self._counted[extent.path] = end

    def expected_rows(self, extents: Sequence[Extent]) -> RowCount | None:
        """Rows of the extents; of files whose groups were not asked for, as many as of others."""
        groups = list(self._groups.values())
        if any(one is None for one in groups):
            known = [self.known_rows(extent) for extent in extents]
            rows = [one for one in known if one is not None]
            return RowCount(sum(rows), is_exact=True) if len(rows) == len(known) else None
        if extents is not self._splits or len(groups) == len(self.paths):
            return RowCount(sum(extent.stop - extent.start for extent in extents), is_exact=True)
        found = sum(int(one.ends[-1]) for one in groups if one is not None and len(one.ends))
        return RowCount(found * len(self.paths) // len(groups), is_exact=False)

    def cut(self, extent: Extent, row: int) -> tuple[Extent, Extent]:
        """Cuts an extent before its row `row`."""
        middle = extent.start + row
        return Extent(extent.path, extent.start, middle), Extent(extent.path, middle, extent.stop)

    def read(self, extent: Extent, columns: Sequence[str]) -> Iterator[Chunk]:
        """Reads the rows of an extent in order."""
        at_once = chunk_rows(len(columns), CHUNK_ROWS)
        for first, table in self._tables(extent, columns):
            start = max(extent.start - first, 0)
            stop = min(extent.stop - first, table.num_rows)
            for low in range(start, stop, at_once):
                size = min(at_once, stop - low)
                yield Chunk(table.slice(low, size), RowPlace(extent.path, first + low))

    def may_hold(self, extent: Extent, column: str, low: int | None, high: int | None) -> bool:
        """Looks at the bounds that the file keeps of its groups."""
        groups = self._groups[extent.path]
        if groups is None or groups.times is None:
            return True
        for group in groups.of(extent):
            bounds = groups.times[group]
            if bounds is None:
                return True
            if (high is None or bounds.least < high) and (low is None or bounds.greatest >= low):
                return True
        return False

    def _more_splits(self) -> list[Extent] | None:
        """Extents of further files: at first of few, so that reading can begin."""
        known = len(self._groups)
        paths = self.paths[known : known + min(known, _MOST_FILES_AT_ONCE)]
        if not paths:
            return None
        with ThreadPoolExecutor(min(len(paths), _THREADS)) as threads:
            found = list(threads.map(self._read_groups, paths))
        self._groups.update(zip(paths, found, strict=True))
        return [
            extent
            for path, groups in zip(paths, found, strict=True)
            for extent in _splits_of(path, groups)
        ]

    def _read_groups(self, path: str) -> _Groups | None:
        return self._checked(path, self._layout(path))

    def _checked(self, path: str, layout: Layout) -> _Groups | None:
        check_schema(path, layout.schema, self.paths[0], self.schema)
        if layout.group_rows is None:
            return None
        ends = np.cumsum(layout.group_rows)
        # A sum beyond 63 bits is negative.
        if min(layout.group_rows.min(initial=0), ends.min(initial=0)) < 0:
            raise DataError(f"{path}: counts of rows that no file has; is it damaged?")
        return _Groups(ends, layout.group_times, layout.file_bytes)

    def identify(self, path: str, until: int = 0) -> FileTag:
        """The identity of a whole file."""
        return tag_of(self._filesystem, path)

    def holds(self, path: str, before: FileTag) -> bool:
        """Files are compared whole: they have an index, so that none grows."""
        return self.identify(path).digest == before.digest

    def window(self, path: str) -> int:
        """There is one."""
        return 0

    def may_grow(self, path: str) -> bool:
        """It may not."""
        return False

    def _tables(self, extent: Extent, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Tables that hold the rows of the extent, with the file's row at which each begins."""
        groups = self._groups[extent.path]
        wanted = None if groups is None else groups.of(extent)
        first = 0 if groups is None or not wanted else groups.start(wanted[0])
        try:
            with self._open(extent.path) as opened:
                if groups is not None and opened.file.size() != groups.file_bytes:
                    raise pa.ArrowInvalid(
                        f"it has {opened.file.size():,} bytes, and had {groups.file_bytes:,} when "
                        "its rows were counted"
                    )
                for table in self._format.read(opened, wanted, columns):
                    yield first, plain_table(table)
                    first += table.num_rows
                    if first >= extent.stop:
                        return
            if groups is not None:
                raise pa.ArrowInvalid("it has fewer rows than it says")
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{extent.path}: cannot be read: {error}") from None

    def _layout(self, path: str) -> Layout:
        try:
            with self._open(path) as opened:
                # Asked first: a format may leave the file closed.
                size = opened.file.size()
                layout = self._format.layout(opened)
                schema = without_views(layout.schema)
                return layout._replace(schema=schema, file_bytes=size)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not {self._format.name} file: {error}") from None

    @contextmanager
    def _open(self, path: str) -> Iterator[OpenFile]:
        with self._filesystem.open_input_file(path) as file:
            yield OpenFile(file, path, self._is_local)


def check_schema(path: str, schema: pa.Schema, first_path: str, first: pa.Schema) -> None:
    """Compares the columns of a file with those of the first, which may be itself.

    Raises:
      DataError: they differ, or a name stands for two columns.
    """
    if path != first_path and schema.equals(first):
        return
    try:
        names = schema.names
    except UnicodeDecodeError:
        raise DataError(f"{path}: the name of a column is not UTF-8; is it damaged?") from None
    remedy = "all files of a source have one schema; name the files of one schema"
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
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
    for name in names:
        if first.get_field_index(name) < 0:
            raise DataError(f"{path}: column {name!r} is not in {first_path}; {remedy}")


def _splits_of(path: str, groups: _Groups | None) -> Iterator[Extent]:
    """Extents of runs of groups that have up to `EXTENT_ROWS` rows together."""
    if groups is None:
        yield Extent(path, 0, END)
        return
    start = before = 0
    for stop in groups.ends.tolist():
        if before > start and stop - start > EXTENT_ROWS:
            yield Extent(path, start, before)
            start = before
        before = stop
    if before > start:
        yield Extent(path, start, before)
