"""Files that come into windows that a run has read: it leaves their rows out, and says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from penstock.config.streams import StreamSource, StreamsSource
from penstock.data.windows.graph import StoredPaths
from penstock.data.windows.growing import Listing, listed_windows
from penstock.data.windows.periods import Periods

_DAY_MS = 86_400_000
_MOST_FILES = 1 << 17
"""Of a stream's last windows, whose names are kept."""


class LateFile(NamedTuple):
    """A file that nobody reads."""

    source: StreamSource
    path: str


class _ReadWindow(NamedTuple):
    start_ms: int
    paths: frozenset[str]


class LateFiles:
    """Of the last day that was read of each stream, or of its last window if that is longer."""

    def __init__(self, config: StreamsSource) -> None:
        self._config = config
        self._windows: list[deque[_ReadWindow]] = [deque() for _ in config.streams]
        self._until_ms: Sequence[int] = ()
        self._known: set[str] = set()
        """Late files that were named."""
        self.num_files = 0
        """That came late so far."""

    def add(self, listing: Listing) -> None:
        """Takes note of windows that are read."""
        numbers = {stream.name: number for number, stream in enumerate(self._config.streams)}
        for stream, window, sources in listed_windows(self._config, listing):
            paths = frozenset(path for part in sources for path in part.files)
            self._windows[numbers[stream.name]].append(_ReadWindow(window.start_ms, paths))
        self._until_ms = listing.span.until_ms
        for read, until in zip(self._windows, self._until_ms, strict=True):
            num_files = sum(len(window.paths) for window in read)
            while len(read) > 1 and (
                read[1].start_ms <= until - _DAY_MS or num_files > _MOST_FILES
            ):
                num_files -= len(read.popleft().paths)

    def found(self, stored: Mapping[str, StoredPaths]) -> list[LateFile]:
        """Those that were not named before.

        Args:
          stored: by the names of stream and source; lists the folders of those windows.

        Raises:
          DataError: a folder cannot be listed.
        """
        found: list[LateFile] = []
        for stream, read, until in zip(
            self._config.streams, self._windows, self._until_ms, strict=True
        ):
            if not read or not stream.grows:
                continue
            known = self._known.union(*(window.paths for window in read))
            for source in stream.sources:
                paths = stored[f"{stream.name}/{source.name}"]
                times = read[0].start_ms - source.delay_ms, until - source.delay_ms
                for period in Periods(paths.store, paths.files, stream.time_zone, *times):
                    found += [LateFile(source, path) for path in period.files if path not in known]
        self._known.update(late.path for late in found)
        self.num_files += len(found)
        return found


def words_of(late: Sequence[LateFile], total: int) -> str:
    """For people: what came, and what helps."""
    source, path = late[0]
    others = f" and {len(late) - 1:,} more" if len(late) > 1 else ""
    remedy = "raise its `lateness`" if source.marker is None else "write its markers later"
    return (
        f"{path}{others}: came after that window of source {source.name!r} was read, so these rows "
        f"are not trained on ({total:,} so far); {remedy}"
    )
