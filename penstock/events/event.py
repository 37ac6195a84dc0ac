"""Events: plain data, checked against the registry, and the same from and to JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from penstock.errors import EventError
from penstock.events.registry import KINDS, ROLES, Fields, Group, Quantity, Unit, field_named

_INFINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}
_FROM_JSON = {None: math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

_MOST_BITS = 1000


class Role(NamedTuple):
    """Which process tells something."""

    kind: str
    """One of `registry.ROLES`."""
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"

    @classmethod
    def parse(cls, text: str) -> Role:
        """Inverse of `str`; raises `EventError`."""
        kind, _, number = text.partition(" ")
        if kind not in ROLES or not number.isdecimal():
            raise EventError(f"role {text!r} is unknown; roles are {', '.join(ROLES)}, numbered")
        return cls(kind, int(number))


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a process tells."""

    kind: str
    """One of `registry.KINDS`."""
    step: int
    """Steps trained by then."""
    time_s: float
    """Since 1970, UTC; NaN: of a run of before, which did not say."""
    role: Role
    values: Mapping[str, Any]
    """By the names of the kind's fields, nested as they are."""


class Measurement(NamedTuple):
    """A single value of an event."""

    path: tuple[str, ...]
    """Names from the outside in: ("tables", "user", "rows")."""
    name: tuple[str, ...]
    """The same as the registry has it: ("tables", "<table>", "rows")."""
    quantity: Quantity
    value: Any


def measurements(event: Event) -> Iterator[Measurement]:
    """Yields every value of an event, in order.

    Raises:
      EventError: the registry does not know the kind or a name.
    """
    if event.kind not in KINDS:
        raise EventError(f"event {event.kind!r} is unknown; penstock/events/registry.py names all")
    yield from _measure(event.kind, KINDS[event.kind].fields, event.values, (), ())


def check(event: Event) -> None:
    """Raises `EventError` unless the registry knows all of an event, and its values are such."""
    Role.parse(str(event.role))
    for path, _, quantity, value in measurements(event):
        if not _is_in(quantity.unit, value):
            raise EventError(
                f"event {event.kind!r}, {'/'.join(path)}: {value!r} is no value in "
                f"{quantity.unit.symbol!r}"
            )


def to_json(value: Any) -> Any:
    """What JSON can say: NaN becomes null, an infinite number "Infinity" or "-Infinity"."""
    if isinstance(value, Mapping):
        return {str(name): to_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return _INFINITE.get(value)
    return value


def values_from_json(fields: Fields, values: Any) -> dict[str, Any]:
    """Inverse of `to_json`, for values of these fields; others stay as they are.

    Raises:
      EventError: a value is not in the unit of its field: the file was changed, or is damaged.
    """
    if not isinstance(values, Mapping):
        raise EventError(f"{_short(values)} is no group of values")
    return {name: _from_json(name, field_named(fields, name), one) for name, one in values.items()}


def line_of(event: Event) -> dict[str, Any]:
    """The event as a JSON object: its values beside `kind`, `step`, `time_s` and `role`."""
    head = {"kind": event.kind, "step": event.step, "time_s": event.time_s, "role": str(event.role)}
    return {**to_json(head), **to_json(event.values)}


def event_of(line: Any) -> Event:
    """Inverse of `line_of`; reads lines of before, too, which had neither time nor role.

    Raises:
      EventError: the line is of an unknown kind, or is none.
    """
    if not isinstance(line, Mapping):
        raise EventError(f"{_short(line)} is no event")
    kind, step, time_s = str(line.get("kind")), line.get("step"), line.get("time_s")
    if kind not in KINDS or not isinstance(step, int) or not _is_in(Unit.STEPS, _number(step)):
        raise EventError(
            f"{_short(kind)} at step {_short(step)} is no event; was it written by a later version?"
        )
    if time_s is not None and not _is_in(Unit.SECONDS, _number(time_s)):
        raise EventError(f"{kind!r} at step {step}: time_s: {_short(time_s)} is no time")
    head = {"kind", "step", "time_s", "role"}
    values = {name: value for name, value in line.items() if name not in head}
    return Event(
        kind,
        step,
        math.nan if time_s is None else float(time_s),
        Role.parse(str(line.get("role", "trainer 0"))),
        values_from_json(KINDS[kind].fields, values),
    )


def _measure(
    kind: str,
    fields: Fields,
    values: Mapping[str, Any],
    path: tuple[str, ...],
    name: tuple[str, ...],
) -> Iterator[Measurement]:
    """Yields what `values` hold, at a place in an event."""
    for key, value in values.items():
        pattern, field = field_named(fields, key) or (key, None)
        if isinstance(field, Quantity):
            yield Measurement((*path, key), (*name, pattern), field, value)
        elif field is not None and isinstance(value, Mapping):
            yield from _measure(kind, field.fields, value, (*path, key), (*name, pattern))
        else:
            raise EventError(
                f"event {kind!r} has no quantity {'/'.join((*path, key))}; "
                "penstock/events/registry.py names all"
            )


def _from_json(name: str, found: tuple[str, Quantity | Group] | None, value: Any) -> Any:
    if found is None:
        return value
    field = found[1]
    if isinstance(field, Group):
        return values_from_json(field.fields, value)
    if field.unit is Unit.BUCKETS and _is_table(value, columns=3):
        read: Any = [[_number(one) for one in bucket] for bucket in value]
        is_right = all(_is_in(Unit.RATIO, one) for bucket in read for one in bucket)
    else:
        read = _number(value) if field.unit.is_number else value
        is_right = _is_in(field.unit, read) and field.unit is not Unit.BUCKETS
    if not is_right:
        raise EventError(f"{name}: {_short(value)} is no value in {field.unit.symbol!r}")
    return read


def _is_in(unit: Unit, value: Any) -> bool:
    """Whether a value is one in the unit. To Python a bool is an int."""
    return isinstance(value, unit.types) and isinstance(value, bool) == (unit is Unit.FLAG)


def _is_table(value: Any, columns: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == columns for row in value
    )


def _number(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return None  # no float can hold it
    return _FROM_JSON.get(value, value) if value is None or isinstance(value, str) else value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
