"""Which rank has each table that is kept whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from penstock.config import FeatureConfig, TableConfig


def ranks_of_whole_tables(
    tables: Sequence[TableConfig], features: Sequence[FeatureConfig], num_ranks: int
) -> Mapping[str, int]:
    """The rank of each table by name, of those whose `placement` is `whole`.

    What a table costs its rank goes by the columns that are read of it: each goes to the rank that
    has the fewest so far, the widest ones first.
    """
    readers = Counter(feature.table for feature in features)
    widths = {
        table.name: table.dim * readers[table.name]
        for table in tables
        if table.placement == "whole"
    }
    loads = [0] * num_ranks
    chosen = {}
    for name in sorted(widths, key=widths.__getitem__, reverse=True):
        rank = loads.index(min(loads))
        chosen[name] = rank
        # A table that no feature reads is looked up by key.
        loads[rank] += max(1, widths[name])
    return chosen
