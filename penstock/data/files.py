"""Finds the files that a path, directory or glob names, on any pyarrow file system."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from penstock.errors import DataError

GLOB = re.compile(r"[*?\[]")
"""Finds where a path begins to be a glob."""
_VARIES = re.compile(r"[*?\[{]")
"""Finds where a path begins to be a glob, or has a field."""


def list_files(
    paths: str | Sequence[str],
) -> tuple[fs.FileSystem, list[str]]:
    """Lists the files in the order of reading.

    Args:
      paths: files, directories (read recursively, without names that begin with `.` or `_`) or
        globs (`*` and `?` within a directory, `**` across), or URIs of these, all of one file
        system.

    Returns:
      The file system and the paths within it. Several paths keep their order; the files of a
      directory or glob are in order of name.

    Raises:
      DataError: a path does not exist or cannot be listed, or nothing matches it; a file is empty
        or named twice.
    """
    given = [paths] if isinstance(paths, str) else list(paths)
    if not given:
        raise DataError("data.source.path names no file; give a file, directory or glob")
    filesystem: fs.FileSystem | None = None
    found: list[str] = []
    for path in given:
        this, inner = resolve_path(path)
        if filesystem is not None and not this.equals(filesystem):
            raise DataError(f"{path}: on another file system than {given[0]}; read one at a time")
        filesystem = this
        try:
            found += _expand(filesystem, inner, path)
        except OSError as error:
            raise DataError(f"{path}: cannot be listed: {error}") from None
    assert filesystem is not None
    twice = next((path for path, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{twice}: named twice; its rows would be read twice")
    seen: dict[object, str] = {}
    for path in found:
        first = seen.setdefault(file_key(filesystem, path), path)
        if first is not path:
            raise DataError(f"{path}: the same file as {first}; its rows would be read twice")
    return filesystem, found


def common_file(
    given: str | Sequence[str],
    paths: Sequence[str],
    others_given: str | Sequence[str],
    others: Sequence[str],
) -> tuple[str, str] | None:
    """A file that two lists share, under whatever names; None: none.

    Args:
      given: what `list_files` was given for `paths`.
      paths: the first list.
      others_given: what it was given for `others`.
      others: the second list.

    Returns:
      Its names in both lists.
    """
    first, second = (
        resolve_path(one if isinstance(one, str) else one[0])[0] for one in (given, others_given)
    )
    if not first.equals(second):
        return None
    names = {file_key(first, path): path for path in paths}
    for path in others:
        name = names.get(file_key(first, path))
        if name is not None:
            return name, path
    return None


def file_key(filesystem: fs.FileSystem, path: str) -> object:
    """Equal for two names of one file; links are found on this machine alone."""
    if not isinstance(filesystem, fs.LocalFileSystem):
        return path
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return found.st_dev, found.st_ino


def resolve_path(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path, glob or URI, and the path within it.

    Raises:
      DataError: a URI of an unknown file system, or one that cannot be reached.
    """
    if "://" not in path:
        return fs.LocalFileSystem(), path
    try:
        stem = _stem(path)
        filesystem, inner = fs.FileSystem.from_uri(stem)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be opened: {error}") from None
    return filesystem, inner + path[len(stem) :]


def _stem(uri: str) -> str:
    """The part before a glob, which would be no valid URI.

    Raises:
      ValueError: there is no folder in it.
    """
    glob = _VARIES.search(uri)
    return uri[: uri.rindex("/", 0, glob.start())] if glob else uri


def paths_like(given: str, inner: str, paths: Sequence[str]) -> list[str]:
    """Paths within a file system as `list_files` takes them.

    Args:
      given: a path, glob or URI of that file system.
      inner: what `resolve_path` made of it.
      paths: of files.
    """
    if "://" not in given or given.startswith("file:"):
        return list(paths)
    stem = _stem(given)
    begin = inner.removesuffix(given[len(stem) :])
    # A URI is percent-encoded, the paths within a file system are not.
    at = next(at for at in range(len(stem) + 1) if unquote(stem[at:]) == begin)
    return [stem[:at] + quote(path) for path in paths]


