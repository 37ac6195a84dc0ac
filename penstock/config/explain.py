"""Turns pydantic's validation errors into lines that name the field, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from penstock.errors import ConfigError


def explain(
    error: ValidationError, model: type[BaseModel], given: Mapping[str, Any], origin: str = ""
) -> ConfigError:
    """Turns pydantic's error into lines of `path: what is wrong (value); remedy`."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in _without_tags(item["loc"], given))
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


def _without_tags(location: tuple[int | str, ...], given: Any) -> Iterator[int | str]:
    """Drops the names of union members, which are not part of what the user wrote."""
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(given, Mapping):
            if part in given or last:
                yield part
                given = given.get(part)
        elif isinstance(given, list | tuple) and isinstance(part, int):
            yield part
            given = given[part]


def _suggestion(key: str, location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    known = sorted(_fields_at(model, location[:-1]))
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known keys: {', '.join(known)}" if known else ""


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Names of the fields of the model that lies at `location` of `model`'s JSON schema."""
    schema = model.model_json_schema()

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return node

    def step(node: dict[str, Any], part: int | str) -> dict[str, Any] | None:
        node = resolve(node)
        if isinstance(part, int):
            items = node.get("items")
            if items is not None:
                return resolve(items)
        elif part in node.get("properties", {}):
            return resolve(node["properties"][part])
        elif "discriminator" in node and part in node["discriminator"]["mapping"]:
            return resolve({"$ref": node["discriminator"]["mapping"][part]})
        for option in node.get("anyOf", ()):
            found = step(option, part)
            if found is not None:
                return found
        return None

    node: dict[str, Any] | None = schema
    for part in location:
        node = step(node, part) if node is not None else None
    if node is None:
        return set()
    # An optional field is one of its type and null.
    options = [resolve(node), *map(resolve, resolve(node).get("anyOf", ()))]
    return {name for option in options for name in option.get("properties", ())}
