"""Slots of the rows of a GPU store: which are free, which are taken, without waiting for the GPU.

Insertions count the rows they make on the device (`allocated`); the host knows a bound of it, and
asks for the number itself only where the bound says that room may be short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.embedding.store import RowLayout
from penstock.kernels.arena import Arena
from penstock.kernels.occurrences import RowArrays
from penstock.kernels.rows import Slots

MAX_SLOTS = 2**31 - 1
_CALLS_AHEAD = 8
"""So many calls before room may be short, the host begins to ask how much is taken."""


class SlotPool:
    """The arenas of a store and their free slots. Slots below `num_defaults` are never free."""

    def __init__(
        self,
        layout: RowLayout,
        num_defaults: int,
        device: torch.device,
        *,
        max_bytes: int = 0,
        poison: bool = False,
    ) -> None:
        """Takes memory for the default rows alone.

        Args:
          layout: of the rows.
          num_defaults: default rows.
          device: where.
          max_bytes: most bytes of rows; 0: as many as there are.
          poison: see `Arena`.

        Raises:
          MemoryError: not even for those.
        """
        most = min(MAX_SLOTS, max_bytes // layout.row_bytes) if max_bytes else MAX_SLOTS
        widths = (
            (layout.dim, layout.dtype),
            (layout.state_dim, torch.float32),
            (layout.usage_dim, torch.int32),
        )
        self._arenas = [
            Arena(width, dtype, device, max_rows=most, poison=poison) for width, dtype in widths
        ]
        self.rows = RowArrays(*(arena.tensor for arena in self._arenas))
        self.num_defaults = num_defaults
        self.row_bytes = layout.row_bytes
        self._grow(max(1, num_defaults))
        self.allocated = torch.zeros(1, dtype=torch.int64, device=device)
        """[1] int64 slots taken since `free` was made; those of `free` first."""
        self.free = torch.empty(0, dtype=torch.int64, device=device)
        self.first_unused = num_defaults
        self._num_pinned: Tensor | None = None
        self._known_by: torch.cuda.Event | None = None
        self._most_allocated = 0
        # Keys inserted after the number that is on its way to the host was copied.
        self._since_copy = 0

    @property
    def capacity(self) -> int:
        """Slots that have memory, default rows aside."""
        return min(arena.rows for arena in self._arenas) - self.num_defaults

    @property
    def slots(self) -> Slots:
        """Where new rows go, by the value of `allocated`."""
        return Slots(self.free, self.first_unused)

    @property
    def most_rows(self) -> int:
        """No more rows are there."""
        return self.first_unused - self.num_defaults - len(self.free) + self._most_allocated

    @property
    def most_slots(self) -> int:
        """All slots of rows are below it."""
        return self._end_of(0)

    def num_rows(self) -> int:
        """Rows; waits for the device."""
        self._learn(int(self.allocated))
        return self.most_rows

    def has_room(self, rows: int) -> bool:
        """Whether so many more rows fit into the memory that there is. Does not wait."""
        if self._known_by is not None and self._known_by.query():  # type: ignore[no-untyped-call]
            assert self._num_pinned is not None
            self._most_allocated = int(self._num_pinned) + self._since_copy
            self._known_by = None
        return self._end_of(rows) <= self.capacity + self.num_defaults

    def reserve(self, rows: int) -> None:
        """Makes room for so many more rows; waits for the device.

        Raises:
          MemoryError: no memory. Nothing changed.
        """
        self._learn(int(self.allocated))
        self._grow(self._end_of(rows))

    def take(self, rows: int) -> None:
        """Notes that at most so many rows have been made; call it after the insertion."""
        self._most_allocated += rows
        self._since_copy += rows
        # Only where it will be asked for soon: a copy costs the host as much as a kernel.
        is_short = self._end_of(_CALLS_AHEAD * rows) > self.capacity + self.num_defaults
        if is_short and self.allocated.is_cuda and self._known_by is None:
            if self._num_pinned is None:
                self._num_pinned = torch.zeros(1, dtype=torch.int64, pin_memory=True)
            self._num_pinned.copy_(self.allocated, non_blocking=True)
            self._known_by = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._known_by.record()
            self._since_copy = 0

    def release(self, slots: Tensor) -> None:
        """Gives slots back: [n] int64, distinct. Waits for the device."""
        taken = int(self.allocated)
        left = self.free[taken:]
        self.first_unused += max(0, taken - len(self.free))
        self.free = torch.cat([left, slots])
        self.allocated.zero_()
        self._learn(0)

    def borrow(self, rows: int) -> int:
        """First of so many slots side by side that nobody has; they are not kept for the caller.

        Raises:
          MemoryError: no memory.
        """
        self._learn(int(self.allocated))
        first = self._end_of(0)
        self._grow(first + rows)
        return first

    def check(self, slots: Tensor) -> None:
        """Raises AssertionError unless the slots [n] int64 of all rows and the free ones are all.

        Waits for the device.
        """
        taken = int(self.allocated)
        end = self.first_unused + max(0, taken - len(self.free))
        uses = torch.bincount(slots, minlength=end)
        assert len(uses) == end, "a slot was never handed out"
        uses[self.free[taken:]] += 1
        uses[: self.num_defaults] += 1
        assert bool((uses == 1).all()), "a slot is used twice or lost"

    def _learn(self, allocated: int) -> None:
        self._most_allocated, self._since_copy, self._known_by = allocated, 0, None

    def _end_of(self, rows: int) -> int:
        """All slots are below it if so many more rows come."""
        return self.first_unused + max(0, self._most_allocated + rows - len(self.free))

    def _grow(self, slots: int) -> None:
        if slots > MAX_SLOTS:
            raise MemoryError(f"{slots} slots")
        for arena in self._arenas:
            arena.reserve(slots)
