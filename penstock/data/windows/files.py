"""Files of one source as Arrow and NumPy arrays; a path is made when somebody asks for it."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Numbers: TypeAlias = npt.NDArray[np.int64]
Rows: TypeAlias = Numbers | slice
"""Places in an array, ascending; a slice shares it."""


def texts(names: pa.LargeStringArray) -> tuple[Numbers, npt.NDArray[np.uint8]]:
    """Where each name begins and the last one ends, [names + 1], and the bytes; of one or more."""
    _, ends, text = names.buffers()
    at = np.frombuffer(ends, np.int64)[names.offset :][: len(names) + 1]
    return at, np.frombuffer(text, np.uint8)


def taken(names: pa.LargeStringArray, rows: Rows) -> pa.LargeStringArray:
    """The names of some rows."""
    return names[rows] if isinstance(rows, slice) else names.take(pa.array(rows))


class InFolder(NamedTuple):
    """One or more files of one folder."""

    folder: str
    names: pa.LargeStringArray
    """Ascending."""
    sizes: Numbers
    """[files] bytes."""

    @classmethod
    def of(cls, folder: str, names: pa.LargeStringArray, sizes: Numbers, rows: Rows) -> InFolder:
        """Some of its files."""
        return cls(folder, taken(names, rows), sizes[rows])

    def digest(self, before: int) -> int:
        """Of its path, names and sizes, and of what came before; 0: nothing did."""
        at, text = texts(self.names)
        digest = zlib.crc32(self.folder.encode(), before)
        digest = zlib.crc32(text[at[0] : at[-1]].data, digest)
        # Lengths, too, lest `a`, `bc` be the same as `ab`, `c`.
        return zlib.crc32((self.sizes + (np.diff(at) << 48)).data, digest)


class Files(Sequence[str]):
    """The paths of some files of one source; slices of them share their arrays."""

    def __init__(self, parts: Sequence[InFolder]) -> None:
        """`parts`: in the order of their files."""
        self.parts = parts
        self._ends = list(accumulate(len(part.names) for part in parts))

    @classmethod
    def joined(cls, files: Sequence[Files]) -> Files:
        """All of them, one behind the other."""
        return files[0] if len(files) == 1 else cls([part for one in files for part in one.parts])

    @property
    def paths(self) -> Sequence[str]:
        """In the order of reading."""
        return self

    @cached_property
    def sizes(self) -> Numbers:
        """[files] bytes."""
        return np.concatenate([part.sizes for part in self.parts] or [np.zeros(0, np.int64)])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[str]:
        for folder, names, _ in self.parts:
            prefix = folder + "/" if folder else ""
            for name in names.to_pylist():
                yield prefix + name

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Files: ...
    def __getitem__(self, place: int | slice) -> str | Files:
        if isinstance(place, int):
            number = range(len(self))[place]
            return next(iter(self[number : number + 1]))
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise ValueError(f"files are cut by steps of 1, not of {step}")
        cut = []
        # From the part that `start` lies in.
        for n in range(bisect_right(self._ends, start), len(self.parts)):
            folder, names, sizes = self.parts[n]
            before = self._ends[n] - len(names)
            if before >= stop:
                break
            low, high = max(start - before, 0), min(stop - before, len(names))
            cut.append(InFolder(folder, names[low:high], sizes[low:high]))
        return Files(cut)

    def digest(self) -> int:
        """Of their paths and sizes, in 32 bits."""
        digest = 0
        for part in self.parts:
            digest = part.digest(digest)
        return digest


def files_at(paths: Sequence[str]) -> Files:
    """Files whose sizes nobody knows, 0 bytes each."""
    names = pa.array(paths, pa.large_string())
    return Files([InFolder("", names, np.zeros(len(paths), np.int64))] if paths else [])
