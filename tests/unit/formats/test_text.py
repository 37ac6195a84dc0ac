"""CSV and TSV: malformed rows, headers, line ends, and a Criteo log as it comes."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest

from penstock.config import TextSource, parse_job
from penstock.data import Dataset
from penstock.data.formats import lines
from penstock.data.formats.text import expand_names, open_text
from penstock.errors import ConfigError, DataError
from tests.contract.data_cases import assert_resumes_everywhere, read_all


def text_job(path, format="tsv", columns=("label", "I1", "C1"), shuffle=0, features=None, **source):
    return parse_job({
        "data": {
            "source": {
                "format": format,
                "path": str(path),
                **({"columns": columns} if columns else {}),
                **source,
            },
            "label": {"column": "label"},
            "numeric": [{"columns": ["I*"]}],
            "shuffle": {"block_rows": shuffle},
        },
        "features": features or [{"columns": ["C*"], "transforms": [{"kind": "hash"}]}],
    })


def rows(count, bad=()):
    lines = [f"{n % 2}\t{n}\tkey{n}" for n in range(count)]
    for number, line in bad:
        lines[number] = line
    return ("\n".join(lines) + "\n").encode()


def error_of(job):
    dataset = Dataset.open(job)
    with pytest.raises(DataError) as error:
        read_all(dataset)
    return str(error.value)


def numbers(batches):
    return [int(value) for batch in batches for value in batch.dense[:, 0]]


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1\t2", "2 fields, expected 3"),
        ("1\t2\tx\ty", "4 fields, expected 3"),
        ("1\ttwo\tx", "column 'I1' is no double: invalid value 'two'"),
        ("", "blank line"),
    ],
)
def test_malformed_row_fails_with_its_line_and_text(
    line, reason, compressed, tmp_path, monkeypatch
):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 512)
    monkeypatch.setattr(lines, "READ_BYTES", 100)
    data = rows(200, [(137, line)])
    path = tmp_path / ("x.tsv.gz" if compressed else "x.tsv")
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert error_of(text_job(path)) == (
        f"{path}:138: {reason}: {line!r}; mend the file or set data.source.on_malformed_row: "
        "quarantine"
    )


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("header", [False, True])
def test_malformed_rows_are_quarantined_once(compressed, header, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 512)
    monkeypatch.setattr(lines, "READ_BYTES", 100)
    bad = [(0, "x\t1\ty"), (57, "1"), (58, "1\t?\tz"), (199, "1\t1\t1\t1")]
    data = (b"label\tI1\tC1\n" if header else b"") + rows(200, bad)
    path = tmp_path / ("x.tsv.gz" if compressed else "x.tsv")
    path.write_bytes(gzip.compress(data) if compressed else data)
    job = text_job(
        path, on_malformed_row="quarantine", columns=None if header else ("label", "I1", "C1")
    )
    kept = tmp_path / "quarantine.jsonl"
    dataset = Dataset.open(job, quarantine=kept)
    good = [number for number in range(200) if number not in dict(bad)]
    batches = read_all(dataset, epochs=2)
    end = batches[-1].end
    assert numbers(batches) == good * 2
    assert dataset.quarantined_rows == 4
    assert dataset.num_rows("train") == 200
    assert end.counts == (400, 0, 8, 392)
    entries = sorted(
        map(json.loads, kept.read_text().splitlines()), key=lambda entry: entry["line"]
    )
    assert [entry["line"] for entry in entries] == [number + 1 + header for number, _ in bad]
    digest = entries[1].pop("digest")
    assert entries[1] == {
        "file": str(path),
        "line": 58 + header,
        "reason": "1 fields, expected 3",
        "text": "1",
        "bytes": path.stat().st_size,
        "number": 2,
    }
    assert {entry["digest"] for entry in entries if "digest" in entry} == {digest}
    assert [entry["text"] for entry in entries] == [line for _, line in bad]
    # A resumed run finds them there; half a line of a killed run is dropped.
    with kept.open("a") as out:
        out.write('{"file": "x')
    again = Dataset.open(job, quarantine=kept)
    again.take_up_quarantine(end)
    assert again.quarantined_rows == 4
    read_all(again)
    assert again.quarantined_rows == 4
    assert len(kept.read_text().splitlines()) == 4


def test_resumes_everywhere_among_malformed_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 512)
    monkeypatch.setattr(lines, "READ_BYTES", 100)
    path = tmp_path / "x.tsv"
    path.write_bytes(rows(300, [(number, "bad") for number in range(0, 300, 7)]))
    dataset = Dataset.open(text_job(path, on_malformed_row="quarantine", shuffle=64))
    assert_resumes_everywhere(dataset, epochs=2, batch_size=16)


def test_a_label_is_named_by_its_line_among_malformed_rows(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(rows(50, [(3, "bad"), (4, "bad"), (20, "7\t1\tx"), (30, "bad")]))
    assert error_of(text_job(path, on_malformed_row="quarantine")) == (
        f"{path}:21, column 'label': label 7 is not 0 or 1; set at_least of the label "
        "to make labels of numbers, or task regression to learn the number"
    )


def test_line_ends_byte_order_mark_and_a_last_line_without_end(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbflabel,I1,C1\r\n1,5,a\r\n0,6,b")
    for columns in (None, ("label", "I1", "C1")):
        if columns:
            path.write_bytes(b"\xef\xbb\xbf1,5,a\n0,6,b")
        batches = read_all(Dataset.open(text_job(path, "csv", columns)))
        assert numbers(batches) == [5, 6]
        assert batches[0].labels.tolist() == [1, 0]


def test_quotes_and_words_that_are_not_null(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('label,I1,C1\n1,5,"a,b"\n0,6,NA\n0,7,\n')
    bag = read_all(Dataset.open(text_job(path, "csv", None)))[0].sparse["C1"]
    assert bag.offsets.tolist() == [0, 1, 2, 2]
    # Tab-separated files have no quotes.
    path.write_text('1\t5\t"a\n0\t6\tb"\n')
    assert numbers(read_all(Dataset.open(text_job(path)))) == [5, 6]


def test_gzip_of_several_members_reads_whole(tmp_path):
    path = tmp_path / "x.tsv.gz"
    path.write_bytes(gzip.compress(rows(10)) + gzip.compress(rows(5)))
    dataset = Dataset.open(text_job(path))
    assert dataset.num_rows("train") == 15
    assert numbers(read_all(dataset)) == [*range(10), *range(5)]


def test_strings_without_transform_are_refused_with_both_remedies(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(rows(3))
    with pytest.raises(DataError) as error:
        Dataset.open(text_job(path, features=[{"columns": ["C1"]}]))
    assert str(error.value) == (
        f"{path}: column 'C1' is string; keys are 64-bit integers: add the transform hash (or "
        "hex), or "
        "declare data.source.types: {C1: int64}"
    )


def test_headers_that_differ(tmp_path):
    (tmp_path / "a.csv").write_text("label,I1,C1\n1,5,a\n")
    (tmp_path / "b.csv").write_text("label,C1,I1\n1,a,5\n")
    with pytest.raises(DataError) as error:
        Dataset.open(text_job(tmp_path, "csv", None))
    assert str(error.value) == (
        f"{tmp_path}/b.csv: column 'C1' stands where {tmp_path}/a.csv has 'I1' (column 2); all "
        "files of "
        "a source have one header"
    )


def test_files_with_a_header_only_among_others_are_fine(tmp_path):
    (tmp_path / "a.csv").write_text("label,I1,C1\n")
    (tmp_path / "b.csv").write_text("label,I1,C1\n1,5,a\n")
    assert numbers(read_all(Dataset.open(text_job(tmp_path, "csv", None)))) == [5]


def test_names():
    assert expand_names(["label", "I{1..3}", "x{9..10}y"]) == [
        "label",
        "I1",
        "I2",
        "I3",
        "x9y",
        "x10y",
    ]
    with pytest.raises(ConfigError, match=r"data.source.columns: 'I\{3..1\}' is an empty range"):
        expand_names(["I{3..1}"])


def test_types_that_match_no_column(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(rows(3))
    with pytest.raises(ConfigError) as raised:
        Dataset.open(text_job(path, types={"D*": "int64"}))
    assert str(raised.value).startswith(
        f"data.source.types: 'D*' matches no column of {path}; there are label, I1, "
    )


def test_a_name_wins_over_globs_the_last_glob_over_others_and_all_over_what_is_usual(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"label,I1,I2,J1,K1\n1,2,3,4,5\n")
    types = {"I1": "string", "I*": "int64", "*1": "float64"}
    usual = {"I*": "float32", "label": "int64", "*": "float32"}
    schema = open_text(TextSource(path=str(path), types=types), usual).schema
    assert [str(kind) for kind in schema.types] == ["int64", "string", "int64", "double", "double"]
    swapped = {"*1": "float64", "I*": "int64", "I1": "string"}
    schema = open_text(TextSource(path=str(path), types=swapped), usual).schema
    assert [str(kind) for kind in schema.types] == ["int64", "string", "int64", "double", "double"]
    schema = open_text(
        TextSource(path=str(path), types={"*1": "float64", "I*": "int64"}), {}
    ).schema
    assert [str(kind) for kind in schema.types] == ["string", "int64", "int64", "double", "double"]


def test_a_type_by_the_name_of_a_column_with_brackets(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"label,id[0]\n1,7\n")
    source = TextSource(path=str(path), types={"id[0]": "int64"})
    assert open_text(source, {}).schema.field("id[0]").type == pa.int64()


@pytest.mark.parametrize(
    "text",
    [b"label,a\r1,2\r0,3\r", b"label,a\r1,2\n0,3\n", b"label,a\r1\n0,3\n", b"label\ra\r\n1,2\r\n"],
)
def test_a_header_that_ends_with_a_carriage_return_takes_no_row_along(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_bytes(text)
    with pytest.raises(DataError, match=r"x.csv:1: the header holds a carriage return before its"):
        open_text(TextSource(path=str(path)), {})


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz"])
def test_criteo_log(suffix, tmp_path, monkeypatch):
    """label, 13 integers (blanks; I2 may be negative), 26 ids of 8 hexadecimal digits (blanks)."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(lines, "READ_BYTES", 7_000)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    integers = rng.integers(0, 9000, (300, 13))
    integers[:, 1] -= 3
    ids = rng.integers(0, 2**32, (300, 26))
    blank_i, blank_c = rng.random((300, 13)) < 0.3, rng.random((300, 26)) < 0.2
    log = [
        "\t".join(
            [str(labels[r])]
            + ["" if blank_i[r, c] else str(integers[r, c]) for c in range(13)]
            + ["" if blank_c[r, c] else f"{ids[r, c]:08x}" for c in range(26)]
        )
        for r in range(300)
    ]
    data = ("\n".join(log) + "\n").encode()
    path = tmp_path / f"day_0{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    job = parse_job({
        "data": {
            "source": {
                "format": "tsv",
                "path": str(path),
                "columns": ["label", "I{1..13}", "C{1..26}"],
            },
            "label": {"column": "label"},
            "numeric": [
                {"columns": ["I*"], "transforms": [{"kind": "clip", "low": -1}, {"kind": "log"}]}
            ],
            "split": {"by": "fraction", "evaluation": 0.2},
            "shuffle": {"block_rows": 64},
        },
        "features": [{"columns": ["C*"], "transforms": [{"kind": "hex"}], "missing": -1}],
    })
    dataset = Dataset.open(job)
    assert dataset.numeric == tuple(f"I{n}" for n in range(1, 14))
    assert [f.name for f in dataset.features] == [f"C{n}" for n in range(1, 27)]
    assert [t.name for t in dataset.tables] == [f"C{n}" for n in range(1, 27)]
    batches = read_all(dataset, shuffle=False) + read_all(dataset, "evaluation")
    dense = np.concatenate([b.dense.numpy() for b in batches])
    clipped = np.maximum(np.where(blank_i, 0, integers), -1).astype(np.float64)
    logarithms = (np.sign(clipped) * np.log1p(np.abs(clipped))).astype(np.float32)
    np.testing.assert_array_max_ulp(dense, logarithms, maxulp=2)  # as much as log promises
    keys = np.concatenate([b.sparse.values.numpy().reshape(26, -1) for b in batches], axis=1)
    np.testing.assert_array_equal(keys.T, np.where(blank_c, -1, ids))
    assert np.concatenate([b.labels.numpy() for b in batches]).tolist() == labels.tolist()
    assert_resumes_everywhere(dataset)


