"""The hours or days of one source, in order of time, each with its files.

Folders are listed from the coarsest date on, the earliest first, some ahead of need on threads of
their own; folders that cannot hold the time asked for are not listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import datetime
from typing import NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import pyarrow as pa

from penstock.data.windows.files import Files, InFolder, Rows, taken
from penstock.data.windows.folders import FolderStore
from penstock.data.windows.patterns import Key, PathPattern, begin_of, naive_days
from penstock.errors import DataError

T = TypeVar("T")

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

    folders: Sequence[tuple[Key, str]]
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
        """The files in folders of one key each, by time."""
        waiting = [_Asked(_Folders((), 0, [self._pattern.root]), None)]
        ahead = largest = 1
        while waiting:
            self._ask(threads, waiting, ahead)
            asked = waiting.pop(0)
            assert asked.listed is not None
            listed = [future.result() for future in asked.listed]
            if not self._is_last(asked.folders):
                waiting[:0] = _below(asked.folders, listed)
            largest = max(largest, *(one.num_entries for one in listed))
            # One at first, which nothing holds up, and more when it is known how large they are.
            ahead = max(1, min(2 * ahead, _AHEAD, self._most_ahead // largest))
            self._ask(threads, waiting, ahead)
            yield _by_key(one.files for one in listed)

    def _ask(self, threads: Executor, waiting: list[_Asked], ahead: int) -> None:
        """Sees to it that the first folders, `ahead` or a few more, are being listed."""
        place = 0
        while place < len(waiting) and ahead > 0:
            folders, listed = waiting[place]
            if listed is None:
                futures = [threads.submit(self._list, folders, path) for path in folders.paths]
                waiting[place] = _Asked(folders, futures)
            elif not self._is_last(folders) and all(_is_known(future) for future in listed):
                # What is below the next day is listed before the last hour of this one is taken.
                below = _below(folders, [future.result() for future in listed])
                waiting[place : place + 1] = below
                continue
            ahead -= len(folders.paths)
            place += 1

    def _is_last(self, folders: _Folders) -> bool:
        return folders.level == len(self._pattern.levels) - 1

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
            raise DataError(
                f"{self._pattern.path}: no such directory: {path or '.'}{self._pattern.where}"
            )
        num_entries = len(entries.files) + len(entries.folders)
        prefix = _prefix(path) if path else ""
        others = pa.array(sorted(entries.others), pa.large_string())
        for _, rows in self._near(folders, path, others):
            matching = taken(others, rows).to_pylist()
            self._pattern.passed_over.update(prefix + name for name in matching)
        if self._is_last(folders):
            files = [
                (key, InFolder.of(path, entries.files, entries.sizes, rows))
                for key, rows in self._near(folders, path, entries.files)
            ]
            return _Listed([], files, num_entries)
        below = [
            (key, prefix + name)
            for key, rows in self._near(folders, path, entries.folders)
            for name in taken(entries.folders, rows).to_pylist()
        ]
        return _Listed(below, [], num_entries)

    def _near(
        self, folders: _Folders, path: str, names: pa.LargeStringArray
    ) -> Iterator[tuple[Key, Rows]]:
        """The names in a folder that may be of the time asked for, by their keys."""
        found = self._pattern.matches(folders.level, names, folders.key, path)
        for key, rows in zip(*found, strict=True):
            days = naive_days(key) if key else None
            # A day that there is not is told by name where it is read.
            if days is None or (days[0] <= self._days[1] and days[1] >= self._days[0]):
                yield key, rows


def _is_known(future: Future[_Listed]) -> bool:
    # An error is raised when the folder's turn comes.
    return future.done() and future.exception() is None


def _below(folders: _Folders, listed: Iterable[_Listed]) -> list[_Asked]:
    """The folders below some, of the same key together, by their keys."""
    paths = _by_key(one.folders for one in listed)
    return [
        # Of folders of one depth, all files of one come before all of the next in order of path.
        _Asked(_Folders(key, folders.level + 1, sorted(paths[key], key=_prefix)), None)
        for key in sorted(paths)
    ]


def _by_key(found: Iterable[Sequence[tuple[Key, T]]]) -> dict[Key, list[T]]:
    """In their order."""
    by_key: dict[Key, list[T]] = {}
    for pairs in found:
        for key, one in pairs:
            by_key.setdefault(key, []).append(one)
    return by_key


def _prefix(folder: str) -> str:
    return folder + "/"
