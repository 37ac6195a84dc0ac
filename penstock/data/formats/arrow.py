"""Arrow IPC: files (also Feather version 2) and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from penstock.data.formats.columnar import Layout, OpenFile

_FILE_MAGIC = b"ARROW1"
_OLD_FEATHER_MAGIC = b"FEA1"


class ArrowFormat:
    """Reads Arrow IPC; by a file's first bytes, whether it is a file or a stream."""

    name = "a readable Arrow IPC"

    def layout(self, opened: OpenFile) -> Layout:
        """Reads the schema; of a file, also how many rows each record batch has."""
        file = opened.file
        if not _is_file(file):
            with ipc.open_stream(file) as stream:
                return Layout(stream.schema, None)
        with ipc.open_file(file) as reader:
            schema = reader.schema
        if not schema.names:
            return Layout(schema, np.zeros(0, dtype=np.int64))
        # The count stands in a record batch's head, but pyarrow tells it only of what is read.
        file.seek(0)
        narrow = min(range(len(schema.names)), key=lambda index: _width(schema.field(index).type))
        with ipc.open_file(file, options=ipc.IpcReadOptions(included_fields=[narrow])) as reader:
            batches = map(reader.get_batch, range(reader.num_record_batches))
            rows = np.array([batch.num_rows for batch in batches], dtype=np.int64)
        return Layout(schema, rows)

    def read(
        self, opened: OpenFile, groups: Sequence[int] | None, columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Reads record batches, one table each."""
        file = opened.file
        if groups is None:
            with ipc.open_stream(file) as stream:
                schema = stream.schema
            file.seek(0)
            with ipc.open_stream(file, options=_fields(schema, columns)) as stream:
                for batch in stream:
                    yield _checked(batch, columns)
            return
        with ipc.open_file(file) as reader:
            schema = reader.schema
        file.seek(0)
        with ipc.open_file(file, options=_fields(schema, columns)) as reader:
            for group in groups:
                yield _checked(reader.get_batch(group), columns)


def _is_file(file: pa.NativeFile) -> bool:
    start: bytes = file.read(len(_FILE_MAGIC))
    file.seek(0)
    if start.startswith(_OLD_FEATHER_MAGIC):
        raise pa.ArrowInvalid("Feather version 1; write it again as version 2")
    return start == _FILE_MAGIC


def _width(kind: pa.DataType) -> int:
    """Bits of a value; many where they vary."""
    try:
        return int(kind.bit_width)
    except ValueError:
        return 1 << 30


def _fields(schema: pa.Schema, columns: Sequence[str]) -> ipc.IpcReadOptions:
    # No field at all would mean every one.
    return ipc.IpcReadOptions(
        included_fields=[schema.get_field_index(name) for name in columns] or [0]
    )


def _checked(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.Table:
    # A damaged file may hold offsets that point anywhere; all else reads what they say.
    batch.validate(full=True)
    return pa.Table.from_batches([batch]).select(list(columns))
