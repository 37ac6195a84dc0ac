"""Parts of the rows of a text say of themselves what the whole says of them."""

from itertools import combinations_with_replacement

import pyarrow as pa
import pytest

from penstock import _core
from penstock.data.formats.row_ends import (
    BOM,
    FIELD_START,
    QuoteStates,
    Quoting,
    RowEnds,
    view,
)

TEXT = b'a,"x\ny"\n\n"odd\n"!,1\nb,"q"z\n\r\n\rz,1\n"\n\n\n",2\nc,"odd\n" ,1\n"odd\n"?\nlast,"ok"\n'
COMMA = Quoting(ord(","), ord('"'))


@pytest.mark.parametrize("line_breaks", [True, False])
def test_a_range_of_rows_is_that_text_alone(line_breaks):
    ends = RowEnds(COMMA, line_breaks=line_breaks)
    rows = ends.take(TEXT)
    assert rows.text == TEXT
    assert rows.count == (10 if line_breaks else TEXT.count(b"\n"))
    assert list(rows.odd) == ([2, 7, 8] if line_breaks else [])
    assert b"".join(row + b"\n" for row in rows.split()) == TEXT
    for start, stop in combinations_with_replacement(range(rows.count + 1), 2):
        part = rows.range(start, stop)
        alone = ends.take(part.text)
        assert part.split() == rows.split()[start:stop]
        assert part.count == alone.count == stop - start
        assert part.ends.tolist() == alone.ends.tolist()
        assert list(part.odd) == list(alone.odd)
        assert part.has_blank() == any(row in {b"", b"\r"} for row in part.split())


@pytest.mark.parametrize("line_breaks", [True, False])
def test_rows_know_the_lines_with_which_they_begin(line_breaks):
    rows = RowEnds(COMMA, line_breaks=line_breaks).take(TEXT)
    if not line_breaks:
        assert rows.first_lines() is None
        return
    starts = [0, *rows.ends[:-1].tolist()]
    assert rows.first_lines().tolist() == [TEXT[:start].count(b"\n") for start in starts]
    assert rows.range(9, 10).first_lines() is None


@pytest.mark.parametrize("block_bytes", [4, 7, 1 << 20])
def test_states_of_quoting_are_those_from_the_front_behind_a_mark_too(tmp_path, block_bytes):
    text = b'"a\n\n","b""\n"\n1,"x\n"\n' * 5
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    plain.write_bytes(text)
    marked.write_bytes(BOM + text)
    places = range(len(text) + 1)
    wanted = [_core.quote_states_after(view(text[:place]), *COMMA)[FIELD_START] for place in places]
    assert len(set(wanted)) > 2
    for order in (places, reversed(places)):
        states = QuoteStates(pa.OSFile, COMMA, block_bytes)
        for place in order:
            assert states.at(str(plain), place) == wanted[place]
            assert states.at(str(marked), place + len(BOM)) == wanted[place]
