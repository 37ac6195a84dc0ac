"""Divides the rows of a source into training and evaluation."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa

from penstock.config import FileSplit, FractionSplit, TimeSplit, TimeUnit
from penstock.data.columns.decode import TICKS_PER_S, read_times
from penstock.data.files import glob_pattern
from penstock.data.plan.counting import Stages, count_rows, in_parallel, no_stages
from penstock.data.source import Chunk, Extent, KeptPlace, RowCount, Source
from penstock.errors import ConfigError, DataError

Part: TypeAlias = Literal["train", "evaluation"]


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Rows whose `column` lies in [low, high) ms."""

    column: str
    low: int | None
    high: int | None
    unit: TimeUnit = "ms"
    """Of integers in the column."""

    def keep(self, chunk: Chunk) -> Chunk:
        """The rows of the chunk that lie in the range."""
        if not chunk.table.num_rows:
            return chunk
        times = read_times(chunk.table.column(self.column), self.column, chunk.place, self.unit)
        kept = np.ones(times.shape, dtype=bool)
        if self.low is not None:
            kept &= times >= self.low
        if self.high is not None:
            kept &= times < self.high
        if kept.all():
            return chunk
        rows = np.flatnonzero(kept)
        return chunk._replace(
            table=chunk.table.take(rows),
            place=KeptPlace(chunk.place, rows),
            stretch=chunk.num_read,
            kept=rows if chunk.kept is None else chunk.kept[rows],
        )


class _Kept:
    """How many of the rows that were read lie in a range of times. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = self._kept = 0

    def add(self, read: int, kept: int) -> None:
        """Takes note of some rows."""
        with self._lock:
            self._read += read
            self._kept += kept

    def share(self) -> float:
        """Of all that were read; 1 while there were none."""
        with self._lock:
            return self._kept / self._read if self._read else 1.0


@dataclass(frozen=True)
class PartRows:
    """The rows of one part: extents of one source, perhaps filtered by time."""

    source: Source
    extents: Sequence[Extent]
    """May be found as they are asked for; their number, as late as can be."""
    files: Sequence[str]
    """On which the part depends, in the order of reading."""
    time_range: TimeRange | None = None
    divided: int = 0
    """Files, the first of the source, of which a fraction is held out; 0: no split by fraction."""
    first_file: int = 0
    """Number of the first of `files`, where others were read before and are no longer listed."""
    _kept: _Kept = field(default_factory=_Kept, compare=False)

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Of the part's files, by path."""
        return {path: number for number, path in enumerate(self.files, self.first_file)}

    def read(self, extent: Extent, columns: Sequence[str]) -> Generator[Chunk]:
        """The part's rows of an extent, in order, in chunks that may be empty."""
        if self.time_range is None:
            yield from self.source.read(extent, columns)
            return
        for chunk in self.source.read(extent, columns):
            kept = self.time_range.keep(chunk)
            self._kept.add(chunk.table.num_rows, kept.table.num_rows)
            yield kept

    def count_rows(self, stages: Stages = no_stages) -> int:
        """Rows of the part, malformed ones included; with a time range it reads the times."""
        if self.time_range is None:
            return sum(count_rows(self.source, self.extents, stages))
        return sum(in_parallel(self._count_extent, self.extents))

    def _count_extent(self, extent: Extent, is_unwanted: Callable[[], bool]) -> int:
        total = 0
        for rows in self._row_counts(extent):
            total += rows
            if is_unwanted():
                break
        return total

    def expected_rows(self) -> RowCount | None:
        """Rows of the part, as far as they are known without reading; None: not at all.

        With a time range, by the share of the rows that lay in it so far.
        """
        expected = self.source.expected_rows(self.extents)
        if expected is None or self.time_range is None:
            return expected
        return RowCount(round(expected.rows * self._kept.share()), is_exact=False)

    def has_rows(self) -> bool:
        """Whether there is any row; stops at the first."""

        def has_some(extent: Extent, is_unwanted: Callable[[], bool] = lambda: False) -> bool:
            for rows in self._row_counts(extent):
                if rows or is_unwanted():
                    return rows > 0
            return False

        extents = iter(self.extents)
        # Nearly always there is one at once.
        first = next(extents, None)
        if first is None or has_some(first):
            return first is not None
        with closing(in_parallel(has_some, extents)) as found:
            return any(found)

    def _row_counts(self, extent: Extent) -> Iterator[int]:
        if self.time_range is None:
            yield from self.source.row_counts(extent)
            return
        for chunk in self.read(extent, [self.time_range.column]):
            yield chunk.table.num_rows


