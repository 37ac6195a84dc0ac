"""What the texts of a column may be read as: integers, numbers, times, hexadecimal digits."""

from __future__ import annotations

from collections import Counter
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

TextKind: TypeAlias = Literal["integer", "float", "time", "text"]

NULL_TEXTS = ("\\N", "NULL", "null", "NA", "N/A", "NaN", "nan", "None")
"""Texts that stand for a missing number, where all else in the column is numbers."""

_TIMES = (pa.timestamp("ms", tz="UTC"), pa.timestamp("ms"))


class TextKinds:
    """The narrowest reading that every text of a column so far allows."""

    def __init__(self) -> None:
        self.kind: TextKind | None = None
        """None: no text has come, besides those that may stand for null."""
        self.null_texts: Counter[str] = Counter()
        """Those of `NULL_TEXTS` that came."""
        self._hex_widths: tuple[int, int] | None = (17, 0)
        """Shortest and longest; None: some text is not 1 to 16 hexadecimal digits."""
        self._has_digit = self._has_letter = False
        self._zone: pa.DataType | None = None

    @property
    def hex_digits(self) -> int | None:
        """Digits of each text, if all are hexadecimal numbers of one width, at least 4."""
        if self._hex_widths is None or not (self._has_digit and self._has_letter):
            return None
        low, high = self._hex_widths
        return low if low == high and low >= 4 else None

    def read(self, texts: pa.Array) -> NDArray[np.float64] | None:
        """Takes more texts (no null among them).

        Returns:
          Their numbers, of times in ms since 1970 UTC, without those that stand for null; None:
          they are neither numbers nor times, or not what texts before were.
        """
        is_null_text = pc.is_in(texts, pa.array(NULL_TEXTS, texts.type))
        if pc.any(is_null_text).as_py():
            found = pc.value_counts(texts.filter(is_null_text)).to_pylist()
            self.null_texts.update({one["values"]: one["counts"] for one in found})
            texts = texts.filter(pc.invert(is_null_text))
        if not len(texts):
            return np.empty(0)
        self._look_for_hex(texts)
        return self._numbers(texts)

    def _numbers(self, texts: pa.Array) -> NDArray[np.float64] | None:
        if self.kind in {None, "integer"} and _are_integers(texts):
            self.kind = "integer"
            return _as_float(texts.cast(pa.int64()))
        if self.kind in {None, "integer", "float"} and not _has_leading_zero(texts):
            try:
                numbers = _as_float(texts.cast(pa.float64()))
            except pa.ArrowInvalid:
                pass
            else:
                self.kind = "float"
                return numbers
        if self.kind in {None, "time"}:
            times = self._times(texts)
            if times is not None:
                self.kind = "time"
                return times
        self.kind = "text"
        return None

    def _times(self, texts: pa.Array) -> NDArray[np.float64] | None:
        for kind in _TIMES if self._zone is None else (self._zone,):
            try:
                times = texts.cast(kind)
            except pa.ArrowInvalid:
                continue
            self._zone = kind
            return _as_float(times.cast(pa.int64()))
        return None

    def _look_for_hex(self, texts: pa.Array) -> None:
        if self._hex_widths is None:
            return
        if not pc.all(pc.match_substring_regex(texts, "^[0-9a-fA-F]{1,16}$")).as_py():
            self._hex_widths = None
            return
        widths = pc.min_max(pc.binary_length(texts)).as_py()
        low, high = self._hex_widths
        self._hex_widths = min(low, widths["min"]), max(high, widths["max"])
        if not (self._has_digit and self._has_letter):
            self._has_digit |= pc.any(pc.match_substring_regex(texts, "[0-9]")).as_py()
            self._has_letter |= pc.any(pc.match_substring_regex(texts, "[a-fA-F]")).as_py()


def _are_integers(texts: pa.Array) -> bool:
    if _has_leading_zero(texts):
        return False
    try:
        texts.cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def _has_leading_zero(texts: pa.Array) -> bool:
    """Whether reading a number would lose something: 007 and 7 are different texts."""
    return bool(pc.any(pc.match_substring_regex(texts, r"^[-+]?0\d")).as_py())


def _as_float(array: pa.Array) -> NDArray[np.float64]:
    # Rounds large integers: good enough for statistics.
    numbers: NDArray[np.float64] = array.cast(pa.float64(), safe=False).to_numpy(
        zero_copy_only=False
    )
    return numbers
