"""Metrics by the values of a column: AUC within groups, and all metrics of the largest slices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.config import Hash
from penstock.data.columns.transforms import read_keys
from penstock.training.metrics.sample_metrics import SampleMetrics

MAX_GROUPED_SAMPLES = 1 << 22
"""Samples that a grouped AUC keeps; they take 20 bytes each, and 100 while it is computed."""
SLICES_DECIDED_AFTER = 1 << 18
"""Samples among which the largest slices are chosen."""
SLICE_BINS = 1 << 17
"""Different scores that each slice tells apart, see `BinaryMetrics`."""


class GroupedAUC:
    """Mean over the groups of the AUC among the samples of one group, weighted by their weight.

    Known as GAUC, weighted by impressions: a group is a user, say, and samples of two users are
    never compared. Groups whose labels are all of one class have no AUC and are left out, and so
    are samples whose group is missing; `share` says how much weight was counted.

    At most `max_samples` samples are kept. When more come, half of all groups are dropped, with
    all their samples, past and future; which ones is a function of the group's key, so the rest is
    a uniform sample of the groups whatever the order. State is additive.

    Source: arXiv:1706.06978 (DIN) section 5.2.
    """

    def __init__(self, max_samples: int = MAX_GROUPED_SAMPLES) -> None:
        self._max_samples = max_samples
        self._parts: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        self._kept = 0
        self._halvings = 0
        self._weight = 0.0

    def update(
        self, groups: pa.Array, logits: Tensor, labels: Tensor, weights: Tensor | None = None
    ) -> None:
        """Adds samples.

        Args:
          groups: [B] int64, text or bytes; null where a sample belongs to none.
          logits: [B] float32, finite.
          labels: [B] in {0, 1}.
          weights: [B] >= 0; None: 1 each.
        """
        is_text = not pa.types.is_integer(groups.type)
        keys, lengths, _ = read_keys(groups, [Hash()] if is_text else [], None)
        weight = np.ones(len(groups), np.float32) if weights is None else weights.numpy()
        self._weight += float(weight.sum(dtype=np.float64))
        label = labels.numpy()
        columns = np.stack((logits.numpy(), label * weight, (1 - label) * weight), axis=1)
        if lengths is not None:
            columns = columns[lengths > 0]
        self._add(keys, columns)

    def merge(self, other: GroupedAUC) -> None:
        """Adds all samples of `other`, which stays as it is."""
        self._weight += other._weight
        self._halvings = max(self._halvings, other._halvings)
        parts, self._parts, self._kept = [*self._parts, *other._parts], [], 0
        for keys, columns in parts:
            self._add(keys, columns)

    def compute(self) -> dict[str, float]:
        """The mean of all samples so far.

        Returns:
          auc: NaN where no group has both classes.
          groups: how many groups it is the mean of.
          share: weight of their samples over that of all samples.
        """
        if not self._parts:
            return {"auc": math.nan, "groups": 0, "share": 0.0}
        keys = np.concatenate([part[0] for part in self._parts])
        columns = np.concatenate([part[1] for part in self._parts])
        aucs, weights = _auc_by_group(keys, columns)
        counted = float(weights.sum())
        return {
            "auc": float((aucs * weights).sum()) / counted if counted else math.nan,
            "groups": aucs.size,
            "share": counted / self._weight if counted else 0.0,
        }

    def _add(self, keys: NDArray[np.int64], columns: NDArray[np.float32]) -> None:
        self._parts.append(self._drawn(keys, columns))
        self._kept += self._parts[-1][0].size
        while self._kept > self._max_samples:
            self._halvings += 1
            self._parts = [self._drawn(*part) for part in self._parts]
            self._kept = sum(keys.size for keys, _ in self._parts)

    def _drawn(
        self, keys: NDArray[np.int64], columns: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The samples of the groups that are still kept: 1 in 2 ** halvings."""
        if not self._halvings:
            return keys, columns
        # Shifting by 64 bits is undefined; nobody gets there but one group larger than the limit.
        is_kept = _draw(keys) >> np.uint64(64 - min(self._halvings, 63)) == 0
        is_kept &= self._halvings < 64
        return keys[is_kept], columns[is_kept]


