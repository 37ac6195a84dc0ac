"""TFRecord files of `tf.train.Example`, plain or compressed by gzip: records one after the other.

Framing is read here: 8 bytes of length, their checksum, the data, its checksum. What is in the data
is read by `ptars`, from bytes to Arrow; checksums are computed by `google-crc32c`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from penstock.config import TfRecordSource, TfRecordType, compression_of_path
from penstock.data.formats.columnar import Layout, OpenFile
from penstock.data.formats.text import expand_names
from penstock.data.source import CHUNK_ROWS, chunk_rows
from penstock.errors import ConfigError

READ_BYTES = 2 << 20
"""Read at once; bounds the memory of a reader."""
MAX_RECORD_BYTES = 64 << 20
_HEAD, _TAIL = struct.Struct("<QI"), struct.Struct("<I")
_LISTS = ("bytes_list", "float_list", "int64_list")
"""The kinds of a feature, in the order of tf.train.Feature, whose fields are numbered from 1."""
_VALUES: Mapping[str, tuple[str, pa.DataType]] = {
    "int64": ("int64_list", pa.int64()),
    "float32": ("float_list", pa.float32()),
    "float64": ("float_list", pa.float64()),
    "string": ("bytes_list", pa.string()),
    "bytes": ("bytes_list", pa.binary()),
}


class _Column(NamedTuple):
    """What a feature is read as."""

    kind: str
    """Of `_LISTS`."""
    value: pa.DataType
    is_list: bool
    declared: TfRecordType

    @property
    def type(self) -> pa.DataType:
        """Of the column."""
        return pa.list_(self.value) if self.is_list else self.value


class TfRecordFormat:
    """Reads TFRecord. Files have no index, so each is one extent."""

    name = "a TFRecord"

    def __init__(self, config: TfRecordSource) -> None:
        """Finds the packages.

        Raises:
          ConfigError: they are not installed, or no feature is declared, or one twice.
        """
        self._columns: dict[str, _Column] = {}
        for pattern, declared in config.types.items():
            for name in expand_names([pattern]):
                if name in self._columns:
                    raise ConfigError(f"data.source.types: {name!r} is declared twice")
                inner = declared.removeprefix("list<").removesuffix(">")
                kind, value = _VALUES[inner]
                self._columns[name] = _Column(kind, value, inner != declared, declared)
        if not self._columns:
            raise ConfigError(
                "data.source.types: TFRecord files do not say what their features are; declare "
                "those that are columns, as in {user: int64, price: float32, items: list<int64>}"
            )
        self._schema = pa.schema([(name, one.type) for name, one in self._columns.items()])
        self._checksum, self._to_arrow = _packages()

    def layout(self, opened: OpenFile) -> Layout:
        """The declared columns; looks whether the file begins as a TFRecord does."""
        head = b""
        with _stream(opened) as stream:
            while len(head) < _HEAD.size and (read := stream.read(_HEAD.size - len(head))):
                head += read
        self._size(head, 0, 0, 0)
        return Layout(self._schema, None)

    def read(
        self, opened: OpenFile, groups: Sequence[int] | None, columns: Sequence[str]
    ) -> Iterator[pa.Table]:
        """Reads all records, some at a time."""
        most = chunk_rows(len(columns), CHUNK_ROWS)
        first = 0
        with _stream(opened) as stream:
            for records in self._records(stream):
                for low in range(0, len(records), most):
                    some = records[low : low + most]
                    yield self._table(some, first + low, columns)
                first += len(records)

    def _records(self, stream: pa.NativeFile) -> Iterator[list[bytes]]:
        """The data of records, about `READ_BYTES` at a time.

        Raises:
          ArrowInvalid: a checksum is wrong, or the file ends within a record; names its number,
            from 0, and first byte.
        """
        data, at, number, wanted = b"", 0, 0, 0
        while True:
            read = stream.read(max(READ_BYTES, wanted - len(data)))
            if not read:
                if data:
                    raise pa.ArrowInvalid(
                        f"it ends within record {number}, which begins at byte {at}; write it again"
                    )
                return
            data += read
            records: list[bytes] = []
            low = 0
            while (wanted := self._size(data, low, at, number + len(records))) <= len(data) - low:
                record = data[low + _HEAD.size : low + wanted - _TAIL.size]
                (checksum,) = _TAIL.unpack_from(data, low + wanted - _TAIL.size)
                if self._checksum(record) != checksum:
                    raise _damaged("data", number + len(records), at + low)
                records.append(record)
                low += wanted
            data, at, number = data[low:], at + low, number + len(records)
            if records:
                yield records

    def _size(self, data: bytes, low: int, at: int, number: int) -> int:
        """Bytes of the record that begins at `low`, as far as is known."""
        if len(data) - low < _HEAD.size:
            return _HEAD.size
        length, checksum = _HEAD.unpack_from(data, low)
        if self._checksum(data[low : low + 8]) != checksum:
            raise _damaged("length", number, at + low)
        if length > MAX_RECORD_BYTES:
            raise pa.ArrowInvalid(
                f"record {number} at byte {at + low} has {length:,} bytes; up to "
                f"{MAX_RECORD_BYTES:,} are read"
            )
        return int(_HEAD.size + length + _TAIL.size)

    def _table(self, records: Sequence[bytes], first: int, columns: Sequence[str]) -> pa.Table:
        """The columns of records that are the file's from number `first` on."""
        try:
            batch = self._to_arrow(records)
        except ValueError:
            number, error = _first_bad(records, self._to_arrow)
            raise pa.ArrowInvalid(
                f"record {first + number} is no tf.train.Example: {error}"
            ) from None
        entries = _Entries(batch, first)
        arrays = [entries.column(name, self._columns[name]) for name in columns]
        fields = [self._schema.field(name) for name in columns]
        if not columns:
            return pa.table({"": pa.nulls(len(records))}).select([])
        return pa.table(arrays, schema=pa.schema(fields))


