"""Windows of event time, one behind the other without a gap: hours and days of a zone, durations.

An hour is one of the clock, by its date, number and offset from UTC: where clocks are put back it
is there twice, where they are put forward it is missing, and by half an hour it is a short one.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

Unit: TypeAlias = Literal["hour", "day"] | int
"""Of windows; a number of ms counts from the first one."""


class Window(NamedTuple):
    """Event times [start, stop), in ms since 1970 UTC."""

    start_ms: int
    stop_ms: int

    def words(self, zone: ZoneInfo) -> str:
        """When it is, for people: with the offset from UTC where an hour is there twice."""
        start, stop = (_words(datetime.fromtimestamp(ms / 1000, zone)) for ms in self)
        return f"{start} to {stop.removeprefix(start[:11])}"


def _words(at: datetime) -> str:
    text = at.strftime("%Y-%m-%d %H:%M:%S").removesuffix(":00")
    is_twice = at.utcoffset() != at.replace(fold=1 - at.fold).utcoffset()
    return text + at.strftime(" %z") if is_twice else text


def windows(unit: Unit, zone: ZoneInfo, start_ms: int, end_ms: int | None) -> Iterator[Window]:
    """All windows that begin before `end_ms`, in order; those of `hour` and `day` end with those.

    Args:
      unit: of the windows. The first one may be a part of an hour or day, from `start_ms` on, and
        the last one up to `end_ms`.
      zone: whose hours and days.
      start_ms: where the first window begins.
      end_ms: where the last one ends; None: there is no last one.
    """
    start = start_ms
    while end_ms is None or start < end_ms:
        if unit == "hour":
            stop = _end_of_hour(start, zone)
        else:
            stop = _end_of_day(start, zone) if unit == "day" else start + unit
        if end_ms is not None:
            stop = min(stop, end_ms)
        yield Window(start, stop)
        start = stop


def moment_ms(local: datetime, zone: ZoneInfo) -> int:
    """The moment of a local time, in ms since 1970 UTC.

    Of one that is there twice, the later; of one that is skipped, as far behind the gap.
    """
    both = (local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    return round(max(both).timestamp() * 1000)


def _end_of_day(at_ms: int, zone: ZoneInfo) -> int:
    """The first moment of the date that follows, whatever clocks do on the way."""
    local = datetime.fromtimestamp(at_ms / 1000, zone).replace(tzinfo=None)
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    return round(midnight.replace(tzinfo=zone).astimezone(UTC).timestamp() * 1000)


def _end_of_hour(at_ms: int, zone: ZoneInfo) -> int:
    local = datetime.fromtimestamp(at_ms / 1000, zone).replace(tzinfo=None)
    next_hour = local.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    low, high = at_ms, at_ms + round((next_hour - local).total_seconds() * 1000)
    offset = _offset(at_ms, zone)
    if _offset(high - 1, zone) == offset:
        return high
    while high - low > 1:  # clocks change on the way
        middle = (low + high) // 2
        low, high = (middle, high) if _offset(middle, zone) == offset else (low, middle)
    return high


def _offset(ms: int, zone: ZoneInfo) -> timedelta | None:
    return datetime.fromtimestamp(ms / 1000, zone).utcoffset()
