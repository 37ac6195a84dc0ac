"""Where the paths of a job's streams lead: file systems, folders, patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pyarrow import fs

from penstock.config.streams import StreamsSource
from penstock.data.files import resolve_path, where_from
from penstock.data.windows.folders import Folders
from penstock.data.windows.graph import StoredPaths
from penstock.data.windows.patterns import PathPattern
from penstock.errors import DataError


class Stored(NamedTuple):
    """A source's files, where they are."""

    paths: StoredPaths
    filesystem: fs.FileSystem
    number: int
    """Of the file system, among those of all sources."""
    path: str
    """Of the source, within its file system."""


class PassedOver:
    """What matches paths and is neither a file nor a folder; each is told once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def new(self, stored: Mapping[str, StoredPaths]) -> str:
        """Of all that was listed so far, what was not told before, in words; empty: nothing."""
        found = {path for one in stored.values() for path in one.files.passed_over}
        new = sorted(found - self._told)
        self._told.update(new)
        if not new:
            return ""
        others = f" and {len(new) - 1:,} more" if len(new) > 1 else ""
        return (
            f"{new[0]}{others}: neither a file nor a folder (a link that leads nowhere, or a pipe, "
            f"{len(self._told):,} so far), so nothing is read there; if rows are missing, write it "
            "anew as a file"
        )


def listed_anew(config: StreamsSource) -> dict[str, StoredPaths]:
    """By name of stream and source, with folders that nobody has listed yet; see `stored_paths`."""
    return {name: one.paths for name, one in stored_paths(config).items()}


def stored_paths(config: StreamsSource) -> dict[str, Stored]:
    """By name of stream and source; sources of one file system share its folders.

    Nothing is listed yet.

    Raises:
      DataError: a marker is on another file system than the files.
    """
    shared: list[tuple[fs.FileSystem, Folders]] = []

    def number_of(filesystem: fs.FileSystem) -> int:
        for number, (other, _) in enumerate(shared):
            if other.equals(filesystem):
                return number
        shared.append((filesystem, Folders(filesystem)))
        return len(shared) - 1

    found = {}
    for stream in config.streams:
        for source in stream.sources:
            assert isinstance(source.files.path, str)
            filesystem, path = resolve_path(source.files.path)
            marker = None if source.marker is None else resolve_path(source.marker)
            if marker is not None and not marker[0].equals(filesystem):
                raise DataError(f"{source.marker}: on another file system than its files")
            number = number_of(filesystem)
            paths = StoredPaths(
                shared[number][1],
                PathPattern(path, where_from(source.files.path, filesystem)),
                None if marker is None else PathPattern(marker[1]),
            )
            found[f"{stream.name}/{source.name}"] = Stored(paths, filesystem, number, path)
    return found
