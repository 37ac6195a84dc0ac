"""`Bags` on a GPU: the kernels of look-ups and updates, on rows that came from other ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.embedding.gpu.batches import PlanCache
from penstock.embedding.gpu.gradients import sums_by_row
from penstock.embedding.store import PoolingPlan
from penstock.kernels.pool import pooled_forward
from penstock.kernels.update.occurrences import GradientPart
from penstock.types import KeyedJagged


class DeviceBags:
    """Without synchronisation, on the current stream."""

    def __init__(self, dim: int, device: torch.device, *, deterministic: bool) -> None:
        """Of rows of `dim` columns; deterministic: sums have the same bits each time."""
        self._plans = PlanCache(dim, device)
        self._deterministic = deterministic

    def pool(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, rows: Tensor, out: Tensor
    ) -> None:
        """See `Bags.pool`."""
        on_gpu = self._plans.get(plan, len(batch.features))
        slots, one_hot = numbers.to(torch.int32), batch.is_one_hot
        pooled_forward(rows, on_gpu, batch, slots, out, one_hot=one_hot)

    def sums(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, grad: Tensor, count: int
    ) -> Tensor:
        """See `Bags.sums`."""
        on_gpu = self._plans.get(plan, len(batch.features))
        part = GradientPart(batch, numbers.to(torch.int32), grad.to(numbers.device))
        return sums_by_row(on_gpu, [part], count, deterministic=self._deterministic)
