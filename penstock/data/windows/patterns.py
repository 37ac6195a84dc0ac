"""Paths with date fields: which folders may hold files of some time, and when a file's rows were.

A pattern is taken apart into folder levels, and the names of a folder are matched all at once: by
their bytes where a level has fields and text at fixed places and perhaps one `*` behind them, else
by a regular expression. What is found so far on the way down is a `Key`: year, month, day, hour, as
far as they are known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date, datetime
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from penstock.config.streams import DATE_FIELDS, fields_of_path
from penstock.data.files import GLOB, glob_pattern
from penstock.data.windows.calendar import moment_ms
from penstock.data.windows.files import Numbers, Rows, texts
from penstock.errors import DataError

Key: TypeAlias = tuple[int, ...]
"""Year, month, day and hour, as many of them as are known, from the year on."""
Mask: TypeAlias = npt.NDArray[np.bool_]

_FIELD = re.compile(r"\{(YYYY|MM|DD|HH)\}")
_PARTS = re.compile(r"\{(?:YYYY|MM|DD|HH)\}|\*|\?|\[.[^]]*\]|[^*?{\[]+|.", re.DOTALL)
_LEAST = (1, 1, 0)
"""Month, day and hour with which a period begins."""
_RADIX = 100
"""Of a key as one number: more than a month, day or hour that two digits can say."""
_DIGIT = -1
_MAY_BE_DIGIT = re.compile(r"[0-9*?\[\]{}]")
"""What beside a field may be, or stand for, a digit."""


class Level(NamedTuple):
    """One name on the way down."""

    fields: tuple[str, ...]
    """That it has, in the order of its name; one may be there twice."""
    head: tuple[int, ...]
    """Bytes with which a name begins, -1 for any digit; of a level of text and fields first."""
    tail: bytes | None
    """Bytes with which it ends, anything being between; None: it is the head and no more."""
    pattern: str | None
    """Regular expression of RE2, a group a field; None: head and tail say it all."""
    loose: str | None = None
    """The same, where numbers may have one digit (`month=3`); None: none may."""


class Matches(NamedTuple):
    """The names of a folder that a level matches, by what is known of them."""

    keys: list[Key]
    """Ascending."""
    rows: list[Rows]
    """[keys] places of their names, ascending."""


class PathPattern:
    """A path with date fields and globs, level by level."""

    def __init__(self, path: str, where: str = "") -> None:
        """Takes a path apart.

        Args:
          path: within its file system.
          where: it begins, for messages; see `where_from`.

        Raises:
          DataError: a glob of it is none.
        """
        self.path, self.where = path, where
        self.passed_over: set[str] = set()
        """Paths that match and were found to be no files or folders."""
        self.fields = fields_of_path(path)
        names = path.split("/")
        varies = next(n for n, name in enumerate(names) if _FIELD.search(name) or GLOB.search(name))
        self.root = "/".join(names[:varies])
        """The folder that all files are below; empty: the working directory, or all there is."""
        try:
            self.levels = [_level(name) for name in names[varies:]]
            for level in self.levels:
                if level.pattern is not None:
                    pc.match_substring_regex(pa.array([], pa.large_string()), level.pattern)
        except (re.error, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: no glob: {error}; mend what stands in [ ]") from None

    def matches(
        self, level: int, names: pa.LargeStringArray, above: Key, folder: str | None = None
    ) -> Matches:
        """Those names of files or folders of a level that are not hidden and that it matches.

        Args:
          level: counted from 0 below the root.
          names: ascending.
          above: what is known of their folder.
          folder: its path; names that say another time than it, or two, are refused. None: they
            are no match.

        Raises:
          DataError: names of one path contradict each other.
        """
        of_level = self.levels[level]
        if not len(names):
            return Matches([], [])
        match = _in_bytes if of_level.pattern is None else _by_expression
        found, numbers = match(of_level, names)
        if of_level.loose is not None and not found.all():
            _add_loose(of_level.loose, names, found, numbers)
        found &= _seen(names)
        known: dict[str, int | Numbers] = dict(zip(DATE_FIELDS, above, strict=False))
        for field, values in zip(of_level.fields, numbers, strict=True):
            if field not in known:
                known[field] = values
                continue
            is_same = known[field] == values
            unlike = np.flatnonzero(found & ~is_same)
            if folder is not None and len(unlike):
                path = f"{folder}/{names[unlike[0]]}" if folder else names[unlike[0]]
                raise DataError(
                    f"{path}: its path says two times, by two numbers for {{{field}}}; move it, or "
                    "change the path of its source"
                )
            found &= is_same
        rows = slice(0, len(names)) if found.all() else np.flatnonzero(found)
        added = len(known) - len(above)
        if not added:
            return Matches([above], [rows]) if found.any() else Matches([], [])
        code: Any = 0
        for field in DATE_FIELDS[: len(known)]:
            code = code * _RADIX + known[field]
        return _by_key(code[rows], rows, len(known))

    def paths_of(self, key: Key) -> Sequence[str]:
        """The paths that a key may have, of a pattern without globs: with two digits, and one."""
        year, *others = key
        paths = []
        for form in ("02", ""):
            numbers = [f"{year:04}", *(format(one, form) for one in others)]
            values = dict(zip(DATE_FIELDS, numbers, strict=False))
            paths.append(self.path.format_map(values))
        return list(dict.fromkeys(paths))


def begin_of(key: Key, zone: ZoneInfo, path: str) -> int:
    """The moment with which a day or hour begins, in ms since 1970 UTC; see `moment_ms`.

    Raises:
      DataError: there is no such day or hour; names the path.
    """
    return moment_ms(_local(key, path), zone)


def naive_days(key: Key) -> tuple[int, int] | None:
    """Ordinals of the first and last day that a key, perhaps of a year alone, can lie in.

    None: it names no day that there is.
    """
    try:
        year, month, day = (*key, *_LEAST[len(key) - 1 :])[:3]
        first = date(year, month, day).toordinal()
    except ValueError:
        return None
    return first, first + (366, 31, 1, 1)[len(key) - 1] - 1


def _local(key: Key, path: str) -> datetime:
    try:
        year, month, day, hour = (*key, *_LEAST[len(key) - 1 :])
        return datetime(year, month, day, hour)
    except ValueError as error:
        raise DataError(
            f"{path}: its path names no day or hour that there is ({error}); rename it, or change "
            "the path of its source"
        ) from None


def _level(name: str) -> Level:
    fields: list[str] = []
    head: list[int] = []
    pattern: list[str] = []
    tail: bytes | None = None
    is_plain, is_strict, at = True, True, 0
    for part in _PARTS.findall(name):
        field = _FIELD.fullmatch(part)
        beside = name[:at][-1:] + name[at + len(part) :][:1]
        at += len(part)
        if field is not None:
            width = len(field[1])
            # `month=3`, where the number ends without doubt.
            may_be_one = width == 2 and _MAY_BE_DIGIT.search(beside) is None
            is_strict = is_strict and not may_be_one
            digits = "1,2" if may_be_one else str(width)
            pattern.append(f"(?P<f{len(fields)}>[0-9]{{{digits}}})")
            fields.append(field[1])
            head += [_DIGIT] * width
            is_plain = is_plain and tail is None
        elif part in "*?" or (part[0] == "[" and len(part) > 1):
            pattern.append(glob_pattern(part).pattern)
            is_plain = is_plain and part == "*" and tail is None
            tail = b""
        else:
            pattern.append(re.escape(part))
            if tail is None:
                head += part.encode()
            else:
                tail += part.encode()
    whole = "^" + "".join(pattern) + "$"
    if is_plain:
        return Level(tuple(fields), tuple(head), tail, None, None if is_strict else whole)
    return Level(tuple(fields), (), None, whole)


def _in_bytes(level: Level, names: pa.LargeStringArray) -> tuple[Mask, list[Numbers]]:
    """Which names have the level's head and tail, and [fields] the numbers of each of them."""
    at, text = texts(names)
    lengths = np.diff(at)
    tail = level.tail or b""
    least = len(level.head) + len(tail)
    found = lengths == least if level.tail is None else lengths >= least
    if tail:
        found &= pc.ends_with(names, tail.decode()).to_numpy(zero_copy_only=False)
    if not level.head:
        return found, []
    rows = np.flatnonzero(found)
    begins = at[rows]
    fits = np.ones(len(rows), np.bool_)
    digits = []
    for place, byte in enumerate(level.head):
        column = text[begins + place]
        if byte == _DIGIT:
            column -= np.uint8(ord("0"))
            fits &= column < 10
            digits.append(column)
        else:
            fits &= column == byte
    found[rows] = fits
    numbers = []
    for field in level.fields:
        values = np.zeros(len(names), np.int64)
        for _ in field:
            values[rows] = values[rows] * 10 + digits.pop(0)
        numbers.append(values)
    return found, numbers


