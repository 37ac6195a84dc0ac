"""What the host knows of the rows of a GPU store, with the test in the place of the device."""

import threading

import pytest
import torch

pytest.importorskip("triton")

from penstock.config import SGD, TableConfig
from penstock.embedding.gpu.slots import SlotPool
from penstock.embedding.store import RowLayout


@pytest.fixture
def pool():
    layout = RowLayout.of(TableConfig(name="t", dim=4, optimizer=SGD()))
    return SlotPool(layout, 0, torch.device("cpu"), max_bytes=100 * layout.row_bytes)


def report(pool, number, allocated):
    pool.message[0] = number << 32 | allocated


def test_insertions_count_in_full_until_they_report(pool):
    pool.take(40)
    pool.take(40)
    assert pool.most_rows == 80
    report(pool, 1, 7)
    pool.take(10)
    assert pool.most_rows == 7 + 40 + 10
    report(pool, 3, 9)
    assert pool.has_room(91, most_rows=100)
    assert pool.most_rows == 9


def test_an_insertion_that_says_there_is_room_is_waited_for(pool):
    pool.take(60)
    pool.take(30)
    timer = threading.Timer(0.003, report, (pool, 1, 5))
    timer.start()
    # 5 and at most 30 more are there: 65 fit, whatever the second insertion will say.
    assert pool.has_room(65, most_rows=100)
    timer.join()
    assert pool.most_rows == 35


def test_no_room_is_not_waited_for_where_all_have_reported(pool):
    pool.take(60)
    report(pool, 1, 60)
    assert not pool.has_room(41, most_rows=100)
    assert not pool.has_room(20, most_rows=79)
    assert pool.has_room(20, most_rows=80)


def test_no_store_gets_the_word_of_one_before():
    """Its last kernel may write late."""
    layout = RowLayout.of(TableConfig(name="t", dim=4, optimizer=SGD()))
    places = set()
    for _ in range(1100):
        word = SlotPool(layout, 0, torch.device("cpu"), max_bytes=layout.row_bytes).message
        assert word.tolist() == [0]
        assert word.data_ptr() % 16 == 0
        word[0] = 1 << 32 | 1
        places.add(word.data_ptr())
    assert len(places) == 1100
