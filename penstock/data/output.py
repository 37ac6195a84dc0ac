"""Files that are written: never over what is read, over an older one only when told, and whole.

A file is written beside its name and renamed when it is complete: whatever interrupts the writer
leaves the older file, or none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyarrow import fs

from penstock.data.files import GLOB, glob_pattern, is_hidden, resolve_path
from penstock.errors import ConfigError
from penstock.locking import FileLock, Held

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@contextmanager
def whole_file(out: Path, *, reads: Sequence[str] = (), overwrite: bool) -> Iterator[Path]:
    """Yields where to write a file that bears its name at the end of the block, if that is reached.

    What can be known before any work is checked before the block: that the name is free, is not
    read, and can be written.

    Args:
      out: the file; its folder is made.
      reads: files, directories, globs or URIs that are read meanwhile, or must stay.
      overwrite: whether `out` may exist.

    Raises:
      ConfigError: `out` is among `reads`, exists, is a folder, device or URI, is being written
        by another process, or cannot be written. Also where the block raises OSError.
    """
    target = free_path(out, reads=reads, overwrite=overwrite)
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(part, signed=False)
        try:
            yield part
            part.replace(target)
        finally:
            lock.release()
    except Held:
        raise ConfigError(
            f"{out}: another process is writing it; wait for it or name another file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {_reason(error)}") from None


def free_path(out: Path, *, reads: Sequence[str] = (), overwrite: bool) -> Path:
    """The file that `out` is, its folder without symbolic links.

    Where `out` itself is a link, writing replaces the link, not the file that it leads to.

    Raises:
      ConfigError: as `whole_file`, where that does not need to write.
    """
    refuse_uri(out)
    refuse_read([out], reads)
    if os.path.isdir(out):
        raise ConfigError(f"{out}: is a folder; name a file")
    if os.path.exists(out) and not os.path.isfile(out):
        # A device or pipe would be replaced by a file: /dev/null, for every program there is.
        raise ConfigError(f"{out}: is a device, pipe or socket, not a file; name a file")
    if os.path.lexists(out) and not overwrite:
        raise ConfigError(f"{out}: exists already; name another file, or overwrite it with --force")
    return _without_links(out)


def refuse_read(outs: Iterable[Path], reads: Sequence[str]) -> None:
    """Raises ConfigError where one of `outs` is, or would be, read as one of `reads`."""
    for out in outs:
        target = _without_links(out)
        try:
            there = out.stat()
        except OSError:
            there = None  # nothing that could be lost, or that could be opened for writing
        for path in reads:
            if _reads(path, target, there):
                raise ConfigError(
                    f"{out}: is, or would be, among the files that are read ({path}); name another"
                )


def refuse_uri(out: Path) -> None:
    """Raises ConfigError where an output is no local path: `Path` makes `s3:/a` of `s3://a`."""
    if _URI.match(str(out)):
        raise ConfigError(f"{out}: outputs are written to local files; give a path")


def _without_links(out: Path) -> Path:
    return Path(os.path.realpath(out.parent)) / out.name


def _reads(path: str, target: Path, there: os.stat_result | None) -> bool:
    """Whether reading `path` reads the file `target`, now or once it is there."""
    filesystem, inner = resolve_path(path)
    if not isinstance(filesystem, fs.LocalFileSystem):
        return False
    glob = GLOB.search(inner)
    if os.path.isdir(inner):
        root, pattern = inner, None
    elif os.path.exists(inner) or glob is None:
        return _is_same(inner, target, there)
    else:
        cut = inner.rfind("/", 0, glob.start()) + 1
        root, pattern = inner[:cut] or ".", glob_pattern(inner[cut:])
    root = os.path.realpath(root)
    if target.is_relative_to(root):
        below = str(target.relative_to(root))
        if not is_hidden(below) and (pattern is None or pattern.fullmatch(below)):
            return True
    # By another name, or through a link, it may be among the files all the same.
    return there is not None and any(
        _is_same(os.path.join(folder, name), target, there)
        for folder, _, names in os.walk(root)
        for name in names
        if pattern is None or pattern.fullmatch(os.path.relpath(os.path.join(folder, name), root))
    )


def _is_same(path: str, target: Path, there: os.stat_result | None) -> bool:
    if os.path.realpath(path) == str(target):
        return True
    try:
        return there is not None and os.path.samestat(os.stat(path), there)
    except OSError:
        return False


def _reason(error: OSError) -> str:
    named = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{named}"
