"""Columns that folders name: typed as declared, in every format, like columns of the files."""

import shutil
from datetime import UTC, date, datetime
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import TypeAdapter

from penstock.config import NULL_PARTITION, Source, parse_job
from penstock.data import Dataset
from penstock.data.formats import columnar, lines, parquet
from penstock.data.opening import open_source
from penstock.errors import ConfigError, DataError
from penstock.position import Position
from penstock.training.trained import _source_like
from tests.contract.data_cases import (
    assert_resumes_everywhere,
    make_table,
    read_all,
    tensors,
    write_case,
)

KINDS = ["parquet", "orc", "arrow", "arrow stream"]
KINDS += ["csv", "tsv", "quoted csv.zst", "jsonl", "csv.gz"]
TYPES = {"region": "string", "day": "date", "shop": "int64"}
FOLDERS = [
    ("01", date(2024, 1, 30), -(2**63)),
    ("1", date(2024, 1, 31), 2**63 - 1),
    ("007", date(2024, 2, 1), 0),
    ("2A", date(2024, 2, 2), None),
    ("München/a=b %41", date(2024, 2, 3), -1),
    (None, date(2024, 2, 4), 7),
]
ROWS = 60


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(lines, "READ_BYTES", 700)
    monkeypatch.setattr(parquet, "CHUNK_ROWS", 17)
    monkeypatch.setattr(columnar, "EXTENT_ROWS", 30)
    monkeypatch.setattr(columnar, "CHUNK_ROWS", 17)


def named(**values):
    """Folders as Hive and Spark write them."""
    texts = {
        name: NULL_PARTITION if value is None else quote(str(value), safe="")
        for name, value in values.items()
    }
    return "/".join(f"{quote(name, safe='')}={text}" for name, text in texts.items())


def write_log(kind, root):
    """The source of a job over `FOLDERS`, and all rows as one table with the columns in it."""
    parts = []
    for number, (region, day, shop) in enumerate(FOLDERS):
        # Numbered, so that the files are in this order.
        folder = root / f"{number}" / named(region=region, day=day, shop=shop, unnamed="x")
        folder.mkdir(parents=True)
        table = make_table(ROWS, seed=number)
        source = write_case(kind, table, folder)
        given = {
            "day": pa.array([day] * ROWS, pa.date32()),
            "region": pa.array([region] * ROWS, pa.string()),
            "shop": pa.array([shop] * ROWS, pa.int64()),
        }
        for name, array in given.items():
            table = table.append_column(name, array)
        parts.append(table)
    return {**source, "path": str(root), "partitions": TYPES}, pa.concat_tables(parts)


def opened(source):
    return open_source(TypeAdapter(Source).validate_python(source), {"label": "float64"})


def job_over(source, **data):
    return parse_job({
        "data": {
            "source": source,
            "label": {"column": "label"},
            "weight": "weight",
            "event_time": "day",
            "numeric": [{"columns": ["I*"]}],
            "split": {"by": "time", "at": "2024-02-02"},
            "shuffle": {"block_rows": 50},
            **data,
        },
        "features": [
            {"columns": ["C*"]},
            {"columns": ["region"], "transforms": [{"kind": "hash"}]},
            {"columns": ["shop"], "missing": 5},
        ],
        "crosses": [{"name": "both", "columns": ["region", "C1"]}],
        "evaluation": {"metrics": {"grouped_auc": ["region", "shop"]}},
    })


@pytest.mark.parametrize("kind", KINDS)
def test_columns_come_behind_those_of_the_files_by_name(kind, tmp_path):
    config, whole = write_log(kind, tmp_path)
    source = opened(config)
    of_files = opened({**config, "partitions": {}}).schema
    assert source.schema.names == [*of_files.names, "day", "region", "shop"]
    backwards = {**config, "partitions": dict(reversed(TYPES.items()))}
    assert opened(backwards).schema == source.schema
    for names in (
        ["shop", "C4", "region", "label", "day"],
        ["region"],
        ["day", "shop"],
        ["C4"],
        [],
    ):
        found = []
        for extent in source.extents():
            for chunk in source.read(extent, names):
                assert chunk.table.schema.names == names
                assert chunk.table.schema.types == [source.schema.field(n).type for n in names]
                found.append(chunk.table)
        got = pa.concat_tables(found)
        assert sum(table.num_rows for table in found) == whole.num_rows
        for name in names:
            plain = got[name].cast(whole.schema.field(name).type)
            assert plain.combine_chunks().equals(whole[name].combine_chunks())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["train", "evaluation"])
