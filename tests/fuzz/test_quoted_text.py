"""Quoted text, at any size of block, against Python's csv module and a plain loop over bytes."""

import csv
import io
import itertools

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from penstock import _core
from penstock.config import TextSource
from penstock.data.formats import lines, row_ends
from penstock.data.formats.lines import OpenQuote
from penstock.data.formats.text import open_text
from penstock.errors import DataError
from tests.contract.data_cases import COMPRESSIONS
from tests.fuzz.effort import effort

NAMES = ("a", "b", "c")
SIZES = st.tuples(st.sampled_from([3, 4, 7, 30, 64, 1 << 20]), st.sampled_from([1, 5, 64, 1000]))
"""Bytes of a block and of a read."""
VALUES = st.text(st.sampled_from(list('ab",;\n\r \x00é😀')), max_size=8)
TABLES = st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=9)
RAW = st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "a", "bb", '",', ',"', '"\n']))
_NEXT = {
    "start": ("text", "start", "quoted"),
    "text": ("text", "start", "text"),
    "quoted": ("quoted", "quoted", "quote"),
    "quote": ("text", "start", "quoted"),
}
_STATES = list(_NEXT)


def walk(data, state="start", delimiter=b",", quote=b'"'):
    """Ends of rows, numbers of the odd ones and the last state, one byte at a time."""
    ends, odd = [], []
    has_break = has_text = False
    for place, byte in enumerate(data):
        one = bytes([byte])
        kind = 2 if one == quote else 1 if one in {delimiter, b"\n", b"\r"} else 0
        if one == b"\n" and state == "quoted":
            has_break = True
        elif one == b"\n":
            odd += [len(ends)] if has_break and has_text else []
            has_break = has_text = False
            ends.append(place + 1)
        has_text |= state == "quote" and kind == 0
        state = _NEXT[state][kind]
    return ends, odd, state


@effort(200)
@given(
    st.lists(st.sampled_from([*b'"",\n\ra', *b'"' * 3, 0, 200])).map(bytes)
    | st.tuples(st.integers(0, 200), RAW).map(lambda t: b"x" * t[0] + "".join(t[1]).encode() * 9)
)
def test_states_and_ends_are_those_of_a_loop_over_bytes(data):
    array = np.frombuffer(data, dtype=np.uint8)
    for number, state in enumerate(_STATES):
        ends, odd, after = _core.find_row_ends(array, ord(","), ord('"'), number)
        assert (ends.tolist(), odd.tolist(), _STATES[after]) == walk(data, state)
    after = _core.quote_states_after(array, ord(","), ord('"'))
    assert [_STATES[one] for one in after] == [walk(data, state)[2] for state in _STATES]
    opened = [n for n, line in enumerate(data.split(b"\n")) if walk(line)[2] == "quoted"]
    assert _core.find_open_quote(array, ord(","), ord('"')) == (opened[0] if opened else -1)


class Files:
    """Writes text and opens it as a source."""

    def __init__(self, folder, patch):
        self._folder = folder
        self._patch = patch

    def open(self, data, sizes, ending="", **options):
        self._patch.setattr(lines, "BLOCK_BYTES", sizes[0])
        self._patch.setattr(lines, "READ_BYTES", sizes[1])
        self._patch.setattr(row_ends, "_READ_BYTES", sizes[1])
        path = self._folder / ("x.csv." + ending).rstrip(".")
        path.write_bytes(COMPRESSIONS[ending](data))
        config = TextSource(path=str(path), **{"columns": NAMES, **options})
        return open_text(config, {})

    def __repr__(self):
        return "files"


@pytest.fixture
def files(tmp_path, monkeypatch):
    return Files(tmp_path, monkeypatch)


def written(table, line_end="\n", delimiter=",", quote='"', *, quote_all=False):
    """The csv module writes carriage returns without quotes where rows end with line feeds."""

    def value(text):
        if not quote_all and not {delimiter, quote, "\r", "\n"} & set(text):
            return text
        return quote + text.replace(quote, quote * 2) + quote

    return "".join(delimiter.join(map(value, row)) + line_end for row in table)


def rows_of(source, extents=None, malformed=None):
    """Rows, and the line with which each begins; what is malformed is added to the list."""
    found = []
    for split in source.extents() if extents is None else extents:
        for chunk in source.read(split, NAMES):
            if malformed is not None:
                malformed += zip(chunk.malformed, chunk.malformed_lines, strict=True)
            for number, row in enumerate(chunk.table.to_pylist()):
                line = int(chunk.place.locate(number).rpartition(":")[2])
                found.append(([row[name] or "" for name in NAMES], line))
    return found


