import sys

import pytest

from penstock.data.quarantine import MalformedRow, Quarantine
from penstock.errors import DataError


def malformed(*lines):
    return [MalformedRow(line, "no number", f"text {line}") for line in lines]


def test_rows_are_counted_once_by_file_and_line_and_across_runs(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path)
    first.add("a.csv", 0, malformed(0, 7, 8))
    first.add("a.csv", 8, malformed(0, 1))
    first.add("b.csv", 0, malformed(8))
    first.add("a.csv", 0, malformed(9, 7))
    assert first.rows == 5
    again = Quarantine(path)
    assert again.rows == 5
    again.add("a.csv", 9, malformed(0, 1))
    assert again.rows == 6
    assert len(path.read_text(encoding="utf-8").splitlines()) == 6


def test_a_file_without_one_good_line_takes_a_bit_a_line():
    quarantine = Quarantine(None)
    for first in range(0, 1_000_000, 10_000):
        quarantine.add("bad.csv", first, malformed(*range(10_000)))
    assert quarantine.rows == 1_000_000
    assert sum(sys.getsizeof(bits) for bits in quarantine._seen.values()) < 200_000


@pytest.mark.parametrize(
    "line", ["[]", '{"file": "a"}', '{"file": "a", "line": "x"}', '{"file": "a", "line": -1}']
)
def test_a_file_that_is_no_quarantine_is_refused(line, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"quarantine\.jsonl:1: not a quarantine entry; move the file"
    ):
        Quarantine(path)
