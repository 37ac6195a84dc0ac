"""Parquet files give the rows that were written, or an error that names the file."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import ParquetSource
from penstock.data import Dataset
from penstock.data.formats import columnar, parquet
from penstock.data.formats.columnar import Bounds, GroupedFiles
from penstock.data.formats.parquet import ParquetFormat
from penstock.data.source import Extent
from penstock.errors import DataError
from tests.contract.data_cases import make_job, make_table, rows_of, write_case

KINDS = ("int8", "uint16", "int32", "int64", "uint32", "uint64", "float32", "float64")


def open_files(path, time_column=None):
    return GroupedFiles(ParquetSource(format="parquet", path=str(path)), ParquetFormat(time_column))


def read(source, columns, extents=None):
    extents = source.extents() if extents is None else extents
    return pa.concat_tables(
        chunk.table for split in extents for chunk in source.read(split, columns)
    )


def assert_equal(found, expected):
    """As bits: NaN equals NaN then."""
    assert found.schema.equals(expected.schema)
    for name in expected.column_names:
        ours, theirs = found[name].combine_chunks(), expected[name].combine_chunks()
        ours.validate(full=True)
        if pa.types.is_floating(ours.type):
            bits = pa.int32() if ours.type == pa.float32() else pa.int64()
            ours, theirs = ours.view(bits), theirs.view(bits)
        assert ours.equals(theirs), name


def numbers(kind, n, different, nulls, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, different, n)
    if kind == "int64":
        values = values * (2**63 // different - 1) - 2**62
    elif kind.startswith("float"):
        values = np.where(values == 0, np.nan, values / 3)
    return pa.array(values.astype(kind), mask=rng.random(n) < nulls if nulls else None)


def every_kind(n):
    columns = {
        f"{kind} {different} {nulls}": numbers(kind, n, different, nulls)
        for kind in KINDS
        for different in (1, 100)
        for nulls in (0, 0.3, 1)
    }
    columns |= {
        "text": pa.array([f"word {row % 37}" if row % 5 else None for row in range(n)]),
        "large text": pa.array([f"{row % 1000}" for row in range(n)], pa.large_string()),
        "list": pa.array([list(range(row % 4)) if row % 7 else None for row in range(n)]),
        "folded": pa.array(["x", "y", None, "z"] * (n // 4)).dictionary_encode(),
        "ns": pa.array(np.arange(n) * 999_999_937, pa.timestamp("ns")),
        "us": pa.array(np.arange(n), pa.timestamp("us", tz="Europe/Berlin")),
        "day": pa.array(np.arange(n, dtype=np.int32) % 9000, pa.date32()),
        "yes": pa.array([True, None, False, True] * (n // 4)),
        "money": pa.array(range(n), pa.int64()).cast(pa.decimal128(19, 0)),
        "struct": pa.array([{"a": row, "b": None} for row in range(n)]),
        "struct.a": numbers("int64", n, 9, 0.1),
    }
    fields = [
        pa.field(name, array.type, nullable=bool(array.null_count) or "0.3" in name)
        for name, array in columns.items()
    ]
    return pa.table(list(columns.values()), pa.schema(fields))


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_all_kinds_of_pages(tmp_path, monkeypatch, codec, version):
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 1700)
    monkeypatch.setattr(parquet, "CHUNK_ROWS", 333)
    table = every_kind(2000)
    written = {
        "compression": codec,
        "data_page_version": version,
        "row_group_size": 800,
        "data_page_size": 700,
        "write_batch_size": 50,
        "write_page_checksum": True,
    }
    for use_dictionary in (True, False):
        path = tmp_path / "rows.parquet"
        pq.write_table(table, path, use_dictionary=use_dictionary, **written)
        source = open_files(path)
        assert source.schema.equals(table.schema)
        names = [*reversed(table.column_names), "text"]
        assert read(source, names).column_names == names
        assert_equal(read(source, table.column_names), table)


@pytest.mark.parametrize("encoding", ["DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT", "PLAIN"])
def test_other_encodings(tmp_path, encoding):
    kinds = [kind for kind in KINDS[2:4] + KINDS[6:] if encoding[0] != "D" or kind[0] == "i"]
    table = pa.table({kind: numbers(kind, 3000, 500, 0.2) for kind in kinds})
    path = tmp_path / "rows.parquet"
    pq.write_table(
        table, path, use_dictionary=False, column_encoding=dict.fromkeys(kinds, encoding)
    )
    assert_equal(read(open_files(path), kinds), table)


def test_a_dictionary_that_ends_within_a_column(tmp_path):
    """Writers go over to plain pages when a dictionary grows too large."""
    table = pa.table({"a": numbers("int64", 50_000, 40_000, 0.1)})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, dictionary_pagesize_limit=100_000, data_page_size=10_000)
    assert_equal(read(open_files(path), ["a"]), table)


@pytest.mark.parametrize(
    ("is_local", "large", "expected"),
    [(True, 1 << 30, (False, 0)), (True, 1, (False, 1 << 20)), (False, 1, (True, 0))],
)
def test_how_row_groups_are_read(tmp_path, monkeypatch, is_local, large, expected):
    """A remote store is asked for all at once; large local groups are read piece by piece."""
    monkeypatch.setattr(parquet, "_LARGE_GROUP_BYTES", large)
    table = every_kind(200)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=30)
    source = open_files(tmp_path / "rows.parquet")
    monkeypatch.setattr(source, "_is_local", is_local)
    options, plain = [], pq.ParquetFile

    def opened(*arguments, **given):
        options.append(given)
        return plain(*arguments, **given)

    monkeypatch.setattr(pq, "ParquetFile", opened)
    assert_equal(read(source, table.column_names), table)
    assert [(one["pre_buffer"], one["buffer_size"]) for one in options] == [expected]


@pytest.mark.parametrize("columns", [["struct.a"], ["struct"], ["struct", "struct.a"]])
def test_names_with_dots(tmp_path, columns):
    table = every_kind(40)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert_equal(read(open_files(tmp_path / "rows.parquet"), columns), table.select(columns))


def test_groups_of_any_size(tmp_path, monkeypatch):
    """Empty ones, single rows and large ones; extents cut anywhere read the rows between."""
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 100)
    sizes = [0, 1, 1, 0, 98, 1, 250, 0, 0, 3, 99, 1, 1, 0]
    table = pa.table({"a": numbers("int64", sum(sizes), 300, 0.2)})
    path, start = tmp_path / "rows.parquet", 0
    with pq.ParquetWriter(path, table.schema) as writer:
        for size in sizes:
            writer.write_table(table.slice(start, size), row_group_size=max(size, 1))
            start += size
    source = open_files(path)
    extents = list(source.extents())
    assert [(one.start, one.stop) for one in extents] == [
        (0, 100),
        (100, 101),
        (101, 351),
        (351, 354),
        (354, 454),
        (454, 455),
    ]
    assert_equal(read(source, ["a"]), table)
    rng = np.random.default_rng(5)
    for start, stop in np.sort(rng.integers(0, table.num_rows + 1, (60, 2))):
        if start < stop:
            found = read(source, ["a"], [Extent(str(path), int(start), int(stop))])
            assert_equal(found, table.slice(start, stop - start))


def test_cut_rows_decode_as_they_are(tmp_path, monkeypatch):
    """Values and bits of nulls of a slice begin anywhere in their buffers."""
    monkeypatch.setattr(parquet, "CHUNK_ROWS", 53)
    table = make_table(400)
    source = write_case("parquet", table, tmp_path)
    expected = rows_of(read_batches(make_job(source, split=None, shuffle={"block_rows": 0})))
    for held_out in (0.1, 0.35, 0.77):
        job = make_job(
            source, split={"by": "fraction", "evaluation": held_out}, shuffle={"block_rows": 0}
        )
        assert rows_of(read_batches(job) + read_batches(job, "evaluation")) == expected
    keys = [
        tuple(() if v is None else (v,) for v in row)
        for row in zip(*(table[f"C{number}"].to_pylist() for number in (1, 2, 3, 4)), strict=True)
    ]
    assert [row[2] for row in expected] == keys


def read_batches(job, part="train"):
    with Dataset.open(job).batches(part, batch_size=32) as batches:
        return list(batches)


class TestDamage:
    """Whatever the bytes are: an error that names the file, or as many rows as before."""

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "rows.parquet"

    def write(self, path, **options):
        table = pa.table({
            "a": numbers("int64", 3000, 300, 0.2),
            "b": numbers("int32", 3000, 7, 0),
            "c": numbers("float64", 3000, 2900, 0.5),
            "d": pa.array([f"{row % 90}" for row in range(3000)]),
        })
        pq.write_table(table, path, data_page_size=2000, row_group_size=1100, **options)
        good = path.read_bytes()
        return table, good, len(good) - 8 - int.from_bytes(good[-8:-4], "little")

    @pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    def test_of_pages(self, path, codec, version):
        table, good, footer = self.write(path, compression=codec, data_page_version=version)
        source = open_files(path)
        extents = list(source.extents())
        rng = np.random.default_rng(7)
        errors = 0
        for _ in range(150):
            bad = bytearray(good)
            for place in rng.integers(4, footer, rng.integers(1, 4)):
                bad[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
            path.write_bytes(bad)
            try:
                assert read(source, table.column_names, extents).num_rows == 3000
            except DataError as error:
                assert str(error).startswith(f"{path}: cannot be read: ")
                errors += 1
        assert errors > 20
        path.write_bytes(good)
        assert_equal(read(source, table.column_names, extents), table)

    def test_is_found_where_pages_have_checksums(self, path):
        table, good, _ = self.write(path, write_page_checksum=True, compression="none")
        footer = pq.read_metadata(path)
        for group in range(footer.num_row_groups):
            for number, name in enumerate(table.column_names):
                chunk = footer.row_group(group).column(number)
                bad = bytearray(good)
                begin = chunk.dictionary_page_offset or chunk.data_page_offset
                bad[begin + chunk.total_compressed_size - 1] ^= 1
                path.write_bytes(bad)
                with pytest.raises(DataError, match="cannot be read: "):
                    read(open_files(path), [name])

    def test_of_footers(self, path):
        """Bytes of the footer say any number; pyarrow must not be asked what it dies of."""
        table, good, footer = self.write(path)
        rng = np.random.default_rng(11)
        errors = 0
        for _ in range(150):
            bad = bytearray(good)
            bad[rng.integers(footer, len(good))] = rng.choice([0, 0x7F, 0xFF, rng.integers(256)])
            path.write_bytes(bad)
            try:
                source = open_files(path, "b")
                names = [name for name in table.column_names if name in source.schema.names]
                for split in source.extents():
                    source.may_hold(split, "b", 0, 1)
                assert read(source, names).num_rows == sum(map(source.count_rows, source.extents()))
            except DataError as error:
                assert str(error).startswith(str(path))
                errors += 1
        assert errors > 20

    def test_of_a_second_dictionary_ends_the_reading(self, path):
        """What was half read is not read again by the same reader, nor by a loader."""
        job = make_job(write_case("parquet", make_table(400), path.parent), split=None)
        file = path.parent / "part-1.parquet"
        chunk = pq.read_metadata(file).row_group(1).column(5)
        assert chunk.has_dictionary_page
        bad = bytearray(file.read_bytes())
        bad[chunk.dictionary_page_offset + 12 : chunk.data_page_offset] = bytes(
            chunk.data_page_offset - chunk.dictionary_page_offset - 12
        )
        file.write_bytes(bad)
        dataset = Dataset.open(job)
        source = dataset._parts["train"].source
        (split,) = [split for split in source.extents() if split.path == str(file)]
        chunks = source.read(split, ["label", "I3"])
        for _ in range(2):
            with pytest.raises(DataError, match="part-1.parquet: cannot be read: "):
                list(source.read(split, ["label", "I3"]))
        with pytest.raises(DataError):
            list(chunks)
        assert list(chunks) == []
        batches = dataset.batches("train", batch_size=32)
        with pytest.raises(DataError, match="part-1.parquet: cannot be read: "):
            list(batches)
        with pytest.raises(ValueError, match="the loader is closed"):
            next(batches)

    def test_fewer_rows_than_the_footer_says(self, path):
        pq.write_table(pa.table({"a": numbers("int64", 300, 200, 0)}), path)
        data = bytearray(path.read_bytes())
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        # 300 and 302 as Thrift writes them; several fields are 300, one the row group's rows.
        for place in range(footer, len(data)):
            if data[place : place + 2] == b"\xd8\x04":
                path.write_bytes(data[:place] + b"\xdc\x04" + data[place + 2 :])
                group = pq.read_metadata(path).row_group(0)
                if group.num_rows == 302 and group.column(0).num_values == 300:
                    break
        else:
            pytest.fail("the footer does not say how many rows there are")
        source = open_files(path)
        assert source.count_rows(source.extents()[0]) == 302
        with pytest.raises(DataError, match=r"rows.parquet: cannot be read: .*fewer rows than"):
            read(source, ["a"])

    def test_a_file_that_became_another(self, path):
        pq.write_table(pa.table({"a": numbers("int64", 3000, 2000, 0)}), path)
        source = open_files(path)
        size = path.stat().st_size
        for data in (path.read_bytes()[:2000], path.read_bytes() + b"more"):
            path.write_bytes(data)
            with pytest.raises(DataError, match=f"it has {len(data):,} bytes, and had {size:,} "):
                read(source, ["a"])


def bounds_of(tmp_path, array, **options):
    path = tmp_path / "bounds.parquet"
    pq.write_table(pa.table({"t": array, "u": array}), path, row_group_size=10, **options)
    source = open_files(path, "u")
    return source, [
        bounds
        for group in source._groups.values()
        for bounds in (group.times if group.times is not None else [None])
    ]


@pytest.mark.parametrize(
    ("kind", "per_ms"),
    [("ns", 1_000_000), ("us", 1_000), ("ms", 1), ("s", 1), ("us+zone", 1_000)],
)
def test_bounds_of_timestamps(tmp_path, kind, per_ms):
    """Rounded outwards, before 1970 as well; never by way of pandas."""
    unit, _, zone = kind.partition("+")
    step = {"s": 1}.get(unit, per_ms // 2 + 1)
    ticks = (np.arange(40) - 20) * step
    _, bounds = bounds_of(
        tmp_path, pa.array(ticks, pa.timestamp(unit, "Asia/Tokyo" if zone else None))
    )
    exact = ticks.reshape(4, 10) * (1000 if unit == "s" else 1)
    assert bounds == [
        (int(np.floor(part[0] / per_ms)), int(np.ceil(part[-1] / per_ms))) for part in exact
    ]


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_bounds_of_integers(tmp_path, kind):
    info = np.iinfo(kind)
    values = np.array([info.min, info.max] + [1, 5, 3] * 6, dtype=kind)
    _, bounds = bounds_of(tmp_path, pa.array(values))
    assert bounds == [(info.min, info.max), (1, 5)]


def test_bounds_of_days(tmp_path):
    days = pa.array(np.arange(-10, 10, dtype=np.int32), pa.date32())
    _, bounds = bounds_of(tmp_path, days)
    assert bounds == [(-10 * 86_400_000, -86_400_000), (0, 9 * 86_400_000)]


def test_bounds_that_are_not_known(tmp_path):
    times = pa.array(np.arange(10), pa.timestamp("ms"))
    with_null = pa.array([1, None, *range(8)], pa.timestamp("ms"))
    for array, options in [
        (with_null, {}),
        (times, {"write_statistics": False}),
        (times, {"use_deprecated_int96_timestamps": True}),
        (times.cast(pa.string()), {}),
        (pa.array(np.arange(10.0)), {}),
    ]:
        source, bounds = bounds_of(tmp_path, array, **options)
        assert bounds == [None], options
        assert source.may_hold(source.extents()[0], "u", 10**15, None)
    source = open_files(tmp_path / "bounds.parquet", "not there")
    assert source.may_hold(source.extents()[0], "not there", 10**15, None)


def test_a_split_may_hold_what_its_groups_may(tmp_path):
    source, bounds = bounds_of(tmp_path, pa.array(np.arange(40)))
    assert bounds == [Bounds(low, low + 9) for low in (0, 10, 20, 30)]
    (split,) = source.extents()
    before, after = source.cut(split, 15)
    cases = [(None, 0), (None, 1), (10, 20), (20, None), (39, None), (40, None), (15, 15)]
    found = [[source.may_hold(one, "u", *case) for one in (split, before, after)] for case in cases]
    assert found == [
        [False, False, False],
        [True, True, False],
        [True, True, True],
        [True, False, True],
        [True, False, True],
        [False, False, False],
        [True, True, True],
    ]