def by_csv(text, delimiter=",", quote='"'):
    """Rows by Python's csv module, and the line with which each begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quotechar=quote)
    rows, line = [], 1
    for row in reader:
        rows.append((row, line))
        # Its own count takes a carriage return for a line end.
        line = 1 + text.encode().count(b"\n", 0, _place(text, len(rows)))
    return rows


def _place(text, count):
    ends = walk(text.encode())[0]
    return ends[count - 1] if count <= len(ends) else len(text.encode())


@effort(60)
@given(
    TABLES,
    SIZES,
    st.sampled_from(list(COMPRESSIONS)),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_whole_values_are_those_of_pythons_csv(
    files, table, sizes, ending, line_end, mark, end_missing, quote_all
):
    text = written(table, line_end, quote_all=quote_all)
    if end_missing:
        text = text.removesuffix(line_end)
    data = b"\xef\xbb\xbf" * mark + text.encode()
    source = files.open(data, sizes, ending, quoted_line_breaks=True)
    expected = by_csv(text)
    assert [row for row, _ in expected] == table
    assert rows_of(source) == expected
    # Any split alone, as a resumed run or another thread reads it, its state not known yet.
    extents = source.extents()
    fresh = files.open(data, sizes, ending, quoted_line_breaks=True)
    parts = [rows_of(fresh, [split]) for split in reversed(extents)]
    assert list(itertools.chain(*reversed(parts))) == expected
    assert [fresh.count_rows(split) for split in extents] == [len(part) for part in parts[::-1]]
    again = files.open(data, sizes, ending, quoted_line_breaks=True)
    for split, part in zip(extents, parts[::-1], strict=True):
        for row in {1, len(part) - 1} - {0, -1, len(part)}:
            before, after = again.cut(split, row)
            assert rows_of(again, [before]) == part[:row]
            assert rows_of(again, [after]) == part[row:]


@effort(120)
@given(RAW.map("".join), SIZES, st.sampled_from(["", "zst"]))
def test_any_text_reads_as_by_pythons_csv_or_is_named(files, text, sizes, ending):
    assume(text)
    data = text.encode()
    ends, odd, state = walk(data)
    whole = data if data.endswith(b"\n") and state != "quoted" else data + b"\n"
    ends, odd, state = walk(whole)
    malformed = []
    try:
        source = files.open(
            data, sizes, ending, quoted_line_breaks=True, on_malformed_row="quarantine"
        )
        found = rows_of(source, malformed=malformed)
    except DataError as error:
        assert state == "quoted", error
        begin = ends[-1] if ends else 0
        assert f":{1 + data.count(10, 0, begin)}: in the row that begins here" in str(error)
        return
    assert state != "quoted"
    expected = by_csv(text)
    assert len(expected) == len(ends)
    good = [one for n, one in enumerate(expected) if len(one[0]) == len(NAMES) and n not in odd]
    assert found == good
    # Each is named by its own line.
    assert [line for _, line in malformed] == [one[1] for one in expected if one not in good]


@effort(60)
@given(TABLES, SIZES, st.sampled_from(list(COMPRESSIONS)), st.sampled_from(["fail", "quarantine"]))
def test_line_breaks_in_quotes_are_never_read_as_rows(files, table, sizes, ending, policy):
    table = [["".join(one.split("\r")) for one in row] for row in table]
    data = written(table).encode()
    broken = [n for n, row in enumerate(table) if any("\n" in value for value in row)]
    source = files.open(data, sizes, ending, on_malformed_row=policy)
    if not broken:
        assert [row for row, _ in rows_of(source)] == table
        return
    with pytest.raises(OpenQuote) as caught:
        rows_of(source)
    line = broken[0] + 1
    assert f":{line}: a quoted value does not close on its line" in str(caught.value)
    assert "quoted_line_breaks: true" in str(caught.value)
    with pytest.raises(OpenQuote):
        sum(map(source.count_rows, source.extents()))


@effort(30)
@given(TABLES, SIZES, st.sampled_from(["\t", ";", "|", "\x01"]), st.sampled_from(["'", "a"]))
def test_other_dialects(files, table, sizes, delimiter, quote):
    data = written(table, delimiter=delimiter, quote=quote).encode()
    options = {"delimiter": delimiter, "quote": quote, "quoted_line_breaks": True}
    source = files.open(data, sizes, **options)
    assert [row for row, _ in rows_of(source)] == table
