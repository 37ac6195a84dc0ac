"""Negative samples for logs that hold positives alone: from which row each takes its item.

Of a block of n rows, sample `r * (1 + per_positive)` is row r itself, the samples after it are its
negatives. A negative is two rows: its own, and one from which the item's columns are taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from penstock.config import CrossedFeature, Negatives
from penstock.data.columns.checks import is_one_key, nearest
from penstock.data.columns.transforms import CrossPart, cross, cross_part, cross_parts
from penstock.errors import ConfigError, DataError, JobNote


@dataclass(frozen=True, slots=True)
class MixedCross:
    """A cross of columns of the item with others: its key exists only for the pair of rows."""

    config: CrossedFeature
    feature: int
    """Its number in `Columns.feature_names`."""
    of_item: tuple[bool, ...]
    """Which of its columns are the item's."""


@dataclass(frozen=True, slots=True)
class NegativeColumns:
    """What is drawn, and which inputs are the item's."""

    per_positive: int
    candidates: Literal["popularity", "uniform"]
    item: str
    """The column that names the item."""
    numeric: tuple[int, ...]
    """Columns of `Batch.dense` that are the item's."""
    features: tuple[bool, ...]
    """Of each of `Columns.feature_names`, whether it is the item's."""
    mixed: tuple[MixedCross, ...]
    user: str | None = None
    """The column that names whose items are spared; None: those of the row itself alone."""

    @property
    def samples_per_row(self) -> int:
        """The row itself and its negatives."""
        return 1 + self.per_positive


def negative_columns(
    config: Negatives,
    numeric: Sequence[str],
    features: Sequence[str],
    crosses: Sequence[CrossedFeature],
    schema: pa.Schema,
    origin: str,
    *,
    of_one_key: Sequence[str] = (),
) -> NegativeColumns:
    """Finds which inputs are the item's.

    Args:
      config: what is wanted.
      numeric: columns of `Batch.dense`, in order.
      features: columns that are features, in order.
      crosses: the features after them.
      schema: of the source.
      origin: names the source in errors.
      of_one_key: those of `features` that have one key a row.

    Raises:
      ConfigError: a column is no input, or all inputs are the item's.
      DataError: a column is missing, or the first one cannot name the item.
    """
    inputs = {*numeric, *features, *(name for one in crosses for name in one.columns)}
    for name in config.columns:
        if name not in schema.names:
            raise DataError(
                f"{origin}: no column {name!r} (data.negatives){nearest(name, schema.names)}"
            )
        if name not in inputs:
            raise ConfigError(
                f"data.negatives.columns: {name!r} is no input of the model, so it makes no "
                "difference of which row it is; list it under `features` or data.numeric, or "
                "remove it"
            )
    item = config.columns[0]
    kind = schema.field(item).type
    if not is_one_key(kind):
        raise DataError(
            f"{origin}: column {item!r} is {kind}; the first of data.negatives.columns names the "
            "item, by an integer or text a row; put another one first"
        )
    of_cross = [tuple(name in config.columns for name in one.columns) for one in crosses]
    of_features = [name in config.columns for name in features]
    of_numeric = [name in config.columns for name in numeric]
    if all([*of_features, *of_numeric, *map(all, of_cross)]):
        raise ConfigError(
            "data.negatives.columns: these are all inputs, so that a negative would be another "
            "row's positive; leave out what belongs to the user or the moment"
        )
    return NegativeColumns(
        per_positive=config.per_positive,
        candidates=config.candidates,
        item=item,
        numeric=tuple(place for place, whether in enumerate(of_numeric) if whether),
        features=(*of_features, *map(all, of_cross)),
        mixed=tuple(
            MixedCross(one, len(features) + place, which)
            for place, (one, which) in enumerate(zip(crosses, of_cross, strict=True))
            if any(which) and not all(which)
        ),
        user=_user(config, of_one_key, schema, origin),
    )


