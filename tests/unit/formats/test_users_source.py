"""What is wrong with a user's source is told by class, method and part."""

import sys
import types

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from penstock.config import Source, parse_job
from penstock.data import Dataset
from penstock.data.formats import users_source
from penstock.data.opening import open_source
from penstock.errors import ConfigError, DataError
from penstock.position import Position

SCHEMA = pa.schema({"label": pa.int64(), "key": pa.int64()})


def rows_of(part, rows=10):
    keys = [int(part) * 1000 + row for row in range(rows)]
    return pa.table({"label": [row % 2 for row in range(rows)], "key": keys})


class Rows:
    """Right in all; each test spoils one thing."""

    def __init__(self, given=("1", "2", "3"), versions=None):
        self.given, self.versions = list(given), versions or {}

    def schema(self):
        return SCHEMA

    def parts(self):
        return self.given

    def version(self, part):
        return self.versions.get(part, "a")

    def read(self, part, columns):
        yield rows_of(part).select(list(columns))


@pytest.fixture
def module(monkeypatch):
    made = types.ModuleType("of_a_user")
    monkeypatch.setitem(sys.modules, "of_a_user", made)
    return made


@pytest.fixture
def opened(module):
    def open_(kind=Rows, **methods):
        arguments = methods.pop("arguments", {})
        module.Rows = type("Rows", (kind,), methods) if methods else kind
        return open_source(config(arguments), {})

    return open_


def config(arguments=None, factory="of_a_user:Rows"):
    fields = {"format": "python", "factory": factory, "arguments": arguments or {}}
    return TypeAdapter(Source).validate_python(fields)


def said(error, call, *arguments):
    with pytest.raises(error) as caught:
        call(*arguments)
    text = str(caught.value)
    assert text.startswith("data.source.factory ")
    return text


class TestFactory:
    def test_the_module_is_not_there(self):
        text = said(ConfigError, open_source, config(factory="no_such_module:Rows"), {})
        assert "cannot import 'no_such_module': ModuleNotFoundError" in text
        assert "is its folder on PYTHONPATH?" in text

    def test_a_module_that_fails(self, tmp_path, monkeypatch):
        (tmp_path / "fails.py").write_text("1 / 0")
        monkeypatch.syspath_prepend(tmp_path)
        text = said(ConfigError, open_source, config(factory="fails:Rows"), {})
        assert "cannot import 'fails': ZeroDivisionError" in text

    def test_the_class_is_not_there(self, module):
        text = said(ConfigError, open_source, config(factory="of_a_user:Rosw"), {})
        assert "module 'of_a_user' has no 'Rosw'" in text

    def test_what_cannot_be_called(self, module):
        module.Rows = 3
        assert "is int; name a class (docs/data.md" in said(ConfigError, open_source, config(), {})

    def test_arguments_that_it_does_not_take(self, opened):
        text = said(ConfigError, lambda: opened(arguments={"database": "x"}))
        assert "calling it with (database='x') failed: TypeError" in text

    @pytest.mark.parametrize("method", ["schema", "parts", "version", "read"])
    def test_a_method_is_missing(self, method, opened):
        text = said(ConfigError, lambda: opened(**{method: None}))
        assert f"Rows has no method {method}; a source has schema, parts, version, read (" in text

    def test_a_name_that_is_none(self):
        fields = {"data": {"source": {"format": "python", "factory": "Rows"}}}
        with pytest.raises(ConfigError, match=r"data\.source\.factory"):
            parse_job(fields)

    def test_nothing_is_imported_by_reading_a_job(self, tmp_path, monkeypatch):
        (tmp_path / "never.py").write_text("raise SystemExit")
        monkeypatch.syspath_prepend(tmp_path)
        source = {"format": "python", "factory": "never:Rows"}
        parse_job({"data": {"source": source, "label": {"column": "label"}},
                   "features": [{"columns": ["key"]}]})  # fmt: skip
        assert "never" not in sys.modules


