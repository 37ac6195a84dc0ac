"""Guesses what each column of unknown data is for, and says why.

Pure: works on summaries of columns. A guess goes by the column's type, its values and its name, in
this order of weight; the reasons are for a person to judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from penstock.config import TimeUnit
from penstock.errors import ConfigError
from penstock.survey.profile import ColumnSummary, DataProfile

Role: TypeAlias = Literal[
    "label", "event time", "numeric", "categorical", "sequence", "id", "constant", "left out"
]


@dataclass(frozen=True)
class ColumnRole:
    """What one column is for."""

    name: str
    role: Role
    reason: str


@dataclass(frozen=True)
class Roles:
    """What the columns of a source are for."""

    columns: tuple[ColumnRole, ...]
    """In the order of the source."""
    label: str | None
    at_least: float | None
    """Numbers from here on are positive; None: the label is 0 or 1."""
    event_time: str | None
    time_unit: TimeUnit = "ms"
    """Of an integer event time."""

    def named(self, *roles: Role) -> list[str]:
        """Columns of these roles, in the order of the source."""
        return [column.name for column in self.columns if column.role in roles]


_LABELS = re.compile(
    r"label|target|y|clicks?|is_?click(ed)?|clicked|convert(ed)?|conversion|is_?conver\w*|"
    r"purchased?|bought|is_?buy|liked?|is_?like|installed?|response|churn(ed)?|finish|win|"
    r"\w*_label|label_?\w*|click_?label",
    re.IGNORECASE,
)
_RATINGS = re.compile(r"(\w+_)?(rating|ratings|stars|score|rate)", re.IGNORECASE)
_TIMES = re.compile(r"time|timestamp|date|datetime|ts|day|hour|created|_at$", re.IGNORECASE)
_KEYS = re.compile(
    r"(^|_)(id|ids|key|code|cat|category|type|kind|zip|zip_?code|hash|sku|uid|brand|country|region|"
    r"city|state|lang|language|gender|occupation|os|browser|device\w*|site|domain|app|genre|"
    r"referrer|environment)($|_)|[a-z]Id(s)?$|^c\d+$|Type$|^(is|has)_",
    re.IGNORECASE,
)
_NUMBERS = re.compile(
    r"(^|_)(num|n|count|cnt|price|cost|amount|age|qty|quantity|size|length|duration|rank|score|"
    r"rate|ratio|ctr|sum|avg|mean|total|year|days?|hours?|minutes|seconds|lat|lon|width|height|"
    r"weight|value)($|_)|^[in]\d+$",
    re.IGNORECASE,
)
_SECONDS: dict[TimeUnit, float] = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}
_EARLIEST_S, _LATEST_S = 5.0e8, 4.1e9
"""1985 and 2099: where integers can be times."""
_MOST_RATINGS = 21
_NEARLY_ALL = 0.95


def assign_roles(
    profile: DataProfile,
    *,
    label: str | None = None,
    items: Sequence[str] = (),
    event_time: str | None = None,
) -> Roles:
    """Guesses what the columns are for.

    Args:
      profile: what is known of them.
      label: the label's column, where the user knows better.
      items: columns of the item, if every row is a positive and no column a label.
      event_time: the column of times, where the user knows better.

    Raises:
      ConfigError: there is no such column, or it cannot be what the user says.
    """
    if items and label is not None:
        raise ConfigError("--item says that every row is a positive; leave out --label")
    named = [("--label", label), ("--event-time", event_time), *(("--item", one) for one in items)]
    for field, name in named:
        if name is not None and name not in [column.name for column in profile.columns]:
            raise ConfigError(
                f"{field}: no column {name!r}; there are "
                f"{', '.join(column.name for column in profile.columns)}"
            )
    time = _find_time(profile.columns, event_time, label)
    labels = {column.name: column for column in _label_candidates(profile.columns, time, label)}
    if items:
        labels = {}
    chosen = label or next(iter(labels), None)
    at_least = None if chosen is None else _threshold(profile[chosen])
    columns = []
    for column in profile.columns:
        if column.name == chosen:
            role = ColumnRole(column.name, "label", _label_reason(column, at_least, label))
        elif time is not None and column.name == time[0]:
            role = ColumnRole(column.name, "event time", time[2])
        elif column.name in labels:
            reason = f"looks like a label, too; it may be known only after {chosen!r}"
            role = ColumnRole(column.name, "left out", reason)
        else:
            role = ColumnRole(column.name, *_input_role(column))
        columns.append(role)
        if column.name in items and role.role not in {"categorical", "sequence", "numeric"}:
            raise ConfigError(
                f"--item: column {column.name!r} is no input ({role.role}: {role.reason}); leave "
                "it out"
            )
    return Roles(
        tuple(columns),
        chosen,
        at_least,
        None if time is None else time[0],
        "ms" if time is None else time[1],
    )


def _find_time(
    columns: Sequence[ColumnSummary], given: str | None, label: str | None
) -> tuple[str, TimeUnit, str] | None:
    """The column of event times, the unit of its integers, and why."""
    found = []
    for column in columns:
        if column.name == label or (given is not None and column.name != given):
            continue
        why = _time_reason(column, is_given=given is not None)
        if why is not None:
            # Ascending ones first: an event is written when it happens, a birthday is not.
            order = 1.0 if column.numbers is None else column.numbers.descents
            found.append((order > 0.1, not _TIMES.search(column.name), column.name, *why))
    if not found:
        if given is not None:
            raise ConfigError(
                f"--event-time: column {given!r} holds no times, or lacks some: times are "
                "timestamps, dates, ISO 8601 text or integers since 1970, one in each row"
            )
        return None
    _, _, name, unit, reason = min(found)
    return name, unit, reason


def _time_reason(column: ColumnSummary, *, is_given: bool) -> tuple[TimeUnit, str] | None:
    numbers = column.numbers
    usable = column.longest == 1 and not column.missing and numbers is not None
    if not usable or column.lengths is not None:
        return None
    assert numbers is not None
    if column.kind == "time":
        if numbers.minimum == numbers.maximum:
            return None
        return "ms", f"times from {_date(numbers.minimum)} to {_date(numbers.maximum)}"
    if column.kind != "integer" or (numbers.minimum == numbers.maximum and not is_given):
        return None
    for unit, ticks in _SECONDS.items():
        low, high = numbers.minimum / ticks, numbers.maximum / ticks
        if low >= _EARLIEST_S and high <= _LATEST_S:
            # Any integer of ten digits could be a time, so the name or the order must agree.
            is_named = bool(_TIMES.search(column.name))
            if is_given or is_named or numbers.descents < 0.01:
                what = f"integers in {unit} since 1970: {_date(low * 1e3)} to {_date(high * 1e3)}"
                order = "; rows ascend" if numbers.descents < 0.01 else ""
                return unit, what + order
    return None


def _label_candidates(
    columns: Sequence[ColumnSummary], time: tuple[str, TimeUnit, str] | None, given: str | None
) -> Iterator[ColumnSummary]:
    """Columns that look like labels, the likeliest first."""
    if given is not None:
        column = next(one for one in columns if one.name == given)
        if column.kind not in {"integer", "float"} or column.longest > 1:
            raise ConfigError(
                f"--label: column {given!r} holds {column.type}; labels are numbers, one a row"
            )
        yield column
    for pattern, fits in ((_LABELS, _is_binary), (_RATINGS, _is_rating), (_LABELS, _is_rating)):
        for column in columns:
            taken = column.name == given or (time is not None and column.name == time[0])
            if not taken and pattern.fullmatch(column.name) and fits(column):
                yield column


def _is_binary(column: ColumnSummary) -> bool:
    numbers = column.numbers
    return (
        column.kind in {"integer", "float"}
        and column.longest == 1
        and numbers is not None
        and column.values.distinct == 2
        and (numbers.minimum, numbers.maximum) == (0, 1)
    )


def _is_rating(column: ColumnSummary) -> bool:
    return (
        column.kind in {"integer", "float"}
        and column.longest == 1
        and column.numbers is not None
        and 2 <= column.values.distinct <= _MOST_RATINGS
    )


def _threshold(column: ColumnSummary) -> float | None:
    """From where on a number is positive; None where it is 0 or 1 already."""
    numbers = column.numbers
    if _is_binary(column) or numbers is None:
        return None
    # The quantile next above the middle: about half of the rows are positive.
    quantiles = [one for one in numbers.quantiles if one > numbers.minimum]
    middle = numbers.quantiles[len(numbers.quantiles) // 2]
    return middle if middle > numbers.minimum else min(quantiles, default=numbers.maximum)


def _label_reason(column: ColumnSummary, at_least: float | None, given: str | None) -> str:
    why = "as you say" if column.name == given else "its name, and "
    if column.name != given:
        why += (
            "0 and 1 are its only values"
            if at_least is None
            else f"only {column.values.distinct} different numbers"
        )
    if at_least is not None:
        why += f"; positive from {at_least:g} on, the median"
    if column.missing:
        why += f"; {column.missing:,} rows lack it"
    return why


def _input_role(column: ColumnSummary) -> tuple[Role, str]:
    """What a column that is neither label nor time is for."""
    values = column.values
    if column.kind == "unread":
        return "left out", f"no input reads {column.type}"
    if values.distinct == 0:
        return "constant", "every value is missing"
    if values.distinct == 1 and not column.missing and column.longest == 1:
        return "constant", f"every value is {column.hottest}"
    if column.longest > 1:
        return _list_role(column)
    if column.kind == "time":
        return "left out", "a second time; the model reads numbers and keys"
    if column.kind == "float":
        if _KEYS.search(column.name) and not _NUMBERS.search(column.name) and _is_whole(column):
            return "left out", "its name says keys, but they are floats: write them as int64"
        return "numeric", "numbers with a fraction"
    rows = max(column.rows - column.missing, 1)
    if values.distinct > _NEARLY_ALL * rows and rows >= 100:
        share = min(values.distinct / rows, 1.0)
        return "id", f"{share:.0%} of the values differ: a key met once is no help"
    if column.kind == "text":
        what = f"{column.hex_digits} hexadecimal digits" if column.hex_digits else "text"
        return "categorical", f"{what}, {values.distinct:,} different"
    return _integer_role(column)


def _list_role(column: ColumnSummary) -> tuple[Role, str]:
    lengths = column.lengths
    assert lengths is not None
    if column.kind == "float" and lengths.minimum == lengths.maximum:
        return "numeric", f"each row is a vector of {lengths.maximum:,.0f} numbers"
    if column.kind == "float":
        return "left out", "lists of floats, of several lengths: no input reads them"
    if column.kind not in {"integer", "text"}:
        return "left out", f"lists of {column.kind}s: no input reads them"
    return "sequence", f"lists of up to {lengths.maximum:,.0f} keys, {lengths.mean:.1f} on average"


def _integer_role(column: ColumnSummary) -> tuple[Role, str]:
    """Integers are counts or codes; where the name does not tell, their spread does."""
    numbers, values = column.numbers, column.values
    assert numbers is not None
    says_key, says_number = _KEYS.search(column.name), _NUMBERS.search(column.name)
    if bool(says_key) != bool(says_number):
        role: Role = "categorical" if says_key else "numeric"
        return role, f"integers; by its name, {values.distinct:,} different"
    span = numbers.maximum - numbers.minimum + 1
    if values.distinct <= 50:
        return "categorical", f"only {values.distinct} different integers"
    if values.distinct < 0.01 * span and numbers.maximum > 1e6:
        return "categorical", f"{values.distinct:,} integers scattered over a range of {span:.2g}"
    median = numbers.quantiles[len(numbers.quantiles) // 2]
    if median - numbers.minimum < span / 20:
        return "numeric", "integers, most of them small: counts"
    return "categorical", f"{values.distinct:,} integers, spread evenly like codes"


def _is_whole(column: ColumnSummary) -> bool:
    numbers = column.numbers
    return numbers is not None and all(
        one == int(one) for one in (numbers.minimum, numbers.maximum, *numbers.quantiles)
    )


def _date(ms: float) -> str:
    # Of any year, which datetime is not.
    return str(np.datetime64(round(ms), "ms").astype("datetime64[m]")).replace("T", " ")
