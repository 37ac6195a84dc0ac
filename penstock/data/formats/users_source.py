"""A user's own source: one class that names its parts, and reads each.

`UsersRows` is what the class must have; the rest of a source (extents, positions, what changed
between stop and resume, chunks of bounded size) follows from that.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from penstock.config import PythonSource
from penstock.config.users_code import USERS_CODE_ERRORS, described, find_named
from penstock.data.columns.view_types import plain_table, without_views
from penstock.data.plan.lazy_extents import LazyExtents
from penstock.data.source import CHUNK_ROWS, Chunk, Extent, RowCount, RowPlace, chunk_rows
from penstock.errors import ConfigError, DataError
from penstock.position import FileTag

END = 2**63 - 1
"""`Extent.stop` of a part whose rows nobody has counted."""
_MOST_PARTS_AT_ONCE = 128
"""Whose rows are asked for together."""
_METHODS = ("schema", "parts", "version", "read")
_DOCS = "docs/data.md, A source of your own"


class UsersRows(Protocol):
    """What a user's class must have. `read`, `rows` and `version` are called by several threads.

    It may have `rows(part) -> int | None`, too: how many rows `read` will give, if that is known
    without reading them. Only a source that tells may be divided by a fraction at once.
    """

    def schema(self) -> pa.Schema:
        """All columns."""

    def parts(self) -> Sequence[str]:
        """Names of what reads alone, in the order of reading: the unit of reading at one time.

        A run that goes on may find more of them, behind the ones that it began with.
        """

    def version(self, part: str) -> str:
        """A text that is another one when the rows of a part are others, or in another order."""

    def read(self, part: str, columns: Sequence[str]) -> Iterable[pa.Table | pa.RecordBatch]:
        """The rows of a part, the same on every call, as tables of any size with the columns."""


class UsersSource:
    """Source over the parts of a user's class. An `Extent` is [start, stop) in rows of its part."""

    def __init__(self, config: PythonSource) -> None:
        """Imports and makes the class, and asks for its columns and parts.

        Raises:
          ConfigError: the class is not there, cannot be made, or lacks a method.
          DataError: what it gives is not what a source must give; names the method.
        """
        self._name = f"data.source.factory {config.factory!r}"
        self._rows_of = _made(config, self._name)
        self.schema: pa.Schema = self._given_schema()
        self.paths: Sequence[str] = self._given_parts()
        self.num_groups: int | None = None
        self._known: dict[str, int | None] = {}
        """Rows of each part that was asked; None: they are known when it was read."""
        self._asked = 0
        self._extents = LazyExtents((), self._more_extents)
        if not self._extents:
            raise DataError(f"{self._name}: no rows; the source has none at all")

    def extents(self) -> Sequence[Extent]:
        """One a part that has rows, or may have some; found when they are asked for."""
        return self._extents

    def count_rows(self, extent: Extent) -> int:
        """Rows of the extent; reads a part whose rows are not known."""
        return sum(self.row_counts(extent))

    def known_rows(self, extent: Extent) -> int | None:
        """Rows of the extent; None: it must be read for that."""
        if extent.stop != END:
            return extent.stop - extent.start
        rows = self._known.get(extent.path)
        return None if rows is None else rows - extent.start

    def row_counts(self, extent: Extent) -> Iterator[int]:
        """Rows of the extent; of a part whose rows are not known, of each table."""
        known = self.known_rows(extent)
        if known is not None:
            yield known
            return
        for chunk in self.read(extent, ()):
            yield chunk.table.num_rows

    def expected_rows(self, extents: Sequence[Extent]) -> RowCount | None:
        """Rows of the extents; of parts that were not asked for, as many as of others."""
        if extents is self._extents and self._asked < len(self.paths):
            rows = [one for one in list(self._known.values()) if one is not None]
            if not rows:
                return None
            return RowCount(sum(rows) * len(self.paths) // len(rows), is_exact=False)
        known = [self.known_rows(extent) for extent in extents]
        if None in known:
            return None
        return RowCount(sum(one for one in known if one is not None), is_exact=True)

    def cut(self, extent: Extent, row: int) -> tuple[Extent, Extent]:
        """Cuts an extent before its row `row`."""
        middle = extent.start + row
        return Extent(extent.path, extent.start, middle), Extent(extent.path, middle, extent.stop)

    def read(self, extent: Extent, columns: Sequence[str]) -> Iterator[Chunk]:
        """Reads the rows of an extent in order; a part is read from its front."""
        part, names = extent.path, list(columns)
        at_once = chunk_rows(len(names), CHUNK_ROWS)
        first = 0
        # Of no column, not every table knows how many rows it has.
        for table in self._tables(part, names or self.schema.names[:1]):
            low = max(extent.start - first, 0)
            high = min(extent.stop - first, table.num_rows)
            for start in range(low, high, at_once):
                some = table.slice(start, min(at_once, high - start)).select(names)
                yield Chunk(some, RowPlace(part, first + start))
            first += table.num_rows
            if first >= extent.stop and extent.stop != self._known[part]:
                return  # the rest is another extent's
        self._check_count(part, first)

    def may_hold(self, extent: Extent, column: str, low: int | None, high: int | None) -> bool:
        """Nobody tells."""
        return True

    def identify(self, path: str, until: int = 0) -> FileTag:
        """The identity of a part: its name and version."""
        version = self._ask("version", path)
        if not isinstance(version, str) or not version:
            raise self._wrong("version", path, f"gave {version!r}; it gives a text")
        # FORMAT: checkpoints hold such digests; never change.
        content = json.dumps([path, version]).encode()
        return FileTag(path, 0, hashlib.blake2b(content, digest_size=16).hexdigest())

    def holds(self, path: str, before: FileTag) -> bool:
        """Parts are compared whole."""
        return self.identify(path).digest == before.digest

    def window(self, path: str) -> int:
        """There is one."""
        return 0

    def may_grow(self, path: str) -> bool:
        """It may not."""
        return False

    def _tables(self, part: str, names: Sequence[str]) -> Iterator[pa.Table]:
        try:
            for given in self._rows_of.read(part, tuple(names)):
                yield self._checked(given, part, names)
        except USERS_CODE_ERRORS as error:
            raise self._wrong("read", part, f"failed: {described(error)}") from error

    def _checked(self, given: object, part: str, names: Sequence[str]) -> pa.Table:
        if isinstance(given, pa.RecordBatch):
            given = pa.Table.from_batches([given])
        if not isinstance(given, pa.Table):
            kind = type(given).__name__
            raise self._wrong("read", part, f"gave {kind}; it gives pyarrow tables")
        lacking = next((name for name in names if name not in given.schema.names), None)
        if lacking is not None:
            raise self._wrong("read", part, f"gave no column {lacking!r}, which it was asked for")
        table = plain_table(given.select(list(names)))
        for field in table.schema:
            expected = self.schema.field(field.name).type
            if field.type != expected:
                raise self._wrong(
                    "read",
                    part,
                    f"gave column {field.name!r} as {field.type}, but schema() says {expected}",
                )
        # Arrays made of raw buffers may say that they are longer than these.
        table.validate()
        return table

    def _check_count(self, part: str, rows: int) -> None:
        """Takes note of how many rows a whole part has, which are as many as it had before."""
        before = self._known[part]
        if before is not None and rows != before:
            raise self._wrong(
                "read",
                part,
                f"gave {rows:,} rows; rows() or a read before said {before:,}: parts must not "
                "change while they are read",
            )
        self._known[part] = rows

    def _more_extents(self) -> list[Extent] | None:
        """Of further parts: at first of few, so that reading can begin."""
        if self._asked == len(self.paths):
            return None
        asked = self._asked + min(max(self._asked, 1), _MOST_PARTS_AT_ONCE)
        found = {part: self._given_rows(part) for part in self.paths[self._asked : asked]}
        self._known.update(found)
        self._asked = min(asked, len(self.paths))
        return [
            Extent(part, 0, END if rows is None else rows)
            for part, rows in found.items()
            if rows != 0
        ]

    def _given_schema(self) -> pa.Schema:
        schema = self._ask("schema")
        if not isinstance(schema, pa.Schema) or not schema.names:
            raise self._wrong("schema", None, "must give a pyarrow schema with a column")
        twice = next((name for name, count in Counter(schema.names).items() if count > 1), None)
        if twice is not None:
            raise self._wrong("schema", None, f"has column {twice!r} twice")
        return without_views(schema.remove_metadata())

    def _given_parts(self) -> list[str]:
        given = self._ask("parts")
        is_listed = isinstance(given, Sequence) and not isinstance(given, str)
        if not is_listed or not all(isinstance(part, str) and part for part in given):
            raise self._wrong("parts", None, "must give a list of texts, the names of the parts")
        twice = next((name for name, count in Counter(given).items() if count > 1), None)
        if twice is not None:
            raise self._wrong("parts", None, f"has {twice!r} twice; its rows would be read twice")
        if not given:
            raise self._wrong("parts", None, "is empty, so there are no rows")
        return list(given)

    def _given_rows(self, part: str) -> int | None:
        if not hasattr(self._rows_of, "rows"):
            return None
        given = self._ask("rows", part)
        if given is None:
            return None
        try:
            rows = -1 if isinstance(given, bool) else operator.index(given)
        except TypeError:
            rows = -1
        if rows < 0:
            raise self._wrong("rows", part, f"gave {given!r}; it gives a number of rows, or None")
        return rows

    def _ask(self, method: str, *arguments: str) -> Any:
        try:
            return getattr(self._rows_of, method)(*arguments)
        except USERS_CODE_ERRORS as error:
            part = arguments[0] if arguments else None
            raise self._wrong(method, part, f"failed: {described(error)}") from error

    def _wrong(self, method: str, part: str | None, what: str) -> DataError:
        called = f"{method}()" if part is None else f"{method}({part!r})"
        return DataError(f"{self._name}: {called} {what}")


def _made(config: PythonSource, name: str) -> Any:
    factory = find_named("data.source.factory", config.factory)
    if not callable(factory):
        raise ConfigError(f"{name} is {type(factory).__name__}; name a class ({_DOCS})")
    try:
        made = factory(**config.arguments)
    except USERS_CODE_ERRORS as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in config.arguments.items())
        raise ConfigError(
            f"{name}: calling it with ({shown}) failed: {described(error)}; it is given "
            "data.source.arguments"
        ) from error
    for method in _METHODS:
        if not callable(getattr(made, method, None)):
            raise ConfigError(
                f"{name}: {type(made).__name__} has no method {method}; a source has "
                f"{', '.join(_METHODS)} ({_DOCS})"
            )
    return made
