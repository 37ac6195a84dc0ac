"""From a calendar to the files of each window: timer, sources, joiner, sink.

The timer gives windows one after the other. Each source finds its hours or days on a thread of its
own, ahead of need, so that a slow one holds up nobody but those who wait for it. The joiner takes
what falls into a window; the sink delivers in the order of windows, of one stream after the other
or of all side by side: parts as soon as they are found, or windows as soon as they are whole.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from penstock.config.streams import Stream, StreamSource, StreamsSource
from penstock.data.batches.channel import Channel, Closed, Ended
from penstock.data.windows.calendar import Window, windows
from penstock.data.windows.files import Files
from penstock.data.windows.folders import Entries, FolderStore
from penstock.data.windows.patterns import Key, PathPattern
from penstock.data.windows.periods import Period, Periods
from penstock.errors import DataError

_PERIODS_AHEAD = 256
"""Hours or days of a source that are found before somebody asks for them."""
_FILES_AHEAD = 1 << 21
"""Files of all sources at work, about as many: a name and size take some 40 bytes. Nearly all of
them are for folders that are listed at a time, since a store that is far away takes its time for
each; an eighth is for what is found and not taken yet."""


class StoredPaths(NamedTuple):
    """Where the paths of a source lead."""

    store: FolderStore
    files: PathPattern
    marker: PathPattern | None


class WindowPart(NamedTuple):
    """The files of one hour or day of a source, in the window that has them."""

    stream: Stream
    window: Window
    source: StreamSource
    key: Key
    """The hour or day that their paths name."""
    files: Files


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


class _OpenWindow(NamedTuple):
    """A window whose parts are still to be taken, all of them before the next window."""

    stream: Stream
    window: Window
    parts: Iterator[WindowPart]
    """Source by source, in the order of the stream's, and of time."""


