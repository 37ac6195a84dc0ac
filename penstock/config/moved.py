"""Fields that lay elsewhere in jobs of before: they are read where they lay, and named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.errors import ConfigError

# What is learnt (data, features, tables, model, training) was not apart from how it is run.
MOVED = {
    "training.device": "run.device",
    "training.threads": "run.threads",
    "data.reader_threads": "run.reader_threads",
    "data.prefetch_batches": "run.prefetch_batches",
    "training.evaluate_every_steps": "evaluation.every_steps",
    "training.evaluation_batch_size": "evaluation.batch_size",
    "training.metrics": "evaluation.metrics",
    "training.checkpoint": "checkpoint",
    "training.log_every_steps": "report.every_steps",
    "data.shuffle.window_rows": "data.shuffle.block_rows",
    "data.shuffle.window_bytes": "data.shuffle.block_bytes",
}
"""New place by old one."""


def bring_up_to_date(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """Puts moved fields into their new places.

    Args:
      fields: of a job, not yet validated; left as they are.

    Returns:
      The fields, new where something had moved; and for each moved field `old is now new`.

    Raises:
      ConfigError: a field is given in both places.
    """
    notes = []
    for old, new in MOVED.items():
        parent, name = old.rsplit(".", 1)
        group = _group(fields, parent)
        if group is None or name not in group:
            continue
        value = group[name]
        fields = _with(fields, parent, {key: group[key] for key in group if key != name})
        fields = _put(fields, old, new, value)
        notes.append(f"{old} is now {new}")
    return fields, notes


def place_now(place: str) -> str:
    """Where a field, or a field of what has moved, lies now."""
    for old, new in MOVED.items():
        if place == old or place.startswith(f"{old}."):
            return new + place.removeprefix(old)
    return place


def _group(fields: Mapping[str, Any], place: str) -> Mapping[str, Any] | None:
    """The fields at a place like `data.shuffle`; None: there are none."""
    group: Any = fields
    for name in place.split("."):
        group = group.get(name) if isinstance(group, Mapping) else None
    return group if isinstance(group, Mapping) else None


def _with(fields: Mapping[str, Any], place: str, value: Any) -> Mapping[str, Any]:
    """Copies of the fields on the way to a place, with a value there."""
    first, _, rest = place.partition(".")
    return {**fields, first: _with(fields.get(first) or {}, rest, value) if rest else value}


def _put(fields: Mapping[str, Any], old: str, new: str, value: Any) -> Mapping[str, Any]:
    parent, _, name = new.rpartition(".")
    there = _group(fields, parent) if parent else fields
    # What is neither missing nor a group of fields is refused here, as are fields given twice.
    place = fields
    for part in parent.split(".") if parent else ():
        place = place.get(part) or {}
        if not isinstance(place, Mapping):
            raise ConfigError(f"{old} is now {new}, and {parent} is no group of fields; mend it")
    if there is not None and name in there:
        raise ConfigError(f"{old} is now {new}, and both are given; remove {old}")
    return _with(fields, new, value)
