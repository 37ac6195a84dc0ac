"""Which store serves which table and feature of a collection; names that are wrong."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence

from penstock.config import FeatureConfig, TableConfig
from penstock.embedding.store import PooledFeature, RowLayout
from penstock.errors import ConfigError

_MOST_SHOWN = 20


def places_of(tables: Sequence[TableConfig]) -> dict[str, tuple[int, int]]:
    """Of each table by name its group, and its number there.

    A group is of one row layout, and trained or frozen as a whole.
    """
    groups: dict[tuple[RowLayout, bool], int] = {}
    sizes: list[int] = []
    places = {}
    for table in tables:
        group = groups.setdefault((RowLayout.of(table), table.trainable), len(groups))
        if group == len(sizes):
            sizes.append(0)
        places[table.name] = group, sizes[group]
        sizes[group] += 1
    return places


def plans_of(
    places: Mapping[str, tuple[int, int]],
    features: Sequence[FeatureConfig],
    widths: Sequence[int],
) -> dict[int, tuple[PooledFeature, ...]]:
    """The features that each group serves, of those that serve any.

    Args:
      places: from `places_of`.
      features: of tables there.
      widths: columns of each.
    """
    served: dict[int, list[PooledFeature]] = {}
    column = 0
    for f, (feature, width) in enumerate(zip(features, widths, strict=True)):
        group, number = places[feature.table]
        one = PooledFeature(f, number, feature.pooling, column, feature.max_keys)
        served.setdefault(group, []).append(one)
        column += width
    return {group: tuple(ones) for group, ones in served.items()}


def refuse_duplicates(what: str, names: Sequence[str]) -> None:
    """Raises ConfigError with the names that are given twice."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ConfigError(f"{what} names must differ; given twice: {', '.join(twice)}")


def unknown_table(feature: FeatureConfig, known: Sequence[str]) -> str:
    """What is wrong with a feature whose table is not among those `known`."""
    return f"feature {feature.name!r}: no table {feature.table!r}; {nearest(feature.table, known)}"


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that was meant, or those there are."""
    near = difflib.get_close_matches(name, known, n=1)
    more = ", ..." if len(known) > _MOST_SHOWN else ""
    tables = ", ".join(known[:_MOST_SHOWN]) or "none"
    return f"did you mean {near[0]!r}?" if near else f"tables: {tables}{more}"
