"""Whether files are those that a position was taken on: what changed is refused by name.

A file is known by its size and a digest of the blocks at its front and at its end, so that no file
is read as a whole and copies are the same file. Where the format permits it, rows may have been
added at the end of a file that still was to be read from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import basename, commonpath, dirname, relpath
from typing import Protocol

import pyarrow as pa
from pyarrow import fs

from penstock.errors import DataError
from penstock.position import FileTag, Position

# FORMAT: checkpoints hold digests; never change.
_BLOCK_BYTES = 16_384
_DIGEST_BYTES = 16
_GZIP = b"\x1f\x8b"
_THREADS = 16
"""A remote store takes as long for many files at a time as for one."""
_REMEDY = "put it back as it was, or train in a new run folder"


class Identified(Protocol):
    """What is asked of a `Source`. Safe to ask from several threads."""

    def identify(self, path: str, until: int = 0) -> FileTag:
        """See `Source`."""

    def holds(self, path: str, before: FileTag) -> bool:
        """See `Source`."""

    def may_grow(self, path: str) -> bool:
        """See `Source`."""

    def window(self, path: str) -> int:
        """See `Source`."""


class WholeTags:
    """Identities of the files of a source as they are when first asked for."""

    def __init__(self, source: Identified) -> None:
        self.source = source
        self._found: dict[str, FileTag] = {}

    def of(self, path: str) -> FileTag:
        """The identity of a file. Safe to ask from several threads."""
        if path not in self._found:
            self._found[path] = self.source.identify(path)
        return self._found[path]

    def of_all(self, paths: Sequence[str]) -> list[FileTag]:
        """The identities of several files, found side by side."""
        with ThreadPoolExecutor(min(_THREADS, len(paths) or 1)) as threads:
            return list(threads.map(self.of, paths))


def tag_of(filesystem: fs.FileSystem, path: str, size: int | None = None) -> FileTag:
    """The identity of a file, or of its first `size` bytes.

    Raises:
      DataError: the file cannot be read.
    """
    try:
        with filesystem.open_input_file(path) as file:
            whole: int = file.size()
            size = whole if size is None else min(size, whole)
            content = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=_DIGEST_BYTES)
            front: bytes = file.read_at(min(size, _BLOCK_BYTES), 0)
            if front.startswith(_GZIP):
                # When it was compressed says nothing of what is in it.
                front = front[:4] + bytes(4) + front[8:]
            content.update(front)
            if size > _BLOCK_BYTES:
                content.update(file.read_at(_BLOCK_BYTES, size - _BLOCK_BYTES))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return FileTag(path, size, content.hexdigest())


def check_files(source: Identified, paths: Sequence[str], before: Position) -> None:
    """Compares the files of a part with those that a position was taken on.

    Files that were read from must be the first ones, in the same order, with the same content;
    those still to be read must be there in the same order, with any content; others may come
    anywhere behind the ones that were read from.

    Args:
      source: which identifies the files.
      paths: the part's files as they are now, in the order of reading.
      before: the position.

    Raises:
      DataError: names a file, what happened to it, and the remedy.
    """
    begun = [tag for tag in before.files if tag.is_begun]
    names = _Names(before.files)
    # Behind a lane's cursor, or where a fraction is held out, added rows would be left out.
    first = 0 if before.span is None else before.span.first_file
    passed = max(before.divided, *(lane.cursor.file - first for lane in before.lanes), 0)

    def is_same(number: int) -> bool:
        old, now = begun[number], source.identify(paths[number])
        has_grown = number >= passed and now.size > old.size
        return now.digest == old.digest or (has_grown and source.holds(paths[number], old))

    numbers = range(min(len(begun), len(paths)))
    with ThreadPoolExecutor(min(_THREADS, len(numbers) or 1)) as threads:
        for number, same in enumerate(threads.map(is_same, numbers)):
            if not same:
                raise DataError(_explain(names, begun[number], paths[number], paths, source))
    if len(paths) < len(begun):
        raise DataError(_removed(begun[len(paths)]))
    rest = iter(paths[len(begun) :])
    for old in before.files[len(begun) :]:
        if any(names.are_same(old.path, path) for path in rest):
            continue
        if any(names.are_same(old.path, path) for path in paths):
            raise DataError(
                f"{old.path}: stands elsewhere among the files than when the run began, which "
                "reads them in order; keep the order, and add files behind the others"
            )
        raise DataError(_removed(old))


def _removed(old: FileTag) -> str:
    what = "rows of it were trained on" if old.is_begun else "it was still to be read"
    return f"{old.path}: removed since the run began, and {what}; {_REMEDY}"


def _explain(
    names: _Names, old: FileTag, path: str, paths: Sequence[str], source: Identified
) -> str:
    """What happened to a file that was read from, where `path` is now."""
    if names.are_same(old.path, path):
        size = source.identify(path).size
        if size > old.size and source.holds(path, old):
            return (
                f"{path}: rows were added after the run had read it to its end; put them into "
                "a file that comes behind the others, and this one back as it was"
            )
        what = "the content is another"
        if size != old.size:
            what = f"{old.size:,} bytes then, {size:,} now"
        return f"{path}: changed after rows of it were trained on ({what}); {_REMEDY}"
    if not any(names.are_same(old.path, one) for one in paths):
        return _removed(old)
    if any(names.are_same(one.path, path) for one in names.files):
        return (
            f"{path}: now comes before {old.path}, which was read earlier; keep the order of "
            "the files that the run began with"
        )
    return (
        f"{path}: added before {old.path}, which was read already, so its rows would be left out "
        "and others read twice; give it a name or a place behind the files that the run began with"
    )


class _Names:
    """Tells files by name, also after they have moved to another folder together."""

    def __init__(self, files: Sequence[FileTag]) -> None:
        self.files = files
        folders = {dirname(tag.path) for tag in files}
        try:
            self._root = commonpath(folders) if folders else ""
        except ValueError:  # some are absolute, some are not
            self._root = ""

    def are_same(self, old: str, new: str) -> bool:
        """Whether a path of now names the file that `old` named."""
        if old == new:
            return True
        within = relpath(old, self._root) if self._root else basename(old)
        return new.endswith(f"/{within}") or new == within
