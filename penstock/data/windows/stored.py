"""Where the paths of a job's streams lead: file systems, folders, patterns."""

from __future__ import annotations

from typing import NamedTuple

from pyarrow import fs

from penstock.config.streams import StreamsSource
from penstock.data.files import resolve_path
from penstock.data.windows.folders import Folders
from penstock.data.windows.graph import StoredPaths
from penstock.data.windows.patterns import PathPattern
from penstock.errors import DataError


class Stored(NamedTuple):
    """A source's files, where they are."""

    paths: StoredPaths
    scheme: str
    """What comes before its paths in a URI; empty: nothing."""


def stored_paths(config: StreamsSource) -> dict[str, Stored]:
    """By name of stream and source; sources of one file system share its folders.

    Nothing is listed yet.

    Raises:
      DataError: a marker is on another file system than the files.
    """
    shared: list[tuple[fs.FileSystem, Folders]] = []

    def folders_of(filesystem: fs.FileSystem) -> Folders:
        for other, folders in shared:
            if other.equals(filesystem):
                return folders
        shared.append((filesystem, Folders(filesystem)))
        return shared[-1][1]

    found = {}
    for stream in config.streams:
        for source in stream.sources:
            assert isinstance(source.files.path, str)
            filesystem, path = resolve_path(source.files.path)
            marker = None if source.marker is None else resolve_path(source.marker)
            if marker is not None and not marker[0].equals(filesystem):
                raise DataError(f"{source.marker}: on another file system than its files")
            paths = StoredPaths(
                folders_of(filesystem),
                PathPattern(path),
                None if marker is None else PathPattern(marker[1]),
            )
            found[f"{stream.name}/{source.name}"] = Stored(
                paths, source.files.path.removesuffix(path)
            )
    return found
