"""Streams that grow: which windows are complete, so that a run may read them.

A source is complete up to where its markers reach, or, without markers, up to its newest hour or
day, less what may come late. A window is complete when all sources of its stream are, and windows
are read in their order, so what is read does not depend on when somebody looked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple

from penstock.config.streams import Stream, StreamSource, StreamsSource, fields_of_path
from penstock.data.windows.calendar import Window, windows
from penstock.data.windows.files import files_at
from penstock.data.windows.graph import Markers, SourceFiles, StoredPaths, TaskGraph, WindowFiles
from penstock.data.windows.periods import Periods
from penstock.position import Span, SpanWindow

_MOST_FILES = 4_096
"""Of a span, about: so many are listed in each checkpoint."""
_ANY_TIME_MS = round(datetime(9000, 1, 1, tzinfo=UTC).timestamp() * 1000)


class Listing(NamedTuple):
    """A span and its files."""

    span: Span
    paths: Sequence[str]
    """Within their file systems, in the order of reading."""

    def to_plain(self) -> list[Any]:
        """As JSON has it."""
        return [self.span._asdict(), list(self.paths)]

    @classmethod
    def from_plain(cls, said: Any) -> Listing:
        """Inverse of `to_plain`."""
        span, paths = said
        return cls(Span.from_dict(span), paths)


def listed_windows(config: StreamsSource, listing: Listing) -> Iterator[WindowFiles]:
    """The windows of a span with their files."""
    left = iter(listing.paths)
    for number, start, stop, counts in listing.span.windows:
        stream = config.streams[number]
        parts = [
            SourceFiles(source, files_at(list(islice(left, count))))
            for source, count in zip(stream.sources, counts, strict=True)
            if count
        ]
        yield WindowFiles(stream, Window(start, stop), parts)


def waits_for(
    config: StreamsSource, stored: Mapping[str, StoredPaths], since_ms: Sequence[int]
) -> str:
    """What makes another window complete, for people: only of sources that hold it up.

    Args:
      config: the streams.
      stored: as for `next_span`, which found nothing.
      since_ms: of each stream, where the windows begin that were not read.

    Raises:
      DataError: as `TaskGraph`.
    """
    every, lacking = [], []
    for stream, since in zip(config.streams, since_ms, strict=True):
        for source in stream.sources if stream.grows else ():
            what = "a file of a later time" if source.marker is None else "the next marker"
            every.append(f"{what} of source {source.name!r} of stream {stream.name!r}")
            window = next(windows(stream.unit, stream.time_zone, since, None))
            paths = stored[f"{stream.name}/{source.name}"]
            if _source_limit(stream, source, paths, since) < window.stop_ms:
                lacking.append(every[-1])
    # By the clock a window may be complete that has no file.
    return ", ".join(lacking or every)


def begins(config: StreamsSource) -> tuple[int, ...]:
    """Of each stream, where its windows begin."""
    return tuple(stream.start_ms for stream in config.streams)


def has_ended(config: StreamsSource, since_ms: Sequence[int]) -> bool:
    """Whether no window comes from the given times on, nor ever will."""
    return all(
        not stream.grows and since >= stream.end_ms
        for stream, since in zip(config.streams, since_ms, strict=True)
    )


def is_behind_end(config: StreamsSource, window: SpanWindow) -> bool:
    """Whether a window was listed when its stream had no end yet, and lies behind that."""
    stream = config.streams[window.stream]
    return not stream.grows and window.start_ms >= stream.end_ms


def windows_behind_end(config: StreamsSource, listing: Listing) -> set[int]:
    """Numbers of a span's windows that are not to be read any more; see `is_behind_end`."""
    every = enumerate(listing.span.windows)
    return {number for number, one in every if is_behind_end(config, one)}


def next_span(
    config: StreamsSource,
    stored: Mapping[str, StoredPaths],
    since_ms: Sequence[int],
    first_file: int,
) -> Listing | None:
    """The complete windows that come next, as many as a span has.

    Args:
      config: the streams.
      stored: by the names of stream and source; folders that nobody has listed yet.
      since_ms: of each stream, where the windows begin that were not read.
      first_file: number of the first file.

    Returns:
      Windows with a file at least; None: none is complete yet.

    Raises:
      DataError: as `TaskGraph`.
    """
    until = _complete(config, stored, since_ms)
    streams = [
        stream.model_copy(update={"start": _iso(since), "end": _iso(stop)})
        for stream, since, stop in zip(config.streams, since_ms, until, strict=True)
        if stop > since
    ]
    if not streams:
        return None
    numbers = {stream.name: number for number, stream in enumerate(config.streams)}
    paths: list[str] = []
    found: list[SpanWindow] = []
    reached = list(since_ms)
    for one in TaskGraph(config.model_copy(update={"streams": tuple(streams)}), stored):
        number = numbers[one.stream.name]
        of_sources = {part.source.name: part.files.paths for part in one.sources}
        every = [of_sources.get(source.name, ()) for source in one.stream.sources]
        reached[number] = one.window.stop_ms
        if any(map(len, every)):
            files = tuple(len(of_source) for of_source in every)
            found.append(SpanWindow(number, one.window.start_ms, one.window.stop_ms, files))
            paths += [path for of_source in every for path in of_source]
        if len(paths) >= _MOST_FILES:
            break
    else:
        reached = list(until)
    if not found:
        return None
    return Listing(Span(first_file, tuple(reached), tuple(found)), paths)


def _complete(
    config: StreamsSource, stored: Mapping[str, StoredPaths], since_ms: Sequence[int]
) -> list[int]:
    """Of each stream, where the last complete window ends."""
    limits = [
        min(
            _source_limit(stream, source, stored[f"{stream.name}/{source.name}"], since)
            for source in stream.sources
        )
        if stream.grows
        else stream.end_ms
        for stream, since in zip(config.streams, since_ms, strict=True)
    ]
    if config.together:
        growing = [limit for limit, one in zip(limits, config.streams, strict=True) if one.grows]
        limits = [min(limit, *growing) for limit in limits]
    return [
        _last_stop(stream, since, limit)
        for stream, since, limit in zip(config.streams, since_ms, limits, strict=True)
    ]


def _last_stop(stream: Stream, since_ms: int, limit_ms: int) -> int:
    end = None if stream.grows else stream.end_ms
    until = since_ms
    for window in windows(stream.unit, stream.time_zone, since_ms, end):
        if window.stop_ms > limit_ms:
            break
        until = window.stop_ms
    return until


def _source_limit(stream: Stream, source: StreamSource, stored: StoredPaths, since_ms: int) -> int:
    """Up to which time of the stream's windows a source is complete."""
    zone, first = stream.time_zone, since_ms - source.delay_ms
    reached = first
    markers = None if stored.marker is None else Markers(stored.store, stored.marker)
    for period in Periods(stored.store, stored.files, zone, first, _ANY_TIME_MS):
        if markers is None:
            reached = max(reached, period.begin_ms - source.lateness_ms)
            continue
        if not markers.has(period):
            # Whatever the clock says: this one says itself that it is not complete.
            return period.begin_ms + source.delay_ms
        of_hours = "HH" in fields_of_path(str(source.files.path))
        reached = next(windows("hour" if of_hours else "day", zone, period.begin_ms, None)).stop_ms
    if source.closes_after is not None:
        reached = max(reached, round(time.time() * 1000) - source.closes_after_ms)
    return reached + source.delay_ms


def _iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat()
