"""Parses whole rows of CSV/TSV to columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa
from pyarrow import csv

from penstock.data.formats.malformed import find_malformed
from penstock.data.formats.row_ends import RowEnds, TextRows
from penstock.data.quarantine import MalformedRow

_CONVERSION = re.compile(r"CSV column #(\d+): .*?CSV conversion error to \S+: (.*)", re.DOTALL)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class TextParser:
    """Turns rows into tables. Has no state, so threads may share it.

    An empty field is null, as are the texts of `null_values`. A blank line is no row, unless there
    is one column.
    """

    def __init__(
        self,
        schema: pa.Schema,
        columns: Sequence[str],
        delimiter: str,
        quote: str | None,
        row_ends: RowEnds,
        null_values: Sequence[str] = (),
    ) -> None:
        self._names = schema.names
        self._delimiter = delimiter
        self._quote = quote
        self._row_ends = row_ends
        self._null_values = ["", *null_values]
        # Every column is converted, so that a row is malformed or not whatever is read of it.
        self._types = {field.name: field.type for field in schema}
        self._columns = list(columns)

    def parse(self, rows: TextRows, fail_fast: bool) -> tuple[pa.Table, list[MalformedRow]]:
        """Parses rows, as `penstock.data.formats.lines.LineParser` says."""
        # Arrow drops a row whose text it cannot give to `skip`.
        is_plain = _is_utf8(rows.text) and not len(rows.odd)
        if is_plain and (len(self._names) == 1 or not rows.has_blank()):
            wrong: list[csv.InvalidRow] = []
            try:
                table = self._read(rows.text, wrong)
                if not wrong and table.num_rows == rows.count:
                    return table.select(self._columns), []
            except pa.ArrowInvalid:
                pass  # The row is found below.
        malformed, good = find_malformed(rows.split(), self._reason, fail_fast)
        table = self._read(good, []).select(self._columns) if good else self._empty()
        return table, malformed

    def _reason(self, rows: Sequence[bytes]) -> str | None:
        """What is wrong with some row; None if nothing is."""
        if len(self._names) > 1 and any(not row.strip(b"\r") for row in rows):
            return "blank line"
        text = b"\n".join([*rows, b""])
        if not _is_utf8(text):
            return "not UTF-8"
        if len(self._row_ends.take(text).odd):
            return (
                "text after the closing quote of a value with line breaks (a quote is missing or "
                "stray)"
            )
        wrong: list[csv.InvalidRow] = []
        try:
            table = self._read(text, wrong)
        except pa.ArrowInvalid as error:
            match = _CONVERSION.search(str(error))
            if match is None:
                return str(error)
            name = self._names[int(match[1])]
            return f"column {name!r} is no {self._types[name]}: {match[2]}"
        # Arrow ends a row at a carriage return outside of quotes.
        if table.num_rows + len(wrong) != len(rows):
            return "a carriage return within the line"
        if wrong:
            return f"{wrong[0].actual_columns} fields, expected {wrong[0].expected_columns}"
        return None

    def _read(self, text: bytes, wrong: list[csv.InvalidRow]) -> pa.Table:
        def skip(row: csv.InvalidRow) -> str:
            wrong.append(row)
            return "skip"

        return csv.read_csv(
            pa.BufferReader(text),
            read_options=csv.ReadOptions(
                use_threads=False, block_size=len(text) + 1, column_names=self._names
            ),
            parse_options=csv.ParseOptions(
                delimiter=self._delimiter,
                quote_char=self._quote or False,
                newlines_in_values=self._row_ends.quoting is not None,
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