def test_texts_that_mean_null(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"1\t\\N\tNULL\n0\t5\tN\n1\t\t\n1\tNULL\tnull\n")
    job = text_job(path, null_values=["\\N", "NULL"])
    (batch,) = read_all(Dataset.open(job))
    assert batch.dense[:, 0].tolist() == [0, 5, 0, 0]
    assert batch.sparse["C1"].offsets.tolist() == [0, 0, 1, 1, 2]
    assert error_of(text_job(path)) == (
        f"{path}:1: column 'I1' is no double: invalid value '\\N': '1\\t\\\\N\\tNULL'; mend the "
        "file or set data.source.on_malformed_row: quarantine"
    )
    with pytest.raises(ConfigError) as error:
        text_job(path, null_values=["a\tb"])
    assert str(error.value).startswith("job: data.source.null_values.0: string should match")


def test_text_that_is_no_utf8(tmp_path, recwarn):
    """Found by the fuzz tests: Arrow dropped such a row if it had a wrong number of fields, too."""
    path = tmp_path / "x.tsv"
    path.write_bytes(b"1\ta\n0\tb\xff\t\n0\t\xff\n1\tc\n")
    source = {"format": "tsv", "path": str(path), "columns": ["label", "C1"]}
    job = parse_job({
        "data": {
            "source": {**source, "on_malformed_row": "quarantine"},
            "label": {"column": "label"},
        },
        "features": [{"columns": ["C1"], "transforms": [{"kind": "hash"}]}],
    })
    dataset = Dataset.open(job, quarantine=tmp_path / "bad.jsonl")
    assert [batch.batch_size for batch in read_all(dataset)] == [2]
    entries = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(one["line"], one["reason"]) for one in entries] == [(2, "not UTF-8"), (3, "not UTF-8")]
    assert not recwarn.list


def test_header_that_is_no_utf8(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"label,C\xff\n1,2\n")
    job = parse_job({
        "data": {"source": {"format": "csv", "path": str(path)}, "label": {"column": "label"}},
    })
    with pytest.raises(DataError) as caught:
        Dataset.open(job)
    assert str(caught.value) == f"{path}:1: the header is not UTF-8; write the file in UTF-8"


@pytest.mark.parametrize("line", [b"\r1\t2\t3", b"1\t2\t3\r1\t2\t3", b"1\t2\t3\r\r"])
def test_a_carriage_return_within_a_line(tmp_path, line):
    """Found by the fuzz tests: Arrow ends a row there, so that one line became two rows."""
    path = tmp_path / "x.tsv"
    path.write_bytes(b"1\t2\t3\r\n" * 3 + line + b"\n0\t5\t6\r\n")
    job = text_job(
        path, on_malformed_row="quarantine", types={"C1": "int64"}, features=[{"columns": ["C1"]}]
    )
    dataset = Dataset.open(job, quarantine=tmp_path / "bad.jsonl")
    assert [batch.labels.tolist() for batch in read_all(dataset)] == [[1, 1, 1, 0]]
    (entry,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert (entry["line"], entry["reason"]) == (4, "a carriage return within the line")
