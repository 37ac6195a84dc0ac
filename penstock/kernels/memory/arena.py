"""Rows of one size in one address range, which never move while there come to be more."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.memory.address_range import AddressRange

PAGE_BYTES = 1 << 21
LARGEST_GROWTH = 1 << 30
"""Bytes by which an arena grows ahead of need, at most; otherwise by an eighth."""
HOST_RESERVE = 1 << 24
"""Bytes of address space of an arena in Triton's interpreter."""


class Arena:
    """A tensor [max_rows, width] of which the first `rows` may be used.

    On a GPU memory is mapped behind the front of a reserved range of addresses; on the CPU (in
    Triton's interpreter) the system does the same with untouched pages.
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_rows: int,
        poison: bool = False,
    ) -> None:
        """Reserves addresses alone.

        Args:
          width: elements of a row; may be 0.
          dtype: of the elements.
          device: where.
          max_rows: more it never holds; fewer if the device has less memory.
          poison: new rows are filled with bytes 0xFF, NaN in any float: for tests.

        Raises:
          MemoryError: no addresses.
        """
        self.rows = 0
        self.row_bytes = width * dtype.itemsize
        self._poison = poison
        self._range: AddressRange | None = None
        self._bytes = 0
        if device.type == "cpu" or not width:
            self.max_rows = max_rows
            if width:
                self.max_rows = min(max_rows, HOST_RESERVE // self.row_bytes)
            self.tensor: Tensor = torch.empty(self.max_rows, width, dtype=dtype, device=device)
            return
        memory = torch.cuda.get_device_properties(device).total_memory
        self.max_rows = min(max_rows, memory // self.row_bytes)
        self._range = AddressRange(device, self.max_rows * self.row_bytes)
        self._range.extend(1)
        whole = torch.as_tensor(self._range, device=device)[: self.max_rows * self.row_bytes]
        self.tensor = whole.view(dtype).view(self.max_rows, width)

    def reserve(self, rows: int) -> None:
        """Makes at least `rows` usable; those that were keep their place and content.

        Raises:
          MemoryError: the device has no memory for so many. Nothing changed.
        """
        if rows <= self.rows:
            return
        if rows > self.max_rows:
            raise MemoryError(f"an arena of at most {self.max_rows} rows")
        if not self.row_bytes:
            self.rows = self.max_rows
            return
        ahead = min(self._bytes // 8, LARGEST_GROWTH)
        limit = self.max_rows * self.row_bytes
        try:
            self._extend(min(rows * self.row_bytes + ahead, limit))
        except MemoryError:
            if self.tensor.is_cuda:
                torch.cuda.empty_cache()
            self._extend(rows * self.row_bytes)

    def _extend(self, size: int) -> None:
        size = -(-size // PAGE_BYTES) * PAGE_BYTES
        if self._range is not None:
            self._range.extend(min(size, self._range.size))
        self._bytes = size
        before, self.rows = self.rows, min(size // self.row_bytes, self.max_rows)
        if self._poison:
            self.tensor[before : self.rows].view(torch.uint8).fill_(0xFF)
