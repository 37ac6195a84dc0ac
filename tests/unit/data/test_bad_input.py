"""Every message of the data plane that a user may meet, word for word."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import parse_job
from penstock.data import Dataset
from penstock.errors import ConfigError, DataError
from tests.contract.data_cases import read_all

GOOD = {
    "label": [0, 1, 1, 0],
    "w": [1.0, 2.0, 0.5, 0.0],
    "t": [1000, 2000, 3000, 4000],
    "I1": [1.0, 2.0, None, 4.0],
    "C1": [5, 6, None, 8],
    "S1": ["a", "b", None, "ff"],
}


def job_over(source, features=None, tables=None, **data):
    return parse_job({
        "data": {
            "source": source,
            "label": {"column": "label"},
            "numeric": [{"columns": ["I*"]}],
            **data,
        },
        "features": features if features is not None else [{"columns": ["C*"]}],
        **({"tables": tables} if tables else {}),
    })


@pytest.fixture
def parquet_job(tmp_path, monkeypatch):
    """Builds a job over `rows.parquet`, whose columns a test may replace."""
    monkeypatch.chdir(tmp_path)

    def build(columns=None, **options):
        pq.write_table(pa.table({**GOOD, **(columns or {})}), "rows.parquet")
        return job_over({"format": "parquet", "path": "rows.parquet"}, **options)

    return build


def message(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def open_message(error, job, **options):
    return message(error, lambda: Dataset.open(job, **options))


def read_message(job):
    dataset = Dataset.open(job)
    return message(DataError, lambda: read_all(dataset, shuffle=False, batch_size=2))


class TestColumns:
    def test_missing_label(self, parquet_job):
        job = parquet_job(label={"column": "lable"})
        assert open_message(DataError, job) == (
            "rows.parquet: no column 'lable' (data.label.column); did you mean 'label'?"
        )

    def test_missing_numeric_column(self, parquet_job):
        job = parquet_job(numeric=[{"columns": ["I1", "X7"]}])
        assert open_message(DataError, job) == (
            "rows.parquet: no column 'X7' (data.numeric.0); there are label, w, t, I1, C1, S1"
        )

    def test_pattern_without_match(self, parquet_job):
        job = parquet_job(features=[{"columns": ["C*"]}, {"columns": ["Cat*"]}])
        assert open_message(ConfigError, job) == (
            "features.1.columns: 'Cat*' matches no column of rows.parquet; there are label, w, t, "
            "I1, "
            "C1, S1"
        )

    def test_column_claimed_twice(self, parquet_job):
        job = parquet_job(features=[{"columns": ["C1"]}, {"columns": ["C*"]}])
        assert open_message(ConfigError, job) == (
            "column 'C1' is claimed by features.0 and by features.1; leave it to one of them"
        )
        job = parquet_job(numeric=[{"columns": ["label"]}])
        assert open_message(ConfigError, job) == (
            "column 'label' is claimed by data.label.column and by data.numeric.0; leave it to "
            "one of "
            "them"
        )

    def test_a_glob_leaves_label_weight_and_time_alone(self, parquet_job):
        job = parquet_job(
            {"S1": [1, 2, 3, 4]},
            numeric=[],
            weight="w",
            event_time="t",
            features=[{"columns": ["*"]}],
        )
        assert open_message(DataError, job) == (
            "rows.parquet: column 'I1' is double; keys are integers or strings: cast it to int64 "
            "(nullable) where it is written, or list it under `data.numeric`"
        )
        job = parquet_job(
            {"S1": [1, 2, 3, 4], "I1": [1, 2, 3, 4]},
            numeric=[],
            weight="w",
            event_time="t",
            features=[{"columns": ["*"]}],
        )
        assert [f.name for f in Dataset.open(job).features] == ["I1", "C1", "S1"]

    def test_wrong_types(self, parquet_job):
        job = parquet_job(features=[{"columns": ["S1"]}])
        assert open_message(DataError, job) == (
            "rows.parquet: column 'S1' is string; keys are 64-bit integers: add the transform "
            "hash (or "
            "hex)"
        )
        job = parquet_job(features=[{"columns": ["C1"], "transforms": [{"kind": "hex"}]}])
        assert open_message(DataError, job) == (
            "rows.parquet: column 'C1' is int64; the transform hex reads text; remove it, or put "
            "it "
            "first"
        )
        job = parquet_job(numeric=[{"columns": ["S1"]}])
        assert open_message(DataError, job) == (
            "rows.parquet: column 'S1' is string; numeric columns are numbers; list it under "
            "`features` (transform hash)"
        )
        job = parquet_job(label={"column": "S1"})
        assert open_message(DataError, job) == (
            "rows.parquet: column 'S1' is string; labels and weights are numbers; convert it"
        )
        job = parquet_job(event_time="I1", numeric=[])
        assert open_message(DataError, job) == (
            "rows.parquet: column 'I1' is double; event times are timestamps, dates or integers "
            "(ms)"
        )
        job = parquet_job({"C1": pa.array([{"a": 1}] * 4)})
        assert open_message(DataError, job) == (
            "rows.parquet: column 'C1' is struct<a: int64>; keys are integers, strings or lists of "
            "these; convert it"
        )

    def test_unknown_table(self, parquet_job):
        job = parquet_job(features=[{"columns": ["C1"], "table": "usr"}], tables=[{"name": "user"}])
        assert open_message(ConfigError, job) == (
            "features.0.table: no table 'usr' under `tables`; did you mean 'user'?"
        )

    def test_unused_table(self, parquet_job):
        job = parquet_job(tables=[{"name": "user"}])
        assert open_message(ConfigError, job) == (
            "tables.0: no feature reads table 'user'; set `table` of a feature or remove it"
        )

    def test_table_named_twice(self, parquet_job):
        job = parquet_job(tables=[{"name": "C1"}, {"name": "C1"}])
        assert open_message(ConfigError, job) == (
            "tables: two are named 'C1'; give each its own name"
        )

    def test_column_name_that_no_table_may_have(self, parquet_job):
        job = parquet_job({"C 2": [1, 2, 3, 4]})
        assert open_message(ConfigError, job).startswith(
            "column 'C 2' gives its table a name that is not allowed (name: string should match "
        )


class TestValues:
    def test_label_that_is_no_label(self, parquet_job):
        assert read_message(parquet_job({"label": [0, 1, 3, 0]})) == (
            "rows.parquet row 2, column 'label': label 3 is not 0 or 1; set at_least of the label "
            "to make labels of numbers, or task regression to learn the number"
        )

    def test_label_missing(self, parquet_job):
        for job in (
            parquet_job({"label": [0, None, 1, 0]}),
            parquet_job({"label": [0, None, 1, 0]}, label={"column": "label", "at_least": 1}),
        ):
            assert read_message(job) == (
                "rows.parquet row 1, column 'label': the label is missing; leave such rows out of "
                "the file, or set missing: ignore of the label"
            )

    def test_at_least_makes_labels(self, parquet_job):
        job = parquet_job({"label": [1.0, 4.0, 3.5, 5.0]}, label={"column": "label", "at_least": 4})
        batches = read_all(Dataset.open(job), shuffle=False)
        assert batches[0].labels.tolist() == [0, 1, 0, 1]

    @pytest.mark.parametrize("given", [None, float("nan")])
    def test_missing_number(self, parquet_job, given):
        column = {"I1": pa.array([1.0, 2.0, 3.0, given], from_pandas=False)}
        filled = parquet_job(
            column, numeric=[{"columns": ["I1"], "missing": {"policy": "fill", "value": 7}}]
        )
        assert read_all(Dataset.open(filled), shuffle=False)[0].dense[:, 0].tolist() == [1, 2, 3, 7]
        job = parquet_job(column, numeric=[{"columns": ["I1"], "missing": {"policy": "fail"}}])
        assert read_message(job) == (
            "rows.parquet row 3, column 'I1': missing number; set `missing` of data.numeric to "
            "{policy: fill} or mend the file"
        )

    def test_infinite_number(self, parquet_job):
        job = parquet_job({"I1": [1.0, float("inf"), 0.0, 1e300]})
        assert read_message(job) == (
            "rows.parquet row 1, column 'I1': inf is no finite float32 after transforms; add the "
            "transform clip before others or mend the file"
        )
        assert "row 0, column 'I1': 1e+300 is" in read_message(
            parquet_job({"I1": [1e300, 0, 0, 0]})
        )

    @pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), None])
    def test_bad_weight(self, parquet_job, weight):
        job = parquet_job({"w": [1.0, 1.0, weight, 1.0]}, weight="w")
        shown = "nan" if weight is None else f"{weight:g}"
        assert read_message(job) == (
            f"rows.parquet row 2, column 'w': weight {shown} is not a finite number >= 0; mend "
            "the file"
        )

    def test_bad_hex(self, parquet_job):
        job = parquet_job(
            {"S1": [None, "a", "b", "g1"]},
            features=[{"columns": ["S1"], "transforms": [{"kind": "hex"}]}],
        )
        assert read_message(job) == (
            "rows.parquet row 3, column 'S1': 'g1' is not 1 to 16 hexadecimal digits; mend the "
            "file or "
            "use the transform hash"
        )
        job = parquet_job(
            {"S1": [["a"], None, [], ["b", None, "zz"]]},
            features=[{"columns": ["S1"], "transforms": [{"kind": "hex"}]}],
        )
        assert "rows.parquet row 3, column 'S1': 'zz' is not" in read_message(job)

    def test_missing_and_bad_times(self, parquet_job):
        job = parquet_job({"t": [1, None, 2, 3]}, event_time="t")
        assert read_message(job) == (
            "rows.parquet row 1, column 't': the event time is missing; leave such rows out of "
            "the file"
        )
        job = parquet_job({"t": ["2026-01-01", "2026-01-02T03:04:05", "now", "x"]}, event_time="t")
        assert read_message(job) == (
            "rows.parquet row 2, column 't': 'now' is no ISO 8601 time, or only some times of the "
            "column have a zone"
        )

    def test_an_error_comes_after_the_good_batches(self, parquet_job, monkeypatch):
        monkeypatch.setattr("penstock.data.formats.parquet.CHUNK_ROWS", 2)
        job = parquet_job({"label": [0, 1, 0, 9]}, shuffle={"block_rows": 0})
        monkeypatch.setattr("penstock.data.batches.loader_plan._PLAIN_BLOCK_ROWS", 1)
        with Dataset.open(job).batches("train", batch_size=1) as batches:
            assert next(batches).labels.tolist() == [0]
            with pytest.raises(DataError, match="label 9 is not 0 or 1"):
                list(batches)
            with pytest.raises(ValueError, match="the loader is closed"):
                next(batches)


class TestFiles:
    def test_no_such_file(self, tmp_path):
        path = tmp_path / "absent.parquet"
        job = job_over({"format": "parquet", "path": str(path)})
        assert open_message(DataError, job) == f"{path}: no such file or directory"

    @pytest.mark.parametrize("path", ["~/log.parquet", "~/*.parquet"])
    def test_a_home_directory_is_not_expanded(self, path):
        message = open_message(DataError, job_over({"format": "parquet", "path": path}))
        assert message.endswith("; a ~ is not expanded here: write the whole path")

    def test_glob_without_match(self, tmp_path):
        job = job_over({"format": "parquet", "path": f"{tmp_path}/*.parquet"})
        assert open_message(DataError, job) == f"{tmp_path}/*.parquet: no file matches"
        job = job_over({"format": "parquet", "path": f"{tmp_path}/day/*.parquet"})
        assert open_message(DataError, job) == (
            f"{tmp_path}/day/*.parquet: no such directory: {tmp_path}/day"
        )

    def test_empty_directory(self, tmp_path):
        job = job_over({"format": "parquet", "path": str(tmp_path)})
        assert open_message(DataError, job) == f"{tmp_path}: the directory holds no file"

    @pytest.mark.parametrize("kind", ["parquet", "tsv"])
    def test_empty_file(self, kind, tmp_path):
        (tmp_path / "x").touch()
        job = job_over({"format": kind, "path": str(tmp_path / "x")})
        assert open_message(DataError, job) == (
            f"{tmp_path}/x: empty file (0 bytes); remove it or name the others"
        )

    def test_file_without_rows(self, tmp_path):
        pq.write_table(pa.table(GOOD)[:0], tmp_path / "x.parquet")
        job = job_over({"format": "parquet", "path": str(tmp_path)})
        assert open_message(DataError, job) == (
            f"{tmp_path}/x.parquet: no rows; the source has none at all"
        )
        (tmp_path / "x.csv").write_text("label,I1,C1\n")
        job = job_over({"format": "csv", "path": str(tmp_path / "x.csv"), "types": {"C1": "int64"}})
        assert (
            open_message(DataError, job) == f"{tmp_path}/x.csv: no rows; the source has none at all"
        )
        (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"label,I1,C1\n"))
        job = job_over({"format": "csv", "path": f"{tmp_path}/x.csv.gz", "types": {"C1": "int64"}})
        assert open_message(DataError, job) == (
            f"{tmp_path}/x.csv.gz: no rows; the source has none at all"
        )

    def test_not_a_parquet_file(self, tmp_path):
        (tmp_path / "x.parquet").write_text("hello, I am no Parquet file at all")
        job = job_over({"format": "parquet", "path": str(tmp_path)})
        assert open_message(DataError, job).startswith(
            f"{tmp_path}/x.parquet: not a readable Parquet file: "
        )

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_file_without_permission(self, tmp_path):
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table(GOOD), path)
        path.chmod(0)
        job = job_over({"format": "parquet", "path": str(path)})
        assert open_message(DataError, job).startswith(f"{path}: not a readable Parquet file: ")

    def test_path_that_the_system_refuses(self, tmp_path):
        path = tmp_path / ("x" * 300)
        job = job_over({"format": "parquet", "path": str(path)})
        assert open_message(DataError, job).startswith(f"{path}: cannot be listed: [Errno 36] ")

    def test_damaged_parquet_pages(self, parquet_job):
        job = parquet_job()
        dataset = Dataset.open(job)
        with open("rows.parquet", "r+b") as file:
            file.seek(4)
            file.write(b"\xff" * 60)
        error = message(DataError, lambda: read_all(dataset))
        assert error.startswith("rows.parquet: cannot be read: ")

    def test_pages_that_do_not_match_their_checksum(self, parquet_job):
        job = parquet_job()
        options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
        pq.write_table(pa.table(GOOD | {"C1": [5, 6, 7, 77]}), "rows.parquet", **options)
        dataset = Dataset.open(job)
        data = bytearray(Path("rows.parquet").read_bytes())
        data[data.index(pa.array([5, 6, 7, 77]).buffers()[1].to_pybytes()[:32])] ^= 1
        Path("rows.parquet").write_bytes(data)
        error = message(DataError, lambda: read_all(dataset))
        assert error.startswith("rows.parquet: cannot be read: ") and "checksum" in error

    def test_damaged_gzip(self, tmp_path):
        data = bytearray(gzip.compress(b"1\t2\t3\n" * 5000))
        data[30:34] = b"\0\0\0\0"
        (tmp_path / "x.tsv.gz").write_bytes(data)
        source = {"format": "tsv", "path": f"{tmp_path}/x.tsv.gz", "columns": ["label", "I1", "C1"]}
        job = job_over({**source, "types": {"C1": "int64"}})
        assert open_message(DataError, job).startswith(f"{tmp_path}/x.tsv.gz: cannot be read: ")

    def test_file_system_that_does_not_exist(self):
        job = job_over({"format": "parquet", "path": "gopher://host/x.parquet"})
        assert open_message(DataError, job).startswith(
            "gopher://host/x.parquet: cannot be opened: "
        )

    def test_same_file_twice(self, parquet_job):
        parquet_job()
        job = job_over({"format": "parquet", "path": ["rows.parquet", "rows.parquet"]})
        assert open_message(DataError, job) == (
            "rows.parquet: named twice; its rows would be read twice"
        )

    def test_files_of_two_schemas(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        pq.write_table(pa.table({"label": [1], "C1": [1]}), "a.parquet")
        job = job_over({"format": "parquet", "path": "*.parquet"}, numeric=[])
        remedy = "; all files of a source have one schema; name the files of one schema"
        for columns, expected in (
            (
                {"label": [1], "C1": ["x"]},
                "b.parquet: column 'C1' is string, but int64 in a.parquet",
            ),
            ({"label": [1]}, "b.parquet: column 'C1' of a.parquet is missing"),
            ({"label": [1], "C1": [1], "C2": [1]}, "b.parquet: column 'C2' is not in a.parquet"),
        ):
            pq.write_table(pa.table(columns), "b.parquet")
            assert message(DataError, lambda: Dataset.open(job).num_rows("train")) == (
                expected + remedy
            )


class TestParts:
    def test_fraction_without_rows(self, parquet_job):
        job = parquet_job(split={"by": "fraction", "evaluation": 0.1})
        assert open_message(DataError, job) == (
            "data.split.evaluation 0.1 of 4 rows leaves no rows for evaluation; change the "
            "fraction or "
            "give more data"
        )
        job = parquet_job(split={"by": "fraction", "evaluation": 0.9})
        assert open_message(DataError, job) == (
            "data.split.evaluation 0.9 of 4 rows leaves no rows for train; change the fraction or "
            "give "
            "more data"
        )

    def test_time_without_rows(self, parquet_job):
        job = parquet_job(event_time="t", split={"by": "time", "at": "1970-01-01T00:00:09Z"})
        assert open_message(DataError, job) == (
            "data.split.at '1970-01-01T00:00:09Z': no row has 't' at or after it, which leaves no "
            "rows for evaluation; change the time, or data.event_time_unit, now ms"
        )
        job = parquet_job(event_time="t", split={"by": "time", "at": 1000})
        assert open_message(DataError, job) == (
            "data.split.at 1000: no row has 't' before it, which leaves no rows for train; change "
            "the time, or data.event_time_unit, now ms"
        )

    def test_time_that_is_none(self, parquet_job):
        job = parquet_job(event_time="t", split={"by": "time", "at": "noon"})
        assert open_message(ConfigError, job) == (
            "data.split.at: 'noon' is no ISO 8601 time; write it like 2026-01-31T00:00:00Z"
        )

    def test_file_glob_without_rows(self, parquet_job):
        job = parquet_job(split={"by": "file", "evaluation": "day_9*"})
        assert open_message(DataError, job) == (
            "data.split.evaluation 'day_9*' matches no file with rows of 1, which leaves no rows "
            "for "
            "evaluation; change the glob"
        )
        job = parquet_job(split={"by": "file", "evaluation": "*"})
        assert open_message(DataError, job) == (
            "data.split.evaluation '*' matches every file with rows of 1, which leaves no rows for "
            "train; change the glob"
        )

    def test_nothing_held_out(self, parquet_job):
        dataset = Dataset.open(parquet_job())
        assert not dataset.has_evaluation
        assert message(ConfigError, lambda: dataset.num_rows("evaluation")) == (
            "no evaluation rows: nothing is held out; set data.split or data.evaluation_source"
        )

    def test_shuffling_what_is_read_in_order(self, parquet_job):
        split = {"by": "fraction", "evaluation": 0.5}
        dataset = Dataset.open(parquet_job(split=split))
        call = lambda: dataset.batches("evaluation", batch_size=1, shuffle=True)  # noqa: E731
        assert message(ConfigError, call) == "shuffle=True: evaluation is read in order"
