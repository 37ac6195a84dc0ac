"""Bags of rows that came from other ranks: pooled as a store would, and their gradients summed."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock import _core
from penstock.embedding.host_store import core_plan
from penstock.embedding.store import PoolingPlan
from penstock.types import KeyedJagged


class Bags(Protocol):
    """Rows by number, for the keys of a batch."""

    def pool(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, rows: Tensor, out: Tensor
    ) -> None:
        """Pools rows into the plan's columns of `out`.

        Args:
          plan: not by key.
          batch: its keys are not looked at.
          numbers: [N] int64, which row the key at each place has.
          rows: [U, D] float32.
          out: [B, plan.stride] float32; columns of other features are left alone.
        """

    def sums(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, grad: Tensor, count: int
    ) -> Tensor:
        """[count, D] float32: of each row the sum of its keys' shares of grad [B, plan.stride]."""


class HostBags:
    """On the CPU. No number of threads changes a bit."""

    def __init__(self, dim: int, num_threads: int) -> None:
        """Of rows of `dim` columns."""
        self._dim = dim
        self._core = _core.BagSums(dim, num_threads)

    def pool(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, rows: Tensor, out: Tensor
    ) -> None:
        """See `Bags.pool`."""
        self._core.pool(*_arrays(plan, batch, numbers), rows.numpy(), out.numpy())

    def sums(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, grad: Tensor, count: int
    ) -> Tensor:
        """See `Bags.sums`; in the order of the batch."""
        sums = np.empty((count, self._dim), dtype=np.float32)
        self._core.sum(*_arrays(plan, batch, numbers), grad.detach().cpu().numpy(), sums)
        return torch.from_numpy(sums)


def _arrays(
    plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor
) -> tuple[_core.PoolingPlan, NDArray[Any], NDArray[Any] | None, int, NDArray[np.uint32]]:
    weights = None if batch.weights is None else batch.weights.numpy()
    numbered = numbers.numpy().astype(np.uint32)
    return core_plan(plan), batch.offsets.numpy(), weights, batch.batch_size, numbered
