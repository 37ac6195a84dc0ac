"""The ledger's file: each extent to one lane, whoever asks, however often."""

import random
import sqlite3
import threading
from pathlib import Path

import pytest

from penstock.errors import DataError, JobNote
from penstock.ledger import file as ledger_file
from penstock.ledger.file import LedgerFile, copy_ledger, is_on_network


@pytest.fixture
def ledger(tmp_path):
    made = LedgerFile(tmp_path / "ledger.db")
    yield made
    made.close()


PLACES = [(0, 0), (0, 20), (2, 0), (2, 7), (5, 0)]


def test_a_lane_gets_the_first_that_nobody_has(ledger):
    assert ledger.take(0, 1, 0, PLACES) == (0, 0)
    assert ledger.take(0, 0, 0, PLACES) == (0, 20)
    assert ledger.take(0, 1, 1, PLACES) == (2, 0)
    assert ledger.history(0, 1) == [(0, 0), (2, 0)]
    assert ledger.history(0, 0) == [(0, 20)]
    assert ledger.history(1, 0) == ledger.history(0, 2) == []


def test_epochs_are_apart(ledger):
    assert [ledger.take(epoch, 0, 0, PLACES) for epoch in (0, 1)] == [(0, 0), (0, 0)]
    assert ledger.take(2, 0, 0, PLACES[1:]) == (0, 20)


def test_the_same_turn_has_the_same_answer(ledger):
    first = ledger.take(0, 3, 0, PLACES)
    ledger.take(0, 1, 0, PLACES)
    assert ledger.take(0, 3, 0, PLACES) == first
    # Even where what is upcoming is another.
    assert ledger.take(0, 3, 0, PLACES[3:]) == first
    assert ledger.history(0, 3) == [first]


def test_nothing_is_given_where_all_are_taken(ledger):
    for turn in range(len(PLACES)):
        assert ledger.take(0, 0, turn, PLACES) == PLACES[turn]
    assert ledger.take(0, 0, len(PLACES), PLACES) is None
    assert ledger.take(0, 1, 0, PLACES) is None
    assert ledger.take(0, 1, 0, []) is None
    assert ledger.take(0, 1, 0, [(9, 9)]) == (9, 9)


def test_a_lane_keeps_the_order_in_which_it_took(ledger):
    assert ledger.take(0, 0, 0, PLACES[2:]) == (2, 0)
    assert ledger.take(0, 0, 1, PLACES) == (0, 0)
    assert ledger.history(0, 0) == [(2, 0), (0, 0)]


def test_blocks_are_found_again_and_those_of_other_sizes_forgotten(ledger):
    for number in range(4):
        ledger.add_block(0, number, (30, 8), [number, 30 - number])
    ledger.add_block(1, 0, (30, 8), [1, 29])
    assert ledger.block(0, 3, (30, 8)) == [3, 27]
    assert ledger.block(0, 4, (30, 8)) is None
    assert ledger.block(0, 2, (40, 8)) is None
    assert [ledger.block(0, n, (30, 8)) for n in range(4)] == [[0, 30], [1, 29], None, None]
    assert ledger.block(1, 0, (30, 8)) is None  # it comes behind them
    ledger.add_block(0, 2, (40, 8), [20, 20])
    assert ledger.block(0, 2, (40, 8)) == [20, 20]


def test_a_block_that_is_dealt_anew_forgets_those_behind_it_alone(ledger):
    for epoch in (0, 1):
        for number in range(4):
            ledger.add_block(epoch, number, (30, 8), [number, 30 - number])
    # As one that asks again, which may come late.
    ledger.add_block(0, 2, (30, 8), [2, 28])
    assert ledger.block(1, 3, (30, 8)) == [3, 27]
    ledger.add_block(0, 2, (30, 8), [15, 15])
    assert [ledger.block(0, n, (30, 8)) for n in range(4)] == [[0, 30], [1, 29], [15, 15], None]
    assert ledger.block(1, 0, (30, 8)) is None


def test_what_was_written_outlives_its_process(tmp_path):
    first = LedgerFile(tmp_path / "ledger.db")
    first.take(0, 1, 0, PLACES)
    first.add_block(0, 0, (1, 1), [4])
    first.close()
    first.close()
    assert not (tmp_path / "ledger.db.lock").exists()
    again = LedgerFile(tmp_path / "ledger.db")
    assert again.history(0, 1) == [(0, 0)]
    assert again.block(0, 0, (1, 1)) == [4]
    again.close()


def test_a_second_one_is_refused_while_the_first_is_open(ledger, tmp_path):
    with pytest.raises(DataError, match=r"ledger.db: process \d+ on .* keeps this ledger"):
        LedgerFile(tmp_path / "ledger.db")


