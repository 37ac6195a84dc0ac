"""Bags of rows that came from other ranks: pooled as a store would, and their gradients summed."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock import _core
from penstock.embedding.host_store import core_plan
from penstock.embedding.sharded.bag_parts import IS_WEIGHTED, BagParts, names_of
from penstock.embedding.sharded.routes import Owners
from penstock.embedding.store import PoolingPlan
from penstock.types import KeyedJagged


class NumberedBags(Protocol):
    """The bags of one batch, whose keys have rows by number; copies of all that they need."""

    def pool(self, rows: Tensor, out: Tensor) -> None:
        """Pools rows [U, D] float32 into the plan's columns of `out` [B, plan.stride] float32.

        Columns of other features are left alone.
        """

    def sums(self, grad: Tensor) -> Tensor:
        """[U, D] float32: of each row the sum of its keys' shares of grad [B, plan.stride]."""


class Bags(Protocol):
    """Makes bags of rows by number."""

    def numbered(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, count: int
    ) -> NumberedBags:
        """Of a batch.

        Args:
          plan: not by key.
          batch: its keys are not looked at; its arrays may be changed afterwards.
          numbers: [N] int64, which row the key at each place has.
          count: U, of rows.
        """

    def split(self, plan: PoolingPlan, batch: KeyedJagged, owners: Owners, rank: int) -> BagParts:
        """Divides a batch among the owners of its keys.

        Args:
          plan: not by key, of some features.
          batch: checked, of some samples.
          owners: of the tables.
          rank: this one.
        """


class HostBags:
    """On the CPU. No number of threads changes a bit."""

    def __init__(self, dim: int, num_threads: int) -> None:
        """Of rows of `dim` columns."""
        self.dim = dim
        self.core = _core.BagSums(dim, num_threads)

    def numbered(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, count: int
    ) -> HostNumberedBags:
        """See `Bags.numbered`."""
        return HostNumberedBags(self, plan, batch, numbers, count)

    def split(self, plan: PoolingPlan, batch: KeyedJagged, owners: Owners, rank: int) -> BagParts:
        """See `Bags.split`."""
        keys, offsets, weights, message, counts, width, different, scales = self.core.split_bags(
            core_plan(plan),
            batch.values.numpy(),
            batch.offsets.numpy(),
            None if batch.weights is None else batch.weights.numpy(),
            batch.batch_size,
            owners.words.numpy(),
            owners.of_bucket.numpy(),
            owners.of_table.numpy(),
            owners.served(plan).places,
            owners.num_ranks,
            rank,
        )
        is_weighted = batch.weights is not None
        own = KeyedJagged(
            names_of(owners.served(plan).number(rank)),
            torch.from_numpy(keys),
            torch.from_numpy(offsets),
            torch.from_numpy(weights) if is_weighted else None,
            is_checked=True,
        )
        return BagParts(
            own,
            torch.from_numpy(message),
            torch.from_numpy(counts).view(owners.num_ranks, -1),
            width + (IS_WEIGHTED if is_weighted else 0),
            different,
            torch.from_numpy(scales).view(batch.batch_size, -1) if len(scales) else None,
        )


class HostNumberedBags:
    """See `NumberedBags`; sums are in the order of the batch."""

    def __init__(
        self, of: HostBags, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, count: int
    ) -> None:
        """See `Bags.numbered`."""
        self._of, self._count = of, count
        weights = None if batch.weights is None else batch.weights.numpy()
        self._bags = _core.NumberedBags(
            core_plan(plan),
            batch.offsets.numpy(),
            weights,
            batch.batch_size,
            numbers.numpy().astype(np.uint32),
            count,
            of.dim,
        )

    def pool(self, rows: Tensor, out: Tensor) -> None:
        """See `NumberedBags.pool`."""
        self._of.core.pool(self._bags, rows.numpy(), out.numpy())

    def sums(self, grad: Tensor) -> Tensor:
        """See `NumberedBags.sums`."""
        sums = np.empty((self._count, self._of.dim), dtype=np.float32)
        self._of.core.sum(self._bags, grad.detach().cpu().numpy(), sums)
        return torch.from_numpy(sums)
