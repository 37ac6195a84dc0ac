"""Texts of several keys with a separator between them, as lists, from every format with texts."""

import json

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import _core
from penstock.config import parse_job
from penstock.data import Dataset
from penstock.data.columns.transforms import BadValue, split_texts
from penstock.errors import ConfigError, DataError
from tests.contract.data_cases import assert_resumes_everywhere, read_all

GENRES = ["Action|Comedy", None, "Drama", "|Film noir||Drama|", "|", "Ünïcode|Action"] * 9
IDS = ["12|-7", None, "9223372036854775807", "3||3|", "||", "-9223372036854775808|0"] * 9


def write(kind, path, rows):
    file = path / f"x.{kind.removesuffix(' dictionary')}"
    if kind == "csv" or kind == "tsv":
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(rows.schema.names)]
        lines += [
            mark.join("" if v is None else str(v) for v in r.values()) for r in rows.to_pylist()
        ]
        file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    elif kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows.to_pylist())
        file.write_text(text, encoding="utf-8")
    elif kind == "orc":
        orc.write_table(rows, str(file))
    elif kind == "arrow":
        feather.write_feather(rows, str(file), compression="uncompressed", chunksize=20)
    else:
        if kind == "parquet dictionary":
            encoded = rows.column("genres").dictionary_encode()
            rows = rows.drop(["genres"]).append_column("genres", encoded)
        pq.write_table(rows, file, row_group_size=20)
    return file


def job_of(file, features, **source):
    kind = file.suffix.removeprefix(".")
    return parse_job({
        "data": {
            "source": {"format": kind, "path": str(file), **source},
            "label": {"column": "label"},
            "shuffle": {"block_rows": 0},
        },
        "features": features,
    })


def table(**more):
    return pa.table({"label": [0, 1] * 27, "genres": GENRES, "ids": IDS, **more})


def bags(dataset, name):
    out = []
    for batch in read_all(dataset, batch_size=16):
        bag = batch.sparse[name]
        ends = bag.offsets.tolist()
        out += [bag.values[a:b].tolist() for a, b in zip(ends, ends[1:], strict=False)]
    return out


def parts(text):
    return [one for one in (text or "").split("|") if one]


def hashed(text):
    value = _core.xxh64(text.encode(), 0)
    return value - 2**64 if value >= 2**63 else value


KINDS = ["parquet", "parquet dictionary", "orc", "arrow", "csv", "tsv", "jsonl"]
GENRE = {"columns": ["genres"], "separator": "|", "transforms": [{"kind": "hash"}]}


@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_lists(kind, tmp_path):
    file = write(kind, tmp_path, table())
    features = [GENRE, {"columns": ["ids"], "separator": "|"}]
    dataset = Dataset.open(job_of(file, features))
    assert bags(dataset, "genres") == [[hashed(one) for one in parts(text)] for text in GENRES]
    assert bags(dataset, "ids") == [[int(one) for one in parts(text)] for text in IDS]
    assert_resumes_everywhere(dataset, batch_size=16)


def test_missing_max_keys_and_sequences(tmp_path):
    file = write("csv", tmp_path, table())
    rule = {"columns": ["ids"], "separator": "|", "missing": -1, "max_keys": 1, "keep": "last"}
    for pooling in ("sum", "sequence"):
        dataset = Dataset.open(job_of(file, [{**rule, "pooling": pooling}]))
        want = [[int(one) for one in parts(text)][-1:] or [-1] for text in IDS]
        assert bags(dataset, "ids") == want


def test_weights_are_of_the_keys_that_are_left(tmp_path):
    amounts = [[0.5 * n for n, _ in enumerate(parts(text))] for text in GENRES]
    file = write("parquet", tmp_path, table(amounts=pa.array(amounts, pa.list_(pa.float64()))))
    dataset = Dataset.open(job_of(file, [{**GENRE, "weights": "amounts"}]))
    got = [w for batch in read_all(dataset) for w in batch.sparse["genres"].weights.tolist()]
    assert got == [w for row in amounts for w in row]


@given(
    st.lists(st.one_of(st.none(), st.text("ab|;é", max_size=8)), max_size=12),
    st.sampled_from(["|", "||", "a", "é;"]),
    st.sampled_from([pa.string(), pa.large_string(), pa.binary(), pa.string_view()]),
    st.integers(0, 3),
)
def test_equals_a_plain_split(texts, separator, kind, low):
    array = pa.array([None if t is None else t.encode() for t in texts], pa.binary()).cast(kind)
    got = split_texts(array[low:], separator, as_integers=False).to_pylist()
    want = [[one for one in (t or "").split(separator) if one] or None for t in texts[low:]]
    as_text = [row and [x if isinstance(x, str) else x.decode() for x in row] for row in got]
    assert as_text == want
    coded = array.cast(pa.large_string())[low:].dictionary_encode()
    assert split_texts(coded, separator, as_integers=False).to_pylist() == want


@pytest.mark.parametrize("bad", ["x", "1.5", "9223372036854775808", " 1", "1e3"])
@pytest.mark.parametrize("coded", [False, True])
def test_what_is_no_integer(bad, coded):
    array = pa.array(["1|2", None, f"3|{bad}|4", "5"])
    with pytest.raises(BadValue) as raised:
        split_texts(array.dictionary_encode() if coded else array, "|", as_integers=True)
    assert (raised.value.index, raised.value.reason) == (2, f"{bad!r} is no 64-bit integer")


def refusal(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def test_messages(tmp_path):
    file = write("csv", tmp_path, table())
    job = job_of(file, [{"columns": ["genres"], "separator": "|"}])
    assert refusal(DataError, lambda: read_all(Dataset.open(job))) == (
        f"{file}:2, column 'genres': 'Action' is no 64-bit integer; mend the file or use the "
        "transform hash"
    )
    job = job_of(file, [GENRE], types={"genres": "int64"})
    assert refusal(DataError, lambda: Dataset.open(job)) == (
        f"{file}: column 'genres' is int64; the separator '|' splits text; remove it, or declare "
        "it as string in data.source.types"
    )
    lists = table(tags=pa.array([["a"]] * 54))
    file = write("parquet", tmp_path, lists)
    job = job_of(file, [{**GENRE, "columns": ["tags"]}])
    assert "the separator '|' splits text; remove it" in refusal(
        DataError, lambda: Dataset.open(job)
    )
    bucketed = {**GENRE, "transforms": [{"kind": "bucketize", "boundaries": [1]}]}
    assert refusal(ConfigError, lambda: job_of(file, [bucketed])) == (
        "job: features.0: separator splits text, and bucketize reads numbers; remove one"
    )


def test_a_separated_text_is_no_user(tmp_path, recwarn):
    file = write("parquet", tmp_path, table(item=list(range(54))))
    fields = job_of(file, [{"columns": ["item"]}, GENRE]).model_dump()
    fields["data"] |= {"label": None, "negatives": {"per_positive": 1, "columns": ["item"]}}
    Dataset.open(parse_job(fields))
    assert not [one for one in recwarn if "data.negatives.user" in str(one.message)]
