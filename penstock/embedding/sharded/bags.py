"""Bags of rows that came from other ranks: pooled as a store would, and their gradients summed."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock import _core
from penstock.embedding.host_store import core_plan
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
