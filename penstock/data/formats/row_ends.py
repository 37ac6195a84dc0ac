"""Where the rows of text end: at every line feed, or at those outside of quotes; and its lines."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from penstock import _core
from penstock.errors import DataError

BOM = b"\xef\xbb\xbf"
FIELD_START = 0
"""The state of quoting where a row begins."""
_READ_BYTES = 1 << 20

_States: TypeAlias = tuple[int, int, int, int]
"""The state after some bytes, from each of the four states."""


class Quoting(NamedTuple):
    """How values of delimited text are quoted. Bytes."""

    delimiter: int
    quote: int


class RowEnds:
    """Where rows end in text that begins with a row.

    Args:
      quoting: None: values are not quoted.
      line_breaks: line feeds in quotes end no row; else a line is a row.
    """

    def __init__(self, quoting: Quoting | None = None, *, line_breaks: bool = False) -> None:
        self.quoting = quoting if line_breaks else None
        """By which line feeds are told apart; None: all of them end rows."""
        self._quoting_of_lines = None if line_breaks else quoting

    def take(self, text: bytes) -> TextRows:
        """The whole rows with which the text begins."""
        if self.quoting is None:
            return TextRows(text[: text.rfind(b"\n") + 1])
        ends, odd, _ = _core.find_row_ends(view(text), *self.quoting, FIELD_START)
        return TextRows(text[: ends[-1]] if len(ends) else b"", ends, odd)

    def first_end(self, text: bytes, state: int) -> tuple[int, int]:
        """The place after the first row that ends in text that begins anywhere (0: none does).

        Args:
          text: what is looked at.
          state: that of quoting where the text begins.

        Returns:
          The place, and the state after the text.
        """
        if self.quoting is None:
            return text.find(b"\n") + 1, FIELD_START
        ends, _, state = _core.find_row_ends(view(text), *self.quoting, state)
        return int(ends[0]) if len(ends) else 0, state

    def open_quote(self, text: bytes) -> int | None:
        """Number of the first line in which a quoted value opens and does not close.

        Looked for where a line is a row.
        """
        quoting = self._quoting_of_lines
        if quoting is None or quoting.quote not in text:
            return None
        line = _core.find_open_quote(view(text), *quoting)
        return None if line < 0 else line


class TextRows:
    """Whole rows: each ends with a line feed.

    Args:
      text: the rows.
      ends: the places after them; None: a line is a row.
      odd: numbers of the rows in which a quote seems to be missing or stray.
    """

    def __init__(
        self,
        text: bytes,
        ends: NDArray[np.int64] | None = None,
        odd: Sequence[int] | NDArray[np.int64] = (),
    ) -> None:
        self.text = text
        self.odd = odd
        self.are_lines = ends is None
        self.count = len(ends) if ends is not None else _core.count_newlines(view(text))
        self._ends = ends

    @property
    def ends(self) -> NDArray[np.int64]:
        """[count] the places after the rows."""
        if self._ends is None:
            self._ends = np.flatnonzero(view(self.text) == 10) + 1
        return self._ends

    def split(self) -> list[bytes]:
        """The text of each row, without the line feed."""
        if self.are_lines:
            # splitlines() would also split at other bytes than line feeds.
            return self.text.split(b"\n")[:-1]
        return [self.text[i : j - 1] for i, j in pairwise([0, *self.ends.tolist()])]

    def has_blank(self) -> bool:
        """Whether a row is an empty line."""
        if self.are_lines:
            text = self.text
            return text.startswith((b"\n", b"\r\n")) or b"\n\n" in text or b"\n\r\n" in text
        starts = np.concatenate([[0], self.ends])[:-1]
        firsts = view(self.text)[starts]
        return bool(((firsts == 10) | ((firsts == 13) & (self.ends - starts == 2))).any())

    def range(self, start: int, stop: int) -> TextRows:
        """The rows [start, stop)."""
        if start == 0 and stop == self.count:
            return self
        begin = int(self.ends[start - 1]) if start else 0
        text = self.text[begin : int(self.ends[stop - 1])] if start < stop else b""
        if self.are_lines:
            return TextRows(text)
        odd = [row - start for row in self.odd if start <= row < stop]
        return TextRows(text, self.ends[start:stop] - begin, odd)

    def first_lines(self) -> NDArray[np.int64] | None:
        """[count] the line, from 0, with which each row begins; None: each row is a line."""
        if self.are_lines or _core.count_newlines(view(self.text)) == self.count:
            return None
        newlines = np.flatnonzero(view(self.text) == 10) + 1
        return np.concatenate([[0], np.searchsorted(newlines, self.ends[:-1]) + 1])


LINES = RowEnds()
"""Every line is a row."""


class QuoteStates:
    """The state of quoting at any byte of files, found from their fronts. Thread-safe.

    Blocks are looked at in parallel, each once, for what it does to any state.
    """

    def __init__(
        self, open_file: Callable[[str], pa.NativeFile], quoting: Quoting, block_bytes: int
    ) -> None:
        self._open = open_file
        self._quoting = quoting
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._known: dict[str, list[int]] = {}
        """By file, the state at the beginning of each block."""

    def at(self, path: str, byte: int) -> int:
        """The state before a byte of a file. Reads what of the file before it was not read yet."""
        block = byte // self._block_bytes
        with self._lock:
            states = self._known.setdefault(path, [FIELD_START])
            missing = range(len(states) - 1, block)
            for after in self._after_blocks(path, missing):
                states.append(after[states[-1]])
            state = states[block]
        return self._after(path, block * self._block_bytes, byte)[state]

    def _after_blocks(self, path: str, blocks: range) -> Sequence[_States]:
        size = self._block_bytes
        if len(blocks) < 2:
            return [self._after(path, block * size, (block + 1) * size) for block in blocks]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(
                pool.map(lambda block: self._after(path, block * size, (block + 1) * size), blocks)
            )

    def _after(self, path: str, start: int, stop: int) -> _States:
        """What the bytes [start, stop) make of each state."""
        states: _States = (0, 1, 2, 3)
        if start == stop:
            return states
        with self._open(path) as file:
            if start < len(BOM) and file.read_at(len(BOM), 0) == BOM:
                start = len(BOM)
            file.seek(start)
            while start < stop:
                piece = file.read(min(stop - start, _READ_BYTES))
                if not piece:
                    break  # The file became shorter; who reads the rows says so.
                start += len(piece)
                after = _core.quote_states_after(view(piece), *self._quoting)
                states = tuple(after[state] for state in states)  # type: ignore[assignment]
        return states


def view(data: bytes) -> NDArray[np.uint8]:
    """The bytes as an array."""
    return np.frombuffer(data, dtype=np.uint8)


class LineIndex:
    """Line numbers of byte offsets in large files, counted only when a message needs them.

    Remembers those asked for, so that a file is counted at most once. Thread-safe.
    """

    def __init__(self, open_file: Callable[[str], pa.NativeFile]) -> None:
        self._open = open_file
        self._known: dict[str, list[tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def number(self, path: str, start: int) -> int:
        """Number (from 1) of the line that begins at byte `start` of `path`."""
        with self._lock:
            known = self._known.setdefault(path, [(0, 1)])
            byte, line = known[bisect_right(known, (start, 2**63)) - 1]
            if byte == start:
                return line
            with self._open(path) as file:
                file.seek(byte)
                while byte < start:
                    piece = file.read(min(start - byte, _READ_BYTES))
                    if not piece:
                        raise DataError(f"{path}: became shorter while it was read")
                    byte += len(piece)
                    line += _core.count_newlines(np.frombuffer(piece, dtype=np.uint8))
            known.insert(bisect_right(known, (start, 2**63)), (start, line))
            return line
