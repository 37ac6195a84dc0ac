"""Streams as one source: the files of all windows in their order, each read by its own format."""

from __future__ import annotations

import heapq
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, TypeAlias

import pyarrow as pa

from penstock.config.sources import AnyFileSource
from penstock.config.streams import Stream, StreamSource, StreamsSource
from penstock.data.files import file_key, paths_like
from penstock.data.plan.lazy_extents import LazyExtents
from penstock.data.source import Chunk, Extent, RowCount, Source
from penstock.data.windows.graph import StoredPaths, TaskGraph, WindowFiles
from penstock.data.windows.growing import (
    Listing,
    begins,
    listed_windows,
    next_span,
    waits_for,
    windows_behind_end,
)
from penstock.data.windows.stored import PassedOver, Stored, listed_anew, stored_paths
from penstock.errors import DataError, JobNote
from penstock.position import FileTag

_EXTENTS_AT_ONCE = 16


Opener: TypeAlias = Callable[[AnyFileSource], Source]


class _Origin(NamedTuple):
    """Whose a file is."""

    source: Source
    window: int
    order: int
    """Of its source within the window."""


class Streams:
    """Source over streams. Extents are those of the files' formats, in the order of windows."""

    def __init__(
        self,
        config: StreamsSource,
        open_files: Opener,
        listing: Listing | None = None,
        like: pa.Schema | None = None,
    ) -> None:
        """Lists all files, unless they are known.

        Args:
          config: the streams; with a listing, they may grow.
          open_files: opens the files of one source, of all windows.
          listing: some windows and their files.
          like: the columns and types to read; None: those of the files.

        Raises:
          DataError: see `TaskGraph`; a source has no file or one of another, or the columns of two
            sources differ.
        """
        stored = stored_paths(config)
        paths = {name: one.paths for name, one in stored.items()}
        self.span = None if listing is None else listing.span
        """Of streams that grow."""
        self.windows: Sequence[WindowFiles] = list(
            TaskGraph(config, paths) if listing is None else listed_windows(config, listing)
        )
        """All windows, those without a file among them, but of streams that grow."""
        _warn_of_passed_over(paths)
        given: dict[str, list[str]] = defaultdict(list)
        for found in self.windows:
            for part in found.sources:
                name = _name(found.stream, part.source)
                given[name] += paths_like(
                    str(part.source.files.path), stored[name].path, part.files.paths
                )
        sources = {
            name: _open(stream, one, stored[name], given[name], open_files)
            for stream in config.streams
            for one in stream.sources
            for name in [_name(stream, one)]
            if listing is None or name in given
        }
        self.sources: Mapping[str, Source] = sources
        """By names of stream and source, in the order of the streams', and of their sources."""
        found_of = list(sources.values())
        self.schema: pa.Schema = _common_schema(found_of) if like is None else like
        for source in () if like is None else found_of:
            _check_columns(source, like)
        self._origins = self._found_origins(sources, stored)
        self.paths: Sequence[str] = list(self._origins)
        self._extents = LazyExtents((), self._more_extents)
        in_order = heapq.merge(*(source.extents() for source in found_of), key=self._turn)
        # Their files keep their numbers.
        unwanted = set() if listing is None else windows_behind_end(config, listing)
        self._unread = (one for one in in_order if self._origins[one.path].window not in unwanted)
        self._error: DataError | None = None

    def _found_origins(
        self, sources: Mapping[str, Source], stored: Mapping[str, Stored]
    ) -> dict[str, _Origin]:
        """Whose each file is, in the order of reading."""
        seen: dict[object, str] = {}
        left = {name: iter(source.paths) for name, source in sources.items()}
        origins: dict[str, _Origin] = {}
        for number, found in enumerate(self.windows):
            for order, part in enumerate(found.sources):
                name = _name(found.stream, part.source)
                # A source keeps the order in which its files were given.
                for path in islice(left[name], len(part.files.paths)):
                    one = stored[name]
                    before = seen.setdefault((one.number, file_key(one.filesystem, path)), path)
                    if before is not path:
                        as_other = "" if before == path else f" (the same as {before})"
                        raise DataError(
                            f"{path}: a file of two sources of data.source.streams{as_other}; its "
                            "rows would be read twice"
                        )
                    origins[path] = _Origin(sources[name], number, order)
        return origins

    def _turn(self, extent: Extent) -> tuple[int, int]:
        origin = self._origins[extent.path]
        return origin.window, origin.order

    def _more_extents(self) -> list[Extent] | None:
        if self._error is not None:
            raise self._error
        try:
            return list(islice(self._unread, _EXTENTS_AT_ONCE)) or None
        except DataError as error:
            self._error = error
            raise

    @property
    def num_groups(self) -> int | None:
        """Of all files; None: not counted."""
        found = [source.num_groups for source in self.sources.values()]
        return None if None in found else sum(one for one in found if one is not None)

    def window(self, path: str) -> int:
        """Number of the window that a file is in."""
        return self._origins[path].window

    def extents(self) -> Sequence[Extent]:
        """All extents, in the order of reading; found when they are asked for."""
        return self._extents

    def expected_rows(self, extents: Sequence[Extent]) -> RowCount | None:
        """Rows of the extents, as far as the sources know them."""
        if extents is self._extents:
            found = [source.expected_rows(source.extents()) for source in self.sources.values()]
        else:
            by_source: dict[int, list[Extent]] = {id(one): [] for one in self.sources.values()}
            for extent in extents:
                by_source[id(self._of(extent.path))].append(extent)
            found = [
                source.expected_rows(by_source[id(source)]) for source in self.sources.values()
            ]
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        return RowCount(sum(one.rows for one in known), all(one.is_exact for one in known))

    def count_rows(self, extent: Extent) -> int:
        """Rows of the extent."""
        return self._of(extent.path).count_rows(extent)

    def known_rows(self, extent: Extent) -> int | None:
        """Rows of the extent; None: it must be read for that."""
        return self._of(extent.path).known_rows(extent)

    def row_counts(self, extent: Extent) -> Iterator[int]:
        """Rows of successive stretches of the extent."""
        return self._of(extent.path).row_counts(extent)

    def cut(self, extent: Extent, row: int) -> tuple[Extent, Extent]:
        """Cuts an extent before its row `row`."""
        return self._of(extent.path).cut(extent, row)

    def read(self, extent: Extent, columns: Sequence[str]) -> Iterator[Chunk]:
        """Reads the rows of an extent in order, as the types that all sources have in common."""
        types = pa.schema([self.schema.field(name) for name in columns])
        for chunk in self._of(extent.path).read(extent, columns):
            if chunk.table.schema.types == types.types:
                yield chunk
                continue
            try:
                table = chunk.table.cast(types)
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"{chunk.place.span(0, max(1, chunk.table.num_rows))}: cannot be read as the "
                    f"types of the other sources of its streams: {error}"
                ) from None
            yield chunk._replace(table=table)

    def may_hold(self, extent: Extent, column: str, low: int | None, high: int | None) -> bool:
        """As the extent's own source knows."""
        return self._of(extent.path).may_hold(extent, column, low, high)

    def identify(self, path: str, until: int = 0) -> FileTag:
        """The identity of a file."""
        return self._of(path).identify(path, until)

    def holds(self, path: str, before: FileTag) -> bool:
        """Whether what `before` identifies is there as it was."""
        return self._of(path).holds(path, before)

    def may_grow(self, path: str) -> bool:
        """As the file's own source knows."""
        return self._of(path).may_grow(path)

    def _of(self, path: str) -> Source:
        return self._origins[path].source


