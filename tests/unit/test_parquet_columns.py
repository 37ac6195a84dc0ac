"""What the core decodes of Parquet files is what pyarrow reads of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import _core
from penstock.config import ParquetSource
from penstock.data import Dataset
from penstock.data.parquet import ParquetFiles
from penstock.data.parquet_columns import open_columns, plain_columns
from penstock.errors import DataError
from tests.contract.data_cases import (
    assert_resumes_everywhere,
    assert_same_batches,
    make_job,
    make_table,
    read_all,
    write_case,
)

KINDS = ("int32", "int64", "uint32", "uint64", "float32", "float64")


@pytest.fixture(autouse=True)
def _small_row_groups(monkeypatch):
    """Files of tests are small."""
    monkeypatch.setattr("penstock.data.parquet._LEAST_GROUP_ROWS", 1)


def decode(path, names, sizes=(2**62,)):
    """The columns as the core reads them, `sizes` rows at a time in turn."""
    footer = pq.read_metadata(path)
    groups = range(footer.num_row_groups)
    with pa.OSFile(str(path)) as file:
        readers = open_columns(file, plain_columns(file, footer), names, groups)
        assert list(readers) == list(names)
        pieces, left = [], footer.num_rows
        while left:
            for size in sizes:
                rows = min(size, left)
                pieces.append({name: reader.read(rows) for name, reader in readers.items()})
                left -= rows
    for piece in pieces:
        for array in piece.values():
            array.validate(full=True)
    return {name: pa.chunked_array([piece[name] for piece in pieces]) for name in names}


def assert_as_pyarrow(path, sizes=(2**62,)):
    expected = pq.read_table(path)
    found = decode(path, expected.schema.names, sizes)
    for name, column in found.items():
        assert column.type == expected.schema.field(name).type
        # As bits: NaN equals NaN then.
        assert column.null_count == expected[name].null_count
        ours, theirs = column.combine_chunks(), expected[name].combine_chunks()
        assert ours.is_valid().equals(theirs.is_valid())
        zero = pa.scalar(0, column.type)
        bits = [np.asarray(array.fill_null(zero)).tobytes() for array in (ours, theirs)]
        assert bits[0] == bits[1], name


def numbers(kind, n, different, nulls, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, max(different, 1), n)
    if kind.startswith("int"):
        values -= different // 2
    elif kind.startswith("float"):
        values = np.where(values == 0, np.nan, values / 3)
    return pa.array(values.astype(kind), mask=rng.random(n) < nulls if nulls else None)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_all_kinds_of_pages(tmp_path, codec, version, dictionary):
    n = 10_007
    columns = {
        f"{kind} {different} {nulls}": numbers(kind, n, different, nulls)
        for kind in KINDS
        for different in (1, 3, 5000)
        for nulls in (0, 0.3, 1)
    }
    fields = [
        pa.field(name, array.type, nullable=" 0" not in name[-2:])
        for name, array in columns.items()
    ]
    assert {field.nullable for field in fields} == {True, False}
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table(list(columns.values()), pa.schema(fields)),
        path,
        compression=codec,
        data_page_version=version,
        use_dictionary=dictionary,
        row_group_size=4000,
        data_page_size=3000,
        write_batch_size=100,
        write_page_checksum=True,
    )
    assert_as_pyarrow(path)
    assert_as_pyarrow(path, sizes=(1, 7, 1024, 3))


def test_a_dictionary_that_ends_within_a_column(tmp_path):
    """Writers go over to plain pages when a dictionary grows too large."""
    path = tmp_path / "rows.parquet"
    table = pa.table({"a": numbers("int64", 50_000, 40_000, 0.1)})
    pq.write_table(table, path, dictionary_pagesize_limit=100_000, data_page_size=10_000)
    assert_as_pyarrow(path, sizes=(999,))


@pytest.mark.parametrize("bits", range(18))
def test_indices_of_every_width(tmp_path, bits):
    path = tmp_path / "rows.parquet"
    rng = np.random.default_rng(bits)
    # Each value is there once, so that the dictionary needs all bits.
    values = rng.permutation(np.r_[: 2**bits, rng.integers(0, 2**bits, 1001)])
    table = pa.table({"a": values, "b": pa.array(values, mask=rng.random(values.size) < 0.5)})
    pq.write_table(table, path, dictionary_pagesize_limit=2**30)
    assert_as_pyarrow(path, sizes=(12_345, 1, 6))


runs = st.lists(st.tuples(st.integers(1, 200), st.sampled_from("same other null")), max_size=30)


@settings(max_examples=60, deadline=None)
@given(runs=runs, different=st.integers(1, 70_000), size=st.integers(1, 3000), v2=st.booleans())
def test_runs_of_values_and_of_nulls(tmp_path_factory, runs, different, size, v2):
    path = tmp_path_factory.mktemp("runs") / "rows.parquet"
    rng = np.random.default_rng(different)
    values = [rng.integers(0, different, 5)]
    valid = [np.ones(5, dtype=bool)]
    for length, kind in runs:
        values.append(
            rng.integers(0, different, length if kind == "o" else 1).repeat(
                1 if kind == "o" else length
            )
        )
        valid.append(np.full(length, kind != "n"))
    array = pa.array(np.concatenate(values), mask=~np.concatenate(valid))
    version = "2.0" if v2 else "1.0"
    table = pa.table({"a": array})
    pq.write_table(table, path, data_page_version=version, row_group_size=max(1, len(array) // 2))
    assert_as_pyarrow(path, sizes=(size,))


def test_the_rest_is_left_to_pyarrow(tmp_path):
    n = 300
    table = pa.table({
        "plain": numbers("int64", n, 20, 0.2),
        "text": pa.array(["a", "b", None] * 100),
        "list": pa.array([[1], [], [2, 3]] * 100),
        "small": pa.array(range(n), pa.int16()),
        "time": pa.array(range(n), pa.timestamp("ms")),
        "wide": pa.array(range(n), pa.int64()).cast(pa.decimal128(19, 0)),
        "folded": pa.array(["x", "y", None] * 100).dictionary_encode(),
        "delta": numbers("int64", n, 50, 0.1),
        "a": pa.array([{"b": i, "plain": -i} for i in range(n)]),
        "a.b": numbers("int64", n, 9, 0),
    })
    path = tmp_path / "rows.parquet"
    pq.write_table(
        table,
        path,
        row_group_size=128,
        use_dictionary=["plain", "a.b"],
        column_encoding={"delta": "DELTA_BINARY_PACKED"},
    )
    footer = pq.read_metadata(path)
    with pa.OSFile(str(path)) as file:
        names = table.schema.names
        assert list(open_columns(file, plain_columns(file, footer), names, [0, 1, 2])) == [
            "plain",
            "a.b",
        ]
    source = ParquetFiles(ParquetSource(format="parquet", path=str(path)))
    names = [*reversed(names), "plain"]
    (split,) = source.splits()
    for part in (split, *source.cut(split, 137)):
        read = pa.concat_tables([chunk.table for chunk in source.read(part, names)])
        expected = pq.read_table(path).slice(part.start, part.stop - part.start).select(names)
        assert read.schema.types == expected.schema.types and read.schema.names == names
        for one, other in zip(read.columns, expected.columns, strict=True):
            assert one.to_pylist() == other.to_pylist()


def test_one_row_group_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.data.parquet.CHUNK_ROWS", 1000)
    path = tmp_path / "rows.parquet"
    table = pa.table({"a": numbers("int64", 5300, 700, 0.2), "b": numbers("float32", 5300, 9, 0)})
    pq.write_table(table, path, row_group_size=2500)
    source = ParquetFiles(ParquetSource(format="parquet", path=str(path)))
    (split,) = source.splits()
    tables = [chunk.table for chunk in source.read(split, ["b", "a"])]
    assert [part.num_rows for part in tables] == [1000, 1000, 1000, 1000, 1000, 300]
    assert pa.concat_tables(tables)["a"].equals(table["a"])


@pytest.mark.parametrize("shuffled", [True, False])
def test_batches_are_those_of_pyarrow(tmp_path, monkeypatch, shuffled):
    """Bit for bit, and a run that one has begun the other ends."""
    job = make_job(write_case("parquet", make_table(700), tmp_path))
    options = {} if shuffled else {"shuffle": False}
    ours = read_all(Dataset.open(job), **options)
    assert_resumes_everywhere(Dataset.open(job), **options)
    monkeypatch.setattr("penstock.data.parquet._LEAST_GROUP_ROWS", 2**62)
    assert_same_batches(ours, read_all(Dataset.open(job), **options))
    rest = read_all(Dataset.open(job), start=ours[2].end, **options)
    assert_same_batches(ours[3:], rest)


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_damaged_files_are_errors(tmp_path, codec, version):
    """Whatever bytes the pages have, reading them ends: with an error, or with other values."""
    path = tmp_path / "rows.parquet"
    table = pa.table({
        "a": numbers("int64", 3000, 300, 0.2),
        "b": numbers("int32", 3000, 7, 0),
        "c": numbers("float64", 3000, 2900, 0.5),
    })
    options = {"compression": codec, "data_page_version": version, "data_page_size": 2000}
    pq.write_table(table, path, **options)
    source = ParquetFiles(ParquetSource(format="parquet", path=str(path)))
    (split,) = source.splits()
    good = path.read_bytes()
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")
    rng = np.random.default_rng(7)
    errors = 0
    for _ in range(400):
        bad = bytearray(good)
        for place in rng.integers(4, footer, rng.integers(1, 4)):
            bad[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
        path.write_bytes(bad)
        try:
            rows = sum(chunk.table.num_rows for chunk in source.read(split, ["a", "b", "c"]))
            assert rows == 3000
        except DataError as error:
            assert str(error).startswith(f"{path}: cannot be read: ")
            errors += 1
    assert errors > 20


pieces = st.lists(
    st.tuples(st.binary(min_size=1, max_size=90), st.integers(1, 80)), min_size=0, max_size=12
)


@settings(max_examples=100, deadline=None)
@given(pieces=pieces, noise=st.integers(0, 100_000))
def test_snappy_blocks(pieces, noise):
    data = b"".join(piece * times for piece, times in pieces)
    data += np.random.default_rng(noise).bytes(noise) + data
    block = np.frombuffer(pa.Codec("snappy").compress(data, asbytes=True), dtype=np.uint8)
    assert _core.uncompress_snappy(block, len(data)).tobytes() == data
    for size in {max(len(data) - 1, 0), len(data) + 1} - {len(data)}:
        with pytest.raises(ValueError, match="damaged"):
            _core.uncompress_snappy(block, size)
    with pytest.raises(ValueError, match="damaged"):
        _core.uncompress_snappy(block[:-1], len(data))


def test_damaged_snappy_blocks():
    rng = np.random.default_rng(3)
    codec, wrong = pa.Codec("snappy"), 0
    for _ in range(2000):
        data = np.tile(rng.integers(0, 9, rng.integers(1, 40)), 20).astype(np.uint8).tobytes()
        block = np.frombuffer(codec.compress(data, asbytes=True), dtype=np.uint8).copy()
        # The size in front, of up to two bytes, stays.
        block[rng.integers(2, block.size, 2)] = rng.integers(0, 256, 2)
        try:
            expected = codec.decompress(block, len(data), asbytes=True)
        except OSError:
            wrong += 1
            with pytest.raises(ValueError, match="damaged"):
                _core.uncompress_snappy(block, len(data))
        else:
            assert _core.uncompress_snappy(block, len(data)).tobytes() == expected
    assert wrong > 100


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_checksum_of_a_compressed_page(tmp_path, version):
    path = tmp_path / "rows.parquet"
    table = pa.table({"a": numbers("int64", 3000, 2000, 0)})
    pq.write_table(
        table, path, write_page_checksum=True, use_dictionary=False, data_page_version=version
    )
    chunk = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a page does not match its checksum"):
        decode(path, ["a"])


def test_small_row_groups_are_left_to_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.data.parquet._LEAST_GROUP_ROWS", 100)
    monkeypatch.setattr("penstock.data.parquet_columns.ColumnReader.read", None)
    path = tmp_path / "rows.parquet"
    table = pa.table({"a": numbers("int64", 990, 50, 0.1)})
    for size, works in ((99, True), (990, False)):
        pq.write_table(table, path, row_group_size=size)
        source = ParquetFiles(ParquetSource(format="parquet", path=str(path)))
        chunks = source.read(source.splits()[0], ["a"])
        if works:
            assert pa.concat_tables([chunk.table for chunk in chunks])["a"].equals(table["a"])
        else:
            with pytest.raises(TypeError):
                next(chunks)


def test_a_row_group_shorter_than_the_footer_says(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": numbers("int64", 300, 200, 0)}), path)
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # 300 and 302 as Thrift writes them; several fields are 300, one of them the row group's rows.
    for place in range(footer, len(data)):
        if data[place : place + 2] == b"\xd8\x04":
            path.write_bytes(data[:place] + b"\xdc\x04" + data[place + 2 :])
            group = pq.read_metadata(path).row_group(0)
            if group.num_rows == 302 and group.column(0).num_values == 300:
                break
    else:
        pytest.fail("the footer does not say how many rows there are")
    source = ParquetFiles(ParquetSource(format="parquet", path=str(path)))
    assert source.count_rows(source.splits()[0]) == 302
    with pytest.raises(DataError, match="fewer rows than the footer says"):
        list(source.read(source.splits()[0], ["a"]))


def test_more_rows_than_there_are(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": numbers("int64", 300, 200, 0)}), path)
    with pa.OSFile(str(path)) as file:
        known = plain_columns(file, pq.read_metadata(path))
        reader = open_columns(file, known, ["a"], [0])["a"]
        with pytest.raises(ValueError, match="different length"):
            reader.read(301)


def test_a_file_that_became_shorter(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": numbers("int64", 3000, 2000, 0)}), path)
    source = ParquetFiles(ParquetSource(format="parquet", path=str(path)))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cannot be read: "):
        list(source.read(source.splits()[0], ["a"]))
