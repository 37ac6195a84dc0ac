"""Damaged files: every row is right, or counted as malformed, or a typed error names the file."""

import shutil
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import run
from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.formats import lines
from penstock.data.formats.json_lines import JsonParser
from penstock.data.formats.lines import OpenQuote
from penstock.data.formats.row_ends import TextRows
from penstock.data.opening import open_source
from penstock.errors import CheckpointError, ConfigError, DataError
from penstock.training.trained import open_trained
from tests.contract.data_cases import make_job, make_table, write_case
from tests.fuzz.damage import TEXT, damage, damaged
from tests.fuzz.effort import effort

ROWS = 60
KINDS = ("parquet", "orc", "arrow", "arrow stream", "csv.gz", "tsv.bz2", "jsonl.gz")
TEXT_KINDS = ("csv", "tsv", "jsonl")


class Cases(dict):
    """By kind: the source of a job, and the bytes of its files."""

    schemas: dict

    def __repr__(self):
        """A failure shows the case, not the files."""
        return "cases"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The source of a job by kind, and the undamaged bytes of its files."""
    found = Cases()
    found.schemas = {}
    for kind in (*KINDS, *TEXT_KINDS):
        folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
        source = write_case(kind, make_table(ROWS), folder)
        found[kind] = source, {path: path.read_bytes() for path in sorted(folder.iterdir())}
        found.schemas[kind] = open_plainly(make_job(source)).schema
    return found


def rows_of(source):
    """Every row of an open source, as Python values."""
    read = []
    for chunk in chunks_of(source):
        chunk.table.validate(full=True)
        read += chunk.table.to_pylist()
    return read


def chunks_of(source):
    for split in source.extents():
        yield from source.read(split, source.schema.names)


def open_plainly(job):
    types = {"label": "float64", "weight": "float64", "time": "int64", "I*": "float64"}
    return open_source(job.data.source, types)


def names_something(error, path):
    """A message names the file, or the column or the field of the job that does not fit it."""
    return any(part in str(error) for part in (str(path), "column", "data."))


def read_batches(job):
    """All batches of a job; what goes wrong must be a typed error that names the file or column."""
    dataset = Dataset.open(job)
    count = 0
    for part in ("train", "evaluation"):
        with dataset.batches(part, batch_size=16) as batches:
            for batch in batches:
                assert bool(batch.dense.isfinite().all()), "a number that is not finite"
                assert batch.sparse.offsets[-1] == batch.sparse.values.numel()
                count += batch.batch_size
    return dataset, count


@effort(120)
@given(st.sampled_from(KINDS), st.integers(0, 1), damage())
def test_damaged_files(cases, kind, number, harm):
    """Formats with checksums give the same rows or an error; others may give other values."""
    source, files = cases[kind]
    path = list(files)[number % len(files)]
    path.write_bytes(damaged(files[path], harm))
    try:
        try:
            dataset, count = read_batches(make_job(source))
        except (DataError, ConfigError) as error:
            # A damaged schema may lack a column, or have another type for it.
            assert names_something(error, path.parent), error
        else:
            assert count == dataset.num_rows("train") + dataset.num_rows("evaluation")
        if "." in kind:
            whole = rows_of_original(cases, kind)
            try:
                assert rows_of(open_plainly(make_job(source))) == whole
            except DataError as error:
                assert str(path) in str(error)
    finally:
        path.write_bytes(files[path])


def rows_of_original(cases, kind):
    """The rows of the undamaged file; JSON lines in text say the same as the ones compressed."""
    plain = kind.partition(".")[0]
    return rows_of(open_plainly(make_job(cases[plain][0])))


@effort(80)
@given(
    st.sampled_from(TEXT_KINDS),
    damage(TEXT),
    st.sampled_from([(64, 16), (256, 100), (8 << 20, 2 << 20)]),
)
def test_no_line_is_lost(cases, kind, harm, sizes):
    """Rows read and rows quarantined are the lines of the file, and rows not touched are right."""
    source, files = cases[kind]
    ((path, data),) = files.items()
    header, body = (data.split(b"\n", 1)[0] + b"\n", data.split(b"\n", 1)[1])
    if kind != "csv":
        header, body = b"", data
    original = dict(zip(body.splitlines(), rows_of_original(cases, kind), strict=True))
    body = damaged(body, harm)
    path.write_bytes(header + body)
    given_lines = body.split(b"\n")
    if not given_lines[-1]:
        given_lines.pop()
    job = make_job({**source, "on_malformed_row": "quarantine"})
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lines, "BLOCK_BYTES", sizes[0])
            patch.setattr(lines, "READ_BYTES", sizes[1])
            opened = open_plainly(job)
            # The schema of JSON lines is that of the first lines, which may be damaged.
            same_schema = opened.schema == cases.schemas[kind]
            read = rows_of(opened)
            left_out = sum(len(chunk.malformed) for chunk in chunks_of(opened))
            assert len(read) + left_out == len(given_lines)
            assert sum(chunk.num_read for chunk in chunks_of(opened)) == len(given_lines)
            assert sum(map(opened.count_rows, opened.extents())) == len(given_lines)
        if same_schema:
            untouched = Counter(repr(original[line]) for line in given_lines if line in original)
            assert not untouched - Counter(map(repr, read)), "a good row was not read as it is"
    except DataError as error:
        assert str(path) in str(error), error
        assert not given_lines or kind == "jsonl" or isinstance(error, OpenQuote), error
    finally:
        path.write_bytes(data)


@effort(60)
@given(st.sampled_from(TEXT_KINDS), damage(TEXT))
def test_damaged_text_trains_or_names_the_line(cases, kind, harm):
    source, files = cases[kind]
    ((path, data),) = files.items()
    path.write_bytes(damaged(data, harm))
    try:
        for policy in ("fail", "quarantine"):
            try:
                read_batches(make_job({**source, "on_malformed_row": policy}))
            except (DataError, ConfigError) as error:
                assert names_something(error, path), error
    finally:
        path.write_bytes(data)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    job = parse_job({
        "data": {
            "source": {"format": "synthetic", "rows": 400, "num_categorical": 2},
            "split": {"by": "fraction"},
            "label": {"column": "click"},
            "numeric": [{"columns": ["n[0-9]*"]}],
        },
        "features": [{"columns": ["c[0-9]*"]}],
        "table_defaults": {"dim": 4},
        "model": {"kind": "dlrm", "bottom": [4], "top": [4]},
        "training": {"batch_size": 64},
        "run": {"threads": 1},
    })
    run.train(job, folder / "run")
    (found,) = (folder / "run" / "checkpoints").iterdir()
    return found


@effort(60)
@given(st.data())
def test_damaged_checkpoints(checkpoint, tmp_path, data):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy)
    path = data.draw(st.sampled_from(sorted(copy.iterdir())), label="file")
    whole = path.read_bytes()
    if data.draw(st.booleans(), label="remove"):
        path.unlink()
    else:
        harmed = damaged(whole, data.draw(damage(), label="damage"))
        path.write_bytes(harmed)
        if harmed == whole:
            open_trained(copy)
            return
    with pytest.raises(CheckpointError) as caught:
        open_trained(copy)
    assert str(copy) in str(caught.value)


PIECES = st.sampled_from([
    *('{"label": 1, "I1": 2}', '{"C1": [1, 2]}', '{"label": ', "{", "}", "[", "]", '"', "\\", ","),
    *("null", "true", "1e5", ":", " ", "\r", "\t", "\x00", "\xff", '"I1"', "{}", "NaN", "é"),
])


@effort(100)
@given(st.lists(st.lists(PIECES, max_size=6).map("".join), max_size=12))
def test_any_lines_give_rows_or_malformed_rows(texts):
    """Every line is one or the other, and the parser of Arrow never meets what it crashes on."""
    schema = pa.schema([
        ("label", pa.float64()),
        ("I1", pa.float64()),
        ("C1", pa.list_(pa.int64())),
    ])
    parser = JsonParser(schema, ["C1", "label"])
    encoding = "latin-1" if any("\xff" in text for text in texts) else "utf-8"
    data = "".join(text + "\n" for text in texts).encode(encoding)
    table, malformed = parser.parse(TextRows(data), fail_fast=False)
    assert table.num_rows + len(malformed) == len(texts)
    table.validate(full=True)
    assert table.column_names == ["C1", "label"]
    assert [row.line for row in malformed] == sorted({row.line for row in malformed})
