"""Address ranges of a GPU with memory mapped behind their front, by the CUDA driver.

What lies in a range never moves while it grows, and growth copies nothing.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

# Of cuda.h.
_PINNED, _DEVICE, _READ_WRITE = 1, 1, 3
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProperties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class AddressRange:
    """Bytes of a GPU's address space, of which the first `mapped` have memory.

    As `__cuda_array_interface__` it is bytes; a tensor made of it keeps it alive.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        """Reserves at least `size` bytes of addresses; takes no memory.

        Raises:
          MemoryError: no such addresses.
        """
        # Also makes the driver's context.
        device = torch.zeros(1, device=device).device
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._device = device
        self._location = _Location(_DEVICE, device.index)
        self._properties = _AllocationProperties(type=_PINNED, location=self._location)
        granularity = ctypes.c_size_t()
        self._call(
            "cuMemGetAllocationGranularity",
            ctypes.byref(granularity),
            ctypes.byref(self._properties),
            0,
        )
        self.granularity = granularity.value
        self.size = -(-size // self.granularity) * self.granularity
        self.mapped = 0
        self._parts: list[tuple[int, int, ctypes.c_ulonglong]] = []
        self._address = ctypes.c_ulonglong()
        self._call(
            "cuMemAddressReserve",
            ctypes.byref(self._address),
            ctypes.c_size_t(self.size),
            ctypes.c_size_t(0),
            ctypes.c_ulonglong(0),
            ctypes.c_ulonglong(0),
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.size,),
            "typestr": "|u1",
            "data": (self._address.value, False),
            "version": 2,
        }

    def extend(self, size: int) -> None:
        """Maps memory behind the first `size` bytes; its content is undefined.

        Raises:
          MemoryError: the GPU has not so much left. What was mapped stays.
        """
        more = -(-size // self.granularity) * self.granularity - self.mapped
        if more <= 0:
            return
        if self.mapped + more > self.size:
            raise MemoryError("address range is full")
        handle = ctypes.c_ulonglong()
        properties = ctypes.byref(self._properties)
        length, no_flags = ctypes.c_size_t(more), ctypes.c_ulonglong(0)
        self._call("cuMemCreate", ctypes.byref(handle), length, properties, no_flags)
        place = ctypes.c_ulonglong(self._address.value + self.mapped)
        try:
            self._call("cuMemMap", place, length, ctypes.c_size_t(0), handle, no_flags)
        except MemoryError:
            self._call("cuMemRelease", handle)
            raise
        self._parts.append((place.value, more, handle))
        access = _Access(self._location, _READ_WRITE)
        self._call("cuMemSetAccess", place, length, ctypes.byref(access), ctypes.c_size_t(1))
        self.mapped += more

    def __del__(self) -> None:
        if not getattr(self, "_address", None):
            return
        torch.cuda.synchronize(self._device)
        for place, length, handle in self._parts:
            self._driver.cuMemUnmap(ctypes.c_ulonglong(place), ctypes.c_size_t(length))
            self._driver.cuMemRelease(handle)
        self._driver.cuMemAddressFree(self._address, ctypes.c_size_t(self.size))

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._driver, function)(*arguments)
        if status == _OUT_OF_MEMORY:
            raise MemoryError(function)
        if status:
            raise RuntimeError(f"{function} of the CUDA driver failed: error {status}")