def test_batches_are_those_of_a_file_with_the_columns(kind, part, tmp_path):
    config, whole = write_log(kind, tmp_path / "log")
    # Cut as the files are: negatives of a block and its shuffling depend on it alone.
    pq.write_table(whole, tmp_path / "flat.parquet", row_group_size=30)
    flat = {"format": "parquet", "path": str(tmp_path / "flat.parquet")}
    # One text is read as the other types than Parquet tells of the files.
    hive = Dataset.open(job_over(config))
    for options in ({}, {"shuffle": False}):
        options = options if part == "train" else {}
        one = read_all(hive, part, groups=True, **options)
        other = read_all(Dataset.open(job_over(flat)), part, groups=True, **options)
        assert [batch.batch_size for batch in one] == [batch.batch_size for batch in other]
        for got, expected in zip(one, other, strict=True):
            assert got.sparse.features == expected.sparse.features
            for a, b in zip(tensors(got), tensors(expected), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
            for a, b in zip(got.groups, expected.groups, strict=True):
                assert a == b if isinstance(a, str) else np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "csv", "jsonl", "csv.gz"])
def test_resumes_at_every_batch(kind, tmp_path):
    dataset = Dataset.open(job_over(write_log(kind, tmp_path)[0]))
    assert_resumes_everywhere(dataset, epochs=2, seed=5)
    assert_resumes_everywhere(dataset, "evaluation")


def test_a_split_by_time_leaves_whole_folders_unread(tmp_path, monkeypatch):
    config, whole = write_log("csv", tmp_path)
    dataset = Dataset.open(job_over(config))
    read = []
    before = lines.LineFiles.read
    monkeypatch.setattr(
        lines.LineFiles,
        "read",
        lambda self, extent, names: read.append(extent.path) or before(self, extent, names),
    )
    for part in ("evaluation", "train"):
        read.clear()
        assert sum(batch.batch_size for batch in read_all(dataset, part)) == 3 * ROWS
        assert len(set(read)) == 3


@pytest.mark.parametrize(
    "at, sides", [(0, (2, 4)), (1, (3, 3)), (7, (3, 3)), (8, (4, 2)), (-1, (1, 5))]
)
def test_bounds_of_integer_times_are_exact(at, sides, tmp_path):
    for shop in (-5, -1, 0, 7, 9, 10):
        folder = tmp_path / f"t={shop}"
        folder.mkdir()
        pq.write_table(pa.table({"label": [0, 1], "key": [3, 4]}), folder / "p.parquet")
    source = {"format": "parquet", "path": str(tmp_path), "partitions": {"t": "int64"}}
    job = {
        "data": {"source": source, "label": {"column": "label"}, "event_time": "t",
                 "split": {"by": "time", "at": at}},
        "features": [{"columns": ["key"]}],
    }  # fmt: skip
    dataset = Dataset.open(parse_job(job))
    found = tuple(sum(b.batch_size for b in read_all(dataset, p)) for p in ("train", "evaluation"))
    assert found == (2 * sides[0], 2 * sides[1])


