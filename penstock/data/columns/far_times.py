"""Leaves out rows of a log whose event time cannot be: years after those of the rows around them.

A time stamp of the year 2100, or one in another unit, says that its row is damaged. What is merely
early, late or after a gap stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from penstock.config import TimeUnit
from penstock.data.columns.decode import read_times
from penstock.data.quarantine import MalformedRow
from penstock.data.source import Chunk, KeptPlace

_BULK = 0.99
"""Share of a chunk's rows whose times are taken for right."""


@dataclass(frozen=True, slots=True)
class FarTimes:
    """Which rows are too far ahead: a function of their chunk alone."""

    column: str
    unit: TimeUnit
    """Of integers in the column."""
    most_ahead_s: int
    """Seconds after 99 in 100 of the rows that are read together."""

    def leave_out(self, chunk: Chunk) -> Chunk:
        """The chunk without such rows, which are malformed.

        Raises:
          DataError: a time cannot be read.
        """
        if chunk.table.num_rows < 2:
            return chunk
        times = read_times(chunk.table.column(self.column), self.column, chunk.place, self.unit)
        most_ahead = self.most_ahead_s * 1000
        # Without wrap: the difference of two int64 fits into uint64.
        if _distance(times.max(), times.min()) <= most_ahead:
            return chunk
        bulk = int(_BULK * (len(times) - 1))
        latest = np.partition(times, bulk)[bulk]
        is_far = (times > latest) & (times.view(np.uint64) - latest.view(np.uint64) > most_ahead)
        if not is_far.any():
            return chunk
        return _without(chunk, is_far, [self._reason(time, latest) for time in times[is_far]])

    def _reason(self, time: np.int64, latest: np.int64) -> str:
        return (
            f"column {self.column!r}: the event time {_shown(time)} is more than "
            f"{self.most_ahead_s} s after {_shown(latest)}, by which 99 in 100 of the rows read "
            "with it had happened; mend the file, or raise data.event_time_ahead_s"
        )


def _distance(high: np.int64, low: np.int64) -> int:
    return int(high) - int(low)


def _shown(time_ms: np.int64) -> str:
    try:
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=int(time_ms))
    except OverflowError:
        return f"{int(time_ms)} ms since 1970"
    return moment.isoformat()


def _without(chunk: Chunk, is_far: NDArray[np.bool_], reasons: list[str]) -> Chunk:
    rows = np.flatnonzero(~is_far)
    numbers = np.arange(len(is_far)) if chunk.kept is None else chunk.kept
    malformed = list(zip(chunk.malformed, chunk.malformed_lines, strict=True))
    for row, reason in zip(np.flatnonzero(is_far).tolist(), reasons, strict=True):
        text = str(chunk.table.slice(row, 1).to_pylist()[0])
        malformed.append((MalformedRow(int(numbers[row]), reason, text), chunk.place.line(row)))
    malformed.sort(key=lambda one: one[0].line)
    return chunk._replace(
        table=chunk.table.take(rows),
        place=KeptPlace(chunk.place, rows),
        stretch=chunk.num_read,
        kept=numbers[rows],
        malformed=[one for one, _ in malformed],
        malformed_lines=[line for _, line in malformed],
    )
