"""Sizes of tables over all ranks, each of which knows its own rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeAlias

from penstock.embedding import TableStats
from penstock.ranks.group import Group

Values: TypeAlias = dict[str, int | float]


def over_ranks(group: Group, stats: Sequence[TableStats]) -> dict[str, Values]:
    """Values of each table by the names that events have, of the rows of all ranks.

    Args:
      group: every rank of it comes to this place.
      stats: of this rank's rows; the same tables on all ranks.
    """
    mine = {table.name: table.values() for table in stats}
    if group.size == 1:
        return mine
    every = [json.loads(one) for one in group.gathered_bytes(json.dumps(mine).encode())]
    return {
        table.name: _total([values[table.name] for values in every], is_whole=table.is_whole)
        for table in stats
    }


def _total(parts: Sequence[Values], *, is_whole: bool) -> Values:
    """The sums; means of what is a mean (age, over all evicted rows) or a share of a part."""
    total: Values = {name: sum(part[name] for part in parts) for name in parts[0]}
    if "evicted_age" in total:
        ages = sum(part["evicted_age"] * part["evicted"] for part in parts)
        total["evicted_age"] = ages / max(1, total["evicted"])
    if "budget_used" in total and not is_whole:
        total["budget_used"] /= len(parts)  # each has an equal share of max_bytes
    return total