@pytest.mark.parametrize(
    "kind, text, value",
    [
        ("string", "", ""),
        ("string", "a%2Fb%3Dc%25", "a/b=c%"),
        ("string", "%C3%BC", "ü"),
        ("string", "100%", "100%"),
        ("string", "a+b", "a+b"),
        ("string", "null", "null"),
        ("string", "a=b", "a=b"),
        ("int64", "-9223372036854775808", -(2**63)),
        ("int64", "9223372036854775807", 2**63 - 1),
        ("int64", "007", 7),
        ("int64", "%2D7", -7),
        ("uint64", "18446744073709551615", 2**64 - 1),
        ("float64", "-.5e3", -500.0),
        ("date", "0001-01-01", date(1, 1, 1)),
        ("date", "2024-02-29", date(2024, 2, 29)),
        ("timestamp", "2024-01-31 06%3A00%3A00.25", datetime(2024, 1, 31, 6, 0, 0, 250_000)),
        ("timestamp", "2024-01-31T06", datetime(2024, 1, 31, 6)),
        ("timestamp", "2024-01-31T06:00%2B02:00", datetime(2024, 1, 31, 4)),
        *((kind, NULL_PARTITION, None) for kind in
          ("string", "int64", "uint64", "float64", "date", "timestamp")),
    ],
)  # fmt: skip
def test_values(kind, text, value, tmp_path):
    folder = tmp_path / f"key={text}"
    folder.mkdir()
    pq.write_table(pa.table({"label": [1, 0]}), folder / "p.parquet")
    source = opened({"format": "parquet", "path": str(tmp_path), "partitions": {"key": kind}})
    (chunk,) = source.read(source.extents()[0], ["key"])
    assert chunk.table["key"].to_pylist() == [value, value]
    assert chunk.table["key"].null_count == (2 if value is None else 0)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("int64", "2A"), ("int64", ""), ("int64", "9223372036854775808"), ("int64", "1.0"),
        ("int64", "0x1F"), ("int64", " 1"), ("int64", "1_0"), ("int64", "٣"), ("int64", "9" * 200),
        ("uint64", "-1"), ("uint64", "18446744073709551616"),
        ("float64", "nan"), ("float64", "inf"), ("float64", "1e999"), ("float64", ""),
        ("date", "20240131"), ("date", "2024-02-30"), ("date", "2024-1-3"), ("date", "null"),
        ("timestamp", "2024-01-31"), ("timestamp", "2024-01-31 24:00"), ("timestamp", "1706659200"),
    ],
)  # fmt: skip
def test_values_that_are_not_of_the_type(kind, text, tmp_path):
    file = tmp_path / f"key={text}" / "p.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"label": [1, 0]}), file)
    with pytest.raises(DataError) as caught:
        opened({"format": "parquet", "path": str(tmp_path), "partitions": {"key": kind}})
    said = str(caught.value)
    assert said.startswith(f"{file}: key={text} is no {kind} (")
    assert "rename the folder, or declare data.source.partitions: {key: string}" in said


def test_two_texts_of_one_number_are_two_ids_as_text_and_one_as_numbers(tmp_path):
    for text in ("01", "1"):
        (tmp_path / f"id={text}").mkdir()
        pq.write_table(pa.table({"label": [1]}), tmp_path / f"id={text}" / "p.parquet")
    found = {}
    for kind, transforms in (("string", [{"kind": "hash"}]), ("int64", [])):
        source = {"format": "parquet", "path": str(tmp_path), "partitions": {"id": kind}}
        job = {"data": {"source": source, "label": {"column": "label"}},
               "features": [{"columns": ["id"], "transforms": transforms}]}  # fmt: skip
        (batch,) = read_all(Dataset.open(parse_job(job)))
        found[kind] = len(set(batch.sparse.values.tolist()))
    assert found == {"string": 2, "int64": 1}


def one_file(path, columns=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns or {"label": [0, 1]}), path)
    return path


def refused(error, source):
    with pytest.raises(error) as caught:
        opened({"format": "parquet", **source})
    return str(caught.value)


