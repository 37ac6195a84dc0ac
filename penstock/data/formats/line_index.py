"""Line numbers of byte offsets in large files, counted only when a message needs them."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from penstock import _core
from penstock.errors import DataError

_READ_BYTES = 1 << 20


class LineIndex:
    """Remembers the line numbers asked for, so that a file is counted at most once. Thread-safe."""

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
