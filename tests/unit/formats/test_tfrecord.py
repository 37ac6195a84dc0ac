"""TFRecord: read as declared, against a writer of its own; what is wrong is told by record."""

import gzip
import struct
import sys

import numpy as np
import pyarrow as pa
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from pydantic import TypeAdapter

from penstock.config import Source, parse_job
from penstock.data import Dataset
from penstock.data.formats import columnar, tfrecord
from penstock.data.opening import open_source
from penstock.errors import ConfigError, DataError
from tests.contract.data_cases import assert_resumes_everywhere, read_all

pytest.importorskip("ptars", reason="penstock[tfrecord] is not installed")

# As TensorFlow publishes it: the features are a map.
FIELDS = {
    "BytesList": [("value", 1, 12, 3, None)],
    "FloatList": [("value", 1, 2, 3, None)],
    "Int64List": [("value", 1, 3, 3, None)],
    "Feature": [
        ("bytes_list", 1, 11, 1, "BytesList"),
        ("float_list", 2, 11, 1, "FloatList"),
        ("int64_list", 3, 11, 1, "Int64List"),
    ],
    "Features": [("feature", 1, 11, 3, "Features.FeatureEntry")],
    "Example": [("features", 1, 11, 1, "Features")],
}


def example_class():
    file = descriptor_pb2.FileDescriptorProto(name="e.proto", package="tf", syntax="proto3")

    def add(message, fields, union=False):
        for name, number, kind, label, of in fields:
            one = message.field.add(name=name, number=number, type=kind, label=label)
            if of:
                one.type_name = f".tf.{of}"
            if union:
                one.oneof_index = 0

    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        if name == "Feature":
            message.oneof_decl.add(name="kind")
        if name == "Features":
            entry = message.nested_type.add(name="FeatureEntry")
            entry.options.map_entry = True
            add(entry, [("key", 1, 9, 1, None), ("value", 2, 11, 1, "Feature")])
        add(message, fields, union=name == "Feature")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


EXAMPLE = example_class()


def encoded(row):
    """Integers, floats, texts and bytes, single or in lists; None: no kind is set."""
    example = EXAMPLE()
    for name, given in row.items():
        feature = example.features.feature[name]
        values = given if isinstance(given, list) else [] if given is None else [given]
        if given is None:
            continue
        if values and isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        elif values and isinstance(values[0], float):
            feature.float_list.value.extend(values)
        elif values:
            feature.bytes_list.value.extend(
                one.encode() if isinstance(one, str) else one for one in values
            )
        else:
            feature.int64_list.SetInParent()
    return example.SerializeToString()


