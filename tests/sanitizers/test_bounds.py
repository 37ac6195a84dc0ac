"""What a region was not asked for is out of bounds to the address sanitizer, to the byte."""

import ctypes

import pytest

from penstock import _core

PROCESS = ctypes.CDLL(None)
pytestmark = pytest.mark.skipif(
    not hasattr(PROCESS, "__asan_address_is_poisoned"), reason="needs the address sanitizer"
)


def is_out_of_bounds(array, byte):
    address = ctypes.c_void_p(array.ctypes.data + byte)
    return bool(PROCESS.__asan_address_is_poisoned(address))


def test_a_buffer_ends_at_the_byte_asked_for():
    pool = _core.buffer_pool()
    # The same region again and again, larger and smaller: a page that was used before.
    for rows in (301, 203, 300, 202):
        array = pool.take_rows(rows, 5)
        size = rows * 5 * 4
        assert not is_out_of_bounds(array, 0)
        assert not is_out_of_bounds(array, size - 1)
        assert is_out_of_bounds(array, size)
        assert is_out_of_bounds(array, size + 100)
        array[:] = 1
        del array