def _by_expression(level: Level, names: pa.LargeStringArray) -> tuple[Mask, list[Numbers]]:
    """As `_in_bytes`, by the level's regular expression."""
    if not level.fields:
        return _mask(pc.match_substring_regex(names, level.pattern)), []
    return _numbers_in(names, level.pattern)


def _numbers_in(names: pa.LargeStringArray, pattern: str | None) -> tuple[Mask, list[Numbers]]:
    parts = pc.extract_regex(names, pattern)
    numbers = [pc.fill_null(pc.cast(part, pa.int64()), 0).to_numpy() for part in parts.flatten()]
    return _mask(parts.is_valid()), numbers


def _add_loose(
    pattern: str, names: pa.LargeStringArray, found: Mask, numbers: Sequence[Numbers]
) -> None:
    """Adds to what was found the names with numbers of one digit; in place."""
    rows = np.flatnonzero(~found)
    more, of_more = _numbers_in(names.take(pa.array(rows)), pattern)
    found[rows] = more
    for values, some in zip(numbers, of_more, strict=True):
        values[rows] = some


def _seen(names: pa.LargeStringArray) -> Mask:
    """Which names patterns find: those that are not hidden; see `is_hidden`."""
    begins = pc.or_(pc.starts_with(names, "."), pc.starts_with(names, "_"))
    return _mask(pc.invert(pc.or_(begins, pc.ends_with(names, "~"))))


def _mask(found: pa.BooleanArray) -> Mask:
    # A copy, because one without is read-only.
    return np.array(found.to_numpy(zero_copy_only=False))


def _by_key(codes: Numbers, rows: Rows, num_fields: int) -> Matches:
    """Rows by the keys that their codes say; `codes`: [rows]."""
    if not len(codes):
        return Matches([], [])
    order: Numbers | None = None
    if (codes[1:] < codes[:-1]).any():
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
    edges = np.flatnonzero(np.diff(codes)) + 1
    found = Matches([], [])
    for start, stop in pairwise([0, *edges.tolist(), len(codes)]):
        part = slice(start, stop) if order is None else order[start:stop]
        found.keys.append(_key(int(codes[start]), num_fields))
        found.rows.append(part if isinstance(rows, slice) else rows[part])
    return found


def _key(code: int, num_fields: int) -> Key:
    behind = []
    for _ in range(num_fields - 1):
        code, number = divmod(code, _RADIX)
        behind.append(number)
    return (code, *reversed(behind))