def crc32c(data):
    """Bit by bit, as RFC 3720 has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def framed(data):
    def masked(part):
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def write(path, rows):
    data = b"".join(framed(one if isinstance(one, bytes) else encoded(one)) for one in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return data


def opened(path, types, **fields):
    config = {"format": "tfrecord", "path": str(path), "types": types, **fields}
    return open_source(TypeAdapter(Source).validate_python(config), {})


def columns_of(path, types, columns=None):
    source = opened(path, types)
    names = columns or source.schema.names
    (extent,) = source.extents()
    return pa.concat_tables([chunk.table for chunk in source.read(extent, names)])


TYPES = {
    "id": "int64",
    "f": "float32",
    "wide": "float64",
    "text": "string",
    "raw": "bytes",
    "ids": "list<int64>",
    "fs": "list<float32>",
    "texts": "list<string>",
    "raws": "list<bytes>",
}
ROWS = [
    {
        "id": 2**63 - 1, "f": 0.5, "wide": 0.25, "text": "ü", "raw": b"\xff\x00",
        "ids": [1, -2, 3], "fs": [1.0, 2.5], "texts": ["a", ""], "raws": [b"\xfe"], "unread": 3,
    },
    {},
    {"id": -(2**63), "ids": [], "texts": ["x"]},
    dict.fromkeys(TYPES),
    {"id": 0, "f": 0.0, "text": "", "ids": [0]},
]  # fmt: skip


@pytest.mark.parametrize("name", ["a.tfrecord", "a.tfrecords", "a.tfrecord.gz"])
@pytest.mark.parametrize("read_bytes", [1, 13, 100, 1 << 20])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_features_are_columns_as_declared(name, read_bytes, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecord, "READ_BYTES", read_bytes)
    monkeypatch.setattr(tfrecord, "CHUNK_ROWS", chunk)
    write(tmp_path / name, ROWS)
    expected = [{key: row.get(key) for key in TYPES} for row in ROWS]
    got = columns_of(tmp_path / name, TYPES)
    assert got.schema.types == [
        pa.int64(), pa.float32(), pa.float64(), pa.string(), pa.binary(), pa.list_(pa.int64()),
        pa.list_(pa.float32()), pa.list_(pa.string()), pa.list_(pa.binary()),
    ]  # fmt: skip
    assert got.to_pylist() == expected
    backwards = list(reversed(TYPES))
    assert columns_of(tmp_path / name, TYPES, backwards).to_pylist() == [
        {key: row[key] for key in backwards} for row in expected
    ]


def test_many_records_of_many_features_equal_a_plain_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecord, "READ_BYTES", 5000)
    rng = np.random.default_rng(3)
    names = [f"c{number}" for number in range(12)]
    rows = []
    for _ in range(300):
        there = rng.permutation(names)[: rng.integers(0, 12)]
        rows.append({name: [int(v) for v in rng.integers(-5, 5, rng.integers(0, 4))]
                     for name in there})  # fmt: skip
    write(tmp_path / "a.tfrecord", rows)
    got = columns_of(tmp_path / "a.tfrecord", {"c{0..11}": "list<int64>"})
    assert got.to_pylist() == [{name: row.get(name) for name in names} for row in rows]


def test_a_name_that_a_record_has_twice_counts_last(tmp_path):
    # Two messages behind each other are one that has the fields of both.
    write(tmp_path / "a.tfrecord", [encoded({"id": 1}) + encoded({"id": 2}), {"id": 3}])
    assert columns_of(tmp_path / "a.tfrecord", {"id": "int64"})["id"].to_pylist() == [2, 3]


def test_integers_that_are_not_packed(tmp_path):
    value = b"\x08\x05\x08\x07"  # field 1, twice
    feature = b"\x1a" + bytes([len(value)]) + value
    entry = b"\x0a\x01i\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    write(tmp_path / "a.tfrecord", [b"\x0a" + bytes([len(features)]) + features])
    assert columns_of(tmp_path / "a.tfrecord", {"i": "list<int64>"})["i"].to_pylist() == [[5, 7]]


def job(path, **source):
    types = {"label": "int64", "key": "int64", "number": "float32", "list": "list<int64>"}
    return parse_job({
        "data": {
            "source": {"format": "tfrecord", "path": str(path), "types": types, **source},
            "label": {"column": "label"},
            "numeric": [{"columns": ["number"]}],
            "split": {"by": "fraction", "evaluation": 0.2},
            "shuffle": {"block_rows": 50},
        },
        "features": [{"columns": ["key"]}, {"columns": ["list"], "pooling": "mean"}],
    })


def rows_of(first, count):
    return [
        {"label": n % 2, "key": n, "number": n / 2, "list": list(range(n % 4))}
        for n in range(first, first + count)
    ]


@pytest.mark.parametrize("ending", ["tfrecord", "tfrecord.gz"])
def test_batches_and_resume_at_each(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(tfrecord, "READ_BYTES", 700)
    monkeypatch.setattr(columnar, "CHUNK_ROWS", 17)
    for number in range(3):
        write(tmp_path / f"day={number}" / f"p.{ending}", rows_of(number * 100, 40))
    dataset = Dataset.open(job(tmp_path))
    assert (dataset.num_rows("train"), dataset.num_rows("evaluation")) == (96, 24)
    found = [key for batch in read_all(dataset, shuffle=False)
             for key in batch.sparse["key"].values.tolist()]  # fmt: skip
    assert found == [*range(40), *range(100, 140), *range(200, 216)]
    assert_resumes_everywhere(dataset)
    source = opened(tmp_path, {"key": "int64"}, partitions={"day": "int64"})
    days = [chunk.table.to_pylist()[0] for one in source.extents()
            for chunk in source.read(one, ["day", "key"])]  # fmt: skip
    assert {(row["day"], row["key"] // 100) for row in days} == {(0, 0), (1, 1), (2, 2)}


def refused(path, types=None, error=DataError):
    with pytest.raises(error) as caught:
        columns_of(path, types or {"id": "int64"})
    return str(caught.value)


class TestDamaged:
    def write(self, path, change):
        data = bytearray(write(path, [{"id": number} for number in range(5)]))
        size = len(data) // 5
        change(data, size)
        path.write_bytes(data)
        return size

    @pytest.mark.parametrize(
        "within, what", [(3, "length"), (9, "length"), (14, "data"), (-2, "data")]
    )
    @pytest.mark.parametrize("record", [1, 4])
    def test_a_bit_that_flipped(self, within, what, record, tmp_path):
        def flip(data, size):
            data[record * size + within % size] ^= 0x10

        size = self.write(tmp_path / "a.tfrecord", flip)
        said = refused(tmp_path / "a.tfrecord")
        assert said.startswith(f"{tmp_path}/a.tfrecord: cannot be read: the checksum of the {what}")
        assert f"of record {record}, which begins at byte {record * size}, is wrong" in said

    @pytest.mark.parametrize("left", [1, 11, 12, 20, -1])
    def test_an_end_within_a_record(self, left, tmp_path):
        def cut(data, size):
            del data[3 * size + left % size :]

        size = self.write(tmp_path / "a.tfrecord", cut)
        said = refused(tmp_path / "a.tfrecord")
        assert f"ends within record 3, which begins at byte {3 * size}; write it again" in said

    def test_another_format(self, tmp_path):
        (tmp_path / "a.tfrecord").write_bytes(b"label,key\n" * 100)
        said = refused(tmp_path / "a.tfrecord")
        assert "a.tfrecord: not a TFRecord file: the checksum of the length of record 0" in said
        write(tmp_path / "b.tfrecord.gz", ROWS)
        (tmp_path / "b.tfrecord.gz").rename(tmp_path / "b.tfrecord")
        assert "compressed under another name" in refused(tmp_path / "b.tfrecord")

    @pytest.mark.parametrize("size", [1, 11, 12, 13])
    def test_a_file_of_less_than_a_record(self, size, tmp_path):
        write(tmp_path / "a.tfrecord", [b"", {"id": 1}])
        whole = (tmp_path / "a.tfrecord").read_bytes()
        assert columns_of(tmp_path / "a.tfrecord", {"id": "int64"})["id"].to_pylist() == [None, 1]
        (tmp_path / "a.tfrecord").write_bytes(whole[:size])
        assert "it ends within" in refused(tmp_path / "a.tfrecord")

    def test_gzip_that_ends_early(self, tmp_path):
        write(tmp_path / "a.tfrecord.gz", rows_of(0, 1000))
        whole = (tmp_path / "a.tfrecord.gz").read_bytes()
        (tmp_path / "a.tfrecord.gz").write_bytes(whole[: len(whole) // 2])
        said = refused(tmp_path / "a.tfrecord.gz", {"key": "int64"})
        assert "a.tfrecord.gz: " in said and "Truncated compressed stream" in said

    def test_a_record_that_is_too_long(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tfrecord, "MAX_RECORD_BYTES", 50)
        write(tmp_path / "a.tfrecord", [{"id": 1}, {"raw": b"x" * 60}])
        said = refused(tmp_path / "a.tfrecord")
        assert "record 1 at byte" in said and "up to 50 are read" in said


@pytest.mark.parametrize(
    "row, types, said",
    [
        (b"\xff\xff", {"id": "int64"}, " is no tf.train.Example: "),
        ({"id": 0.5}, {"id": "int64"}, ": feature 'id' is a float_list, but {0} declares it int64"),
        ({"id": "1"}, {"id": "list<int64>"}, ": feature 'id' is a bytes_list, but {0} declares it "
         "list<int64>"),
        ({"id": [1, 2]}, {"id": "int64"}, ": feature 'id' has 2 values; declare {0}: "
         "{{id: list<int64>}}"),
        ({"t": b"\xff"}, {"t": "string"}, ": feature 't' holds bytes that are no UTF-8; declare "
         "{0}: {{t: bytes}}"),
        ({"t": ["a", b"\xff"]}, {"t": "list<string>"}, ": feature 't' holds bytes that are no "
         "UTF-8; declare {0}: {{t: list<bytes>}}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk, read_bytes", [(1000, 1 << 20), (3, 1 << 20), (1000, 40)])
def test_records_that_are_not_as_declared(
    row, types, said, chunk, read_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(tfrecord, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(tfrecord, "READ_BYTES", read_bytes)
    # Values before it that are right, at another place among the values than among the records.
    right = {"t": ["x", "y", "z"]} if "list" in str(types) else {}
    write(tmp_path / "a.tfrecord", [{}, right] + [{}] * 5 + [row, {}])
    found = refused(tmp_path / "a.tfrecord", types)
    said = said.format("data.source.types")
    assert found.startswith(f"{tmp_path}/a.tfrecord: cannot be read: record 7{said}")


class TestDeclared:
    def test_nothing(self, tmp_path):
        write(tmp_path / "a.tfrecord", ROWS)
        with pytest.raises(ConfigError, match="do not say what their features are; declare those"):
            opened(tmp_path, {})

    def test_one_twice(self, tmp_path):
        write(tmp_path / "a.tfrecord", ROWS)
        with pytest.raises(ConfigError, match="'c2' is declared twice"):
            opened(tmp_path, {"c{1..3}": "int64", "c2": "string"})

    def test_a_type_that_there_is_not(self, tmp_path):
        with pytest.raises(ConfigError, match=r"data\.source\.types\.key.*'int64'.*'int32'"):
            parse_job({
                "data": {
                    "source": {"format": "tfrecord", "path": "x", "types": {"key": "int32"}},
                    "label": {"column": "label"},
                },
                "features": [],
            })


@pytest.mark.parametrize("name", ["ptars", "google_crc32c"])
def test_a_package_that_is_not_installed(name, tmp_path, monkeypatch):
    write(tmp_path / "a.tfrecord", ROWS)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'penstock\[tfrecord\]'"):
        opened(tmp_path, {"id": "int64"})