def divide(
    source: Source,
    split: FractionSplit | TimeSplit | FileSplit | None,
    event_time: str | None,
    unit: TimeUnit = "ms",
    first_files: int = 0,
    stages: Stages = no_stages,
) -> tuple[PartRows, PartRows | None]:
    """Divides a source as `data.split` says.

    Args:
      source: whose rows.
      split: how.
      event_time: the column of times.
      unit: of integers in it.
      first_files: files that the run began with, of which a fraction was held out: of others
        nothing is, so that no row changes sides; 0: all.
      stages: told where rows must be counted for it.

    Returns:
      Training and evaluation; None where nothing is held out.

    Raises:
      DataError: a part would have no rows.
      ConfigError: the time of the split cannot be read.
    """
    if split is None:
        train = PartRows(source, source.extents(), source.paths)
        if not train.has_rows():
            raise DataError(f"{source.paths[0]}: no rows; the source has none at all")
        return train, None
    if isinstance(split, FractionSplit):
        return _by_fraction(source, split, first_files or len(source.paths), stages)
    if isinstance(split, FileSplit):
        return _by_file(source, split)
    assert event_time is not None
    return _by_time(source, split, event_time, unit)


def _by_fraction(
    source: Source, split: FractionSplit, first_files: int, stages: Stages
) -> tuple[PartRows, PartRows]:
    first = set(source.paths[:first_files])
    extents = [one for one in source.extents() if one.path in first]
    added = source.extents()[len(extents) :]
    rows = count_rows(source, extents, stages)
    total = sum(rows)
    held_out = round(total * split.evaluation)
    if not 0 < held_out < total:
        part = "evaluation" if held_out == 0 else "train"
        raise DataError(
            f"data.split.evaluation {split.evaluation} of {total} rows leaves no rows for {part}; "
            "change the fraction or give more data"
        )
    ends = np.cumsum(rows)
    index = int(np.searchsorted(ends, total - held_out, side="right"))
    left = total - held_out - int(ends[index] - rows[index])
    train, evaluation = extents[:index], extents[index:]
    if left:
        before, after = source.cut(extents[index], left)
        train, evaluation = [*train, before], [after, *evaluation[1:]]
    return (
        # Where it is cut depends on all of them.
        PartRows(source, [*train, *added], source.paths, divided=first_files),
        PartRows(source, evaluation, source.paths, divided=first_files),
    )


def _by_file(source: Source, split: FileSplit) -> tuple[PartRows, PartRows]:
    pattern = glob_pattern(split.evaluation)
    # A bare name is meant in any directory.
    anywhere = re.compile(f"(?:.*/)?(?:{pattern.pattern})")
    matches = {path: anywhere.fullmatch(path) is not None for path in source.paths}
    parts = [
        PartRows(
            source,
            [one for one in source.extents() if matches[one.path] is held_out],
            [path for path in source.paths if matches[path] is held_out],
        )
        for held_out in (False, True)
    ]
    for part, name, which in zip(parts, ("train", "evaluation"), ("every", "no"), strict=True):
        if not part.has_rows():
            raise DataError(
                f"data.split.evaluation {split.evaluation!r} matches {which} file with rows of "
                f"{len(source.paths)}, which leaves no rows for {name}; change the glob"
            )
    return parts[0], parts[1]


def _by_time(
    source: Source, split: TimeSplit, column: str, unit: TimeUnit
) -> tuple[PartRows, PartRows]:
    at = _parse_time(split.at)
    # Sources compare integers as they are, in the unit of the column.
    is_integer = pa.types.is_integer(source.schema.field(column).type)
    ticks = TICKS_PER_S[unit] if is_integer else 1000
    remedy = (
        f"change the time, or data.event_time_unit, now {unit}" if is_integer else "change the time"
    )

    def part(
        low: int | None, high: int | None, order: Callable[[Sequence[Extent]], Sequence[Extent]]
    ) -> PartRows:
        first = None if low is None else low * ticks // 1000
        end = None if high is None else -(-high * ticks // 1000)
        possible = [one for one in source.extents() if source.may_hold(one, column, first, end)]
        files = list(dict.fromkeys(one.path for one in possible))
        rows = PartRows(source, possible, files, TimeRange(column, low, high, unit))
        # Rows are usually in order of time, so one side finds its first row at the end.
        if not replace(rows, extents=order(possible)).has_rows():
            name = "evaluation" if high is None else "train"
            side = "at or after" if high is None else "before"
            raise DataError(
                f"data.split.at {split.at!r}: no row has {column!r} {side} it, which leaves no "
                f"rows for {name}; {remedy}"
            )
        return rows

    return part(None, at, lambda extents: extents), part(at, None, lambda extents: extents[::-1])


def _parse_time(at: int | str) -> int:
    if isinstance(at, int):
        return at
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        raise ConfigError(
            f"data.split.at: {at!r} is no ISO 8601 time; write it like 2026-01-31T00:00:00Z"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)
