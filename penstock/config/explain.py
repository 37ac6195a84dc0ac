"""Turns pydantic's validation errors into lines that name the field, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from penstock.errors import ConfigError

_Node: TypeAlias = dict[str, Any]
"""Of a JSON schema."""


def explain(
    error: ValidationError, model: type[BaseModel], given: Mapping[str, Any], origin: str = ""
) -> ConfigError:
    """Turns pydantic's error into lines of `path: what is wrong (value); remedy`."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in _without_tags(item, given))
        where = f"{origin}: {path}" if origin and path else path or origin or model.__name__
        if item["type"] == "extra_forbidden":
            lines.append(
                f"{where}: unknown key{_suggestion(str(item['loc'][-1]), item['loc'], model)}"
            )
        elif item["type"] == "missing":
            lines.append(f"{where}: required, but not given")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = repr(item["input"])
            value = (
                f" (got {shown})"
                if not isinstance(item["input"], Mapping) and len(shown) <= 80
                else ""
            )
            lines.append(f"{where}: {message[0].lower()}{message[1:]}{value}")
    return ConfigError("\n".join(lines))


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


def _suggestion(key: str, location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    known = sorted(fields_at(model, location[:-1]))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known keys: {', '.join(known)}" if known else ""


def fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Names of the fields of the model that lies at `location` of `model`'s JSON schema.

    The last part of a location may be the tag of a union's member: `("model", "dcn_v2")`.
    """
    schema = model.model_json_schema()
    node = schema
    for part in location:
        found = _below(schema, node, part)
        # The name of a union's member, where the schema has the members without their names.
        is_tag = found is None and isinstance(part, str) and bool(_members(schema, node))
        if found is None and not is_tag:
            return set()
        node = found or node
    reached = [node, *_members(schema, node)]
    return {name for one in reached for name in one.get("properties", {})}


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