def _user(
    config: Negatives, of_one_key: Sequence[str], schema: pa.Schema, origin: str
) -> str | None:
    """The column that names the user, given or found."""
    if config.user is False:
        return None
    if config.user is None:
        found = [name for name in of_one_key if name not in config.columns]
        if len(found) != 1:
            return None
        warnings.warn(
            f"data.negatives.user: taken to be {found[0]!r}, the only feature of one key a row "
            "that is not the item's, so its items in the block are no negatives; say which column "
            "it is, or false",
            JobNote,
            stacklevel=2,
        )
        return found[0]
    if config.user not in schema.names:
        raise DataError(
            f"{origin}: no column {config.user!r} (data.negatives.user)"
            f"{nearest(config.user, schema.names)}"
        )
    kind = schema.field(config.user).type
    if not is_one_key(kind):
        raise DataError(
            f"{origin}: column {config.user!r} is {kind}; data.negatives.user names the user, by "
            "an integer or text a row; name another column"
        )
    return config.user


class ItemRows(NamedTuple):
    """What drawing needs of decoded rows, besides the inputs. n rows."""

    items: NDArray[np.int64]
    """[n] equal where the items are."""
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]]
    """[n] each: values of the columns of the mixed crosses, cross by cross, and which rows have
    one."""
    users: tuple[NDArray[np.int64], NDArray[np.bool_]] | None = None
    """[n] each: equal where the users are, and which rows have one; None: nobody asks."""


def item_rows(table: pa.Table, columns: NegativeColumns) -> ItemRows:
    """Reads the item and the columns of mixed crosses of a chunk."""
    names = [name for one in columns.mixed for name in one.config.columns]
    return ItemRows(
        cross([table.column(columns.item)], 0, None),
        [_with_presence(cross_part(table.column(name))) for name in names],
        None if columns.user is None else _with_presence(cross_part(table.column(columns.user))),
    )


def _with_presence(part: CrossPart) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    n = len(part.values)
    if part.valid is None:
        return part.values, np.ones(n, dtype=bool)
    bits = np.unpackbits(part.valid, count=part.first_bit + n, bitorder="little")
    return part.values, bits[part.first_bit :].astype(bool)


_BUCKETS = 1_021


def joined_items(parts: Sequence[tuple[ItemRows, int, int]]) -> ItemRows:
    """Items and users of the rows [start, stop) of each of `parts`, in order; at least one."""
    users = [
        (one.users[0][start:stop], one.users[1][start:stop])
        for one, start, stop in parts
        if one.users is not None
    ]
    return ItemRows(
        np.concatenate([one.items[start:stop] for one, start, stop in parts]),
        (),
        (np.concatenate([one[0] for one in users]), np.concatenate([one[1] for one in users]))
        if users
        else None,
    )


def can_draw(rows: ItemRows) -> bool:
    """Whether there is a negative for each of n >= 1 rows, so that `draw_rows` raises nothing."""
    if rows.users is None:
        return bool((rows.items != rows.items[0]).any())
    values, present = rows.users
    # Nearly always some of the rows have more items than any user has rows: no need to sort them.
    most = int(np.bincount(values[present] % _BUCKETS, minlength=1).max())
    if len(np.unique(rows.items[: 2 * most + 16])) > max(most, 1):
        return True
    _, item, counts = np.unique(rows.items, return_inverse=True, return_counts=True)
    return bool(_without_spared(item, counts, rows.users, len(item)).most.all())


def draw_rows(
    rows: ItemRows, columns: NegativeColumns, seed: Sequence[int], where: str
) -> NDArray[np.int64]:
    """Draws the rows from which the samples of a block take their item.

    The negatives of a row are independent of each other and may repeat. `popularity`: every row of
    the block whose item is not spared is as likely as any other; `uniform`: every such item is, and
    is taken from the first row that has it. Spared are the items that the row's user has in the
    block; of a row without a user, its own. No draw is repeated, so none can go on for ever: a
    number is drawn among the rows (or items) that remain without those.

    Args:
      rows: items and users of the block's n rows.
      columns: how many are drawn, and how.
      seed: the result is a pure function of it and `rows`.
      where: the block in words, for the error.

    Returns:
      [n * samples_per_row] row numbers; of sample `r * samples_per_row` it is r.

    Raises:
      DataError: all rows have one item, or a user has all items.
    """
    n, drawn_per_row = len(rows.items), columns.per_positive
    distinct, first, item, counts = np.unique(
        rows.items, return_index=True, return_inverse=True, return_counts=True
    )
    if len(distinct) < 2:
        raise DataError(
            f"{where}: all {n} rows have one value of {columns.item!r}, so no negative can be "
            "drawn among them; raise data.shuffle.block_rows, or shuffle the file"
        )
    philox = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(1,)))
    bits = philox.random_raw(n * drawn_per_row).reshape(n, drawn_per_row)
    if columns.candidates == "uniform":
        candidates, sizes = first, np.ones(len(distinct), dtype=np.int64)
    else:
        candidates, sizes = np.argsort(item, kind="stable"), counts
    left = _without_spared(item, sizes, rows.users, len(candidates))
    if not left.most.all():
        row = int(np.argmin(left.most))
        raise DataError(
            f"{where}: the value of {columns.user!r} in row {row} of these has all "
            f"{len(distinct):,} values of {columns.item!r} that there are, so no negative can be "
            "drawn for it; raise data.shuffle.block_rows, shuffle the file, or set "
            "data.negatives.user: false"
        )
    drawn = _below(bits, left.most.astype(np.uint64)[:, None])
    taken = candidates[left.place(drawn)]
    return np.concatenate([np.arange(n)[:, None], taken], axis=1).reshape(-1)


