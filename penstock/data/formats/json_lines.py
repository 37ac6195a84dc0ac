"""JSON lines files: their columns and types, and the parser of their lines."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from penstock import _core
from penstock.config import JsonLinesSource
from penstock.data.columns.checks import check_types, is_named
from penstock.data.columns.numbers import find_ragged
from penstock.data.files import list_files
from penstock.data.formats.lines import LineFiles, first_bytes
from penstock.data.formats.malformed import find_malformed
from penstock.data.formats.row_ends import BOM, TextRows
from penstock.data.quarantine import MalformedRow
from penstock.data.source import TextType, Vector
from penstock.errors import DataError

SAMPLE_LINES = 1000
"""Lines by which the columns and their types are known."""

_TYPES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}
_TYPES |= {f"list<{name}>": pa.list_(kind) for name, kind in _TYPES.items()}
_AS_NUMBER = {None: "float64", "int64": "float64", "list<int64>": "list<float64>"}
no_widths: Mapping[str, int] = MappingProxyType({})
_GLOB = re.compile(r"[*?\[]")
_COLUMN = re.compile(r"Column\(/?(.*?)\) ")


def open_json_lines(
    config: JsonLinesSource,
    default_types: Mapping[str, TextType],
) -> LineFiles:
    """Opens JSON lines files.

    Args:
      config: which files, and types of columns.
      default_types: of columns by name or glob, of which those that are float64 or vectors are
        used. A vector of another length makes its row malformed.

    Raises:
      ConfigError: a type is given for a glob that matches no column.
      DataError: a file cannot be read, or the first lines hold no object.
    """
    filesystem, paths = list_files(config.path)
    sample = first_bytes(filesystem, paths[0], SAMPLE_LINES).removeprefix(BOM)
    found = _kinds(sample)
    schema = pa.schema(_column_types(found, config, default_types, paths[0]))
    if not schema.names:
        raise DataError(
            f"{paths[0]}: no JSON object with a field in the first {SAMPLE_LINES} lines; JSON "
            "lines hold one object a line, {...}"
        )
    widths = {
        name: kind.width
        for pattern, kind in default_types.items()
        if isinstance(kind, Vector)
        for name in schema.names
        if is_named(name, pattern) and pa.types.is_list(schema.field(name).type)
    }
    return LineFiles(
        filesystem,
        paths,
        schema,
        lambda columns: JsonParser(schema, columns, widths),
        has_header=False,
        keeps_malformed=config.on_malformed_row == "quarantine",
    )


class JsonParser:
    """Turns lines into tables. Has no state, so threads may share it."""

    def __init__(
        self, schema: pa.Schema, columns: Sequence[str], widths: Mapping[str, int] = no_widths
    ) -> None:
        """`widths`: numbers of the lists of columns of vectors."""
        # Every column is converted, so that a row is malformed or not whatever is read of it.
        self._schema = schema
        self._columns = list(columns)
        self._widths = widths

    def parse(self, rows: TextRows, fail_fast: bool) -> tuple[pa.Table, list[MalformedRow]]:
        """Parses lines, as `penstock.data.formats.lines.LineParser` says."""
        if self._is_safe(rows.text):
            try:
                table = self._read(rows.text)
                if self._ragged(table) is None:
                    return table.select(self._columns), []
            except pa.ArrowInvalid:
                pass  # The line is found below.
        malformed, good = find_malformed(rows.split(), self._reason, fail_fast)
        table = self._read(good) if good else self._schema.empty_table()
        return table.select(self._columns), malformed

    def _is_safe(self, lines: bytes) -> bool:
        """Whether each line has the outer form of one object, in UTF-8.

        Arrow's parser crashes on some text that is none, and counts objects, not lines.
        """
        if _core.find_non_object(np.frombuffer(lines, dtype=np.uint8)) >= 0:
            return False
        try:
            lines.decode()
        except UnicodeDecodeError:
            return False
        return True

    def _reason(self, rows: Sequence[bytes]) -> str | None:
        """What is wrong with some row; None if nothing is."""
        lines = b"\n".join([*rows, b""])
        if not self._is_safe(lines):
            if not rows[0].strip():
                return "blank line"
            return "not one JSON object in UTF-8, nested at most 64 deep"
        try:
            return self._ragged(self._read(lines))
        except pa.ArrowInvalid as error:
            return self._explain(str(error))

    def _ragged(self, table: pa.Table) -> str | None:
        """What is wrong with some vector; None if nothing is."""
        for name, width in self._widths.items():
            row = find_ragged(table.column(name), width)
            if row >= 0:
                return (
                    f"field {name!r} has {len(table.column(name)[row])} numbers, expected {width}"
                )
        return None

    def _explain(self, error: str) -> str:
        reason = re.sub(r" in row \d+$", "", error.removeprefix("JSON parse error: "))
        match = _COLUMN.match(reason)
        name = match[1].split("/")[0] if match else ""
        if match and name in self._schema.names and "changed from" in reason:
            given = reason.rpartition(" ")[2]
            return f"field {name!r} is no {self._schema.field(name).type}: {given}"
        return reason[0].lower() + reason[1:]

    def _read(self, lines: bytes) -> pa.Table:
        return pa_json.read_json(
            pa.BufferReader(lines),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            parse_options=pa_json.ParseOptions(
                explicit_schema=self._schema, unexpected_field_behavior="ignore"
            ),
        )


def _kinds(sample: bytes) -> dict[str, str | None]:
    """Type of each field, by the most frequent kind of its values; None: all are null.

    Lines that are no objects are left out: reading finds them.
    """
    counts: dict[str, Counter[str]] = {}
    for line in sample.split(b"\n"):
        if _core.find_non_object(np.frombuffer(line + b"\n", dtype=np.uint8)) >= 0:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row.items():
            counts.setdefault(name, Counter()).update(_kind(value))
    return {name: _joined(kinds) for name, kinds in counts.items() if _joined(kinds) != "object"}


def _kind(value: object) -> list[str]:
    """Name of a value's type; nothing for null."""
    if value is None:
        return []
    if isinstance(value, bool):
        return ["bool"]
    if isinstance(value, int):
        return [
            "int64" if -(2**63) <= value < 2**63 else "uint64" if 0 < value < 2**64 else "float64"
        ]
    if isinstance(value, float):
        return ["float64"]
    if isinstance(value, str):
        return ["string"]
    if isinstance(value, list):
        inner = Counter(kind for item in value for kind in _kind(item))
        joined = _joined(inner)
        nested = joined is not None and (joined == "object" or joined.startswith("list<"))
        return ["object" if nested else f"list<{joined or ''}>"]
    return ["object"]