def first_listing(config: StreamsSource) -> Listing | None:
    """The span with which a run over streams that grow begins; None: no window is complete yet.

    Raises:
      DataError: as `TaskGraph`.
    """
    paths = listed_anew(config)
    listing = next_span(config, paths, begins(config), 0)
    if listing is not None:
        _warn_of_passed_over(paths)
    return listing


def _warn_of_passed_over(paths: Mapping[str, StoredPaths]) -> None:
    if words := PassedOver().new(paths):
        warnings.warn(words, JobNote, stacklevel=2)


def first_waits(config: StreamsSource) -> str:
    """What the first window waits for, for people."""
    paths = listed_anew(config)
    return waits_for(config, paths, begins(config))


def complete_now(config: StreamsSource) -> Listing:
    """As `first_listing`; raises DataError where nothing is complete."""
    listing = first_listing(config)
    if listing is None:
        raise DataError(
            f"{config.sources[0].files.path}: no window is complete yet; that takes "
            f"{first_waits(config)}"
        )
    return listing


def _name(stream: Stream, source: StreamSource) -> str:
    return f"{stream.name}/{source.name}"


def _open(
    stream: Stream, source: StreamSource, stored: Stored, paths: Sequence[str], open_files: Opener
) -> Source:
    if not paths:
        delay = f", less its delay of {source.delay}" if source.delay_ms else ""
        raise DataError(
            f"{source.files.path}: no file of it lies between {stream.start} and {stream.end} "
            f"({stream.zone}){delay}; change the path of source {source.name!r}, or the times of "
            f"stream {stream.name!r}{stored.paths.files.where}"
        )
    return open_files(source.files.model_copy(update={"path": tuple(paths)}))


def _check_columns(source: Source, schema: pa.Schema) -> None:
    missing = next((name for name in schema.names if name not in source.schema.names), None)
    if missing is not None:
        raise DataError(
            f"{source.paths[0]}: no column {missing!r}, which the files before it have; the "
            "sources of data.source.streams have the same columns"
        )


def _common_schema(sources: Sequence[Source]) -> pa.Schema:
    """The columns, which all sources have, of types that hold the values of all."""
    first = sources[0]
    fields: list[pa.Field] = list(first.schema)
    for other in sources[1:]:
        path = other.paths[0]
        for one, before in ((other, first), (first, other)):
            extra = next((n for n in one.schema.names if n not in before.schema.names), None)
            if extra is not None:
                raise DataError(
                    f"{before.paths[0]}: column {extra!r} of {one.paths[0]} is missing; the "
                    "sources of data.source.streams have the same columns"
                )
        for place, field in enumerate(fields):
            found = other.schema.field(field.name)
            if field.type != found.type:
                # One that has a dictionary and one that has none share the values.
                field, found = _without_dictionary(field), _without_dictionary(found)
            try:
                common = pa.unify_schemas(
                    [pa.schema([field]), pa.schema([found])], promote_options="permissive"
                )
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                raise DataError(
                    f"{path}: column {field.name!r} is {found.type}, but {field.type} in "
                    f"{first.paths[0]}; declare the type in the source's `types`, or convert the "
                    "files"
                ) from None
            fields[place] = common.field(0)
    return pa.schema([pa.field(field.name, field.type) for field in fields])


def _without_dictionary(field: pa.Field) -> pa.Field:
    kind = field.type
    return field.with_type(kind.value_type) if pa.types.is_dictionary(kind) else field