def test_many_threads_get_each_extent_once_while_others_read(ledger, tmp_path):
    places = [(number // 10, number % 10) for number in range(600)]
    taken, read = [], []

    def work(lane):
        mine = random.Random(lane)
        for turn in range(1000):
            start = mine.randrange(3)
            one = ledger.take(0, lane, turn, places[start:])
            if one is None:
                one = ledger.take(0, lane, turn, places)
            if one is None:
                return
            taken.append(one)

    def look():
        with sqlite3.connect(f"file:{tmp_path}/ledger.db?mode=ro", uri=True) as other:
            while len(taken) < len(places):
                read.append(other.execute("SELECT count(*) FROM leases").fetchone()[0])

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(8)]
    threads.append(threading.Thread(target=look))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken) == places
    assert sum(len(ledger.history(0, lane)) for lane in range(8)) == len(places)
    assert read == sorted(read)


def test_a_file_that_is_no_ledger_is_refused_by_name(tmp_path):
    path = tmp_path / "ledger.db"
    path.write_bytes(b"no ledger at all, but long enough to be looked at" * 30)
    with pytest.raises(DataError, match=r"ledger.db: .*not a database.*remove it"):
        LedgerFile(path)
    assert not (tmp_path / "ledger.db.lock").exists()


def test_a_ledger_of_another_format_is_refused(tmp_path):
    path = tmp_path / "ledger.db"
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 7")
    with pytest.raises(DataError, match="a ledger of format 7, and this version reads 1"):
        LedgerFile(path)


def test_a_full_disk_is_named_and_nothing_is_half_there(ledger):
    size = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
    ledger._connection.execute(f"PRAGMA max_page_count = {size}")
    with pytest.raises(DataError, match=r"ledger.db: .*full; make room on its disk"):
        for number in range(5000):
            ledger.add_block(0, number, (1, 1), list(range(50)))
    assert ledger.block(0, number, (1, 1)) is None
    ledger._connection.execute("PRAGMA max_page_count = 100000")
    ledger.add_block(0, number, (1, 1), [1])
    assert ledger.block(0, number, (1, 1)) == [1]


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local\\040disk xfs rw 0 0
host /mnt/share 9p rw 0 0
s3 /mnt/bucket fuse.s3fs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/data/run/ledger.db", False),
        ("/home/a/ledger.db", True),
        ("/home/local disk/ledger.db", False),
        ("/homely/ledger.db", False),
        ("/mnt/share/ledger.db", True),
        ("/mnt/bucket/x/ledger.db", True),
        ("/mnt/ledger.db", False),
    ],
)
def test_a_file_on_the_network_is_known(tmp_path, path, there):
    assert is_on_network(Path(path), MOUNTS) is there


def test_on_a_network_file_system_no_memory_is_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_file, "is_on_network", lambda path: True)
    with pytest.warns(JobNote, match="on a network file system"):
        ledger = LedgerFile(tmp_path / "ledger.db")
    ledger.take(0, 0, 0, PLACES)
    assert not {one.suffix for one in tmp_path.iterdir()} & {".db-shm", ".db-wal"}
    ledger.close()


def test_a_copy_has_all_and_leaves_the_first_as_it_is(ledger, tmp_path):
    ledger.take(0, 0, 0, PLACES)
    ledger.add_block(0, 0, (30, 8), [30])
    (tmp_path / "other.db.part").write_bytes(b"what is left of a copy that was cut off")
    copy_ledger(tmp_path / "ledger.db", tmp_path / "other.db", (30, 8), 1)
    ledger.take(0, 0, 1, PLACES)
    assert not (tmp_path / "other.db.part").exists()
    other = LedgerFile(tmp_path / "other.db")
    assert other.history(0, 0) == [(0, 0)]
    other.close()
    assert ledger.history(0, 0) == [(0, 0), (0, 20)]


def test_a_copy_of_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"ledger.db: no ledger; runs with `data.policy: elastic`"):
        copy_ledger(tmp_path / "ledger.db", tmp_path / "other.db", (30, 8), 1)
    (tmp_path / "broken.db").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match=r"broken.db: cannot be copied to .*other.db"):
        copy_ledger(tmp_path / "broken.db", tmp_path / "other.db", (30, 8), 1)
    assert not (tmp_path / "other.db").exists()


def test_one_that_was_cut_off_while_it_was_made_is_made_again(tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(ledger_file, "_TABLES", ledger_file._TABLES + "SELECT * FROM nowhere;")
        with pytest.raises(DataError, match="nowhere"):
            LedgerFile(tmp_path / "ledger.db")
    ledger = LedgerFile(tmp_path / "ledger.db")
    assert ledger.take(0, 0, 0, PLACES) == (0, 0)
    ledger.close()
