"""What a job will read, window by window, before any row is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from penstock.data.source import Extent, Source
from penstock.data.windows.files import Files
from penstock.data.windows.served import Streams


class PlannedFiles(NamedTuple):
    """The files of one source in one window; of a source without windows, all."""

    stream: str
    """Empty: of no stream."""
    window: str
    """When it is, for people; empty: any time."""
    source: str
    """Empty: the window has no file."""
    files: int
    bytes: int
    extents: int
    rows: int | None
    """None: they are known only when the files are read (text)."""


def planned(source: Source, advance: Callable[[int, float], None]) -> Iterator[PlannedFiles]:
    """What is read, in the order of reading.

    Args:
      source: an open one.
      advance: told how many rows are known so far, and the share of the files that was looked at.

    Raises:
      DataError: a file is not what its source says.

    Effects: reads what files say of themselves.
    """
    known = _Known(source, advance)
    if not isinstance(source, Streams):
        sizes = [max(source.identify(path).size, 0) for path in source.paths]
        of_files = known.of(source.paths)
        yield PlannedFiles("", "", "all", len(source.paths), sum(sizes), *of_files)
        return
    for found in source.windows:
        stream, words = found.stream.name, found.window.words(found.stream.time_zone)
        if not found.sources:
            yield PlannedFiles(stream, words, "", 0, 0, 0, 0)
        for part in found.sources:
            paths = part.files.paths
            yield PlannedFiles(
                stream,
                words,
                part.source.name,
                len(paths),
                _bytes_of(source, part.files),
                *known.of(paths),
            )


def _bytes_of(source: Streams, files: Files) -> int:
    if source.span is None:
        return int(files.sizes.sum())
    return sum(max(source.identify(path).size, 0) for path in files)  # listed without sizes


class _Known:
    """Extents and rows by file."""

    def __init__(self, source: Source, advance: Callable[[int, float], None]) -> None:
        by_file: dict[str, list[Extent]] = defaultdict(list)
        numbers = {path: number for number, path in enumerate(source.paths, 1)}
        rows = 0
        for extent in source.extents():
            by_file[extent.path].append(extent)
            rows += source.known_rows(extent) or 0
            advance(rows, numbers[extent.path] / len(numbers))
        self._source, self._extents = source, by_file

    def of(self, paths: Sequence[str]) -> tuple[int, int | None]:
        """Extents and rows of some files."""
        extents = [extent for path in paths for extent in self._extents[path]]
        rows = [self._source.known_rows(extent) for extent in extents]
        return len(extents), None if None in rows else sum(one for one in rows if one is not None)