def _expand(filesystem: fs.FileSystem, path: str, given: str) -> list[str]:
    info = filesystem.get_file_info(path)
    glob = GLOB.search(path)
    if info.type == fs.FileType.File:
        files = [(path, info.size)]
    elif info.type == fs.FileType.Directory:
        files = sorted(_files_below(filesystem, path))
        if not files:
            raise DataError(f"{given}: the directory holds no file")
    elif glob is not None:
        root = path[: path.rfind("/", 0, glob.start()) + 1]
        base = root.rstrip("/") or ("/" if root else ".")
        if filesystem.get_file_info(base).type != fs.FileType.Directory:
            where = _of_home(given) or _begins_at(filesystem, base)
            raise DataError(f"{given}: no such directory: {base}{where}")
        found = _files_below(filesystem, base, deep="/" in path[len(root) :] or "**" in path)
        pattern = glob_pattern(path)
        files = sorted(file for file in found if pattern.fullmatch(file[0]))
        if not files:
            folder = _matching_folder(filesystem, base, path)
            raise DataError(f"{given}: no file matches{folder or _begins_at(filesystem, path)}")
    else:
        where = _of_home(given) or _begins_at(filesystem, path)
        raise DataError(f"{given}: no such file or directory{where}")
    for file, size in files:
        if size == 0:
            raise DataError(f"{file}: empty file (0 bytes); remove it or name the others")
    return [file for file, _ in files]


def _of_home(path: str) -> str:
    return "; a ~ is not expanded here: write the whole path" if path.startswith("~") else ""


def where_from(given: str, filesystem: fs.FileSystem) -> str:
    """What an error adds about a path of which nothing was found: where it begins."""
    return _of_home(given) or _begins_at(filesystem, given)


def _begins_at(filesystem: fs.FileSystem, path: str) -> str:
    """What an error adds about a relative path: where it begins."""
    if not isinstance(filesystem, fs.LocalFileSystem) or Path(path).is_absolute():
        return ""
    return f"; a relative path begins in the working directory, {Path.cwd()}"


def _files_below(
    filesystem: fs.FileSystem, base: str, deep: bool = True
) -> Iterator[tuple[str, int]]:
    """(path, bytes) of the files that are not hidden."""
    prefix = base.rstrip("/") + "/"
    for info in filesystem.get_file_info(fs.FileSelector(base, recursive=deep)):
        inner = info.path.removeprefix(prefix)
        if info.type == fs.FileType.File and not is_hidden(inner):
            # A glob relative to the working directory finds paths like it.
            yield (inner if base == "." else info.path), info.size


def _matching_folder(filesystem: fs.FileSystem, base: str, path: str) -> str:
    """What an error adds where a glob that matches no file matches a folder."""
    pattern = glob_pattern(path)
    for info in filesystem.get_file_info(fs.FileSelector(base, recursive="**" in path)):
        name = info.path.removeprefix("./")
        if info.type == fs.FileType.Directory and pattern.fullmatch(name):
            return f", but the folder {name} does; write {path}/* to read the files of such folders"
    return ""


def is_hidden(path: str) -> bool:
    """Whether directories and globs pass over a file of this path below them.

    Names that begin with a dot or underscore, and an editor's backups (`part-0.csv~`), which would
    give the rows of a file twice.
    """
    return any(part.startswith((".", "_")) or part.endswith("~") for part in path.split("/"))


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Translates a path glob: `*` and `?` stay within a directory, `**` crosses directories."""
    out = []
    rest = glob
    while rest:
        if rest.startswith("**/"):
            out.append("(?:.*/)?")
            rest = rest[3:]
        elif rest.startswith("**"):
            out.append(".*")
            rest = rest[2:]
        elif rest[0] in "*?":
            out.append("[^/]*" if rest[0] == "*" else "[^/]")
            rest = rest[1:]
        elif rest[0] == "[" and "]" in rest[2:]:
            end = rest.index("]", 2)
            # `[` begins a named class in RE2; two of the others may come to be operators in Python.
            inside = re.sub(r"[\\\[&~|]|-(?=-)", r"\\\g<0>", rest[1:end])
            out.append(f"[{'^' + inside[1:] if inside[0] == '!' else inside}]")
            rest = rest[end + 1 :]
        else:
            out.append(re.escape(rest[0]))
            rest = rest[1:]
    return re.compile("".join(out))
