"""How often values come and how numbers are spread, in bounded memory, vectorised.

`ValueCounts` knows each value up to a number of different ones, and estimates beyond;
`Quantiles` keeps a uniform sample. Neither knows columns or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Keys = NDArray[np.int64]
_Counts = NDArray[np.int64]


MEMORY_BYTES = 512 << 20
"""Of the counted values of all columns or tables together."""
_MOST_VALUES = 1 << 18
_VALUE_BYTES = 40
"""Of one counted value, between two merges."""


def affordable_values(columns: int) -> int:
    """Different values to count exactly in each of so many columns, within `MEMORY_BYTES`."""
    return max(1 << 12, min(_MOST_VALUES, MEMORY_BYTES // (_VALUE_BYTES * max(columns, 1))))


@dataclass(frozen=True)
class ValueSummary:
    """How accesses are spread over the values of a column or the keys of a table."""

    accesses: int
    """Values counted, missing ones not among them."""
    distinct: int
    """Different values; an estimate unless `is_exact`."""
    distinct_error: float
    """Half of the 95 % interval of `distinct`, relative to it; 0 where exact."""
    is_exact: bool
    """Whether `distinct`, `singletons` and the shares are counts, not estimates."""
    hottest: int | None
    """The most frequent value, or the hash of it that was counted; None: there is no value."""
    hottest_share: float
    """Its share of the accesses."""
    singletons: float
    """Share of the different values that came once."""
    top_shares: tuple[float, float]
    """Share of the accesses to the most frequent 1 % and 10 % of the different values, rounded up
    to whole values."""
    ranks: NDArray[np.float64]
    """[n] ranks by frequency, from 1, at equal ratios."""
    counts: NDArray[np.float64]
    """[n] how often the value of that rank came."""


class ValueCounts:
    """Counts 64-bit values.

    Exact while at most `max_values` different ones have come. From then on it keeps two things:

    - A sample of the values with their exact counts. A value belongs to it if its hash lies below a
      threshold, which is halved when the sample outgrows `max_values`. So a value is counted from
      its first occurrence or never, the sample is uniform over the different values, and
      their number is estimated with a relative standard error of about 1 / sqrt(values kept).
    - The most frequent values with counts that are too low by at most `accesses` / (`max_values` /
      4), as Misra and Gries have it (in batches: Agarwal et al., Mergeable summaries, 2012).

    Shares of the top are summed over the frequent values and, for all others, over the sample.

    At most about 80 bytes a value of `max_values`, and that only while two runs are merged.
    """

    def __init__(self, max_values: int) -> None:
        self.accesses = 0
        self._max_values = max_values
        self._most_hot = max(1, max_values // 4)
        self._halvings = 0
        self._sample = _Tally.empty()
        self._hot: _Tally | None = None
        """None: all values are in the sample."""
        self._hot_error = 0
        """How much too low a count of `_hot` may be."""
        self._pending: list[_Tally] = []
        self._num_pending = 0

    @property
    def is_exact(self) -> bool:
        """Whether every value is counted."""
        self._settle()
        return self._hot is None

    def add(self, values: _Keys, counts: _Counts | None = None) -> None:
        """Counts values.

        Args:
          values: [n] any 64 bits.
          counts: [n] how often each came; None: once.
        """
        if not values.size:
            return
        tally = _Tally.of(values, counts)
        self.accesses += int(tally.counts.sum())
        self._pending.append(tally)
        self._num_pending += tally.keys.size
        # As long as what is there already, so that a value is moved a logarithmic number of times.
        if self._num_pending > max(1 << 12, self._sample.keys.size):
            self._settle()

    def summary(self, points: int = 64) -> ValueSummary:
        """What is known by now; `points` is the number of ranks of the curve."""
        self._settle()
        counts, weights = self._ranked()
        passed = np.cumsum(weights)
        distinct = self._sample.keys.size << self._halvings
        hottest, count = self._hottest()
        accesses = max(self.accesses, 1)
        held = np.concatenate([[0.0], np.cumsum(counts * weights)])
        total = max(float(held[-1]), 1.0)
        places = np.concatenate([[0.0], passed])
        shares = [
            float(np.interp(np.ceil(part * distinct), places, held)) / total for part in (0.01, 0.1)
        ]
        kept = self._sample
        once = float((kept.counts == 1).sum()) / kept.keys.size if kept.keys.size else 0.0
        ranks = np.unique(np.geomspace(1, max(distinct, 1), points).round())
        if not counts.size:
            ranks = np.empty(0)
        at = np.searchsorted(passed, ranks).clip(max=counts.size - 1)
        drawn = 0.5**self._halvings
        return ValueSummary(
            accesses=self.accesses,
            distinct=distinct,
            distinct_error=1.96 * float(np.sqrt((1 - drawn) / max(kept.keys.size, 1))),
            is_exact=self._hot is None,
            hottest=hottest,
            hottest_share=count / accesses,
            singletons=once,
            top_shares=(shares[0], shares[1]),
            ranks=ranks,
            counts=counts[at],
        )

    def sorted_values(self) -> tuple[_Keys, _Counts] | None:
        """All values in ascending order, and how often each came; None: not all are known."""
        self._settle()
        if self._hot is not None:
            return None
        return self._sample.keys, self._sample.counts

    def share_within(self, other: ValueCounts) -> float:
        """Share of the different values of this one that are in the other one too, estimated."""
        self._settle()
        other._settle()
        halvings = max(self._halvings, other._halvings)
        mine = self._sample.drawn(halvings).keys
        found = np.isin(mine, other._sample.drawn(halvings).keys, assume_unique=True)
        return float(found.mean()) if mine.size else 0.0

    def _settle(self) -> None:
        """Merges what is pending; draws a smaller sample where it has become too many."""
        if not self._pending:
            return
        fresh = _Tally.merged(self._pending)
        self._pending.clear()
        self._num_pending = 0
        if self._hot is not None:
            self._count_hot([self._hot, fresh])
        self._sample = _Tally.merged([self._sample, fresh.drawn(self._halvings)])
        if self._sample.keys.size > self._max_values and self._hot is None:
            self._count_hot([self._sample])
        while self._sample.keys.size > self._max_values:
            self._halvings += 1
            self._sample = self._sample.drawn(self._halvings)

    def _count_hot(self, tallies: Sequence[_Tally]) -> None:
        joined = _Tally.merged(tallies)
        if joined.keys.size > self._most_hot:
            place = joined.keys.size - self._most_hot - 1
            # Every count sinks by the largest one that is dropped, so at least `_most_hot` + 1
            # accesses vanish with each unit of the error.
            sunk = int(np.partition(joined.counts, place)[place])
            self._hot_error += sunk
            stays = joined.counts > sunk
            joined = _Tally(joined.keys[stays], joined.counts[stays] - sunk)
        self._hot = joined

    def _frequent(self) -> _Tally:
        """Frequent values whose counts are known within an eighth or so."""
        if self._hot is None:
            return _Tally.empty()
        is_sure = self._hot.counts >= 8 * self._hot_error
        keys, counts = self._hot.keys[is_sure], self._hot.counts[is_sure] + self._hot_error // 2
        # Of those that happen to be in the sample, the exact count is known.
        if self._sample.keys.size:
            place = np.searchsorted(self._sample.keys, keys).clip(max=self._sample.keys.size - 1)
            is_sampled = self._sample.keys[place] == keys
            counts = np.where(is_sampled, self._sample.counts[place], counts)
        return _Tally(keys, counts)

    def _ranked(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Counts in descending order, and how many values each stands for."""
        frequent = self._frequent()
        rest = ~np.isin(self._sample.keys, frequent.keys, assume_unique=True)
        counts = np.concatenate([frequent.counts, self._sample.counts[rest]]).astype(np.float64)
        weights = np.ones(counts.size)
        weights[frequent.keys.size :] = 2.0**self._halvings
        order = np.argsort(-counts, kind="stable")
        return counts[order], weights[order]

    def _hottest(self) -> tuple[int | None, int]:
        frequent = self._frequent()
        known = frequent if frequent.keys.size else self._hot or self._sample
        if not known.keys.size:
            return None, 0
        place = int(known.counts.argmax())
        return int(known.keys[place]), int(known.counts[place])


