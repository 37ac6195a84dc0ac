"""Columns that folders name (`region=01/day=2024-01-03/`), beside those of any files.

Their types are declared, never guessed. What a file's folders say is read once, when its source is
opened; chunks get columns of one value, which no row costs more than its place in them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import TypeAlias
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from penstock.config import NULL_PARTITION, PartitionType
from penstock.data.source import CHUNK_ROWS, Chunk, Extent, RowCount, Source
from penstock.errors import DataError
from penstock.position import FileTag

Value: TypeAlias = str | int | float | date | datetime | None

_TYPES: Mapping[PartitionType, pa.DataType] = {
    # The text of a chunk's rows is hashed once.
    "string": pa.dictionary(pa.int32(), pa.string()),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "float64": pa.float64(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
}
_RANGES = {"int64": (-(2**63), 2**63), "uint64": (0, 2**64)}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_TIMESTAMP = re.compile(
    r"\d{4}-\d{2}-\d{2}[ T]\d{2}(:\d{2}(:\d{2}(\.\d{1,6})?)?)?(Z|[-+]\d{2}:\d{2})?", re.ASCII
)
_WRITTEN = {
    "date": "a date like 2024-01-31",
    "timestamp": "a time like 2024-01-31 06:00:00",
    "float64": "a finite number",
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS_PER_DAY = 86_400_000


class Partitioned:
    """A source of files with the columns that their folders name behind its own, by name."""

    def __init__(self, files: Source, types: Mapping[str, PartitionType]) -> None:
        """Reads the paths.

        Args:
          files: the source of the files.
          types: type by name; a name that folders have and that is not among them is no column.

        Raises:
          DataError: a file's folders lack a name or have it twice, or a value is not of its type;
            a name is that of a column of the files.
        """
        self._files = files
        self._types = dict(sorted(types.items()))
        self.paths: Sequence[str] = files.paths
        twice = next((name for name in self._types if name in files.schema.names), None)
        if twice is not None:
            raise DataError(
                f"{files.paths[0]}: column {twice!r} is in the file, and data.source.partitions "
                "takes it from the path; take it out of partitions to read the file's, or rename "
                "one of them"
            )
        self.schema: pa.Schema = pa.schema([
            *files.schema,
            *(pa.field(name, _TYPES[kind]) for name, kind in self._types.items()),
        ])
        self._of_folders: dict[str, Mapping[str, Value]] = {}
        for path in files.paths:
            folder = path.rpartition("/")[0]
            if folder not in self._of_folders:
                self._of_folders[folder] = _values(path, folder, self._types)

    @property
    def num_groups(self) -> int | None:
        """Of the files; None: not counted."""
        return self._files.num_groups

    def extents(self) -> Sequence[Extent]:
        """Those of the files."""
        return self._files.extents()

    def count_rows(self, extent: Extent) -> int:
        """Rows of the extent."""
        return self._files.count_rows(extent)

    def known_rows(self, extent: Extent) -> int | None:
        """Rows of the extent; None: it must be read for that."""
        return self._files.known_rows(extent)

    def row_counts(self, extent: Extent) -> Iterator[int]:
        """Rows of successive stretches of the extent."""
        return self._files.row_counts(extent)

    def expected_rows(self, extents: Sequence[Extent]) -> RowCount | None:
        """Rows of the extents, as far as the files tell."""
        return self._files.expected_rows(extents)

    def cut(self, extent: Extent, row: int) -> tuple[Extent, Extent]:
        """Cuts an extent before its row `row`."""
        return self._files.cut(extent, row)

    def read(self, extent: Extent, columns: Sequence[str]) -> Iterator[Chunk]:
        """Reads the files' columns, and puts those of the path where they are asked for."""
        values = self._values_of(extent.path)
        of_file = [name for name in columns if name not in self._types]
        added = {name: _Repeated(self._types[name], values[name]) for name in columns
                 if name in self._types}  # fmt: skip
        for chunk in self._files.read(extent, of_file):
            table, rows = chunk.table, chunk.table.num_rows
            arrays = [
                added[name].first(rows) if name in added else table.column(name) for name in columns
            ]
            yield chunk._replace(table=pa.table(arrays, names=list(columns)) if arrays else table)

    def may_hold(self, extent: Extent, column: str, low: int | None, high: int | None) -> bool:
        """Of a column of the path its one time is known; else as the files know."""
        if column not in self._types:
            return self._files.may_hold(extent, column, low, high)
        value = self._values_of(extent.path)[column]
        if isinstance(value, datetime):
            since = value - _EPOCH
            ms: float = since.days * _MS_PER_DAY + since.seconds * 1000 + since.microseconds / 1000
        elif isinstance(value, date):
            ms = (value - _EPOCH.date()).days * _MS_PER_DAY
        elif isinstance(value, int):
            ms = value
        else:
            # A time that is missing must be found and named.
            return True
        return (high is None or math.floor(ms) < high) and (low is None or math.ceil(ms) >= low)

    def identify(self, path: str, until: int = 0) -> FileTag:
        """The identity of a file; in other folders its rows are others."""
        return self._marked(self._files.identify(path, until), path)

    def holds(self, path: str, before: FileTag) -> bool:
        """Whether the file holds what `before` identifies, in folders that say the same."""
        try:
            return self._files.holds(path, self._marked(before, path))
        except ValueError:
            return False  # no digest of ours

    def window(self, path: str) -> int:
        """Of the files."""
        return self._files.window(path)

    def may_grow(self, path: str) -> bool:
        """As the files know."""
        return self._files.may_grow(path)

    def _values_of(self, path: str) -> Mapping[str, Value]:
        return self._of_folders[path.rpartition("/")[0]]

    def _marked(self, tag: FileTag, path: str) -> FileTag:
        """The tag with the values of the path folded into its digest, or taken out of it again."""
        values = [
            [name, None if value is None else str(value)]
            for name, value in self._values_of(path).items()
        ]
        # FORMAT: checkpoints hold such digests; never change.
        digits = len(tag.digest)
        content = hashlib.blake2b(json.dumps(values).encode(), digest_size=digits // 2).digest()
        mixed = int(tag.digest, 16) ^ int.from_bytes(content, "big")
        return tag._replace(digest=f"{mixed:0{digits}x}")


class _Repeated:
    """A column of one value, made once for all chunks of an extent."""

    def __init__(self, kind: PartitionType, value: Value) -> None:
        self._kind, self._value = _TYPES[kind], value
        self._array = self._of(0)

    def first(self, rows: int) -> pa.Array:
        """[rows] the value."""
        if len(self._array) < rows:
            self._array = self._of(max(rows, CHUNK_ROWS if len(self._array) else 0))
        return self._array.slice(0, rows)

    def _of(self, rows: int) -> pa.Array:
        if self._value is None:
            return pa.nulls(rows, self._kind)
        if pa.types.is_dictionary(self._kind):
            # Its places are zeros that nobody has written to, so memory that is there for all.
            return pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(rows, dtype=np.int32)), pa.array([self._value], pa.string())
            )
        return pa.repeat(pa.scalar(self._value, self._kind), rows)


