"""Slots of the rows of a GPU store: which are free, which are taken, without waiting for the GPU.

Insertions count the rows they make on the device (`allocated`); the host knows a bound of it. Where
the bound says that room may be short soon, the number itself is sent to the host after every
insertion, and the host waits for the oldest of those on their way that says there is room: the GPU
has later steps to work on meanwhile.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.embedding.store import RowLayout
from penstock.kernels.arena import Arena
from penstock.kernels.occurrences import RowArrays
from penstock.kernels.rows import Slots

MAX_SLOTS = 2**31 - 1
_CALLS_AHEAD = 8
"""So many calls before room may be short, the host begins to ask how much is taken."""
_MOST_ON_THEIR_WAY = 16


class _Message(NamedTuple):
    """A value of `allocated` on its way to the host."""

    arrived: torch.cuda.Event
    place: int
    """In pinned memory."""
    taken: int
    """Rows that had been taken at most when it was sent."""


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
        self._pinned: Tensor | None = None
        self._messages: deque[_Message] = deque()
        self._num_sent = 0
        # Of all insertions, at most; `allocated` is no more than `_known` and what came after it.
        self._taken = 0
        self._known = 0
        self._taken_when_known = 0

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
        """A bound of the rows."""
        return self.first_unused - self.num_defaults - len(self.free) + self._most_allocated

    @property
    def most_slots(self) -> int:
        """All slots of rows are below it."""
        return self._end_of(0)

    def num_rows(self) -> int:
        """Rows; waits for the device."""
        self._learn(int(self.allocated))
        return self.most_rows

    def has_room(self, rows: int, most_rows: int) -> bool:
        """Whether so many more rows fit into the memory that there is, and are `most_rows` then.

        Waits for insertions before, one after the other, as long as they may say so.
        """
        while not self._fit(rows, most_rows):
            if not self._messages:
                return False
            message = self._messages.popleft()
            message.arrived.synchronize()
            assert self._pinned is not None
            self._known = int(self._pinned[message.place])
            self._taken_when_known = message.taken
        return True

    def reserve(self, rows: int) -> None:
        """Makes room for so many more rows; waits for the device.

        Raises:
          MemoryError: no memory. Nothing changed.
        """
        self._learn(int(self.allocated))
        self._grow(self._end_of(rows))

    def take(self, rows: int, most_rows: int) -> None:
        """Notes that at most so many rows have been made; call it after the insertion.

        Args:
          rows: of this insertion, at most.
          most_rows: as later calls of `has_room` will give it.
        """
        self._taken += rows
        # Only where it will be asked for soon: a copy costs the host as much as a kernel.
        if self.allocated.is_cuda and not self._fit(_CALLS_AHEAD * rows, most_rows):
            self._send()

    def _send(self) -> None:
        if self._pinned is None:
            self._pinned = torch.zeros(_MOST_ON_THEIR_WAY, dtype=torch.int64, pin_memory=True)
        if len(self._messages) == _MOST_ON_THEIR_WAY:
            return
        place = self._num_sent % _MOST_ON_THEIR_WAY
        self._num_sent += 1
        self._pinned[place : place + 1].copy_(self.allocated, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        self._messages.append(_Message(arrived, place, self._taken))

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

    @property
    def _most_allocated(self) -> int:
        return self._known + self._taken - self._taken_when_known

    def _learn(self, allocated: int) -> None:
        self._known, self._taken_when_known = allocated, self._taken
        self._messages.clear()

    def _fit(self, rows: int, most_rows: int) -> bool:
        has_memory = self._end_of(rows) <= self.capacity + self.num_defaults
        return has_memory and self.most_rows + rows <= most_rows

    def _end_of(self, rows: int) -> int:
        """All slots are below it if so many more rows come."""
        return self.first_unused + max(0, self._most_allocated + rows - len(self.free))

    def _grow(self, slots: int) -> None:
        if slots > MAX_SLOTS:
            raise MemoryError(f"{slots} slots")
        for arena in self._arenas:
            arena.reserve(slots)
