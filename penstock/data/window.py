"""Decoded rows, and how batches are cut from them.

`Rows` is a decoded chunk, a `Window` joins chunks, `Samples` is a batch cut from it: numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from penstock import _core
from penstock.data.negatives import ItemRows, NegativeColumns, mixed_keys


class Bags(NamedTuple):
    """The bags of one feature of n rows."""

    values: NDArray[np.int64]
    """[N] keys, row after row."""
    offsets: NDArray[np.int64] | None
    """[n + 1]; None: one key a row."""
    weights: NDArray[np.float32] | None = None
    """[N], finite; None: each is 1."""


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


class Samples(NamedTuple):
    """The arrays of a batch, as `penstock.types.Batch` names them."""

    dense: NDArray[np.float32]
    values: NDArray[np.int64]
    offsets: NDArray[np.int64]
    key_weights: NDArray[np.float32] | None
    labels: NDArray[np.float32]
    weights: NDArray[np.float32] | None
    event_time: NDArray[np.int64] | None
    teacher: NDArray[np.float32] | None
    groups: Sequence[pa.Array]


class Window:
    """Stretches of several chunks as one run of rows, from which batches are cut."""

    items: NDArray[np.int64] | None
    """[num_rows] equal where the items are; None: no negatives are drawn."""

    def __init__(
        self,
        parts: Sequence[tuple[Rows, int, int]],
        negatives: NegativeColumns | None = None,
    ) -> None:
        """Joins the rows [start, stop) of each of `parts`, in order. Keys are not copied."""
        rows, starts, stops = zip(*parts, strict=True)

        def join(arrays: list[Any]) -> Any:
            if arrays[0] is None:
                return None
            if len(arrays) == 1:
                return arrays[0][starts[0] : stops[0]]
            return np.concatenate([a[i:j] for a, i, j in zip(arrays, starts, stops, strict=True)])

        self._dense = join([part.dense for part in rows])
        self._labels = join([part.labels for part in rows])
        self._weights = join([part.weights for part in rows])
        self._event_time = join([part.event_time for part in rows])
        self._teacher = join([part.teacher for part in rows])
        self._groups = [
            pa.concat_arrays([
                group.slice(i, j - i) for group, i, j in zip(column, starts, stops, strict=True)
            ])
            for column in zip(*(part.groups for part in rows), strict=True)
        ]
        self._bags = _core.JaggedWindow(
            [bags for part in rows for bags in part.bags], starts, stops
        )
        self._num_features = len(rows[0].bags)
        self._negatives = negatives
        drawing = [part.item_rows for part in rows if part.item_rows is not None]
        self.items = join([one.items for one in drawing]) if drawing else None
        self._cross_parts = [
            (join([values for values, _ in of_rows]), join([present for _, present in of_rows]))
            for of_rows in zip(*(one.parts for one in drawing), strict=True)
        ]
        self.num_rows = int(self._labels.shape[0])

    def batches(
        self,
        samples: NDArray[np.int64],
        batch_size: int,
        drawn: NDArray[np.int64] | None = None,
    ) -> Iterator[Samples]:
        """Copies the samples of those numbers, in that order, and cuts the copy into batches.

        All batches at once and feature by feature, so that each column stays in cache.

        Args:
          samples: [S] numbers of rows; with `drawn` of samples, see `negatives.py`.
          batch_size: samples of each batch but the last.
          drawn: row from which each sample of the window takes its item; None: rows are samples.
        """
        rows, items = samples, None
        of_items: tuple[bool, ...] = ()
        if drawn is not None:
            assert self._negatives is not None
            rows, items = samples // self._negatives.samples_per_row, drawn[samples]
            of_items = self._negatives.features
        cut = _Cut(
            *self._bags.cut(rows, batch_size, items, of_items),
            num_features=self._num_features,
            num_samples=len(rows),
            batch_size=batch_size,
        )

        def take(array: Any) -> Any:
            return None if array is None else array.take(rows, axis=0)

        dense = take(self._dense)
        if items is None:
            labels = take(self._labels)
        else:
            labels = self._take_items(samples, rows, items, dense, cut)
        weights, event_time, teacher = map(take, (self._weights, self._event_time, self._teacher))
        groups = [group.take(pa.array(rows)) for group in self._groups]

        for number, low in enumerate(range(0, len(rows), batch_size)):
            high = min(low + batch_size, len(rows))
            keys, offsets = cut.batch(number)
            yield Samples(
                dense[low:high],
                cut.values[keys],
                offsets,
                None if cut.weights is None else cut.weights[keys],
                labels[low:high],
                None if weights is None else weights[low:high],
                None if event_time is None else event_time[low:high],
                None if teacher is None else teacher[low:high],
                [group.slice(low, high - low) for group in groups],
            )

    def _take_items(
        self,
        samples: NDArray[np.int64],
        rows: NDArray[np.int64],
        items: NDArray[np.int64],
        dense: NDArray[np.float32],
        cut: _Cut,
    ) -> NDArray[np.float32]:
        """Puts the items' numbers and crosses in place of the rows' own; returns the labels."""
        negatives = self._negatives
        assert negatives is not None
        if negatives.numeric:
            numeric = list(negatives.numeric)
            dense[:, numeric] = self._dense[items[:, None], numeric]
        parts = iter(self._cross_parts)
        for one in negatives.mixed:
            keys = mixed_keys(one, list(islice(parts, len(one.of_item))), rows, items)
            cut.values[cut.places_of(one.feature)] = keys
        is_positive: NDArray[np.bool_] = samples % negatives.samples_per_row == 0
        return is_positive.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Bags of all batches, as `JaggedWindow.cut` gives them."""

    values: NDArray[np.int64]
    offsets: NDArray[np.int64] | None
    starts: NDArray[np.int64] | None
    weights: NDArray[np.float32] | None
    num_features: int
    num_samples: int
    batch_size: int

    def batch(self, number: int) -> tuple[slice, NDArray[np.int64]]:
        """Where the keys of a batch lie, and its offsets."""
        low = number * self.batch_size
        high = min(low + self.batch_size, self.num_samples)
        bags = self.num_features * (high - low)
        if self.offsets is None or self.starts is None:
            keys = slice(low * self.num_features, high * self.num_features)
            return keys, _one_key_offsets(bags)
        begin = low * self.num_features + number
        keys = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return keys, self.offsets[begin : begin + bags + 1]

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


@lru_cache(maxsize=16)
def _one_key_offsets(bags: int) -> NDArray[np.int64]:
    """Offsets of bags of one key; shared by all batches of that size."""
    return np.arange(bags + 1)