class _Left(NamedTuple):
    """What is left of candidates in the order of their items, for each of n rows."""

    most: NDArray[np.int64]
    """[n] candidates that are left."""
    spares: NDArray[np.int64]
    """[n] group of spared items of each row."""
    stride: int
    """More than there are candidates."""
    bounds: NDArray[np.int64]
    """[spared items] ascending: group * stride + how many candidates are left before the item."""
    skipped: NDArray[np.int64]
    """[spared items + groups] a group's candidates of its first 0, 1, ... spared items."""

    def place(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n, m] numbers among those that are left, of each row, to numbers among all."""
        group = self.spares[:, None]
        wanted = group * self.stride + numbers
        if len(self.bounds) == len(self.skipped) // 2:  # one of each group: no search
            passed = group + (wanted >= self.bounds[group])
        else:
            passed = np.searchsorted(self.bounds, wanted, side="right")
        places: NDArray[np.int64] = numbers + self.skipped[passed + group]
        return places


def _without_spared(
    item: NDArray[np.int64],
    sizes: NDArray[np.int64],
    users: tuple[NDArray[np.int64], NDArray[np.bool_]] | None,
    candidates: int,
) -> _Left:
    """Leaves out the candidates of the items that each row spares.

    Args:
      item: [n] number of each row's item.
      sizes: [items] candidates of each.
      users: of the rows, as in `ItemRows`.
      candidates: of all items.
    """
    num_items = len(sizes)
    if users is None:
        spares, group = item, np.arange(num_items)
        spared = group
    else:
        values, present = users
        # A row of nobody spares the same as all others of its item, as if that were a user.
        user = np.unique(values, return_inverse=True)[1]
        spares = np.unique(np.where(present, num_items + user, item), return_inverse=True)[1]
        pairs = np.unique(spares * num_items + item)
        group, spared = pairs // num_items, pairs % num_items
    begins = np.searchsorted(group, np.arange(group[-1] + 1))
    total = np.concatenate([[0], np.cumsum(sizes[spared])])
    before = total[:-1] - total[begins][group]
    first_candidate = np.cumsum(sizes) - sizes
    stride = candidates + 1
    skipped = np.insert(total[1:] - total[begins][group], begins, 0)
    ends = np.append(begins[1:], len(group))
    return _Left(
        most=(candidates - (total[ends] - total[begins]))[spares],
        spares=spares,
        stride=stride,
        bounds=group * stride + first_candidate[spared] - before,
        skipped=skipped,
    )


def _below(bits: NDArray[np.uint64], limits: NDArray[np.uint64] | np.uint64) -> NDArray[np.int64]:
    """Random numbers in [0, limit) of random bits.

    Limits are below 2^32; a number is off its fair share by less than limit / 2^32 of it.
    """
    half = np.uint64(32)
    return (((bits >> half) * limits) >> half).view(np.int64)


def mixed_keys(
    one: MixedCross,
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]],
    rows: NDArray[np.int64],
    drawn: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Keys of a cross whose columns come from two rows.

    Args:
      one: the cross.
      parts: values and presence [n] of each of its columns.
      rows: [S] the samples' own rows.
      drawn: [S] the rows of their items.

    Returns:
      [S]
    """
    taken = []
    for (values, present), of_item in zip(parts, one.of_item, strict=True):
        at = drawn if of_item else rows
        valid = np.packbits(present[at], bitorder="little")
        taken.append(CrossPart(values[at], valid, 0))
    return cross_parts(taken, one.config.seed, one.config.buckets)
