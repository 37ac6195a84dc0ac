"""The rate of positives over time, or over the file where there is no time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.data.columns.decode import read_times
from penstock.data.columns.numbers import read_numbers
from penstock.data.columns.transforms import BadValue
from penstock.data.plan.counting import Progress
from penstock.data.source import Chunk, Source
from penstock.errors import DataError
from penstock.survey.profile import DataProfile, Reach, spread_chunks
from penstock.survey.roles import Roles

BUCKETS = 24


@dataclass(frozen=True)
class LabelRate:
    """Positives by bucket, all buckets of one width."""

    edges: NDArray[np.float64]
    """[buckets + 1] ms since 1970 UTC, or numbers of rows."""
    is_time: bool
    rows: NDArray[np.int64]
    """[buckets] with a label."""
    positives: NDArray[np.int64]
    """[buckets]"""

    @property
    def overall(self) -> float:
        """Share of the positives among all rows with a label; NaN if there are none."""
        rows = int(self.rows.sum())
        return int(self.positives.sum()) / rows if rows else float("nan")


def label_rate(
    source: Source,
    profile: DataProfile,
    roles: Roles,
    *,
    max_rows: int | None = None,
    progress: Progress = lambda rows, share: None,
) -> LabelRate | None:
    """Reads labels and times once more.

    Args:
      source: opened so that its label is a number and its time one.
      profile: of all columns of the same rows.
      roles: which columns are label and time.
      max_rows: as it was for `profile_source`.
      progress: told after each chunk.

    Returns:
      Rates by time, or by row where there is no time; None: there is no label.

    Raises:
      DataError: a file cannot be read.
    """
    if roles.label is None:
        return None
    low, high = 0.0, float(max(profile.rows, 1))
    if roles.event_time is not None:
        numbers = profile[roles.event_time].numbers
        assert numbers is not None
        unit = profile[roles.event_time].kind == "integer"
        ticks = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}[roles.time_unit] if unit else 1.0
        low, high = numbers.minimum * ticks, numbers.maximum * ticks + 1
    edges = np.linspace(low, high, BUCKETS + 1)
    rows, positives = np.zeros(BUCKETS, dtype=np.int64), np.zeros(BUCKETS, dtype=np.int64)
    columns = [name for name in (roles.label, roles.event_time) if name is not None]
    seen = 0
    reach = Reach(source)
    for extent, chunk in spread_chunks(source, columns, max_rows):
        at = _places(chunk, roles, seen)
        labels = _labels(chunk, roles.label)
        known = ~np.isnan(labels)
        is_positive = labels >= (0.5 if roles.at_least is None else roles.at_least)
        bucket = np.searchsorted(edges, at, side="right").clip(1, BUCKETS) - 1
        rows += np.bincount(bucket[known], minlength=BUCKETS)
        positives += np.bincount(bucket[known & is_positive], minlength=BUCKETS)
        seen += chunk.table.num_rows
        progress(seen, reach.share(extent, chunk) if max_rows is None else seen / max_rows)
    return LabelRate(edges, roles.event_time is not None, rows, positives)


def _places(chunk: Chunk, roles: Roles, seen: int) -> NDArray[np.float64]:
    name = roles.event_time
    if name is None:
        return np.arange(seen, seen + chunk.table.num_rows, dtype=np.float64)
    times = read_times(chunk.table.column(name), name, chunk.place, roles.time_unit)
    return times.astype(np.float64)


def _labels(chunk: Chunk, name: str) -> NDArray[np.floating]:
    try:
        return read_numbers(chunk.table.column(name))
    except BadValue as bad:
        raise DataError(
            f"{chunk.place.locate(bad.index)}, column {name!r}: {bad.reason}; mend the file"
        ) from None
