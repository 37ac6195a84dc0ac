"""The launcher, with a function in the driver's place that writes down what it is given."""

import ctypes
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from penstock import _core
from penstock.kernels import launch

LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_void_p,),
    *(ctypes.c_uint,) * 7,
    *(ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p),
)


class Driver:
    """Notes launches of kernels of `num_parameters` words of 8 bytes."""

    def __init__(self, num_parameters, status=0):
        self.launches = []

        def note(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
            words = [
                ctypes.cast(parameters[i], ctypes.POINTER(ctypes.c_int64))[0]
                for i in range(num_parameters)
            ]
            self.launches.append((function, (gx, gy, gz), (bx, by, bz), shared, stream, words))
            return status

        self._note = LAUNCH(note)
        self.address = ctypes.cast(self._note, ctypes.c_void_p).value


def test_parameters_come_in_order_without_what_is_compiled_in():
    driver = Driver(num_parameters=5)
    launcher = _core.KernelLauncher(driver.address)
    first, second = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    arguments = (first, 1, -7, second, 1 << 40)
    types = ["*fp32", "constexpr", "i32", "*i64", "i64"]
    assert not launcher.launch(3, 99, (2,), arguments)
    launcher.add(3, arguments, types, 1234, 64, 48)
    assert launcher.launch(3, 99, (2, 5), arguments)
    ((function, grid, block, shared, stream, words),) = driver.launches
    assert (function, grid, block, shared, stream) == (1234, (2, 5, 1), (64, 1, 1), 48, 99)
    # The last is Triton's scratch memory.
    assert words == [first.data_ptr(), -7, second.data_ptr(), 1 << 40, 0]


@pytest.mark.parametrize(
    "changed",
    [
        (torch.zeros(4, dtype=torch.bfloat16), 3, 16),
        (torch.zeros(5)[1:], 3, 16),
        (torch.zeros(4), 1, 16),
        (torch.zeros(4), 16, 16),
        (torch.zeros(4), 1 << 31, 16),
        (torch.zeros(4), -(1 << 31) - 1, 16),
        (torch.zeros(4), 3, 17),
        (torch.zeros(4), 3),
    ],
    ids=["dtype", "alignment", "one", "by 16", "wide", "wide below", "not by 16", "fewer"],
)
def test_other_kinds_of_arguments_are_another_form(changed):
    driver = Driver(num_parameters=3)
    launcher = _core.KernelLauncher(driver.address)
    launcher.add(0, (torch.zeros(4), 3, 16), ["*fp32", "i32", "i32"], 1, 32, 0)
    assert launcher.launch(0, 0, (1,), (torch.zeros(8), -5, 160))
    assert not launcher.launch(0, 0, (1,), changed)
    assert not launcher.launch(1, 0, (1,), (torch.zeros(8), -5, 160))
    assert len(driver.launches) == 1


def test_what_the_driver_refuses_is_raised():
    launcher = _core.KernelLauncher(Driver(0, status=700).address)
    launcher.add(0, (3,), ["i32"], 1, 32, 0)
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        launcher.launch(0, 0, (1,), (3,))


def test_arguments_must_fit_their_types():
    launcher = _core.KernelLauncher(Driver(0).address)
    with pytest.raises(ValueError, match="1 arguments and 2 types"):
        launcher.add(0, (3,), ["i32", "i32"], 1, 32, 0)
    with pytest.raises(ValueError, match="of type fp32"):
        launcher.add(0, (3,), ["fp32"], 1, 32, 0)
    with pytest.raises(AttributeError, match="no attribute"):
        launcher.launch(0, 0, (1,), (3.0,))


class Pair(NamedTuple):
    first: object
    second: object


def test_a_kernel_gets_its_arguments_in_its_groups():
    def kernel(one, two: "Pair", three, four: "Pair", five, form):
        pass

    arguments = (1, 2, 3, 4, 5, 6, 7)
    grouped = [1, Pair(2, 3), 4, Pair(5, 6), 7]
    assert launch.nested(SimpleNamespace(fn=kernel), arguments) == grouped
    assert list(launch._flat(["*fp32", Pair("i32", "constexpr"), "i64"])) == [
        "*fp32",
        "i32",
        "constexpr",
        "i64",
    ]