class SliceMetrics:
    """All metrics of a task for the most frequent values of a column, and for the rest.

    The values are chosen among the first `SLICES_DECIDED_AFTER` samples: by number, equal ones by
    which came first. A missing value is one like others, named `(missing)`.

    Args:
      top: values with metrics of their own.
      make: empty metrics of one slice.
    """

    def __init__(self, top: int, make: Callable[[], SampleMetrics]) -> None:
        self._top = top
        self._make = make
        self._values: pa.Array | None = None
        self._slices: list[SampleMetrics] = []
        self._pending: list[tuple[pa.Array, Tensor, Tensor, Tensor]] = []
        self._num_pending = 0

    def update(
        self, groups: pa.Array, logits: Tensor, labels: Tensor, weights: Tensor | None = None
    ) -> None:
        """Adds samples; arguments as of `GroupedAUC.update`."""
        weight = torch.ones_like(labels) if weights is None else weights
        self._pending.append((groups, logits, labels, weight))
        self._num_pending += len(groups)
        if self._num_pending >= SLICES_DECIDED_AFTER:
            self._settle()

    def compute(self) -> dict[str, Any]:
        """The metrics of all samples so far.

        Returns:
          values: by name of the value, the largest slice first: what its metrics compute.
          rest: the same of all other samples.
        """
        self._settle()
        if self._values is None:
            return {"values": {}, "rest": self._make().compute()}
        names = [_name(value) for value in self._values.to_pylist()]
        *slices, rest = [one.compute() for one in self._slices]
        return {"values": dict(zip(names, slices, strict=True)), "rest": rest}

    def _settle(self) -> None:
        """Deals out the pending samples to their slices, many batches at a time."""
        if not self._pending:
            return
        groups = pa.concat_arrays([part[0] for part in self._pending])
        logits, labels, weights = (
            torch.cat(column) for column in list(zip(*self._pending, strict=True))[1:]
        )
        self._pending.clear()
        self._num_pending = 0
        if self._values is None:
            self._values = _most_frequent(groups[:SLICES_DECIDED_AFTER], self._top)
            self._slices = [self._make() for _ in range(len(self._values) + 1)]
        place = pc.fill_null(pc.index_in(groups, self._values), len(self._values))
        places = place.to_numpy(zero_copy_only=False).astype(np.int64)
        order = np.argsort(places, kind="stable")
        counts = np.bincount(places, minlength=len(self._slices))
        for metrics, rows in zip(self._slices, np.split(order, counts.cumsum()[:-1]), strict=True):
            chosen = torch.from_numpy(rows)
            metrics.update(logits[chosen], labels[chosen], weights[chosen])


def _most_frequent(groups: pa.Array, top: int) -> pa.Array:
    counted = pc.value_counts(groups)
    order = np.argsort(-counted.field("counts").to_numpy(), kind="stable")
    return counted.field("values").take(pa.array(order[:top]))


def _name(value: int | str | bytes | None) -> str:
    if value is None:
        return "(missing)"
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _draw(keys: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for each key that looks random: SplitMix64 of it."""
    mixed = keys.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _auc_by_group(
    keys: NDArray[np.int64], columns: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUC and weight of every group with both classes.

    Args:
      keys: [n] of the groups.
      columns: [n, 3] score, weight of the positive, weight of the negative.
    """
    if not keys.size:
        return np.empty(0), np.empty(0)
    order = np.lexsort((columns[:, 0], keys))
    keys, scores = keys[order], columns[order, 0]
    is_group = np.ones(keys.size, dtype=bool)
    is_group[1:] = keys[1:] != keys[:-1]
    is_run = is_group.copy()
    is_run[1:] |= scores[1:] != scores[:-1]
    # A run: samples of one group with equal scores, which count half against each other.
    runs = np.flatnonzero(is_run)
    positive = np.add.reduceat(columns[order, 1], runs, dtype=np.float64)
    negative = np.add.reduceat(columns[order, 2], runs, dtype=np.float64)
    groups = np.flatnonzero(is_group[runs])
    num_runs = np.diff(np.append(groups, runs.size))
    passed = np.cumsum(negative) - negative
    below = passed - np.repeat(passed[groups], num_runs)
    wins = np.add.reduceat(positive * (below + 0.5 * negative), groups)
    positives, negatives = np.add.reduceat(positive, groups), np.add.reduceat(negative, groups)
    has_both = (positives > 0) & (negatives > 0)
    pairs = positives[has_both] * negatives[has_both]
    return wins[has_both] / pairs, (positives + negatives)[has_both]
