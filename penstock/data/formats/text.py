"""CSV and TSV files: their columns and types, from the job and the header."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
from pyarrow import csv, fs

from penstock.config import TextSource
from penstock.data.columns.checks import check_types, is_named
from penstock.data.files import list_files
from penstock.data.formats.lines import LineFiles, first_bytes, open_quote
from penstock.data.formats.row_ends import BOM, Quoting, RowEnds
from penstock.data.formats.text_parser import TextParser
from penstock.data.source import TextType, Vector
from penstock.errors import ConfigError, DataError

_TYPES = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}
_NAME_RANGE = re.compile(r"^(.*)\{(\d+)\.\.(\d+)\}(.*)$")


def open_text(
    config: TextSource,
    default_types: Mapping[str, TextType],
) -> LineFiles:
    """Opens CSV/TSV files.

    Args:
      config: which files, their columns and types.
      default_types: types of columns by name or glob, where `config` declares none.

    Raises:
      ConfigError: names or types of columns are wrong.
      DataError: a file cannot be read, or its header is not that of the first.
    """
    filesystem, paths = list_files(config.path)
    delimiter, quote = config.delimiter_character, config.quote_character
    quoting = None if quote is None else Quoting(ord(delimiter), ord(quote))
    row_ends = RowEnds(quoting, line_breaks=config.quoted_line_breaks)
    if config.columns is None:
        names = _header(filesystem, paths[0], config, row_ends)
    else:
        names = expand_names(config.columns)
    _check_names(names, paths[0])
    check_types(config.types, names, paths[0])
    schema = pa.schema(_column_types(names, config, default_types))
    if config.columns is None:
        for path in paths[1:]:
            header = _header(filesystem, path, config, row_ends)
            _check_header(path, header, paths[0], names)
    return LineFiles(
        filesystem,
        paths,
        schema,
        lambda columns: TextParser(schema, columns, delimiter, quote, row_ends, config.null_values),
        row_ends=row_ends,
        has_header=config.columns is None,
        keeps_malformed=config.on_malformed_row == "quarantine",
    )


def guess_delimiter(config: TextSource) -> str | None:
    """Another delimiter than that of the format, if the first line has one and not that; else None.

    Raises:
      DataError: the first file cannot be read.
    """
    filesystem, paths = list_files(config.path)
    line = first_bytes(filesystem, paths[0]).decode(errors="replace")
    if config.delimiter_character in line:
        return None
    return next((one for one in ";|\t," if one in line), None)


def _header(
    filesystem: fs.FileSystem, path: str, config: TextSource, row_ends: RowEnds
) -> list[str]:
    row = first_bytes(filesystem, path, row_ends=row_ends).removeprefix(BOM)
    if not row.strip():
        raise DataError(f"{path}: the first line, the header, is empty")
    try:
        row.decode()
    except UnicodeDecodeError:
        raise DataError(f"{path}:1: the header is not UTF-8; write the file in UTF-8") from None
    if row_ends.open_quote(row) is not None:
        raise open_quote(path, 1, row)
    options = csv.ParseOptions(
        delimiter=config.delimiter_character,
        quote_char=config.quote_character or False,
        newlines_in_values=True,
    )
    try:
        header = csv.read_csv(pa.BufferReader(row), parse_options=options)
        names = list(header.column_names)
    except pa.ArrowException as error:
        if b"\r" in row.rstrip(b"\r\n"):
            raise _carriage_return(path) from None
        raise DataError(f"{path}:1: header cannot be read: {error}") from None
    if header.num_rows:
        raise _carriage_return(path)
    return names


def _carriage_return(path: str) -> DataError:
    return DataError(
        f"{path}:1: the header holds a carriage return before its end, as files of old Macs do; "
        "end lines with line feeds"
    )


def _check_header(path: str, header: list[str], first_path: str, first: list[str]) -> None:
    for position, (name, expected) in enumerate(zip(header, first, strict=False)):
        if name != expected:
            raise DataError(
                f"{path}: column {name!r} stands where {first_path} has {expected!r} "
                f"(column {position + 1}); all files of a source have one header"
            )
    if len(header) != len(first):
        raise DataError(
            f"{path}: {len(header)} columns, but {len(first)} in {first_path}; "
            "all files of a source have one header"
        )


def expand_names(names: Sequence[str]) -> list[str]:
    """Expands `I{1..13}` to I1, I2, ... I13; other names stay."""
    out = []
    for name in names:
        match = _NAME_RANGE.match(name)
        if match is None:
            out.append(name)
            continue
        before, low, high, after = match.groups()
        if int(high) < int(low):
            raise ConfigError(f"data.source.columns: {name!r} is an empty range")
        out += [f"{before}{number}{after}" for number in range(int(low), int(high) + 1)]
    return out


def _check_names(names: Sequence[str], path: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{path}: column {name!r} is named twice; give each its own name")
        seen.add(name)


def _column_types(
    names: Sequence[str],
    config: TextSource,
    default_types: Mapping[str, TextType],
) -> Iterator[tuple[str, pa.DataType]]:
    for name in names:
        declared = [kind for pattern, kind in config.types.items() if is_named(name, pattern)]
        default = next((k for p, k in default_types.items() if is_named(name, p)), "string")
        # No text holds a vector; what the column is says the check of its type.
        default = "string" if isinstance(default, Vector) else default
        # An exact name wins over globs; among globs the last one does.
        kind = config.types.get(name) or (declared[-1] if declared else default)
        yield name, _TYPES[kind]
