"""From a calendar to the files of each window: timer, sources, joiner, sink.

The timer gives windows one after the other. Each source finds its hours or days on a thread of its
own, ahead of need, so that a slow one holds up nobody but those who wait for it. The joiner puts
together what falls into a window; the sink delivers windows in their order, of one stream after the
other or of all side by side.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

from penstock.config.streams import Stream, StreamSource, StreamsSource
from penstock.data.batches.channel import Channel, Closed, Ended
from penstock.data.windows.calendar import Window, windows
from penstock.data.windows.folders import FolderStore
from penstock.data.windows.patterns import PathPattern
from penstock.data.windows.periods import Files, Period, Periods
from penstock.errors import DataError

_PERIODS_AHEAD = 256
"""Hours or days of a source that are found before somebody asks for them."""


class StoredPaths(NamedTuple):
    """Where the paths of a source lead."""

    store: FolderStore
    files: PathPattern
    marker: PathPattern | None


class SourceFiles(NamedTuple):
    """What a window has of one source."""

    source: StreamSource
    files: Files


class WindowFiles(NamedTuple):
    """A window of a stream, and all of its files."""

    stream: Stream
    window: Window
    sources: Sequence[SourceFiles]
    """In the order of the stream's; of those that have a file."""


class TaskGraph:
    """The windows of a job, each with its files."""

    def __init__(self, config: StreamsSource, stored: Mapping[str, StoredPaths]) -> None:
        """`stored`: by the names of stream and source, `stream/source`."""
        self._config, self._stored = config, stored

    def __iter__(self) -> Generator[WindowFiles]:
        """In order; a window is found when it is asked for, or somewhat before.

        Raises:
          DataError: a folder cannot be listed, a path names no time that there is, or a marker is
            missing.
        """
        streams = [self._windows(stream) for stream in self._config.streams]
        with ExitStack() as opened:
            for stream in streams:
                opened.enter_context(closing(stream))
            if self._config.together:
                yield from heapq.merge(*streams, key=lambda found: found.window.stop_ms)
            else:
                for stream in streams:
                    yield from stream

    def _windows(self, stream: Stream) -> Generator[WindowFiles]:
        with ExitStack() as opened:
            found = [_Pump(self._periods(stream, source)) for source in stream.sources]
            for pump in found:
                opened.callback(pump.close)
            for window in windows(stream.unit, stream.time_zone, stream.start_ms, stream.end_ms):
                parts = []
                for source, pump in zip(stream.sources, found, strict=True):
                    periods = pump.until(window.stop_ms - source.delay_ms)
                    if periods:
                        parts.append(SourceFiles(source, _joined(periods)))
                yield WindowFiles(stream, window, parts)

    def _periods(self, stream: Stream, source: StreamSource) -> Generator[Period]:
        stored = self._stored[f"{stream.name}/{source.name}"]
        times = stream.start_ms - source.delay_ms, stream.end_ms - source.delay_ms
        for period in Periods(stored.store, stored.files, stream.time_zone, *times):
            if stored.marker is not None:
                _check_marker(stored, period)
            yield period


class _Pump:
    """The periods of a source, found on a thread of their own, and taken window by window."""

    def __init__(self, periods: Generator[Period]) -> None:
        self._channel: Channel[Period] = Channel(_PERIODS_AHEAD)
        self._next: Period | None = None
        self._has_ended = False
        threading.Thread(
            target=self._fill, args=(periods,), name="penstock-periods", daemon=True
        ).start()

    def until(self, stop_ms: int) -> list[Period]:
        """Those before a moment that were not taken yet; waits until they are known."""
        taken = []
        while not self._has_ended:
            if self._next is None:
                try:
                    self._next = self._channel.get()
                except Ended:
                    self._has_ended = True
                    break
            if self._next.begin_ms >= stop_ms:
                break
            taken.append(self._next)
            self._next = None
        return taken

    def close(self) -> None:
        """Ends the thread, at the next thing that it finds."""
        self._channel.close()

    def _fill(self, periods: Generator[Period]) -> None:
        try:
            with closing(periods):
                for period in periods:
                    self._channel.put(period)
            self._channel.end()
        except Closed:
            return
        # Not handled here: `until` raises it.
        except BaseException as error:
            self._channel.fail(error)


def _joined(periods: Sequence[Period]) -> Files:
    if len(periods) == 1:
        return periods[0].files
    return Files(
        [path for period in periods for path in period.files.paths],
        [size for period in periods for size in period.files.sizes],
    )


def _check_marker(stored: StoredPaths, period: Period) -> None:
    assert stored.marker is not None
    path = stored.marker.path_of(period.key)
    folder, _, name = path.rpartition("/")
    entries = stored.store.entries(folder)
    if entries is None or name not in entries.files:
        raise DataError(
            f"{path}: missing, so {period.files.paths[0]} and what lies beside it may be "
            "incomplete; wait for it, end the stream before it, or take `marker` out of the source"
        )
