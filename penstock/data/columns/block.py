"""Decoded rows, and how batches are cut from them.

`Rows` is a decoded chunk, a `Block` joins chunks, `Samples` is a batch cut from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, repeat
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock import _core
from penstock.data.columns.checks import is_text
from penstock.data.columns.negatives import ItemRows, NegativeColumns, mixed_keys


class Bags(NamedTuple):
    """The bags of one feature of n rows."""

    values: NDArray[np.int64]
    """[N] keys, row after row."""
    offsets: NDArray[np.int64] | None
    """[n + 1]; None: one key a row."""
    weights: NDArray[np.float32] | None = None
    """[N], finite; None: each is 1."""

    @property
    def key_bytes(self) -> int:
        """Of a key and its weight."""
        return 8 if self.weights is None else 12


@dataclass(frozen=True, slots=True)
class Rows:
    """Decoded rows of one chunk. n rows."""

    dense: NDArray[np.float32]
    """[n, numeric columns], finite."""
    bags: Sequence[Bags]
    """Of each feature."""
    labels: NDArray[np.float32]
    """[n], or [n, L] of several labels; NaN where one is missing."""
    weights: NDArray[np.float32] | None
    event_time: NDArray[np.int64] | None
    """[n] ms since 1970 UTC."""
    teacher: NDArray[np.float32] | None
    groups: Sequence[pa.Array] = ()
    """[n] of each of `Columns.groups`."""
    item_rows: ItemRows | None = None
    """Where negatives are drawn."""

    @property
    def num_rows(self) -> int:
        """How many rows there are (n)."""
        return int(self.labels.shape[0])

    def memory(self, start: int, stop: int) -> int:
        """Memory of the rows [start, stop), in bytes, as `memory_before` counts it."""
        size = (stop - start) * self._fixed_row_bytes
        for bags in self.bags:
            if bags.offsets is not None:
                size += int(bags.offsets[stop] - bags.offsets[start]) * bags.key_bytes
        return size + sum(
            int(pc.sum(pc.binary_length(group.slice(start, stop - start))).as_py() or 0)
            for group in self.groups
            if is_text(group.type)
        )

    def memory_before(self, start: int, stop: int) -> NDArray[np.int64]:
        """[stop - start + 1] bytes of memory of the first 0, 1, ... of the rows [start, stop).

        A function of the values alone: not of how the rows came to be chunks.
        """
        sizes = np.arange(stop - start + 1, dtype=np.int64) * self._fixed_row_bytes
        for bags in self.bags:
            if bags.offsets is not None:
                keys = bags.offsets[start : stop + 1] - bags.offsets[start]
                sizes += keys * bags.key_bytes
        for group in self.groups:
            if is_text(group.type):
                lengths = pc.binary_length(group.slice(start, stop - start)).fill_null(0)
                sizes[1:] += np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
        return sizes

    @property
    def _fixed_row_bytes(self) -> int:
        """Of each row, whatever its lists and texts hold."""
        arrays = (self.dense, self.labels, self.weights, self.event_time, self.teacher)
        size = sum(a.itemsize * math.prod(a.shape[1:]) for a in arrays if a is not None)
        # A bag has an offset, even where those of a chunk are left out.
        size += sum(8 + (bags.offsets is None) * bags.key_bytes for bags in self.bags)
        if self.item_rows is not None:
            size += 8 + 9 * (len(self.item_rows.parts) + (self.item_rows.users is not None))
        return size + 8 * len(self.groups)


_Present: TypeAlias = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""[n] values, and which rows have one."""


class Samples(NamedTuple):
    """The tensors of a batch, as `penstock.types.Batch` names them."""

    dense: Tensor
    values: Tensor
    offsets: Tensor
    key_weights: Tensor | None
    labels: Tensor
    weights: Tensor | None
    event_time: Tensor | None
    teacher: Tensor | None
    groups: Sequence[pa.Array]


