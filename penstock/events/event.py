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
        # To Python a bool is an int.
        is_flag = isinstance(value, bool)
        if not isinstance(value, quantity.unit.types) or is_flag != (quantity.unit is Unit.FLAG):
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


def values_from_json(fields: Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `to_json`, for values of these fields; others stay as they are."""
    return {name: _from_json(field_named(fields, name), one) for name, one in values.items()}


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
        raise EventError(f"{line!r} is no event")
    kind, step = str(line.get("kind")), line.get("step")
    if kind not in KINDS or not isinstance(step, int):
        raise EventError(
            f"{kind!r} at step {step!r} is no event; was it written by a later version?"
        )
    head = {"kind", "step", "time_s", "role"}
    values = {name: value for name, value in line.items() if name not in head}
    return Event(
        kind,
        step,
        math.nan if line.get("time_s") is None else float(line["time_s"]),
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


def _from_json(found: tuple[str, Quantity | Group] | None, value: Any) -> Any:
    if found is None:
        return value
    field = found[1]
    if isinstance(field, Group):
        return values_from_json(field.fields, value) if isinstance(value, Mapping) else value
    if field.unit is Unit.BUCKETS and isinstance(value, list):
        return [[_number(one) for one in bucket] for bucket in value]
    return _number(value) if field.unit.is_number else value


def _number(value: Any) -> Any:
    return _FROM_JSON.get(value, value) if value is None or isinstance(value, str) else value