@pytest.mark.parametrize(
    "method, gives, text",
    [
        ("schema", ["label"], "schema() must give a pyarrow schema with a column"),
        ("schema", pa.schema([]), "schema() must give a pyarrow schema with a column"),
        ("schema", pa.schema([("a", pa.int8())] * 2), "schema() has column 'a' twice"),
        ("parts", "123", "parts() must give a list of texts"),
        ("parts", [1, 2], "parts() must give a list of texts"),
        ("parts", ["1", ""], "parts() must give a list of texts"),
        ("parts", None, "parts() must give a list of texts"),
        ("parts", ["1", "2", "1"], "parts() has '1' twice; its rows would be read twice"),
        ("parts", [], "parts() is empty"),
        ("rows", -1, "rows('1') gave -1; it gives a number of rows, or None"),
        ("rows", "10", "rows('1') gave '10'"),
        ("rows", True, "rows('1') gave True"),
        ("rows", 2.5, "rows('1') gave 2.5"),
        ("rows", 0, "no rows; the source has none at all"),
    ],
)
def test_what_is_given_at_opening(method, gives, text, opened):
    assert text in said(DataError, lambda: opened(**{method: lambda self, *_: gives}))


@pytest.mark.parametrize("method", ["schema", "parts", "rows"])
def test_a_method_that_fails_at_opening(method, opened):
    def fails(self, *given):
        raise OSError("no route")

    text = said(DataError, lambda: opened(**{method: fails}))
    given = "'1'" if method == "rows" else ""
    assert f"{method}({given}) failed: OSError: no route" in text


@pytest.mark.parametrize("gives", [None, 7, ""])
def test_a_version_that_is_no_text(gives, opened):
    source = opened(version=lambda self, part: gives)
    assert f"version('1') gave {gives!r}; it gives a text" in said(DataError, source.identify, "1")


def read_all(source, columns=("key",)):
    return [chunk for extent in source.extents() for chunk in source.read(extent, columns)]


