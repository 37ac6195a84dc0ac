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
        section, name = old.split(".")
        group = fields.get(section)
        if not isinstance(group, Mapping) or name not in group:
            continue
        value = group[name]
        fields = {**fields, section: {key: group[key] for key in group if key != name}}
        fields = _put(fields, old, new, value)
        notes.append(f"{old} is now {new}")
    return fields, notes


def _put(fields: Mapping[str, Any], old: str, new: str, value: Any) -> Mapping[str, Any]:
    section, _, name = new.partition(".")
    there = fields.get(section)
    if name and (there is None or isinstance(there, Mapping)):
        is_free, placed = name not in (there or {}), {**(there or {}), name: value}
    else:
        is_free, placed = section not in fields, value
    if not is_free:
        raise ConfigError(f"{old} is now {new}, and both are given; remove {old}")
    return {**fields, section: placed}