def _values(path: str, folder: str, types: Mapping[str, PartitionType]) -> dict[str, Value]:
    """What the folders of a file say, in the order of `types`."""
    found: dict[str, str] = {}
    for part in folder.split("/"):
        key, equals, text = part.partition("=")
        try:
            name, value = unquote(key, errors="strict"), unquote(text, errors="strict")
        except UnicodeDecodeError:
            raise DataError(
                f"{path}: the folder {part!r} is no UTF-8 once its % are read; rename it"
            ) from None
        if not equals or name not in types:
            continue
        if name in found:
            raise DataError(
                f"{path}: two folders name {name!r}; rename one, or take it out of "
                "data.source.partitions"
            )
        found[name] = value
    lacking = next((name for name in types if name not in found), None)
    if lacking is not None:
        raise DataError(
            f"{path}: no folder of its path says {lacking}=..., which data.source.partitions "
            "declares; move it into such a folder, write the whole path, or take the name out of "
            "partitions"
        )
    return {name: _value(path, name, kind, found[name]) for name, kind in types.items()}


def _value(path: str, name: str, kind: PartitionType, text: str) -> Value:
    if text == NULL_PARTITION:
        return None
    value = _parsed(kind, text)
    if value is None:
        raise DataError(
            f"{path}: {name}={text} is no {kind} ({_WRITTEN.get(kind, 'an integer in its range')});"
            f" rename the folder, or declare data.source.partitions: {{{name}: string}}"
        )
    return value


def _parsed(kind: PartitionType, text: str) -> Value:
    """The value of a text; None: it is not of the type."""
    if kind == "string":
        return text
    try:
        if kind == "date":
            return date.fromisoformat(text) if _DATE.fullmatch(text) else None
        if kind == "timestamp":
            return _moment(text) if _TIMESTAMP.fullmatch(text) else None
    except ValueError:
        return None
    if kind == "float64":
        number = float(text) if _NUMBER.fullmatch(text) else math.inf
        return number if math.isfinite(number) else None
    # Longer ones are out of range, and Python refuses to read those of thousands of digits.
    integer = int(text) if _INTEGER.fullmatch(text) and len(text) <= 64 else None
    low, high = _RANGES[kind]
    return integer if integer is not None and low <= integer < high else None


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