def no_samples(rows: Rows) -> Samples:
    """A batch without a sample, of the types that `rows`, which are none, have."""

    def none(array: NDArray[Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array.copy())

    has_weights = any(bags.weights is not None for bags in rows.bags)
    return Samples(
        torch.from_numpy(rows.dense.copy()),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(0) if has_weights else None,
        torch.from_numpy(rows.labels.copy()),
        none(rows.weights),
        none(rows.event_time),
        none(rows.teacher),
        rows.groups,
    )


class Block:
    """Stretches of several chunks as one run of rows, from which batches are cut."""

    num_rows: int
    item_rows: ItemRows | None
    """What drawing needs of its rows; None: no negatives are drawn."""

    def __init__(
        self,
        parts: Sequence[tuple[Rows, int, int]],
        negatives: NegativeColumns | None = None,
    ) -> None:
        """Joins the rows [start, stop) of each of `parts`, in order. Next to nothing is copied."""
        self._rows, starts, stops = zip(*parts, strict=True)
        self.num_rows = sum(stops) - sum(starts)
        self._num_features = len(self._rows[0].bags)
        self._bags = _core.JaggedBlock(
            [bags for part in self._rows for bags in part.bags], starts, stops
        )

        def join(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
            stretches = [a[i:j] for a, i, j in zip(arrays, starts, stops, strict=True)]
            return np.concatenate(stretches) if len(stretches) > 1 else stretches[0]

        self._groups = [
            pa.concat_arrays([
                group.slice(i, j - i) for group, i, j in zip(column, starts, stops, strict=True)
            ])
            for column in zip(*(part.groups for part in self._rows), strict=True)
        ]
        self._negatives = negatives
        drawing = [part.item_rows for part in self._rows if part.item_rows is not None]

        def join_pairs(of_rows: Sequence[_Present]) -> _Present:
            values, present = zip(*of_rows, strict=True)
            return join(values), join(present)

        users = [one.users for one in drawing if one.users is not None]
        self._cross_parts = [
            join_pairs(of_rows) for of_rows in zip(*(one.parts for one in drawing), strict=True)
        ]
        self.item_rows = (
            ItemRows(
                join([one.items for one in drawing]),
                self._cross_parts,
                join_pairs(users) if users else None,
            )
            if drawing
            else None
        )

    def batches(
        self,
        samples: NDArray[np.int64] | range,
        batch_size: int,
        drawn: NDArray[np.int64] | None = None,
    ) -> Iterator[Samples]:
        """Copies the samples of those numbers, in that order, and cuts the copy into batches.

        All batches at once and feature by feature, so that each column stays in cache.

        Args:
          samples: [S] numbers of rows; with `drawn` of samples, see `negatives.py`. A range (of
            step 1) is copied faster.
          batch_size: samples of each batch but the last.
          drawn: row from which each sample of the block takes its item; None: rows are samples.
        """
        if drawn is not None:
            return self._batches_with_negatives(np.asarray(samples), batch_size, drawn)
        if isinstance(samples, range):
            places = self._bags.locate_run(samples.start, len(samples))
        else:
            places = self._bags.locate(samples)
        cut = self._cut(places, batch_size)
        dense, labels = self._take(places, "dense"), self._take(places, "labels")
        assert dense is not None and labels is not None
        return self._split(places, samples, cut, dense, labels)

    def _batches_with_negatives(
        self, samples: NDArray[np.int64], batch_size: int, drawn: NDArray[np.int64]
    ) -> Iterator[Samples]:
        negatives = self._negatives
        assert negatives is not None
        rows, items = samples // negatives.samples_per_row, drawn[samples]
        places, of_items = self._bags.locate(rows), self._bags.locate(items)
        cut = self._cut(places, batch_size, of_items, negatives.features)
        dense = self._take(places, "dense")
        assert dense is not None
        if negatives.numeric:
            numeric = list(negatives.numeric)
            other = self._take(of_items, "dense")
            assert other is not None
            dense[:, numeric] = other[:, numeric]
        parts = iter(self._cross_parts)
        for one in negatives.mixed:
            keys = mixed_keys(one, list(islice(parts, len(one.of_item))), rows, items)
            cut.values[cut.places_of(one.feature)] = keys
        is_positive: NDArray[np.bool_] = samples % negatives.samples_per_row == 0
        return self._split(places, rows, cut, dense, is_positive.astype(np.float32))

    def _cut(
        self,
        places: _core.Places,
        batch_size: int,
        others: _core.Places | None = None,
        of_others: Sequence[bool] = (),
    ) -> _Cut:
        return _Cut(
            *self._bags.cut(places, batch_size, others, of_others),
            num_features=self._num_features,
            num_samples=len(places),
            batch_size=batch_size,
        )

    def _take(self, places: _core.Places, name: str) -> NDArray[Any] | None:
        """The rows of one of the plain arrays of `Rows`; None if there is none."""
        parts = [getattr(rows, name) for rows in self._rows]
        if parts[0] is None:
            return None
        return self._bags.take(places, parts)

    def _split(
        self,
        places: _core.Places,
        rows: NDArray[np.int64] | range,
        cut: _Cut,
        dense: NDArray[np.float32],
        labels: NDArray[np.float32],
    ) -> Iterator[Samples]:
        """Cuts arrays of all samples into those of batches."""
        size = cut.batch_size

        def split_others(name: str) -> Iterable[Tensor | None]:
            array = self._take(places, name)
            return repeat(None) if array is None else split(array, size)

        of_all = [
            group.slice(rows.start, len(rows))
            if isinstance(rows, range)
            else group.take(pa.array(rows))
            for group in self._groups
        ]
        groups = (
            [group.slice(low, size) for group in of_all] for low in range(0, len(places), size)
        )
        weights, event_time, teacher = map(split_others, ("weights", "event_time", "teacher"))
        columns = (split(dense, size), *cut.split(), split(labels, size))
        return map(Samples, *columns, weights, event_time, teacher, groups)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Bags of all batches, as `JaggedBlock.cut` gives them."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64] | None
    starts: NDArray[np.int64] | None
    weights: NDArray[np.float32] | None
    num_features: int
    num_samples: int
    batch_size: int

    def split(self) -> tuple[Iterable[Tensor], Iterable[Tensor], Iterable[Tensor | None]]:
        """Keys, offsets and weights (or None) of each batch."""
        lows = np.arange(0, self.num_samples, self.batch_size)
        bags = np.minimum(self.num_samples - lows, self.batch_size) * self.num_features
        if self.offsets is None or self.starts is None:
            sizes = bags.tolist()
            offsets: Iterable[Tensor] = map(_one_key_offsets, sizes)
        else:
            sizes = np.diff(self.starts).tolist()
            offsets = split(self.offsets, (bags + 1).tolist())
        weights = repeat(None) if self.weights is None else split(self.weights, sizes)
        return split(self.values, sizes), offsets, weights

    def places_of(self, feature: int) -> NDArray[np.int64]:
        """[num_samples] where the keys of a feature of one key a bag lie in `values`."""
        lows = np.arange(0, self.num_samples, self.batch_size)
        sizes = np.minimum(self.num_samples - lows, self.batch_size)
        first_bags = lows * self.num_features + feature * sizes
        if self.offsets is None or self.starts is None:
            firsts = first_bags
        else:
            firsts = self.starts[:-1] + self.offsets[first_bags + np.arange(len(lows))]
        return np.repeat(firsts - lows, sizes) + np.arange(self.num_samples)


def split(array: NDArray[Any], sizes: int | list[int]) -> tuple[Tensor, ...]:
    """Views of an array, as tensors: of stretches of one size or of `sizes`."""
    parts: tuple[Tensor, ...] = torch.split(torch.from_numpy(array), sizes)
    return parts


@lru_cache(maxsize=16)
def _one_key_offsets(bags: int) -> Tensor:
    """Offsets of bags of one key; shared by all batches of that size."""
    return torch.arange(bags + 1)
