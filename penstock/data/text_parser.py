"""Parses whole lines of CSV/TSV to columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa
from pyarrow import csv

from penstock.data.malformed import find_malformed
from penstock.data.quarantine import MalformedRow

_CONVERSION = re.compile(r"CSV column #(\d+): .*?CSV conversion error to \S+: (.*)", re.DOTALL)
_BLANK = re.compile(rb"(?:^|\n)\r?\n")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _has_lone_return(lines: bytes) -> bool:
    return b"\r" in lines and lines.count(b"\r") != lines.count(b"\r\n")


class TextParser:
    """Turns lines into tables. Has no state, so threads may share it.

    An empty field is null, as are the texts of `null_values`. A blank line is no row, unless there
    is one column.
    """

    def __init__(
        self,
        schema: pa.Schema,
        columns: Sequence[str],
        delimiter: str,
        null_values: Sequence[str] = (),
    ) -> None:
        self._names = schema.names
        self._delimiter = delimiter
        self._null_values = ["", *null_values]
        # Every column is converted, so that a row is malformed or not whatever is read of it.
        self._types = {field.name: field.type for field in schema}
        self._columns = list(columns)

    def parse(self, lines: bytes, fail_fast: bool) -> tuple[pa.Table, list[MalformedRow]]:
        """Parses lines, each ended by a line feed.

        Args:
          lines: the lines.
          fail_fast: stop at the first malformed row; the table is then of no use.

        Returns:
          The columns asked for of the good rows, and the malformed rows in order.
        """
        wrong: list[csv.InvalidRow] = []
        is_plain = _is_utf8(lines) and not _has_lone_return(lines)
        if is_plain and (len(self._names) == 1 or not _BLANK.search(lines)):
            try:
                table = self._read(lines, wrong)
                if not wrong:
                    return table.select(self._columns), []
            except pa.ArrowInvalid:
                pass  # The line is found below.
        malformed, good = find_malformed(lines, self._reason, fail_fast)
        table = self._read(good, []).select(self._columns) if good else self._empty()
        return table, malformed

    def _reason(self, rows: list[bytes]) -> str | None:
        """What is wrong with some row; None if nothing is."""
        if len(self._names) > 1 and any(not row.strip(b"\r") for row in rows):
            return "blank line"
        lines = b"\n".join([*rows, b""])
        # Arrow drops a row whose text it cannot give to `skip`.
        if not _is_utf8(lines):
            return "not UTF-8"
        # Arrow ends a row there.
        if _has_lone_return(lines):
            return "a carriage return within the line"
        wrong: list[csv.InvalidRow] = []
        try:
            self._read(lines, wrong)
        except pa.ArrowInvalid as error:
            match = _CONVERSION.search(str(error))
            if match is None:
                return str(error)
            name = self._names[int(match[1])]
            return f"column {name!r} is no {self._types[name]}: {match[2]}"
        if wrong:
            return f"{wrong[0].actual_columns} fields, expected {wrong[0].expected_columns}"
        return None

    def _read(self, lines: bytes, wrong: list[csv.InvalidRow]) -> pa.Table:
        def skip(row: csv.InvalidRow) -> str:
            wrong.append(row)
            return "skip"

        quoted = self._delimiter == ","
        return csv.read_csv(
            pa.BufferReader(lines),
            read_options=csv.ReadOptions(
                use_threads=False, block_size=len(lines) + 1, column_names=self._names
            ),
            parse_options=csv.ParseOptions(
                delimiter=self._delimiter,
                quote_char='"' if quoted else False,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            convert_options=csv.ConvertOptions(
                column_types=self._types, null_values=self._null_values, strings_can_be_null=True
            ),
        )

    def _empty(self) -> pa.Table:
        schema = pa.schema([(name, self._types[name]) for name in self._columns])
        return schema.empty_table()
