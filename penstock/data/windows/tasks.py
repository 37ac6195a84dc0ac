"""Tasks by number, held as ranges: names are listed again where they are asked for late."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping
from typing import NamedTuple

from penstock.config.streams import Stream, StreamSource
from penstock.data.windows.calendar import Window
from penstock.data.windows.files import Files, InFolder
from penstock.data.windows.graph import StoredPaths, WindowPart
from penstock.data.windows.patterns import Key
from penstock.errors import DataError


class Task(NamedTuple):
    """A run of files of one window and source: what one reader takes at once."""

    stream: Stream
    window: Window
    source: StreamSource
    start: int
    """The first of its files, among those of the same hour or day."""
    stop: int


class _Part(NamedTuple):
    """A `WindowPart` without names."""

    stream: Stream
    window: Window
    source: StreamSource
    key: Key
    folders: tuple[str, ...]
    num_files: int
    digest: int
    """Of folders, names and sizes."""


class Tasks:
    """All tasks of the parts that were added, numbered from 0 in their order.

    Memory is by the part, an hour or day of a source, whatever files and tasks it has.
    """

    def __init__(self, stored: Mapping[str, StoredPaths], most_files: int) -> None:
        """Holds none yet.

        Args:
          stored: as the graph's whose parts are added.
          most_files: of one task; of each part, all tasks have as many but the last.
        """
        self._stored, self._most = stored, most_files
        self._parts: list[_Part] = []
        self._firsts = array("q")
        """[parts] number of the first task of each."""
        self._length = 0
        self._named: tuple[int, Files] | None = None
        """The part whose names are at hand, by its place."""

    def add(self, part: WindowPart) -> range:
        """The numbers of the part's tasks."""
        stream, window, source, key, files = part
        folders = tuple(one.folder for one in files.parts)
        self._named = len(self._parts), files
        self._firsts.append(self._length)
        self._parts.append(_Part(stream, window, source, key, folders, len(files), files.digest()))
        self._length += -(-len(files) // self._most)
        return range(self._firsts[-1], self._length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> Task:
        place, start = self._place(number)
        part = self._parts[place]
        stop = min(start + self._most, part.num_files)
        return Task(part.stream, part.window, part.source, start, stop)

    def files(self, number: int) -> Files:
        """The files of a task, in order.

        Raises:
          DataError: they are listed again, and cannot be, or are no longer what was found.
        """
        place, start = self._place(number)
        if self._named is None or self._named[0] != place:
            self._named = place, self._again(self._parts[place])
        return self._named[1][start : start + self._most]

    def _place(self, number: int) -> tuple[int, int]:
        """The part of a task, and which of its files is the task's first one."""
        if not 0 <= number < self._length:
            raise IndexError(f"task {number} of {self._length}")
        place = bisect_right(self._firsts, number) - 1
        return place, (number - self._firsts[place]) * self._most

    def _again(self, part: _Part) -> Files:
        paths = self._stored[f"{part.stream.name}/{part.source.name}"]
        found = []
        for folder in part.folders:
            entries = paths.store.entries(folder)
            if entries is not None:
                names = entries.files
                for rows in paths.files.matches(len(paths.files.levels) - 1, names, part.key).rows:
                    found.append(InFolder.of(folder, names, entries.sizes, rows))
        files = Files(found)
        if len(files) != part.num_files or files.digest() != part.digest:
            raise DataError(
                f"{', '.join(part.folders)}: files were added, removed or written anew since tasks "
                f"were made of those of {part.window.words(part.stream.time_zone)}; put them back, "
                "or begin a new run"
            )
        return files
