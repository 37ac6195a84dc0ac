"""The contract of every source: columns, extents that read alone, chunks of rows.

An `Extent` is the unit of reading and of position in a checkpoint, a `Chunk` is what is decoded at
once. Sources know files and rows; they know nothing of features, batches or epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from penstock.data.quarantine import MalformedRow
from penstock.position import FileTag

CHUNK_ROWS = 65_536
"""Most rows that are decoded at once where the format lets us choose."""
_CHUNK_VALUES = 2**22
"""Values, of all columns, that are decoded at once: 32 MiB if they have 8 bytes."""


class Vector(NamedTuple):
    """The type of a column whose rows are lists of as many numbers."""

    width: int


TextType: TypeAlias = Literal["int64", "float64"] | Vector
"""What a column of text or JSON lines is read as."""


def chunk_rows(num_columns: int, most: int) -> int:
    """Rows to decode at once: `most`, or fewer of wide rows, to bound the memory of a reader."""
    return min(most, -(-_CHUNK_VALUES // max(1, num_columns)))


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of one file that reads alone: [start, stop) in the unit of its source."""

    path: str
    """As the user wrote it or as the glob found it."""
    start: int
    stop: int


class Span(NamedTuple):
    """A stretch of one file, for messages."""

    path: str
    unit: str
    """`rows`, `bytes` or `lines`."""
    start: int
    stop: int
    """Exclusive."""

    def __str__(self) -> str:
        return f"{self.path} {self.unit} {self.start}-{self.stop - 1}"


class Place(Protocol):
    """Says where the rows of a chunk come from."""

    def locate(self, row: int) -> str:
        """Names one row of the chunk exactly; may read the file again, so only for errors."""

    def line(self, row: int) -> int:
        """Line at which a row of the chunk begins, or its number, in the file from 1; as slow."""

    def span(self, start: int, stop: int) -> Span:
        """Names the rows [start, stop) of the chunk without reading anything."""


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Rows numbered from 0 within their file."""

    path: str
    first: int

    def locate(self, row: int) -> str:
        """Names one row of the chunk."""
        return f"{self.path} row {self.first + row}"

    def line(self, row: int) -> int:
        """Number of one row in the file, from 1."""
        return self.first + row + 1

    def span(self, start: int, stop: int) -> Span:
        """Names the rows [start, stop) of the chunk."""
        return Span(self.path, "rows", self.first + start, self.first + stop)


@dataclass(frozen=True, slots=True)
class KeptPlace:
    """Some rows of another place, after a filter."""

    place: Place
    kept: NDArray[np.int64]

    def locate(self, row: int) -> str:
        """Names one row of the chunk."""
        return self.place.locate(int(self.kept[row]))

    def line(self, row: int) -> int:
        """Line or number of one row."""
        return self.place.line(int(self.kept[row]))

    def span(self, start: int, stop: int) -> Span:
        """Names the stretch that holds the rows [start, stop) of the chunk."""
        return self.place.span(int(self.kept[start]), int(self.kept[stop - 1]) + 1)


class Chunk(NamedTuple):
    """The good rows of a stretch of one extent, in order."""

    table: pa.Table
    place: Place
    stretch: int | None = None
    """Rows that were read, those left out among them; None: those of the table."""
    kept: NDArray[np.int64] | None = None
    """[rows of the table] their numbers within the stretch, ascending; None: none is left out."""
    malformed: Sequence[MalformedRow] = ()
    """By their number among the rows of the stretch."""
    malformed_lines: Sequence[int] = ()
    """Lines of the file, from 1, at which they begin."""
    until: int = 0
    """Bytes of the file up to the end of the stretch, if its source's files may grow."""

    @property
    def num_read(self) -> int:
        """Rows of the stretch."""
        rows: int = self.table.num_rows
        return rows if self.stretch is None else self.stretch


class RowCount(NamedTuple):
    """How many rows (or samples) there are."""

    rows: int
    is_exact: bool
    """False: by what was read so far."""


class Source(Protocol):
    """Rows in files (or made from numbers). Safe to read from several threads at once."""

    schema: pa.Schema
    """All columns. Text sources give the types that their columns are parsed to."""
    paths: Sequence[str]
    """The files, in the order of reading."""

    @property
    def num_groups(self) -> int | None:
        """Row groups, stripes or record batches of all files.

        None: the format has none, or they are not counted.
        """

    def extents(self) -> Sequence[Extent]:
        """All extents, in the order of reading; the same on every call."""

    def count_rows(self, extent: Extent) -> int:
        """Rows of the extent, malformed ones included. May read it."""

    def known_rows(self, extent: Extent) -> int | None:
        """Rows of the extent, as `count_rows`; None: it must be read for that."""

    def row_counts(self, extent: Extent) -> Iterator[int]:
        """Rows of successive stretches of the extent. May read them, one after the other."""

    def expected_rows(self, extents: Sequence[Extent]) -> RowCount | None:
        """Rows of extents, by what is known of them and of others. Reads nothing.

        None: nothing is known yet.
        """

    def cut(self, extent: Extent, row: int) -> tuple[Extent, Extent]:
        """Cuts an extent before its row `row`, where 0 < row < its rows."""

    def read(self, extent: Extent, columns: Sequence[str]) -> Iterator[Chunk]:
        """Reads the rows of an extent in order, with the `columns` in the order given.

        Raises:
          DataError: the file cannot be read, or holds what it should not.
        """

    def may_hold(self, extent: Extent, column: str, low: int | None, high: int | None) -> bool:
        """False only where the source knows that no time of `column` lies in [low, high) ms."""

    def identify(self, path: str, until: int = 0) -> FileTag:
        """The identity of one of its files, see `identity.py`.

        Where rows may follow: of its first `until` bytes, if that is not 0.
        """

    def holds(self, path: str, before: FileTag) -> bool:
        """Whether what `before` identifies is there as it was; where rows may follow, they may."""

    def window(self, path: str) -> int:
        """Number of the window of event time that a file is in, ascending in the order of reading.

        0 where nobody divided the files by time.
        """

    def may_grow(self, path: str) -> bool:
        """Whether rows added at the end of the file leave those before as they are."""