class TestRefused:
    def test_a_file_without_the_folder(self, tmp_path):
        one_file(tmp_path / "a" / "region=1" / "p.parquet")
        # Neither a file's own name nor a folder without = says anything.
        file = one_file(tmp_path / "b" / "region" / "region=1.parquet")
        said = refused(DataError, {"path": str(tmp_path), "partitions": {"region": "string"}})
        assert said.startswith(f"{file}: no folder of its path says region=..., which")
        assert "take the name out of partitions" in said

    def test_a_name_of_another_case(self, tmp_path):
        one_file(tmp_path / "Region=1" / "p.parquet")
        said = refused(DataError, {"path": str(tmp_path), "partitions": {"region": "string"}})
        assert "no folder of its path says region=" in said

    def test_a_name_twice(self, tmp_path):
        file = one_file(tmp_path / "region=1" / "region=2" / "p.parquet")
        said = refused(DataError, {"path": str(tmp_path), "partitions": {"region": "string"}})
        assert said.startswith(f"{file}: two folders name 'region'; rename one")

    def test_text_that_is_no_utf8(self, tmp_path):
        file = one_file(tmp_path / "region=%FF" / "p.parquet")
        said = refused(DataError, {"path": str(tmp_path), "partitions": {"region": "string"}})
        assert said.startswith(f"{file}: the folder 'region=%FF' is no UTF-8")

    def test_a_column_of_both(self, tmp_path):
        file = one_file(tmp_path / "label=1" / "p.parquet")
        said = refused(DataError, {"path": str(tmp_path), "partitions": {"label": "int64"}})
        assert said.startswith(f"{file}: column 'label' is in the file, and data.source.partitions")
        assert "take it out of partitions to read the file's" in said

    @pytest.mark.parametrize("name", ["", "a=b", "a/b"])
    def test_names_that_no_folder_has(self, name, tmp_path):
        source = {"format": "parquet", "path": str(tmp_path), "partitions": {name: "string"}}
        with pytest.raises(ConfigError, match="partitions"):
            parse_job({"data": {"source": source, "label": {"column": "label"}}, "features": []})

    def test_a_type_that_there_is_not(self, tmp_path):
        source = {"format": "parquet", "path": str(tmp_path), "partitions": {"a": "int32"}}
        with pytest.raises(ConfigError, match=r"data\.source\.partitions\.a.*'int64'.*'int32'"):
            parse_job({"data": {"source": source, "label": {"column": "label"}}, "features": []})

    def test_text_as_keys_says_how_to_declare_it(self, tmp_path):
        config, _ = write_log("csv", tmp_path)
        job = {"data": {"source": config, "label": {"column": "label"}},
               "features": [{"columns": ["region"]}]}  # fmt: skip
        with pytest.raises(DataError, match=r"declare data\.source\.partitions: \{region: int64\}"):
            Dataset.open(parse_job(job))


def test_names_that_are_not_declared_are_no_columns(tmp_path):
    one_file(tmp_path / "region=2A" / "%FF=1" / "p.parquet")
    assert opened({"format": "parquet", "path": str(tmp_path)}).schema.names == ["label"]


def test_percent_encoded_names(tmp_path):
    one_file(tmp_path / "my%20shop=1" / "p.parquet")
    found = opened({"format": "parquet", "path": str(tmp_path), "partitions": {"my shop": "int64"}})
    assert found.schema.names == ["label", "my shop"]


def test_folders_above_the_path_and_of_relative_paths_count(tmp_path, monkeypatch):
    file = one_file(tmp_path / "region=1" / "day=2" / "p.parquet")
    types = {"region": "int64", "day": "int64"}
    for path in (file, file.parent, tmp_path / "*" / "day=*" / "*.parquet"):
        source = opened({"format": "parquet", "path": str(path), "partitions": types})
        (chunk,) = source.read(source.extents()[0], ["region", "day"])
        assert chunk.table.to_pylist() == [{"region": 1, "day": 2}] * 2
    monkeypatch.chdir(tmp_path / "region=1")
    said = refused(DataError, {"path": "day=2", "partitions": types})
    assert said.startswith("day=2/p.parquet: no folder of its path says region=")


