"""Paths with date fields: which folders may hold files of some time, and when a file's rows were.

A pattern is taken apart into folder levels, each a regular expression. What is found so far on the
way down is a `Key`: year, month, day, hour, as far as they are known.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

from penstock.config.streams import DATE_FIELDS, fields_of_path
from penstock.data.files import GLOB, glob_pattern
from penstock.data.windows.calendar import moment_ms
from penstock.errors import DataError

Key: TypeAlias = tuple[int, ...]
"""Year, month, day and hour, as many of them as are known, from the year on."""

_FIELD = re.compile(r"\{(YYYY|MM|DD|HH)\}")
_LEAST = (1, 1, 0)
"""Month, day and hour with which a period begins."""


class Level(NamedTuple):
    """One name on the way down."""

    name: re.Pattern[str]
    """With a group for each field that it has, named like it; a field that is there twice has the
    other in a group of the name and `_2`."""
    fields: tuple[str, ...]
    """That it has, in the order of its name."""


class PathPattern:
    """A path with date fields and globs, level by level."""

    def __init__(self, path: str) -> None:
        """`path`: within its file system."""
        self.path = path
        self.fields = fields_of_path(path)
        names = path.split("/")
        varies = next(n for n, name in enumerate(names) if _FIELD.search(name) or GLOB.search(name))
        self.root = "/".join(names[:varies])
        """The folder that all files are below; empty: the working directory, or all there is."""
        self.levels = [_level(name) for name in names[varies:]]

    def key_of(self, level: int, name: str, above: Key) -> Key | None:
        """What is known of a file or folder of a level; None: the pattern does not match it."""
        pattern, fields = self.levels[level]
        found = pattern.fullmatch(name)
        if found is None:
            return None
        known = dict(zip(DATE_FIELDS, above, strict=False))
        for field, text in zip(fields, found.groups(), strict=True):
            if known.setdefault(field, int(text)) != int(text):
                return None  # two names of one path that contradict each other
        return tuple(known[field] for field in DATE_FIELDS if field in known)

    def path_of(self, key: Key) -> str:
        """The path of a key, of a pattern without globs."""
        texts = (f"{key[0]:04}", *(f"{number:02}" for number in key[1:]))
        values = dict(zip(DATE_FIELDS, texts, strict=False))
        return _FIELD.sub(lambda found: values[found[1]], self.path)


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
    parts, fields, at = [], [], 0
    for found in _FIELD.finditer(name):
        parts.append(glob_pattern(name[at : found.start()]).pattern)
        parts.append(r"(\d{4})" if found[1] == "YYYY" else r"(\d{2})")
        fields.append(found[1])
        at = found.end()
    parts.append(glob_pattern(name[at:]).pattern)
    return Level(re.compile("".join(parts)), tuple(fields))
