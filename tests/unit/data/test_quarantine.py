import errno
import json
import os
import sys
import threading
from contextlib import suppress

import pytest

from penstock.data.quarantine import LeftOut, Quarantine
from penstock.errors import DataError
from penstock.position import FileTag

A, B = FileTag("a.csv", 100, "aa"), FileTag("b.csv", 100, "bb")


def left_out(file, *lines):
    return [LeftOut(file, line, "no number", f"text {line}") for line in lines]


def lines_in(path):
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(entry["file"], entry["line"]) for entry in entries]


def resumed(path, quarantined):
    found = Quarantine(path)
    found.resume(quarantined)
    return found


def test_rows_are_counted_once_by_content_and_line(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.add(left_out(A, 0, 7, 8), 1)
    quarantine.add(left_out(A, 8, 9), 4)
    quarantine.add(left_out(B, 8), 6)
    # Under another name, by evaluation, and again in a later epoch.
    quarantine.add(left_out(A._replace(path="./copy of a.csv"), 9, 7, 10))
    quarantine.add(left_out(A, 0, 7, 8, 8, 9), 7)
    assert quarantine.rows == 6
    assert lines_in(path) == [
        ("a.csv", 0),
        ("a.csv", 7),
        ("a.csv", 8),
        ("a.csv", 9),
        ("b.csv", 8),
        ("./copy of a.csv", 10),
    ]


def test_a_resumed_run_drops_what_came_behind_its_position(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path)
    first.add(left_out(A, 1, 5), 1)
    first.add(left_out(A, 9))  # evaluation's
    first.add(left_out(B, 2, 4), 3)
    with path.open("a", encoding="utf-8") as out:
        out.write('{"file": "b.csv", "li')  # the power went
    again = resumed(path, 3)
    assert again.rows == 4
    assert lines_in(path) == [("a.csv", 1), ("a.csv", 5), ("a.csv", 9), ("b.csv", 2)]
    again.add(left_out(B, 4), 4)
    again.add(left_out(A, 9), 5)
    assert lines_in(path)[4:] == [("b.csv", 4)]
    assert resumed(path, 0).rows == 1
    assert lines_in(path) == [("a.csv", 9)]


def test_sync_returns_when_the_disk_has_the_file(tmp_path, monkeypatch):
    path, asked = tmp_path / "quarantine.jsonl", []
    quarantine = Quarantine(path)
    monkeypatch.setattr(os, "fsync", lambda file: asked.append(os.fstat(file).st_ino))
    quarantine.sync()
    assert asked == []
    quarantine.add(left_out(A, 3), 1)
    quarantine.sync()
    assert asked == [path.stat().st_ino]

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=r"quarantine cannot be written: .*Input/output error"):
        quarantine.sync()


def test_of_several_ranks_one_writes_and_all_count(tmp_path, monkeypatch):
    path = tmp_path / "quarantine.jsonl"
    writer, other = Quarantine(path), Quarantine(path, writes=False)
    for one in (other, writer, other):
        one.add(left_out(A, 3, 5), 1)
    assert (writer.rows, other.rows) == (2, 2)
    assert lines_in(path) == [("a.csv", 3), ("a.csv", 5)]
    before = path.stat()
    again = Quarantine(path, writes=False)
    again.resume(1)  # without the second, which the writer is to take out
    assert again.rows == 1
    assert path.stat() == before
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("nothing of it was written here"))
    again.sync()


def test_an_entry_that_is_there_twice_is_one_row(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add(left_out(A, 3), 1)
    entry = path.read_bytes()
    path.write_bytes(entry + entry)
    assert resumed(path, None).rows == 1
    assert path.read_bytes() == entry


def test_entries_of_version_1_are_known_by_their_path(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    entry = {"file": "a.csv", "line": 7, "reason": "no number", "text": "x"}
    path.write_text(json.dumps(entry) + "\n", encoding="utf-8")
    quarantine = resumed(path, None)
    quarantine.add(left_out(A, 7, 8), 1)
    quarantine.add(left_out(B, 7), 3)
    assert lines_in(path) == [("a.csv", 7), ("a.csv", 8), ("b.csv", 7)]
    assert quarantine.rows == 3


def test_two_threads_that_find_the_same_row_count_it_once(tmp_path, monkeypatch):
    both, has = threading.Barrier(2), Quarantine._has

    def has_and_wait(self, name, line):
        found = has(self, name, line)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # the other one, if it may come here
        return found

    monkeypatch.setattr(Quarantine, "_has", has_and_wait)
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path)
    threads = [threading.Thread(target=quarantine.add, args=(left_out(A, 7),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quarantine.rows == 1
    assert lines_in(path) == [("a.csv", 7)]


def test_a_file_without_one_good_line_takes_a_bit_a_line():
    quarantine = Quarantine(None)
    for first in range(0, 1_000_000, 10_000):
        quarantine.add(left_out(A, *range(first, first + 10_000)), first + 1)
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
        resumed(path, 0)
