"""Slots of the rows of a GPU store: which are free, which are taken, without waiting for the GPU.

Insertions count the rows they make on the device (`allocated`); the host knows a bound of it. Every
insertion writes the count to memory of the host as well, with its own number. Where the bound says
that there is no room, the host waits for a count that says there is, the oldest that may: the GPU
has later steps to work on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import torch
from torch import Tensor

from penstock.embedding.store import RowLayout
from penstock.kernels.index.rows import COUNT_BITS, Slots
from penstock.kernels.memory.arena import Arena
from penstock.kernels.update.occurrences import RowArrays

MAX_SLOTS = 2**31 - 1
_POLL_S = 20e-6
_POLLS = 500
"""After so many the device is waited for, which raises what went wrong there."""
_COUNT_BITS = int(COUNT_BITS.value)
_lock = threading.Lock()
_WORDS = 512
_WORD_STRIDE = 2
"""In int64: kernels are compiled for addresses of whole 16 bytes."""
_words: dict[bool, tuple[Tensor, int]] = {}
"""By whether they are pinned: words for stores, and how many of them have one."""
_used_up: list[Tensor] = []


def _own_word(pinned: bool) -> Tensor:
    """[1] int64, 0, that belongs to one store for ever.

    The last kernel of a store that is gone may write to its word late. Whoever else had been given
    that memory would take it for their own.
    """
    with _lock:
        words, given = _words.get(pinned, (None, 0))
        if words is None or given == _WORDS:
            if words is not None:
                _used_up.append(words)
            size = _WORDS * _WORD_STRIDE
            words, given = torch.zeros(size, dtype=torch.int64, pin_memory=pinned), 0
        _words[pinned] = words, given + 1
        return words[given * _WORD_STRIDE :][:1]


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
        self.message = _own_word(pinned=device.type == "cuda")
        """[1] int64 on the host: number of an insertion, and `allocated` after it."""
        self._message = self.message.numpy()
        self.num_insertions = 0
        # Number of each insertion whose count has not been read, and rows taken with it at most.
        self._awaited: deque[tuple[int, int]] = deque()
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
        return self.first_unused - self.num_defaults - self.free.numel() + self._most_allocated

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
        polls = 0
        while not self._fit(rows, most_rows):
            if not self._awaited:
                return False
            if self._read():
                continue
            polls += 1
            if polls <= _POLLS:
                time.sleep(_POLL_S)
                continue
            torch.cuda.synchronize(self.allocated.device)
            assert self._read(), "an insertion has not reported its rows"
        return True

    def _read(self) -> bool:
        """Takes in the newest count that has come; False: none since the last."""
        word = int(self._message[0])
        number, has_come = word >> _COUNT_BITS, False
        while self._awaited and self._awaited[0][0] <= number:
            self._taken_when_known = self._awaited.popleft()[1]
            self._known = word & ((1 << _COUNT_BITS) - 1)
            has_come = True
        return has_come

    def reserve(self, rows: int) -> None:
        """Makes room for so many more rows; waits for the device.

        Raises:
          MemoryError: no memory. Nothing changed.
        """
        self._learn(int(self.allocated))
        self._grow(self._end_of(rows))

    def take(self, rows: int) -> None:
        """Notes that at most so many rows have been made; call it after the insertion.

        Its kernel must have written `message` with the number `num_insertions` + 1.
        """
        self._taken += rows
        self.num_insertions += 1
        self._awaited.append((self.num_insertions, self._taken))
        self._read()

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
        self._awaited.clear()

    def _fit(self, rows: int, most_rows: int) -> bool:
        has_memory = self._end_of(rows) <= self.capacity + self.num_defaults
        return has_memory and self.most_rows + rows <= most_rows

    def _end_of(self, rows: int) -> int:
        """All slots are below it if so many more rows come."""
        return self.first_unused + max(0, self._most_allocated + rows - self.free.numel())

    def _grow(self, slots: int) -> None:
        if slots > MAX_SLOTS:
            raise MemoryError(f"{slots} slots")
        for arena in self._arenas:
            arena.reserve(slots)
