"""The rows of a lane that were read and are in no block yet.

A block has rows of one window of event time, and where negatives are drawn, they are drawn among
them. Where none can be drawn among all rows that a lane has left of a window, these count as rows
of its next window, and of the next again, until one can. That is a function of the lane's rows from
the first one on that is in no block: neither of who reads, nor of which windows are listed by then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import NamedTuple

from penstock.data.batches.channel import Ended
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.reader import Reader
from penstock.data.batches.stretches import Stretch, rows_within, take
from penstock.data.columns.negatives import ItemRows, can_draw, joined_items
from penstock.position import Cursor

# FORMAT: what a batch holds depends on it.
_MANY_ROWS = 4_096
"""So many rows of a lane are taken to have a negative for each, or two of its parts of a block."""


class Offer(NamedTuple):
    """What a lane can give to a block: a function of its rows, however they came to be read."""

    rows: int
    """Good ones."""
    is_last: bool
    """Whether there is no more to give of what is listed. Rows may be left: see `LaneQueue`."""
    is_limited: bool
    """Whether there are fewer than were wanted, as more would take too much memory."""
    next_window: int | None = None
    """Of event time, of which the next row counts, if these are all of the windows asked for."""


class LaneQueue:
    """Of one lane. Its reader's errors are raised where it reads."""

    def __init__(self, number: int, reader: Reader, plan: LoaderPlan) -> None:
        self.number = number
        self._reader, self._plan = reader, plan
        self._waiting: deque[Stretch] = deque()
        self._rows = self._memory = 0
        # One lane's limit is in whole batches; of several, all of them together are.
        self._unit = plan.rows_of_whole_batches if plan.num_lanes == 1 else 1
        self._many_rows = max(2 * -(-plan.block_rows // plan.num_lanes), _MANY_ROWS)
        self._much_memory = 2 * (plan.block_bytes // plan.num_lanes)
        self._window, self._is_window_known = -1, False
        self._without_negatives = 0
        """Of the first rows, for how many it is known."""

    def begin_epoch(self) -> None:
        """Goes on to the next epoch; the one before must have been taken to its end."""
        self._has_ended = False

    def rest_of_block(self) -> list[Stretch]:
        """The rows of the block that a former run began; before the first epoch."""
        return list(self._reader.stretches())

    @property
    def rows(self) -> int:
        """Good ones that wait."""
        return self._rows

    def offer(self, wanted: int, most_bytes: int, window: int) -> Offer:
        """What it can give of `wanted` good rows within some memory. Reads on for it.

        Of the windows of event time up to `window`; all of these, where fewer would be left than
        make a block.
        """
        if self._plan.joins_windows:
            first = self._first_window()
            if first is None:
                return Offer(0, True, False)
            if first > window:
                return Offer(0, False, False, first)
        while True:
            size = wanted
            if self._memory > most_bytes:
                fit = rows_within(self._waiting, most_bytes)
                size = min(size, max(fit // self._unit, 1) * self._unit)
            is_limited, inside, behind = size < wanted, self._rows, None
            if self._waiting and self._waiting[-1].passage.window > window:
                inside, behind = self._up_to(window)
            # A row that is left says where the next block begins.
            if inside >= size + self._plan.rows_to_begin_a_block(size):
                return Offer(size, False, is_limited)
            if behind is not None:
                return Offer(inside, False, False, behind)
            if self._has_ended:
                return Offer(inside, True, False)
            self._read()

    def offer_now(self, most_rows: int, most_bytes: int, window: int) -> Offer:
        """As `offer`, of what was read so far; `is_limited`: more is not read until some is taken.

        Args:
          most_rows: of the block that all lanes make together.
          most_bytes: of rows that wait here.
          window: the last one of which it offers.
        """
        while not self._has_ended and self._rows <= most_rows and self._memory <= most_bytes:
            try:
                stretch = self._reader.take_now()
            except Ended:
                self._has_ended = True
                break
            if stretch is None:
                break
            self._add(stretch)
        inside, behind = self._up_to(window)
        if behind is not None or self._has_ended:
            return Offer(inside, behind is None, False, behind)
        is_limited = self._rows > most_rows or self._memory > most_bytes
        # A row that is left says where the next block begins.
        return Offer(max(inside - 1, 0), False, is_limited)

    def _first_window(self) -> int | None:
        """The window of which the first row counts: its own, or where negatives can be drawn.

        None: there is no row, or none can be drawn among all that are left. Reads on for it.
        """
        while not self._is_window_known:
            inside, behind = self._up_to(self._window)
            if self._is_much(inside):
                self._is_window_known = True
            elif behind is None and not self._has_ended:
                self._read()
            elif inside != self._without_negatives and can_draw(self._items(inside)):
                self._is_window_known = True
            else:
                self._without_negatives = inside
                if behind is None:
                    return None
                self._window = behind
        return self._window

    def _is_much(self, rows: int) -> bool:
        """Whether the first good rows are so many that they make blocks of their own."""
        if rows >= self._many_rows:
            return True
        most = self._much_memory
        return self._memory > most and rows > rows_within(self._waiting, most)

    def _items(self, rows: int) -> ItemRows:
        """Of the first good rows."""
        parts = []
        for one in self._waiting:
            size = min(one.size, rows)
            if size:
                assert one.rows is not None and one.rows.item_rows is not None
                parts.append((one.rows.item_rows, one.low, one.low + size))
                rows -= size
        return joined_items(parts)

    def _up_to(self, window: int) -> tuple[int, int | None]:
        """Good rows of the windows up to one, and the window of the good row behind them."""
        rows = 0
        for one in self._waiting:
            if one.size and one.passage.window > window:
                return rows, one.passage.window
            rows += one.size
        return rows, None

    def take(self, rows: int) -> list[Stretch]:
        """Removes the first good rows, and what was left out before the next one."""
        taken = take(self._waiting, rows)
        self._count(self._rows - rows)
        return taken

    def take_all(self) -> list[Stretch]:
        """Removes all that is left of the epoch, which was read to its end."""
        taken = list(self._waiting)
        self._waiting.clear()
        self._count(0)
        return taken

    def leave_out_all(self) -> list[Stretch]:
        """As `take_all`, without its good rows."""
        return [replace(one, high=one.low) for one in self.take_all()]

    def _count(self, rows: int) -> None:
        self._rows = rows
        self._memory = sum(one.memory for one in self._waiting)
        self._window, self._is_window_known, self._without_negatives = -1, False, 0

    @property
    def begins_at(self) -> Cursor:
        """Where the next row is, of those that were read; there must be one."""
        first = self._waiting[0]
        return Cursor(first.passage.file, first.passage.start, first.first)

    def _read(self) -> None:
        try:
            self._add(self._reader.take())
        except Ended:
            self._has_ended = True

    def _add(self, stretch: Stretch) -> None:
        self._waiting.append(stretch)
        self._rows += stretch.size
        self._memory += stretch.memory