@pytest.mark.parametrize(
    "gives, text",
    [
        (lambda part: [{"key": [1]}], "read('1') gave dict; it gives pyarrow tables"),
        (lambda part: rows_of(part), "it gives pyarrow tables"),
        (lambda part: None, "read('1') failed: TypeError"),
        (lambda part: [pa.table({"label": [1]})], "gave no column 'key', which it was asked for"),
        (
            lambda part: [pa.table({"key": [1.5]})],
            "gave column 'key' as double, but schema() says int64",
        ),
        (lambda part: [pa.table({"key": pa.array([1], pa.int32())})], "as int32, but schema()"),
        (lambda part: (_ for _ in ()).throw(ValueError("odd")), "failed: ValueError: odd"),
        (lambda part: [rows_of(part), 1 // 0], "failed: ZeroDivisionError"),
    ],
)
def test_what_read_gives(gives, text, opened):
    source = opened(read=lambda self, part, columns: gives(part))
    assert text in said(DataError, read_all, source)


@pytest.mark.parametrize("told, given", [(10, 9), (10, 11), (10, 20), (9, 10)])
def test_other_rows_than_were_told(told, given, opened):
    def read(self, part, columns):
        table = rows_of(part, given).select(list(columns))
        yield from (table.slice(first, 10) for first in range(0, given, 10))

    source = opened(read=read, rows=lambda self, part: told)
    text = said(DataError, read_all, source)
    assert f"read('1') gave {given:,} rows; rows() or a read before said {told:,}" in text


def test_other_rows_than_before(opened):
    left = iter([10, 10, 10, 10, 8, 10])
    read = lambda self, part, columns: [rows_of(part, next(left))]  # noqa: E731
    source = opened(read=read)
    assert len(read_all(source)) == 3
    text = said(DataError, read_all, source)
    assert "read('2') gave 8 rows; rows() or a read before said 10" in text


def test_only_the_columns_asked_for_are_read_and_kept(opened):
    asked = []

    def read(self, part, columns):
        asked.append(columns)
        yield rows_of(part).append_column("more", pa.array(range(10)))
        yield pa.RecordBatch.from_pylist([{"key": 5, "label": 0}], SCHEMA)

    source = opened(read=read)
    chunks = read_all(source, ["key"])
    assert {tuple(chunk.table.schema.names) for chunk in chunks} == {("key",)}
    nothing = [chunk.table for chunk in read_all(source, [])]
    assert [(table.num_rows, table.num_columns) for table in nothing] == [(10, 0), (1, 0)] * 3
    assert asked == [("key",)] * 3 + [("label",)] * 3
    assert chunks[1].place.locate(0) == "1 row 10"


def test_tables_are_cut_into_bounded_chunks(opened, monkeypatch):
    monkeypatch.setattr(users_source, "CHUNK_ROWS", 4)
    sizes = [chunk.table.num_rows for chunk in read_all(opened())]
    assert sizes == [4, 4, 2] * 3


def test_views_are_read_as_what_they_are_views_of(opened):
    kind = pa.schema({"label": pa.int64(), "key": pa.string_view()})
    table = pa.table({"label": [1], "key": pa.array(["a"], pa.string_view())}, schema=kind)
    source = opened(schema=lambda self: kind, read=lambda self, part, columns: [table])
    assert source.schema.field("key").type == pa.large_string()
    assert read_all(source)[0].table.column("key").to_pylist() == ["a"]


def test_rows_are_asked_as_late_as_can_be(opened):
    asked = []

    def rows(self, part):
        asked.append(part)
        return None if part == "3" else 0 if part == "2" else 10

    source = opened(rows=rows, arguments={"given": [str(n) for n in range(1, 9)]})
    assert asked == ["1"] and source.expected_rows(source.extents()) == (80, False)
    extents = source.extents()
    assert [one.path for one in extents] == [str(n) for n in range(1, 9) if n != 2]
    assert source.known_rows(extents[1]) is None
    assert source.expected_rows(extents) is None
    assert source.count_rows(extents[1]) == 10 == source.known_rows(extents[1])
    assert source.expected_rows(extents) == (70, True)


def job(arguments=None, **data):
    return parse_job({
        "data": {
            "source": {"format": "python", "factory": "of_a_user:Rows",
                       "arguments": arguments or {}},
            "label": {"column": "label"},
            "shuffle": {"block_rows": 0},
            **data,
        },
        "features": [{"columns": ["key"]}],
    })  # fmt: skip


def keys(dataset, **options):
    with dataset.batches("train", batch_size=10, **options) as batches:
        return [batch.sparse.values.tolist() for batch in batches]


class TestGoingOn:
    @pytest.fixture
    def at(self, module):
        module.Rows = Rows
        with Dataset.open(job()).batches("train", batch_size=10) as batches:
            return Position.from_dict([next(batches), next(batches)][1].end.to_dict())

    def test_parts_that_came_since(self, at):
        dataset = Dataset.open(job({"given": ["1", "2", "3", "4"]}), after=at)
        assert [one[0] for one in keys(dataset, start=at)] == [3000, 4000]

    @pytest.mark.parametrize(
        "arguments, text",
        [
            ({"versions": {"2": "b"}}, "2: changed after rows of it were trained on"),
            ({"given": ["2", "3"]}, "1: removed since the run began"),
            ({"given": ["1", "0", "2", "3"]}, "0: added before 2, which was read already"),
            ({"given": ["2", "1", "3"]}, "2: now comes before 1"),
        ],
    )
    def test_parts_that_are_others(self, arguments, text, at):
        with pytest.raises(DataError) as caught:
            Dataset.open(job(arguments), after=at)
        assert str(caught.value).startswith(text)

    def test_a_part_that_was_not_read_may_be_another(self, module):
        module.Rows = Rows
        given = {"given": [str(number) for number in range(1, 9)]}
        blocks = {"shuffle": {"block_rows": 10}}
        with Dataset.open(job(given, **blocks)).batches("train", batch_size=10) as batches:
            at = [next(batches), next(batches)][1].end
        dataset = Dataset.open(job({**given, "versions": {"8": "b"}}, **blocks), after=at)
        assert [one[0] // 1000 for one in keys(dataset, start=at)] == list(range(3, 9))


class TestEvaluationSource:
    def other(self, arguments, factory="of_a_user:Rows"):
        return {"format": "python", "factory": factory, "arguments": arguments}

    def test_a_part_of_both_is_refused(self, module):
        module.Rows = Rows
        other = self.other({"given": ["7", "2"]})
        with pytest.raises(ConfigError, match=r"evaluation_source: 2 is in data\.source, too"):
            Dataset.open(job(evaluation_source=other))

    def test_other_parts_versions_and_classes_are_not(self, module):
        module.Rows = Rows
        module.Others = type("Others", (Rows,), {})
        for other in (
            self.other({"given": ["7", "8"]}),
            self.other({"given": ["2"], "versions": {"2": "b"}}),
            self.other({}, factory="of_a_user:Others"),
        ):
            assert Dataset.open(job(evaluation_source=other)).has_evaluation

    def test_beside_files(self, module, tmp_path):
        module.Rows = Rows
        (tmp_path / "a.csv").write_text("label,key\n1,2\n0,3\n")
        other = {"format": "csv", "path": str(tmp_path / "a.csv"), "types": {"key": "int64"}}
        assert Dataset.open(job(evaluation_source=other)).has_evaluation
