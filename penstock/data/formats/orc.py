"""ORC: stripes, and how many rows each has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import orc

from penstock.data.formats.columnar import Layout, OpenFile

# Fields of ORC's footer (orc_proto.proto): FileTail.footer, Footer.stripes, StripeInformation.
_FOOTER, _STRIPES, _STRIPE_ROWS = 2, 3, 5


class OrcFormat:
    """Reads ORC."""

    name = "a readable ORC"

    def layout(self, opened: OpenFile) -> Layout:
        """Reads the footer."""
        parsed = orc.ORCFile(opened.file)
        rows = _stripe_rows(parsed)
        if len(rows) != parsed.nstripes or rows.sum() != parsed.nrows:
            raise pa.ArrowInvalid(
                f"the footer names {rows.sum()} rows in {len(rows)} stripes, but the file has "
                f"{parsed.nrows} in {parsed.nstripes}"
            )
        return Layout(parsed.schema, rows)

    def read(
        self, opened: OpenFile, groups: Sequence[int] | None, columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Reads stripes, one table each."""
        parsed = orc.ORCFile(opened.file)
        # Of no column, pyarrow reads no row.
        some = list(columns) or parsed.schema.names[:1]
        for stripe in range(parsed.nstripes) if groups is None else groups:
            batch = parsed.read_stripe(stripe, columns=some)
            yield pa.Table.from_batches([batch]).select(list(columns))


def _stripe_rows(parsed: orc.ORCFile) -> NDArray[np.int64]:
    # pyarrow tells the rows of a stripe only by reading it.
    footer = next(_fields(parsed.reader.serialized_file_tail(), _FOOTER), b"")
    assert isinstance(footer, bytes)
    rows = []
    for stripe in _fields(footer, _STRIPES):
        assert isinstance(stripe, bytes)
        count = next(_fields(stripe, _STRIPE_ROWS), 0)
        assert isinstance(count, int)
        if count >= 2**63:
            raise pa.ArrowInvalid(f"a stripe of {count} rows; is it damaged?")
        rows.append(count)
    return np.array(rows, dtype=np.int64)


def _fields(message: bytes, wanted: int) -> Iterator[int | bytes]:
    """Values of one field of a protocol buffer message: numbers, or the bytes of what is nested.

    Raises:
      ArrowInvalid: it is no such message.
    """
    at = 0
    try:
        while at < len(message):
            tag, at = _varint(message, at)
            number, kind = tag >> 3, tag & 7
            value: int | bytes
            if kind == 0:
                value, at = _varint(message, at)
            elif kind in {1, 5}:
                at += 8 if kind == 1 else 4
                continue
            elif kind == 2:
                size, at = _varint(message, at)
                value = message[at : at + size]
                at += size
            else:
                raise pa.ArrowInvalid(f"footer with a field of unknown wire type {kind}")
            if number == wanted:
                yield value
    except IndexError:
        raise pa.ArrowInvalid("footer cut short") from None


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
