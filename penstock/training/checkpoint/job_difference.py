"""Whether a checkpoint belongs to a job, and if not, which fields tell.

A resumed run may change what does not alter the meaning of a row, a weight or a position in the
input: where the data lies, for how long, how fast and how verbosely to train. Everything else
must be as it was. docs/checkpoint_format.md lists and explains the fields.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from penstock.config import FeatureConfig, Job, TableConfig, parse_job
from penstock.config.base import changeable_fields
from penstock.errors import CheckpointError, ConfigError

MAY_CHANGE = (
    *changeable_fields(Job),
    *changeable_fields(FeatureConfig, "feature *."),
    *changeable_fields(TableConfig, "table *."),
)
"""Globs of fields that a resumed run may change, by their marks in the configuration."""

no_widths: Mapping[str, int] = MappingProxyType({})
_CLASSES = {"feature": FeatureConfig, "table": TableConfig}
_MOST_LINES = 20
_ABSENT = object()


def resolve(
    numeric: Sequence[str],
    features: Sequence[FeatureConfig],
    tables: Sequence[TableConfig],
    numeric_widths: Mapping[str, int] = no_widths,
) -> dict[str, Any]:
    """What the job came to, as plain data for the manifest."""
    widths = {"numeric_widths": dict(numeric_widths)} if numeric_widths else {}
    return {
        "numeric": list(numeric),
        **widths,
        "features": [feature.model_dump(mode="json") for feature in features],
        "tables": [table.model_dump(mode="json") for table in tables],
    }


def differences(
    saved_job: Mapping[str, Any],
    saved: Mapping[str, Any],
    job: Job,
    resolved: Mapping[str, Any],
) -> list[str]:
    """Compares a checkpoint's job with another one.

    Args:
      saved_job: fields of the job in the manifest.
      saved: `resolve` of the checkpoint.
      job: the job that wants to go on from it.
      resolved: `resolve` of that job; or `saved`, where it is not asked what the job comes to.

    Returns:
      One line for each field that differs and must not; empty: the checkpoint fits.
    """
    try:
        # Through the current classes, so that a field younger than the checkpoint has its default.
        before = parse_job(saved_job, is_record=True).model_dump(mode="json")
    except ConfigError:
        before = dict(saved_job)
    lines = _compare(leaves(before), leaves(job.model_dump(mode="json")))
    return [*lines, *resolved_differences(saved, resolved)]


def resolved_differences(saved: Mapping[str, Any], resolved: Mapping[str, Any]) -> list[str]:
    """The part of `differences` that concerns columns, features and tables."""
    lines = []
    if saved["numeric"] != resolved["numeric"]:
        lines.append(_line("numeric columns", saved["numeric"], resolved["numeric"]))
    # Absent where no column holds vectors.
    before, after = (one.get("numeric_widths", {}) for one in (saved, resolved))
    if before != after:
        lines.append(_line("widths of numeric columns", before, after))
    for kind in ("feature", "table"):
        old = {item["name"]: _renewed(kind, item) for item in saved[f"{kind}s"]}
        new = {item["name"]: _renewed(kind, item) for item in resolved[f"{kind}s"]}
        lines += [f"{kind} {name}: only in the checkpoint" for name in old if name not in new]
        lines += [f"{kind} {name}: only in the job" for name in new if name not in old]
        common = [name for name in old if name in new]
        for name in common:
            prefix = f"{kind} {name}."
            lines += _compare(leaves(old[name], prefix), leaves(new[name], prefix))
        # A table is found by its name, but the features' order is that of the model's inputs.
        order = [name for name in new if name in old]
        if kind == "feature" and common != order:
            lines.append(_line("order of the features", common, order))
    return lines


def _renewed(kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of a feature or table as the current classes have them, younger ones with defaults."""
    try:
        renewed: dict[str, Any] = _CLASSES[kind](**fields).model_dump(mode="json")
    except ConfigError:
        return fields
    return renewed


def refuse_other(path: str | os.PathLike[str], lines: Sequence[str]) -> None:
    """Raises `CheckpointError` where there are lines of `differences` to the checkpoint `path`."""
    if lines:
        raise CheckpointError(
            f"checkpoint {path} is of another job:\n{describe(lines)}\n"
            "resume with the job that wrote it, or train this one in a new run folder"
        )


def describe(lines: Sequence[str]) -> str:
    """The lines, indented, cut off where they are many."""
    shown = [f"  {line}" for line in lines[:_MOST_LINES]]
    if len(lines) > _MOST_LINES:
        shown.append(f"  and {len(lines) - _MOST_LINES} more")
    return "\n".join(shown)


def _compare(before: Iterator[tuple[str, Any]], after: Iterator[tuple[str, Any]]) -> list[str]:
    old, new = dict(before), dict(after)
    return [
        _line(path, old.get(path, _ABSENT), new.get(path, _ABSENT))
        for path in {**old, **new}
        if old.get(path, _ABSENT) != new.get(path, _ABSENT)
        and not any(fnmatch.fnmatchcase(path, pattern) for pattern in MAY_CHANGE)
    ]


def _line(path: str, before: Any, after: Any) -> str:
    return f"{path}: {_show(before)} in the checkpoint, {_show(after)} in the job"


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything that is not itself a mapping or a list of mappings."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{path}{name}." if _is_inner(item) else f"{path}{name}")
    elif isinstance(value, list) and _is_inner(value):
        for place, item in enumerate(value):
            yield from leaves(item, f"{path}{place}.")
    else:
        yield path, value


def _is_inner(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(x, Mapping) for x in value)