class TaskGraph:
    """The windows of a job, each with its files."""

    def __init__(self, config: StreamsSource, stored: Mapping[str, StoredPaths]) -> None:
        """`stored`: by the names of stream and source, `stream/source`."""
        self._config, self.stored = config, stored

    def __iter__(self) -> Generator[WindowFiles]:
        """In order; a window is found when it is asked for, or somewhat before.

        Raises:
          DataError: a folder cannot be listed, a path names no time that there is, or a marker is
            missing.
        """
        with closing(self._windows()) as opened:
            for stream, window, parts in opened:
                found: dict[str, list[WindowPart]] = {}
                for part in parts:
                    found.setdefault(part.source.name, []).append(part)
                sources = [
                    SourceFiles(of[0].source, Files.joined([part.files for part in of]))
                    for of in found.values()
                ]
                yield WindowFiles(stream, window, sources)

    def parts(self) -> Generator[WindowPart]:
        """The same files in the same order, those of an hour or day as soon as they are found.

        Raises:
          DataError: as when windows are asked for; of a window that has an error, parts may have
            been given.
        """
        with closing(self._windows()) as opened:
            for _, _, parts in opened:
                yield from parts

    def _windows(self) -> Generator[_OpenWindow]:
        with ExitStack() as opened:
            if self._config.together:
                most = _FILES_AHEAD // len(self._config.sources)
                streams = [
                    opened.enter_context(closing(self._of_stream(stream, most)))
                    for stream in self._config.streams
                ]
                yield from heapq.merge(*streams, key=lambda found: found.window.stop_ms)
                return
            for stream in self._config.streams:
                most = _FILES_AHEAD // len(stream.sources)
                yield from opened.enter_context(closing(self._of_stream(stream, most)))

    def _of_stream(self, stream: Stream, most_ahead: int) -> Generator[_OpenWindow]:
        with ExitStack() as opened:
            pumps = []
            for source in stream.sources:
                periods = self._periods(stream, source, most_ahead)
                pumps.append(_Pump(periods, most_ahead // 8))
                opened.callback(pumps[-1].close)
            for window in windows(stream.unit, stream.time_zone, stream.start_ms, stream.end_ms):
                yield _OpenWindow(stream, window, self._joined(stream, window, pumps))

    def _joined(
        self, stream: Stream, window: Window, pumps: Sequence[_Pump]
    ) -> Iterator[WindowPart]:
        for source, pump in zip(stream.sources, pumps, strict=True):
            for period in pump.until(window.stop_ms - source.delay_ms):
                yield WindowPart(stream, window, source, period.key, period.files)

    def _periods(self, stream: Stream, source: StreamSource, most_ahead: int) -> Generator[Period]:
        stored = self.stored[f"{stream.name}/{source.name}"]
        times = stream.start_ms - source.delay_ms, stream.end_ms - source.delay_ms
        check = None if stored.marker is None else Markers(stored.store, stored.marker).check
        for period in Periods(stored.store, stored.files, stream.time_zone, *times, most_ahead):
            if check is not None:
                check(period)
            yield period


class _Pump:
    """The periods of a source, found on a thread of their own, and taken window by window."""

    def __init__(self, periods: Generator[Period], most_ahead: int) -> None:
        """`most_ahead`: files that are found before they are asked for, with a period beyond."""
        self._channel: Channel[Period] = Channel(_PERIODS_AHEAD)
        self._next: Period | None = None
        self._has_ended = False
        self._most_ahead = most_ahead
        self._ahead = 0
        self._is_closed = False
        self._changed = threading.Condition()
        threading.Thread(
            target=self._fill, args=(periods,), name="penstock-periods", daemon=True
        ).start()

    def until(self, stop_ms: int) -> Iterator[Period]:
        """Those before a moment that were not taken yet; waits for each until it is known."""
        while not self._has_ended:
            if self._next is None:
                try:
                    self._next = self._channel.get()
                except Ended:
                    self._has_ended = True
                    break
                self._count(-len(self._next.files))
            if self._next.begin_ms >= stop_ms:
                break
            taken, self._next = self._next, None
            yield taken

    def close(self) -> None:
        """Ends the thread, at the next thing that it finds."""
        self._channel.close()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _count(self, files: int) -> None:
        with self._changed:
            self._ahead += files
            self._changed.notify_all()

    def _wait(self) -> None:
        """For those that are ahead to be taken; what is waited for is in the channel already."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._ahead <= self._most_ahead)

    def _fill(self, periods: Generator[Period]) -> None:
        try:
            with closing(periods):
                for period in periods:
                    self._count(len(period.files))
                    self._channel.put(period)
                    self._wait()
            self._channel.end()
        except Closed:
            return
        # Not handled here: `until` raises it.
        except BaseException as error:
            self._channel.fail(error)


class Markers:
    """Says of hours or days whether their markers are there."""

    def __init__(self, store: FolderStore, marker: PathPattern) -> None:
        self._store, self._marker = store, marker
        self._folder = ""
        self._entries: Entries | None = None
        """Of the folder of the last marker: those of many hours may lie side by side."""

    def has(self, period: Period) -> bool:
        """Whether its marker is there."""
        return any(map(self._is_there, self._marker.paths_of(period.key)))

    def check(self, period: Period) -> None:
        """Raises DataError: its marker is missing."""
        if not self.has(period):
            raise DataError(
                f"{self._marker.paths_of(period.key)[0]}: missing, so {period.files[0]} and "
                "what lies beside it may be incomplete; wait for it, end the stream before it, "
                "or take `marker` out of the source"
            )

    def _is_there(self, path: str) -> bool:
        folder, _, name = path.rpartition("/")
        if self._entries is None or folder != self._folder:
            self._folder, self._entries = folder, self._store.entries(folder)
        return self._entries is not None and pc.index(self._entries.files, _text(name)).as_py() >= 0


def _text(name: str) -> pa.LargeStringScalar:
    return pa.scalar(name, pa.large_string())
