"""ORC, Arrow IPC and JSON lines: what is read of them, and what is said of files that are none."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, ipc, orc

from penstock import _core
from penstock.config import ArrowSource, OrcSource, TextSource, parse_job
from penstock.data import Dataset
from penstock.data.formats import lines
from penstock.data.formats.arrow import ArrowFormat
from penstock.data.formats.columnar import GroupedFiles, OpenFile
from penstock.data.formats.orc import OrcFormat
from penstock.errors import ConfigError, DataError
from penstock.training.trained import _source_like
from tests.contract.data_cases import assert_resumes_everywhere, read_all


def job_over(source, features=None, **data):
    return parse_job({
        "data": {
            "source": source,
            "label": {"column": "label"},
            "numeric": [{"columns": ["I*"]}],
            "shuffle": {"block_rows": 0},
            **data,
        },
        "features": features or [{"columns": ["C*"]}],
    })


def message(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def rows(count=40):
    return {
        "label": [[number % 2] for number in range(count)],
        "I1": [[] if number % 5 == 0 else [float(number)] for number in range(count)],
        "C1": [[] if number % 7 == 0 else [number] for number in range(count)],
    }


class TestListsOfAtMostOneValue:
    def test_read_as_the_value_or_missing(self, tmp_path):
        given = rows()
        orc.write_table(pa.table(given), tmp_path / "x.orc")
        job = job_over(
            {"format": "orc", "path": f"{tmp_path}/x.orc"},
            numeric=[{"columns": ["I*"], "missing": {"policy": "fill", "value": -1}}],
        )
        (batch,) = read_all(Dataset.open(job), batch_size=64)
        assert batch.labels.tolist() == [row[0] for row in given["label"]]
        assert batch.dense[:, 0].tolist() == [row[0] if row else -1 for row in given["I1"]]
        assert batch.sparse["C1"].values.tolist() == [row[0] for row in given["C1"] if row]

    @pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
    def test_nulls_and_slices(self, kind, tmp_path):
        table = pa.table({
            "label": pa.array([[1.0], [0.0], [1.0]], kind(pa.float32())),
            "I1": pa.array([None, [7], []], kind(pa.int16())),
            "C1": [1, 2, 3],
        })
        with ipc.new_file(tmp_path / "x.arrow", table.schema) as out:
            out.write_table(table)
        job = job_over({"format": "arrow", "path": f"{tmp_path}/x.arrow"})
        (batch,) = read_all(Dataset.open(job))
        assert batch.dense[:, 0].tolist() == [0, 7, 0]

    @pytest.mark.parametrize("column", ["I1", "label", "w"])
    def test_two_values(self, column, tmp_path):
        given = {**rows(), "w": [[1.0]] * 40}
        given[column][17] = [1, 0]
        orc.write_table(pa.table(given), tmp_path / "x.orc")
        job = job_over({"format": "orc", "path": f"{tmp_path}/x.orc"}, weight="w")
        assert message(DataError, lambda: read_all(Dataset.open(job))) == (
            f"{tmp_path}/x.orc row 17, column {column!r}: 2 values where at most one is expected; "
            "mend the file, or list the column under `features`"
            + ("; where each row is a vector, set its `width` in data.numeric" * (column == "I1"))
        )

    def test_empty_label(self, tmp_path):
        given = rows()
        given["label"][3] = []
        orc.write_table(pa.table(given), tmp_path / "x.orc")
        job = job_over({"format": "orc", "path": f"{tmp_path}/x.orc"})
        assert message(DataError, lambda: read_all(Dataset.open(job))) == (
            f"{tmp_path}/x.orc row 3, column 'label': the label is missing; leave such rows out of "
            "the file, or set missing: ignore of the label"
        )

    def test_lists_of_text_are_no_numbers(self, tmp_path):
        orc.write_table(pa.table({**rows(), "I1": [["a"]] * 40}), tmp_path / "x.orc")
        job = job_over({"format": "orc", "path": f"{tmp_path}/x.orc"})
        assert message(DataError, lambda: Dataset.open(job)) == (
            f"{tmp_path}/x.orc: column 'I1' is list<item: string>; numeric columns are numbers; "
            "list it under `features` (transform hash)"
        )


def test_the_last_keys_of_a_list(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_rows(3))
    features = [{"columns": ["C1"], "max_keys": 1, "keep": "last"}]
    (batch,) = read_all(Dataset.open(job_over({"format": "jsonl", "path": str(path)}, features)))
    assert batch.sparse["C1"].values.tolist() == [1, 2, 3]


class TestColumnarFiles:
    def test_stripes_are_counted_from_the_footer(self, tmp_path):
        path = tmp_path / "x.orc"
        table = pa.table({"a": np.random.default_rng(0).integers(0, 2**62, 300_000)})
        orc.write_table(table, path, stripe_size=65_536)
        parsed = orc.ORCFile(path)
        with pa.OSFile(str(path)) as file:
            counted = OrcFormat().layout(OpenFile(file, str(path), is_local=True)).group_rows
        stripes = range(parsed.nstripes)
        assert counted.tolist() == [parsed.read_stripe(stripe).num_rows for stripe in stripes]
        assert len(counted) > 100
        source = GroupedFiles(OrcSource(path=str(path)), OrcFormat())
        extents = source.extents()
        assert len(extents) >= 3
        assert extents[0].stop <= 131_072
        back = [chunk.table for split in extents for chunk in source.read(split, ["a"])]
        assert pa.concat_tables(back)["a"].to_pylist() == table["a"].to_pylist()

    def test_feather_compressed_with_dictionaries_and_other_order_of_columns(self, tmp_path):
        path = tmp_path / "x.feather"
        table = pa.table({
            "t": pa.array(["a", "b", "a"]).dictionary_encode(),
            "n": [1, 2, 3],
            "l": [[1], [], [2]],
        })
        feather.write_feather(table, path, compression="lz4")
        source = GroupedFiles(ArrowSource(path=str(path)), ArrowFormat())
        (chunk,) = source.read(source.extents()[0], ["l", "t"])
        assert chunk.table.to_pydict() == {"l": [[1], [], [2]], "t": ["a", "b", "a"]}
        (nothing,) = source.read(source.extents()[0], [])
        assert nothing.table.num_columns == 0

    @pytest.mark.parametrize("kind", ["orc", "arrow"])
    def test_not_such_a_file(self, kind, tmp_path):
        path = tmp_path / f"x.{kind}"
        for junk in (b"hello, I am no such file at all", b"ARROW1\0\0" + b"\xff" * 40, b"ORC" * 9):
            path.write_bytes(junk)
            job = job_over({"format": kind, "path": str(path)})
            name = {"orc": "a readable ORC", "arrow": "a readable Arrow IPC"}[kind]
            assert message(DataError, lambda job=job: Dataset.open(job)).startswith(
                f"{path}: not {name} file: "
            )

    def test_feather_of_version_1(self, tmp_path):
        path = tmp_path / "x.feather"
        path.write_bytes(b"FEA1" + b"\0" * 60)
        job = job_over({"format": "arrow", "path": str(path)})
        assert message(DataError, lambda: Dataset.open(job)) == (
            f"{path}: not a readable Arrow IPC file: Feather version 1; write it again as version 2"
        )

    @pytest.mark.parametrize("kind", ["orc", "arrow", "arrow stream"])
    def test_a_file_cut_short(self, kind, tmp_path):
        path = tmp_path / "x"
        table = pa.table({"label": [0, 1] * 500, "I1": [1.5] * 1000, "C1": range(1000)})
        if kind == "orc":
            orc.write_table(table, path)
        else:
            new = ipc.new_file if kind == "arrow" else ipc.new_stream
            with new(path, table.schema) as out:
                out.write_table(table, max_chunksize=100)
        path.write_bytes(path.read_bytes()[:-300])
        job = job_over({"format": kind.split()[0], "path": str(path)})
        error = message(DataError, lambda: read_all(Dataset.open(job)))
        assert error.startswith((f"{path}: not a readable ", f"{path}: cannot be read: "))

    def test_a_stripe_of_more_rows_than_any(self, tmp_path, monkeypatch):
        path = tmp_path / "x.orc"
        orc.write_table(pa.table({"label": [1], "C1": [1]}), path)
        monkeypatch.setattr(
            "penstock.data.formats.orc._fields",
            lambda message, field: iter([2**80] if field == 5 else [b"\0"]),
        )
        job = job_over({"format": "orc", "path": str(path)}, numeric=[])
        assert message(DataError, lambda: Dataset.open(job)).startswith(
            f"{path}: not a readable ORC file: a stripe of 1208925819614629174706176 rows"
        )

    def test_no_rows(self, tmp_path):
        table = pa.table({"label": [1], "I1": [1.0], "C1": [1]})[:0]
        for kind, new in (("file", ipc.new_file), ("stream", ipc.new_stream)):
            path = tmp_path / kind
            with new(path, table.schema) as out:
                out.write_table(table)
            job = job_over({"format": "arrow", "path": str(path)})
            assert message(DataError, lambda job=job: Dataset.open(job)) == (
                f"{path}: no rows; the source has none at all"
            )

    def test_a_name_that_is_no_utf8(self, tmp_path):
        """Found by the fuzz tests."""
        path = tmp_path / "x.arrow"
        with ipc.new_stream(path, pa.schema([("label", pa.int64())])) as out:
            out.write_table(pa.table({"label": [1, 0]}))
        path.write_bytes(path.read_bytes().replace(b"label", b"lab\xfel"))
        job = job_over({"format": "arrow", "path": str(path)})
        assert message(DataError, lambda: Dataset.open(job)) == (
            f"{path}: the name of a column is not UTF-8; is it damaged?"
        )

    def test_a_name_that_stands_twice(self, tmp_path):
        batch = pa.record_batch([pa.array([1]), pa.array([2])], names=["label", "label"])
        with ipc.new_file(tmp_path / "x.arrow", batch.schema) as out:
            out.write_batch(batch)
        job = job_over({"format": "arrow", "path": str(tmp_path)})
        assert message(DataError, lambda: Dataset.open(job)) == (
            f"{tmp_path}/x.arrow: column 'label' is there twice; give each its own name"
        )


def json_rows(count, bad=()):
    written = [
        json.dumps({"label": n % 2, "I1": n, "C1": [n, n + 1], "S1": f"k{n}"}) for n in range(count)
    ]
    for number, line in bad:
        written[number] = line
    return ("\n".join(written) + "\n").encode()


def json_job(path, **source):
    features = [{"columns": ["C*"]}, {"columns": ["S*"], "transforms": [{"kind": "hash"}]}]
    return job_over({"format": "jsonl", "path": str(path), **source}, features)


MALFORMED = [
    ("", "blank line"),
    ("null", "not one JSON object in UTF-8, nested at most 64 deep"),
    ('{"label": 1} {"label": 0}', "not one JSON object in UTF-8, nested at most 64 deep"),
    ('{"label": 1', "not one JSON object in UTF-8, nested at most 64 deep"),
    ('{"a": ' + "[" * 999, "not one JSON object in UTF-8, nested at most 64 deep"),
    ('{"label": 1, "I1": x}', "invalid value."),
    ('{"label": 1, "I1": "many"}', "field 'I1' is no double: string"),
    ('{"label": 1, "C1": 5}', "field 'C1' is no list<item: int64>: number"),
    ('{"label": 1, "C1": [true]}', "field 'C1' is no list<item: int64>: boolean"),
    ('{"label": 1, "I1": 1e999}', "number too big to be stored in double."),
    ('{"label": 1, "label": 1}', "column(/label) was specified twice"),
]


class TestJsonLines:
    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch):
        monkeypatch.setattr(lines, "BLOCK_BYTES", 4096)
        monkeypatch.setattr(lines, "READ_BYTES", 1500)

    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize(("line", "reason"), MALFORMED)
    def test_malformed_row_fails_with_its_line(self, line, reason, compressed, tmp_path):
        data = json_rows(200, [(137, line)])
        path = tmp_path / ("x.jsonl.gz" if compressed else "x.jsonl")
        path.write_bytes(gzip.compress(data) if compressed else data)
        shown = repr(line if len(line) <= 120 else line[:117] + "...")
        assert message(DataError, lambda: read_all(Dataset.open(json_job(path)))) == (
            f"{path}:138: {reason}: {shown}; mend the file or set data.source.on_malformed_row: "
            "quarantine"
        )

    def test_malformed_rows_are_quarantined_once(self, tmp_path):
        bad = [(10 + 7 * number, line) for number, (line, _) in enumerate(MALFORMED)]
        path, kept = tmp_path / "x.jsonl", tmp_path / "quarantine.jsonl"
        path.write_bytes(json_rows(200, bad))
        dataset = Dataset.open(json_job(path, on_malformed_row="quarantine"), quarantine=kept)
        good = [number for number in range(200) if number not in dict(bad)]
        batches = read_all(dataset, epochs=2)
        assert [int(v) for batch in batches for v in batch.dense[:, 0]] == good * 2
        assert dataset.quarantined_rows == len(bad)
        entries = [json.loads(entry) for entry in kept.read_text().splitlines()]
        found = {entry["line"]: (entry["text"], entry["reason"]) for entry in entries}
        assert found == {number + 1: one for (number, _), one in zip(bad, MALFORMED, strict=True)}
        assert_resumes_everywhere(dataset, batch_size=16)

    def test_text_that_is_no_utf8(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_bytes(json_rows(3) + b'{"label": 1, "S1": "\xff"}\n')
        assert message(DataError, lambda: read_all(Dataset.open(json_job(path)))).startswith(
            f"{path}:4: not one JSON object in UTF-8, nested at most 64 deep: "
        )

    def test_types_of_the_first_lines(self, tmp_path):
        path = tmp_path / "x.jsonl"
        first = [
            {"label": True, "I1": 1, "n": None, "mixed": 1, "time": "2026-01-01T00:00:00Z"},
            {"label": False, "big": 2**64 - 1, "mixed": 1.5, "l": [], "o": {"a": 1}},
            {"label": False, "l": ["a", None], "deep": [[1]], "e": []},
        ]
        path.write_text("no json\n" + "".join(json.dumps(row) + "\n" for row in first))
        job = json_job(path, types={"late": "int64"})
        from penstock.data.columns.schema import default_text_types
        from penstock.data.formats.json_lines import open_json_lines

        source = open_json_lines(job.data.source, default_text_types(job))
        assert {field.name: str(field.type) for field in source.schema} == {
            "label": "bool",
            "I1": "double",
            "n": "string",
            "mixed": "double",
            "time": "string",
            "big": "uint64",
            "l": "list<item: string>",
            "e": "list<item: string>",
            "late": "int64",
        }

    def test_declared_types_and_fields_that_come_late(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_text('{"label": 1, "I1": 1.5}\n' * 1200 + '{"label": 0, "C1": 7, "new": 1}\n')
        features = [{"columns": ["C1"]}]
        source = {"format": "jsonl", "path": str(path)}
        assert message(DataError, lambda: Dataset.open(job_over(source, features))) == (
            f"{path}: no column 'C1' (features.0); there are label, I1"
        )
        dataset = Dataset.open(job_over({**source, "types": {"C1": "int64"}}, features))
        batches = read_all(dataset)
        assert sum(batch.sparse["C1"].values.numel() for batch in batches) == 1
        assert (
            message(
                ConfigError, lambda: Dataset.open(job_over({**source, "types": {"X*": "int64"}}))
            )
            == f"data.source.types: 'X*' matches no column of {path}; there are label, I1"
        )

    def test_no_object_at_all(self, tmp_path):
        path = tmp_path / "x.jsonl"
        path.write_text("[1, 2]\n{}\n")
        assert message(DataError, lambda: Dataset.open(json_job(path))) == (
            f"{path}: no JSON object with a field in the first 1000 lines; JSON lines hold one "
            "object a line, {...}"
        )

    def test_outer_form(self):
        def first(text):
            return _core.find_non_object(np.frombuffer(text, dtype=np.uint8))

        assert first(b'{"a": "}{\\"\\\\"}\n  {} \r\n{"a": [{"b": []}]}\n') == -1
        for wrong in (b"", b"1", b"{}{}", b"{} null", b"{", b'{"a', b'{"a\\', b"}", b"[]", b"{}]"):
            assert first(b"{}\n" + wrong + b"\n{}\n") == 1, wrong


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.orc", "orc"),
        ("day_*.feather", "arrow"),
        ("x.jsonl.gz", "jsonl"),
        ("x.tsv", "tsv"),
        ("folder", "csv"),
    ],
)
def test_other_data_has_the_format_of_its_ending(path, expected):
    """`evaluate --data` and `predict --data`; without an ending, the job's own."""
    source = TextSource(path="x.csv", columns=("label", "I1"), on_malformed_row="quarantine")
    like = _source_like(source, path)
    assert (like.format, like.path) == (expected, path)
    if expected in {"tsv", "csv"}:
        assert like.columns == source.columns
