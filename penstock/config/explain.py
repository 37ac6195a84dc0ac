"""Turns pydantic's validation errors into lines that name the field, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from penstock.errors import ConfigError

_KINDS = {
    "string_type": "a text",
    "tuple_type": "a list",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "model_type": "fields",
}
"""What a value is not, by the type of the error: of a member of a union, perhaps."""
_Node: TypeAlias = dict[str, Any]
"""Of a JSON schema."""


def explain(
    error: ValidationError, model: type[BaseModel], given: Mapping[str, Any], origin: str = ""
) -> ConfigError:
    """Turns pydantic's error into lines of `path: what is wrong (value); remedy`."""
    at: dict[tuple[int | str, ...], list[ErrorDetails]] = {}
    for item in error.errors():
        at.setdefault(tuple(_without_tags(item, given)), []).append(item)
    lines = []
    for place, items in at.items():
        kinds = [_KINDS.get(item["type"], "") for item in items]
        if all(kinds) and any(_is_below(other, place) for other in at):
            continue  # it is of another member of the union, of which something is wrong inside
        path = ".".join(map(str, place))
        where = f"{origin}: {path}" if origin and path else path or origin or model.__name__
        if len(items) > 1 and all(kinds):
            lines.append(f"{where}: expected {' or '.join(kinds)}{_shown(items[0]['input'])}")
        else:
            lines += [f"{where}: {_what_is_wrong(item, model)}" for item in items]
    return ConfigError("\n".join(lines))


def _is_below(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return len(place) > len(other) and place[: len(other)] == other


def _what_is_wrong(item: ErrorDetails, model: type[BaseModel]) -> str:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden":
        known = fields_at(model, item["loc"][:-1])
        return f"unknown key{_suggestion(str(item['loc'][-1]), known)}"
    if kind == "missing":
        return "required, but not given"
    if kind in {"model_type", "model_attributes_type"}:
        return f"expected fields, as in `a: 1`{_shown(value)}; give some, or leave it out"
    if kind == "tuple_type":
        remedy = f"; write [{value}]" if isinstance(value, str | int | float) else ""
        return f"expected a list{_shown(value)}{remedy}"
    if kind.startswith("union_tag_"):
        tag = item["ctx"]["discriminator"].strip("'")
        known = tags_at(model, item["loc"])
        if kind == "union_tag_not_found":
            return f"{tag} is not given; it is one of {', '.join(sorted(known))}"
        return f"unknown {tag} {item['ctx']['tag']!r}{_suggestion(item['ctx']['tag'], known)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}{_shown(value)}"


def _shown(value: Any) -> str:
    """The value that was given, if it is short."""
    shown = "" if isinstance(value, Mapping) else repr(value)
    return f" (got {shown})" if 0 < len(shown) <= 80 else ""


def _without_tags(item: ErrorDetails, given: Any) -> Iterator[int | str]:
    """Drops the names of union members, which are not part of what the user wrote."""
    location = item["loc"]
    for position, part in enumerate(location):
        is_absent = item["type"] == "missing" and position == len(location) - 1
        if isinstance(given, Mapping):
            if part in given or is_absent:
                yield part
                given = given.get(part)
        elif isinstance(given, list | tuple) and isinstance(part, int):
            yield part
            given = given[part]


def _suggestion(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    near = [name for name in known if name == key.strip().lower().replace("-", "_")] or near
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Names of the fields of the model that lies at `location` of `model`'s JSON schema.

    The last part of a location may be the tag of a union's member: `("model", "dcn_v2")`.
    """
    return {name for one in _reached(model, location) for name in one.get("properties", {})}


def tags_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Tags of the union that lies at `location`, as `fields_at`."""
    unions = [one["discriminator"] for one in _reached(model, location) if "discriminator" in one]
    return {tag for union in unions for tag in union["mapping"]}


def _reached(model: type[BaseModel], location: tuple[int | str, ...]) -> list[_Node]:
    """What lies at a location: a node of the schema, and the members of the union that it is."""
    schema = model.model_json_schema()
    node = schema
    for part in location:
        found = _below(schema, node, part)
        # The name of a union's member, where the schema has the members without their names.
        is_tag = found is None and isinstance(part, str) and bool(_members(schema, node))
        if found is None and not is_tag:
            return []
        node = found or node
    return [node, *_members(schema, node)]


def _below(schema: _Node, node: _Node, part: int | str) -> _Node | None:
    if isinstance(part, int):
        if "items" in node:
            return _resolved(schema, node["items"])
    elif part in node.get("properties", {}):
        return _resolved(schema, node["properties"][part])
    elif "discriminator" in node and part in node["discriminator"]["mapping"]:
        return _resolved(schema, {"$ref": node["discriminator"]["mapping"][part]})
    found = (_below(schema, member, part) for member in _members(schema, node))
    return next((one for one in found if one is not None), None)


def _members(schema: _Node, node: _Node) -> list[_Node]:
    """Of a union, and of the unions in it."""
    direct = [
        _resolved(schema, member) for member in (*node.get("anyOf", ()), *node.get("oneOf", ()))
    ]
    return [*direct, *(one for member in direct for one in _members(schema, member))]


def _resolved(schema: _Node, node: _Node) -> _Node:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node