@dataclass(frozen=True)
class _Tally:
    """Different values in ascending order, and how often each came."""

    keys: _Keys
    counts: _Counts

    @classmethod
    def empty(cls) -> _Tally:
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    @classmethod
    def of(cls, values: _Keys, counts: _Counts | None = None) -> _Tally:
        if counts is None:
            keys, found = np.unique(values, return_counts=True)
            return cls(keys, found.astype(np.int64, copy=False))
        order = np.argsort(values, kind="stable")
        keys = values[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        return cls(keys[first], np.add.reduceat(counts[order], first))

    @classmethod
    def merged(cls, parts: Sequence[_Tally]) -> _Tally:
        parts = [part for part in parts if part.keys.size]
        if len(parts) < 2:
            return parts[0] if parts else cls.empty()
        keys = np.concatenate([part.keys for part in parts])
        return cls.of(keys, np.concatenate([part.counts for part in parts]))

    def drawn(self, halvings: int) -> _Tally:
        """The values whose hash lies in the lowest 1 of 2 ** halvings parts."""
        if not halvings:
            return self
        kept = mix(self.keys) >> np.uint64(64 - halvings) == 0
        return _Tally(self.keys[kept], self.counts[kept])


def mix(keys: _Keys) -> NDArray[np.uint64]:
    """A number for each key that looks random and differs for different keys: SplitMix64 of it."""
    mixed = keys.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Quantiles:
    """Quantiles of a stream of numbers, from a uniform sample of at most `size` of them.

    Exact while no more have come. Otherwise the rank of a quantile is off by less than
    1 / sqrt(`size`) (two standard errors, at the median), whatever the numbers are.
    """

    def __init__(self, size: int = 1 << 16, seed: int = 0) -> None:
        self.count = 0
        self._size = size
        self._random = np.random.default_rng(seed)
        # The numbers with the lowest priorities are the sample.
        self._numbers: list[NDArray[np.float64]] = []
        self._priorities: list[NDArray[np.float64]] = []
        self._kept = 0
        self._below = 1.0

    @property
    def is_exact(self) -> bool:
        """Whether every number is in the sample."""
        return self.count <= self._size

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Adds numbers [n]; NaN must not be among them."""
        self.count += numbers.size
        priorities = self._random.random(numbers.size)
        drawn = priorities < self._below
        self._numbers.append(numbers[drawn])
        self._priorities.append(priorities[drawn])
        self._kept += int(drawn.sum())
        if self._kept > 2 * self._size:
            self._shrink()

    def at(self, shares: Sequence[float]) -> list[float]:
        """The numbers below which `shares` of the numbers lie; empty: there are none.

        Each is a number that came, as near in rank as there is.
        """
        if self._kept > self._size:
            self._shrink()
        if not self._kept:
            return []
        numbers = np.concatenate(self._numbers)
        return [float(one) for one in np.quantile(numbers, shares, method="inverted_cdf")]

    def _shrink(self) -> None:
        numbers, priorities = np.concatenate(self._numbers), np.concatenate(self._priorities)
        lowest = np.argpartition(priorities, self._size)[: self._size]
        # In the order in which they came, so that the sample does not depend on the partition.
        lowest.sort()
        self._numbers, self._priorities = [numbers[lowest]], [priorities[lowest]]
        self._kept = self._size
        self._below = float(self._priorities[0].max())