def _joined(kinds: Counter[str]) -> str | None:
    """One type for values of several; what does not fit is malformed when it is read."""
    known = Counter({kind: count for kind, count in kinds.items() if kind != "list<>"})
    if not known:
        return "list<string>" if kinds else None
    most = known.most_common(1)[0][0]
    outer = "list<{}>" if most.startswith("list<") else "{}"
    for wide in ("float64", "uint64"):
        numbers = {outer.format(one) for one in ("int64", "uint64", "float64")}
        if most in numbers and outer.format(wide) in known:
            return outer.format(wide)
    return most


def _column_types(
    found: Mapping[str, str | None],
    config: JsonLinesSource,
    default_types: Mapping[str, TextType],
    path: str,
) -> Iterator[tuple[str, pa.DataType]]:
    # A column that the first lines lack is there if its name, not a glob, has a type.
    names = [*found, *(n for n in config.types if n not in found and not _GLOB.search(n))]
    check_types(config.types, names, path)
    vectors = [pattern for pattern, kind in default_types.items() if isinstance(kind, Vector)]
    numbers = [pattern for pattern, kind in default_types.items() if kind == "float64"]
    numbers += vectors
    for name in names:
        declared = [kind for pattern, kind in config.types.items() if is_named(name, pattern)]
        kind = found.get(name)
        if kind is None and any(is_named(name, pattern) for pattern in vectors):
            kind = "list<float64>"
        if any(is_named(name, pattern) for pattern in numbers):
            # Later values may have a fraction.
            kind = _AS_NUMBER.get(kind, kind)
        # An exact name wins over globs; among globs the last one does.
        chosen = config.types.get(name) or (declared[-1] if declared else kind or "string")
        yield name, _TYPES[chosen]
