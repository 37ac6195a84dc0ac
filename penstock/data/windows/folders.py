"""Folders of a file system, listed once for all who look into them at about the same time."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from penstock.errors import DataError, ListingError

KEPT_BYTES = 64 << 20
"""Of names and sizes that stay for who asks later; the last listing stays however large it is."""


_MOST_FAILURES = 7
T = TypeVar("T")


class Tries:
    """Of listings again and again: some in a row may fail, each tried later than the one before."""

    def __init__(self) -> None:
        self._failures = self._pauses = 0

    def of(self, listing: Callable[[], T], tell: Callable[[str], None]) -> T | None:
        """What is listed; None: it failed, which is told, or is not tried this time.

        Raises:
          ListingError: it failed the seventh time in a row, some 60 calls after the first.
        """
        if self._pauses:
            self._pauses -= 1
            return None
        try:
            found = listing()
        except ListingError as error:
            self._failures += 1
            if self._failures == _MOST_FAILURES:
                raise
            self._pauses = 2 ** (self._failures - 1) - 1
            tell(f"{error}; it will be tried again ({self._failures} of {_MOST_FAILURES - 1})")
            return None
        self._failures = 0
        return found


class Entries(NamedTuple):
    """What a folder holds, hidden names and markers among them."""

    folders: pa.LargeStringArray
    """Names, ascending."""
    files: pa.LargeStringArray
    """Names, ascending."""
    sizes: npt.NDArray[np.int64]
    """[files] bytes; 0 where the store does not say it."""
    others: Sequence[str] = ()
    """Names of what is neither, in any order: links that lead nowhere, pipes."""

    @classmethod
    def of(
        cls,
        folders: Sequence[str],
        files: Sequence[str],
        sizes: Sequence[int],
        others: Sequence[str] = (),
    ) -> Entries:
        """From names in any order; `sizes`: [files] bytes."""
        names, order = _ascending(files)
        counts = np.array(sizes, np.int64)
        counts = counts if order is None else counts[order]
        return cls(_ascending(folders)[0], names, counts, others)


class FolderStore(Protocol):
    """What has folders. Safe to ask from several threads."""

    def entries(self, folder: str) -> Entries | None:
        """What a folder holds; None: there is no such folder.

        Raises:
          DataError: it cannot be listed.
        """


def listed(filesystem: fs.FileSystem, folder: str) -> Entries | None:
    """What a folder of a pyarrow file system holds; None: there is no such folder.

    Raises:
      ListingError: it cannot be listed.
    """
    base = folder or "."
    try:
        infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True))
        if not infos and filesystem.get_file_info(base).type != fs.FileType.Directory:
            return None
        names = [info.base_name for info in infos]
    except (OSError, pa.ArrowException) as error:
        raise ListingError(f"{base}: cannot be listed: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{base}: cannot be listed: a name in it is not UTF-8 ({error.object!r}); rename it"
        ) from None
    sizes = [info.size for info in infos]
    # Arrow's own file systems give a size to files alone; to ask for a type takes 15 times as long.
    is_certain = not isinstance(filesystem, fs.PyFileSystem)
    kinds = {
        number: infos[number].type
        for number, size in enumerate(sizes)
        if size is None or not is_certain
    }
    folders = [names[number] for number, kind in kinds.items() if kind == fs.FileType.Directory]
    no_files = {number for number, kind in kinds.items() if kind != fs.FileType.File}
    others = [names[n] for n in no_files if kinds[n] != fs.FileType.Directory]
    if isinstance(filesystem, fs.LocalFileSystem):
        others += _broken_links(base, names)
    if kinds:
        files = [number for number in range(len(names)) if number not in no_files]
        names, sizes = [names[n] for n in files], [sizes[n] or 0 for n in files]
    return Entries.of(folders, names, sizes, others)


def _broken_links(folder: str, names: Sequence[str]) -> list[str]:
    """Links of a folder that lead nowhere, which Arrow passes over, beside those it has named."""
    with suppress(FileNotFoundError):  # removed meanwhile
        every = os.listdir(folder)
        if len(every) > len(names):
            paths = ((name, os.path.join(folder, name)) for name in set(every).difference(names))
            found = [name for name, at in paths if os.path.islink(at) and not os.path.exists(at)]
            return [os.fsencode(name).decode(errors="replace") for name in found]
    return []


class Folders:
    """The folders of a file system, each listed once while it is kept. Safe to share by threads."""

    def __init__(self, filesystem: fs.FileSystem | Callable[[str], Entries | None]) -> None:
        """`filesystem`: of pyarrow, or what lists a folder of another; see `listed`."""
        self._list = (
            partial(listed, filesystem) if isinstance(filesystem, fs.FileSystem) else filesystem
        )
        self._asked: dict[str, Future[Entries | None]] = {}
        """Folders that are being listed."""
        self._kept: OrderedDict[str, Entries | None] = OrderedDict()
        """Those that were, the one asked for longest ago first."""
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self.listings = 0
        """Folders that were listed so far, one as often as it was."""

    def entries(self, folder: str) -> Entries | None:
        """See `FolderStore`."""
        with self._lock:
            if folder in self._kept:
                self._kept.move_to_end(folder)
                return self._kept[folder]
            future = self._asked.get(folder)
            is_first = future is None
            if future is None:
                future = self._asked[folder] = Future()
                self.listings += 1
        if is_first:
            try:
                future.set_result(self._list(folder))
            # Those who wait for the same folder fail with it, whatever it is; who asks later
            # lists it again.
            except BaseException as error:
                future.set_exception(error)
                raise
            finally:
                self._keep(folder, future)
        return future.result()

    def _keep(self, folder: str, future: Future[Entries | None]) -> None:
        """Drops what was asked for longest ago, until the rest may stay beside this one."""
        with self._lock:
            del self._asked[folder]
            if future.exception() is not None:
                return
            self._kept[folder] = future.result()
            self._kept_bytes += _bytes_of(folder, future.result())
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= _bytes_of(*self._kept.popitem(last=False))


def _bytes_of(folder: str, entries: Entries | None) -> int:
    """That a kept folder takes, about."""
    known = 0 if entries is None else sum(part.nbytes for part in entries[:3])
    return known + len(folder) + 1000  # Python's objects


def _ascending(
    names: Sequence[str],
) -> tuple[pa.LargeStringArray, npt.NDArray[np.int64] | None]:
    """Names in order, and their places before; None: they were in order."""
    found = pa.array(names, pa.large_string())
    if len(found) < 2 or pc.all(pc.less_equal(found[:-1], found[1:])).as_py():
        return found, None
    order = pc.sort_indices(found)
    return found.take(order), order.to_numpy()