class _Entries:
    """The features of some records, all in one array, found by name without looking at others."""

    def __init__(self, batch: pa.RecordBatch, first: int) -> None:
        self._first = first
        self._rows = batch.num_rows
        lists = batch.column(0).field(0)
        entries = lists.values
        values = entries.field("value")
        self._lists = {kind: values.field(kind) for kind in _LISTS}
        self._row_of = np.repeat(np.arange(self._rows), np.diff(lists.offsets.to_numpy()))
        names = entries.field("key").dictionary_encode()
        codes = names.indices.to_numpy()
        self._order = np.argsort(codes, kind="stable")
        self._ends = np.searchsorted(codes[self._order], np.arange(len(names.dictionary) + 1))
        self._codes = {name: code for code, name in enumerate(names.dictionary.to_pylist())}

    def column(self, name: str, column: _Column) -> pa.Array:
        """[rows] the values of a feature; null where a record lacks it, or holds nothing in it.

        Raises:
          ArrowInvalid: it is of another kind, or has several values where one is declared.
        """
        code = self._codes.get(name)
        low, high = (0, 0) if code is None else self._ends[code : code + 2]
        found = self._order[low:high]
        # Of a name that a record has twice the last one counts, as in protocol buffers' maps.
        entry_of = np.full(self._rows, -1, dtype=np.int64)
        entry_of[self._row_of[found]] = found
        indices = pa.array(entry_of, mask=entry_of < 0)
        for kind, lists in self._lists.items():
            if kind != column.kind and found.size:
                is_other = lists.is_valid().take(indices).fill_null(False)
                if is_other.true_count:
                    row = int(is_other.to_numpy(zero_copy_only=False).argmax())
                    raise pa.ArrowInvalid(
                        f"record {self._first + row}: feature {name!r} is a {kind}, but "
                        f"data.source.types declares it {column.declared}"
                    )
        lists = self._lists[column.kind]
        # Of a list that is not there, the values are null too.
        present = pc.and_(pa.array(entry_of >= 0), lists.is_valid().take(indices).fill_null(False))
        taken = lists.field("value").take(pc.if_else(present, indices, None))
        if column.is_list:
            return self._typed(taken, name, column)
        lengths = taken.value_lengths().fill_null(0).to_numpy()
        if lengths.max(initial=0) > 1:
            row = int((lengths > 1).argmax())
            raise pa.ArrowInvalid(
                f"record {self._first + row}: feature {name!r} has {lengths[row]} values; declare "
                f"data.source.types: {{{name}: list<{column.declared}>}}"
            )
        ends: NDArray[np.int64] = np.cumsum(lengths, dtype=np.int64)
        values = taken.flatten().take(pa.array(ends - 1, mask=lengths == 0))
        return self._typed(values, name, column)

    def _typed(self, array: pa.Array, name: str, column: _Column) -> pa.Array:
        try:
            return array.cast(column.type)
        except pa.ArrowInvalid:
            flat = array.flatten() if column.is_list else array
            row, _ = _first_bad(flat, lambda some: some.cast(column.value))
            if column.is_list:
                row = pc.list_parent_indices(array)[row].as_py()
            declared = column.declared.replace("string", "bytes")
            raise pa.ArrowInvalid(
                f"record {self._first + row}: feature {name!r} holds bytes that are no UTF-8; "
                f"declare data.source.types: {{{name}: {declared}}}"
            ) from None


