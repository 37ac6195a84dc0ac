"""The hours or days of one source, in order of time, each with its files.

Folders are listed from the coarsest date on, the earliest first, some ahead of need on threads of
their own; folders that cannot hold the time asked for are not listed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

from penstock.data.windows.folders import Entries, FolderStore, is_seen
from penstock.data.windows.patterns import Key, PathPattern, begin_of, naive_days
from penstock.errors import DataError

_AHEAD = 16
"""Folders of a source that are listed at a time: a remote store takes as long for one."""
_SPARE_DAYS = 2
"""A zone's days and those of UTC differ by less."""


class Files(NamedTuple):
    """Some files of one source."""

    paths: Sequence[str]
    """In order of path."""
    sizes: Sequence[int]
    """[files] bytes."""


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


class _Listed(NamedTuple):
    """What lies below such folders."""

    folders: Sequence[_Folders]
    """By what is known of them, ascending."""
    files: Sequence[tuple[Key, Files]]


class _Asked(NamedTuple):
    """Folders, and what will be known of them; None: nobody was asked to list them yet."""

    folders: _Folders
    listed: Future[_Listed] | None


class Periods:
    """The periods of a source that begin in [start, end)."""

    def __init__(
        self, store: FolderStore, pattern: PathPattern, zone: ZoneInfo, start_ms: int, end_ms: int
    ) -> None:
        self._store, self._pattern, self._zone = store, pattern, zone
        self._times = start_ms, end_ms
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
                for listed in self._listed(threads):
                    yield from self._periods(listed.files)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _listed(self, threads: Executor) -> Iterator[_Listed]:
        """What lies in folders, those above others before them, in order of time."""
        first = _Folders((), 0, [self._pattern.root])
        waiting = deque([_Asked(first, threads.submit(self._list, first))])
        while waiting:
            asked = waiting.popleft().listed
            assert asked is not None
            listed = asked.result()
            yield listed
            waiting.extendleft(_Asked(one, None) for one in reversed(listed.folders))
            for place in range(min(_AHEAD, len(waiting))):
                folders, known = waiting[place]
                if known is None:
                    waiting[place] = _Asked(folders, threads.submit(self._list, folders))

    def _periods(self, found: Sequence[tuple[Key, Files]]) -> Iterator[Period]:
        for key, files in found:
            begin = begin_of(key, self._zone, files.paths[0])
            if self._times[0] <= begin < self._times[1]:
                yield Period(key, begin, files)

    def _list(self, folders: _Folders) -> _Listed:
        below: dict[Key, list[str]] = {}
        files: dict[Key, list[tuple[str, int]]] = {}
        for path in folders.paths:
            entries = self._store.entries(path)
            if entries is None:
                if folders.level:
                    continue  # removed since its parent was listed
                raise DataError(f"{self._pattern.path}: no such directory: {path or '.'}")
            prefix = path + "/" if path else ""
            for name, key in self._matching(folders, entries):
                below.setdefault(key, []).append(prefix + name)
            for name, size, key in self._files(folders, entries):
                files.setdefault(key, []).append((prefix + name, size))
        return _Listed(
            [_Folders(key, folders.level + 1, below[key]) for key in sorted(below)],
            [(key, Files(*zip(*sorted(files[key]), strict=True))) for key in sorted(files)],
        )

    def _is_last(self, folders: _Folders) -> bool:
        return folders.level == len(self._pattern.levels) - 1

    def _matching(self, folders: _Folders, entries: Entries) -> Iterator[tuple[str, Key]]:
        for name in () if self._is_last(folders) else entries.folders:
            key = self._key(folders, name)
            if key is not None:
                yield name, key

    def _files(self, folders: _Folders, entries: Entries) -> Iterator[tuple[str, int, Key]]:
        found = zip(entries.files, entries.sizes, strict=True)
        for name, size in found if self._is_last(folders) else ():
            key = self._key(folders, name)
            if key is not None:
                yield name, size, key

    def _key(self, folders: _Folders, name: str) -> Key | None:
        if not is_seen(name):
            return None
        key = self._pattern.key_of(folders.level, name, folders.key)
        if not key:
            return key
        days = naive_days(key)
        if days is None:
            return key  # told by name where it is read
        is_near = days[0] <= self._days[1] and days[1] >= self._days[0]
        return key if is_near else None
