"""The hours or days of one source, in order of time, each with its files.

Folders are listed from the coarsest date on, the earliest first, some ahead of need on threads of
their own; folders that cannot hold the time asked for are not listed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

import pyarrow as pa

from penstock.data.windows.files import Files, InFolder, Rows, taken
from penstock.data.windows.folders import FolderStore
from penstock.data.windows.patterns import Key, PathPattern, begin_of, naive_days
from penstock.errors import DataError

_AHEAD = 16
"""Folders of a source that are listed at a time: a remote store takes as long for one."""
_SPARE_DAYS = 2
"""A zone's days and those of UTC differ by less."""


class Period(NamedTuple):
    """The files of one hour or day of a source, by their paths."""

    key: Key
    begin_ms: int
    files: Files


class _Folders(NamedTuple):
    """Folders of which the same part of the date is known."""

    key: Key
    level: int
    paths: Sequence[str]
    """In the order of the files below them."""


class _Listed(NamedTuple):
    """What lies in one folder, by its key, ascending."""

    folders: Sequence[tuple[Key, list[str]]]
    """Their paths."""
    files: Sequence[tuple[Key, InFolder]]
    num_entries: int
    """That were looked at."""


class _Asked(NamedTuple):
    """Folders, and what will be known of each; None: nobody was asked to list them yet."""

    folders: _Folders
    listed: Sequence[Future[_Listed]] | None


class Periods:
    """The periods of a source that begin in [start, end)."""

    def __init__(
        self,
        store: FolderStore,
        pattern: PathPattern,
        zone: ZoneInfo,
        start_ms: int,
        end_ms: int,
        most_ahead: int = 1 << 20,
    ) -> None:
        """Looks at nothing yet.

        Args:
          store: where the folders are.
          pattern: of the files.
          zone: whose hours and days it names.
          start_ms: in ms since 1970 UTC.
          end_ms: exclusive.
          most_ahead: names in folders that are listed at a time; one folder may have more.
        """
        self._store, self._pattern, self._zone = store, pattern, zone
        self._times, self._most_ahead = (start_ms, end_ms), most_ahead
        low, high = (
            datetime.fromtimestamp(ms / 1000, zone).toordinal() for ms in (start_ms, end_ms)
        )
        self._days = low - _SPARE_DAYS, high + _SPARE_DAYS

    def __iter__(self) -> Iterator[Period]:
        """In order of time.

        Raises:
          DataError: a folder cannot be listed, or a path names no time that there is.
        """
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="penstock-lister") as threads:
            try:
                for found in self._found(threads):
                    yield from self._periods(found)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _found(self, threads: Executor) -> Iterator[Mapping[Key, list[InFolder]]]:
        """The files in folders of one key each, those above others before them, by time."""
        waiting = deque([_Asked(_Folders((), 0, [self._pattern.root]), None)])
        ahead = largest = 1
        while waiting:
            self._ask(threads, waiting, ahead)
            asked = waiting.popleft()
            assert asked.listed is not None
            below: dict[Key, list[str]] = {}
            files: dict[Key, list[InFolder]] = {}
            for future in asked.listed:
                listed = future.result()
                largest = max(largest, listed.num_entries)
                for key, paths in listed.folders:
                    below.setdefault(key, []).extend(paths)
                for key, in_folder in listed.files:
                    files.setdefault(key, []).append(in_folder)
            waiting.extendleft(
                # Of folders of one depth, all files of one come before all of the next by path.
                _Asked(_Folders(key, asked.folders.level + 1, sorted(below[key], key=_below)), None)
                for key in sorted(below, reverse=True)
            )
            # One at first, which nothing holds up, and more when it is known how large they are.
            ahead = max(1, min(2 * ahead, _AHEAD, self._most_ahead // largest))
            self._ask(threads, waiting, ahead)
            yield files

    def _ask(self, threads: Executor, waiting: deque[_Asked], ahead: int) -> None:
        """Sees to it that the first folders, `ahead` or a few more, are being listed."""
        for place, (folders, listed) in enumerate(waiting):
            if ahead <= 0:
                return
            if listed is None:
                futures = [threads.submit(self._list, folders, path) for path in folders.paths]
                waiting[place] = _Asked(folders, futures)
            ahead -= len(folders.paths)

    def _periods(self, found: Mapping[Key, list[InFolder]]) -> Iterator[Period]:
        for key in sorted(found):
            files = Files(found[key])
            begin = begin_of(key, self._zone, files[0])
            if self._times[0] <= begin < self._times[1]:
                yield Period(key, begin, files)

    def _list(self, folders: _Folders, path: str) -> _Listed:
        entries = self._store.entries(path)
        if entries is None:
            if folders.level:
                return _Listed([], [], 0)  # removed since its parent was listed
            raise DataError(f"{self._pattern.path}: no such directory: {path or '.'}")
        num_entries = len(entries.files) + len(entries.folders)
        if folders.level == len(self._pattern.levels) - 1:
            files = [
                (key, InFolder.of(path, entries.files, entries.sizes, rows))
                for key, rows in self._near(folders, entries.files)
            ]
            return _Listed([], files, num_entries)
        prefix = _below(path) if path else ""
        below = [
            (key, [prefix + name for name in taken(entries.folders, rows).to_pylist()])
            for key, rows in self._near(folders, entries.folders)
        ]
        return _Listed(below, [], num_entries)

    def _near(self, folders: _Folders, names: pa.LargeStringArray) -> Iterator[tuple[Key, Rows]]:
        """The names that may be of the time asked for, by their keys."""
        for key, rows in zip(
            *self._pattern.matches(folders.level, names, folders.key), strict=True
        ):
            days = naive_days(key) if key else None
            # A day that there is not is told by name where it is read.
            if days is None or (days[0] <= self._days[1] and days[1] >= self._days[0]):
                yield key, rows


def _below(folder: str) -> str:
    return folder + "/"