def _first_bad(given: Any, reads: Callable[[Any], Any]) -> tuple[int, str]:
    """The first of some that cannot be read together, found by halving, and what is wrong."""
    low, high, why = 0, len(given), ""
    while True:
        middle = (low + high) // 2 if high - low > 1 else high
        try:
            reads(given[low:middle])
            low = middle
        except ValueError as error:
            high, why = middle, str(error)
            if high - low == 1:
                return low, why
        assert low < high, "each part alone can be read"


def _stream(opened: OpenFile) -> pa.NativeFile:
    compression = compression_of_path(opened.path)
    if compression is None:
        return opened.file
    return pa.CompressedInputStream(opened.file, compression)


def _damaged(what: str, number: int, at: int) -> pa.ArrowInvalid:
    return pa.ArrowInvalid(
        f"the checksum of the {what} of record {number}, which begins at byte {at}, is wrong; is "
        "the file damaged, compressed under another name, or no TFRecord?"
    )


def _packages() -> tuple[Callable[[bytes], int], Callable[[Sequence[bytes]], pa.RecordBatch]]:
    """Masked checksums of bytes, and tables of the data of records."""
    try:
        import google_crc32c
        import ptars
        from google.protobuf import descriptor_pb2, descriptor_pool
    except ImportError as error:
        raise ConfigError(
            f"data.source.format tfrecord: {error}; pip install 'penstock[tfrecord]'"
        ) from None

    crc: Callable[[bytes], int] = google_crc32c.value

    def masked(data: bytes) -> int:
        found = crc(data)
        return ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF

    pool = descriptor_pool.DescriptorPool()
    pool.Add(_example_of(descriptor_pb2))
    example = pool.FindMessageTypeByName("penstock.Example")
    handler = ptars.HandlerPool([example.file]).get_for_message(example)
    return masked, lambda records: handler.list_to_record_batch(list(records))


def _example_of(pb: Any) -> Any:
    """tf.train.Example, with its map of features as what it is on the wire: a list of entries."""
    file = pb.FileDescriptorProto(
        name="penstock_example.proto", package="penstock", syntax="proto3"
    )
    field = pb.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, str, bool], union: str = "") -> None:
        made = file.message_type.add(name=name)
        if union:
            made.oneof_decl.add(name=union)
        for named, number, kind, is_repeated in fields:
            label = field.LABEL_REPEATED if is_repeated else field.LABEL_OPTIONAL
            one = made.field.add(name=named, number=number, label=label)
            if kind.startswith("."):
                one.type, one.type_name = field.TYPE_MESSAGE, f".penstock{kind}"
            else:
                one.type = field.Type.Value(f"TYPE_{kind}")
            if union:
                one.oneof_index = 0

    message("BytesList", ("value", 1, "BYTES", True))
    message("FloatList", ("value", 1, "FLOAT", True))
    message("Int64List", ("value", 1, "INT64", True))
    kinds = ((name, number) for number, name in enumerate(_LISTS, 1))
    titles = (".BytesList", ".FloatList", ".Int64List")
    message(
        "Feature",
        *((*kind, title, False) for kind, title in zip(kinds, titles, strict=True)),
        union="kind",
    )
    message("Entry", ("key", 1, "STRING", False), ("value", 2, ".Feature", False))
    message("Features", ("feature", 1, ".Entry", True))
    message("Example", ("features", 1, ".Features", False))
    return file
