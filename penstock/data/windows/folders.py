"""Folders of a file system, listed once each, however many windows and sources look into them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import pyarrow as pa
from pyarrow import fs

from penstock.data.files import is_hidden
from penstock.errors import DataError


class Entries(NamedTuple):
    """What a folder holds, hidden names and markers among them."""

    folders: Sequence[str]
    """Names, ascending."""
    files: Sequence[str]
    """Names, ascending."""
    sizes: Sequence[int]
    """[files] bytes."""


class FolderStore(Protocol):
    """What has folders. Safe to ask from several threads."""

    def entries(self, folder: str) -> Entries | None:
        """What a folder holds; None: there is no such folder.

        Raises:
          DataError: it cannot be listed.
        """


class Folders:
    """The folders of a pyarrow file system, each listed once. Safe to share by threads."""

    def __init__(self, filesystem: fs.FileSystem) -> None:
        self._filesystem = filesystem
        self._found: dict[str, Future[Entries | None]] = {}
        self._lock = threading.Lock()

    def entries(self, folder: str) -> Entries | None:
        """See `FolderStore`."""
        with self._lock:
            future = self._found.get(folder)
            is_first = future is None
            if future is None:
                future = self._found[folder] = Future()
        if is_first:
            try:
                future.set_result(self._list(folder))
            except DataError as error:
                future.set_exception(error)
        return future.result()

    @property
    def listings(self) -> int:
        """Calls of the file system so far."""
        return len(self._found)

    def _list(self, folder: str) -> Entries | None:
        base = folder or "."
        try:
            infos = self._filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
            if not infos and self._filesystem.get_file_info(base).type != fs.FileType.Directory:
                return None
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{base}: cannot be listed: {error}") from None
        infos.sort(key=lambda info: info.base_name)
        files = [info for info in infos if info.type == fs.FileType.File]
        return Entries(
            [info.base_name for info in infos if info.type == fs.FileType.Directory],
            [info.base_name for info in files],
            [info.size for info in files],
        )


def is_seen(name: str) -> bool:
    """Whether patterns find a name; see `is_hidden`."""
    return not is_hidden(name)