class TestResume:
    def job(self, folder, kind="csv", **source):
        source = {"format": kind, "path": str(folder), "partitions": {"key": "int64"}, **source}
        return parse_job({
            "data": {"source": source, "label": {"column": "label"}, "shuffle": {"block_rows": 0}},
            "features": [{"columns": ["key"]}],
        })

    def write(self, folder, rows=8):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "p.csv").write_text("label\n" + "0\n1\n" * (rows // 2))

    def position(self, folder):
        batches = read_all(Dataset.open(self.job(folder)), batch_size=4)
        return Position.from_dict(batches[2].end.to_dict())

    def test_a_file_that_was_read_in_another_folder_is_another(self, tmp_path):
        for number in range(2):
            self.write(tmp_path / f"{number}" / "key=1")
        at = self.position(tmp_path)
        (tmp_path / "0" / "key=1").rename(tmp_path / "0" / "key=01")  # the same number
        assert len(read_all(Dataset.open(self.job(tmp_path)), start=at, batch_size=4)) == 1
        (tmp_path / "0" / "key=01").rename(tmp_path / "0" / "key=2")
        with pytest.raises(DataError, match="removed since the run began, and rows of it were"):
            Dataset.open(self.job(tmp_path), after=at)

    @pytest.mark.parametrize(
        "kind, texts",
        [("timestamp", ["2024-01-31T06", "2024-01-31 08%3A00%2B02:00", "2024-01-31T06:00:00Z"]),
         ("int64", ["7", "007", "%2B7"]), ("float64", ["0.5", ".50", "5e-1"])],
    )  # fmt: skip
    def test_two_ways_to_write_a_value_are_one(self, kind, texts, tmp_path):
        for text in texts:
            self.write(tmp_path / f"key={text}")
        source = opened({"format": "csv", "path": str(tmp_path), "partitions": {"key": kind}})
        assert len({source.identify(path).digest for path in source.paths}) == 1

    def test_folders_that_moved_together_must_say_the_same(self, tmp_path):
        self.write(tmp_path / "key=1", rows=16)
        at = self.position(tmp_path)
        for name in ("elsewhere/key=1", "elsewhere/key=2"):
            (tmp_path / name).mkdir(parents=True)
            shutil.copy(tmp_path / "key=1" / "p.csv", tmp_path / name)
        rest = read_all(Dataset.open(self.job(tmp_path / "elsewhere/key=1")), start=at)
        assert sum(batch.batch_size for batch in rest) == 4
        with pytest.raises(DataError, match="key=2/p.csv: changed after rows of it were trained"):
            Dataset.open(self.job(tmp_path / "elsewhere/key=2"), after=at)

    def test_text_may_grow(self, tmp_path):
        for number in range(2):
            self.write(tmp_path / f"{number}" / "key=1")
        at = self.position(tmp_path)
        self.write(tmp_path / "1" / "key=1", rows=12)
        rest = read_all(Dataset.open(self.job(tmp_path)), start=at, batch_size=4)
        assert sum(batch.batch_size for batch in rest) == 8
        self.write(tmp_path / "0" / "key=1", rows=12)
        with pytest.raises(DataError, match="rows were added after"):
            Dataset.open(self.job(tmp_path), after=at)

    def test_malformed_rows_of_equal_files_are_each_counted(self, tmp_path):
        for number in range(3):
            self.write(tmp_path / f"key={number}")
            (tmp_path / f"key={number}" / "p.csv").open("a").write("x\n")
        dataset = Dataset.open(self.job(tmp_path, on_malformed_row="quarantine"))
        assert sum(batch.batch_size for batch in read_all(dataset)) == 24
        assert dataset.quarantined_rows == 3


class TestStreams:
    def config(self, folder, types, **other):
        files = {"format": "parquet", "partitions": types,
                 "path": f"{folder}/new/day={{YYYY}}-{{MM}}-{{DD}}/region=*/*.parquet"}  # fmt: skip
        second = {"format": "parquet", "path": f"{folder}/old/{{YYYY}}{{MM}}{{DD}}.parquet"}
        sources = [{"name": "new", "files": files}, {"name": "old", "files": second}]
        return {"format": "streams", "streams": [
            {"name": "all", "start": "2026-02-27", "end": "2026-03-03", "sources": sources,
             **other}]}  # fmt: skip

    def write(self, folder, dictionary=True):
        expected = []
        for number, date_ in enumerate(np.arange("2026-02-27", "2026-03-03", dtype="M8[D]")):
            at = date_.item()
            for region in ("01", "1", "2A")[: number + 1]:
                one_file(folder / f"new/day={at}/region={region}/p.parquet")
                expected += [(at, region)] * 2
            regions = pa.array(["x", "01"])
            one_file(folder / f"old/{at:%Y%m%d}.parquet", {
                "label": [0, 1],
                "region": regions.dictionary_encode() if dictionary else regions,
                "day": pa.array([at, at], pa.date32()),
            })  # fmt: skip
            expected += [(at, "x"), (at, "01")]
        return expected

    @pytest.mark.parametrize("dictionary", [True, False])
    def test_beside_a_source_that_has_the_columns(self, dictionary, tmp_path):
        expected = self.write(tmp_path, dictionary=dictionary)
        source = opened(self.config(tmp_path, {"day": "date", "region": "string"}))
        kind = pa.dictionary(pa.int32(), pa.string()) if dictionary else pa.string()
        assert source.schema.field("region").type == kind
        found = []
        for extent in source.extents():
            for chunk in source.read(extent, ["day", "region"]):
                assert chunk.table.schema.types == [pa.date32(), kind]
                found += [tuple(row.values()) for row in chunk.table.to_pylist()]
        assert found == expected

    def test_a_source_that_lacks_one(self, tmp_path):
        self.write(tmp_path)
        with pytest.raises(DataError, match="'day' of .* is missing; the sources of"):
            opened(self.config(tmp_path, {"region": "string"}))

    def test_a_type_that_no_other_holds(self, tmp_path):
        self.write(tmp_path)
        with pytest.raises(DataError, match="column 'region' is string, but int64 in"):
            folder = tmp_path / "new"
            for one in sorted(folder.glob("day=*/region=2A")):
                one.rename(one.with_name("region=2"))
            opened(self.config(tmp_path, {"day": "date", "region": "int64"}))


def test_times_as_text_of_folders(tmp_path):
    config, whole = write_log("parquet", tmp_path)
    config = {**config, "partitions": {**TYPES, "day": "string"}}
    times = {
        part: {time for batch in read_all(Dataset.open(job_over(config)), part)
               for time in batch.event_time.tolist()}
        for part in ("train", "evaluation")
    }  # fmt: skip
    days = [round(datetime(d.year, d.month, d.day, tzinfo=UTC).timestamp() * 1000)
            for _, d, _ in FOLDERS]  # fmt: skip
    assert times == {"train": set(days[:3]), "evaluation": set(days[3:])}


def test_a_time_that_is_null_is_told(tmp_path):
    for name in (NULL_PARTITION, "2024-01-01", "2024-01-03"):
        one_file(tmp_path / f"day={name}" / "p.parquet", {"label": [0, 1], "key": [3, 4]})
    config = {"format": "parquet", "path": str(tmp_path), "partitions": {"day": "date"}}
    job = {"data": {"source": config, "label": {"column": "label"}, "event_time": "day",
                    "split": {"by": "time", "at": "2024-01-02"}},
           "features": [{"columns": ["key"]}]}  # fmt: skip
    with pytest.raises(DataError, match=r"column 'day': the event time is missing"):
        read_all(Dataset.open(parse_job(job)))


def test_prediction_reads_them_from_files_of_another_format(tmp_path):
    config, _ = write_log("parquet", tmp_path / "a")
    write_log("csv", tmp_path / "b")
    source = TypeAdapter(Source).validate_python(config)
    like = _source_like(source, str(tmp_path / "b" / "*" / "*" / "*" / "*" / "*" / "*.csv"))
    assert (like.format, like.partitions) == ("csv", TYPES)
    assert open_source(like, {}).schema.names[-3:] == ["day", "region", "shop"]


def test_a_text_of_folders_that_is_no_time_is_named(tmp_path):
    for name in ("2024-01-01", "2024-01-02", "soon"):
        one_file(tmp_path / f"day={name}" / "p.parquet", {"label": [0, 1], "key": [3, 4]})
    source = {"format": "parquet", "path": str(tmp_path), "partitions": {"day": "string"}}
    job = {"data": {"source": source, "label": {"column": "label"}, "event_time": "day"},
           "features": [{"columns": ["key"]}]}  # fmt: skip
    with pytest.raises(DataError, match="column 'day': 'soon' is no ISO 8601 time"):
        read_all(Dataset.open(parse_job(job)))
