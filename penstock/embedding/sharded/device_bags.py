"""`Bags` on a GPU: the kernels of look-ups and updates, on rows that came from other ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from penstock.embedding.gpu.batches import PlanCache
from penstock.embedding.gpu.gradients import sums_by_row
from penstock.embedding.sharded.bag_parts import BagParts, split_on_device
from penstock.embedding.sharded.routes import Owners
from penstock.embedding.store import PoolingPlan
from penstock.kernels.plan import DevicePlan
from penstock.kernels.pool import pooled_forward
from penstock.kernels.update.occurrences import GradientPart
from penstock.types import KeyedJagged


class DeviceBags:
    """On the current stream; without synchronisation, unless said otherwise."""

    def __init__(self, dim: int, device: torch.device, *, deterministic: bool) -> None:
        """Of rows of `dim` columns; deterministic: sums have the same bits each time."""
        self._plans = PlanCache(dim, device)
        self._deterministic = deterministic

    def numbered(
        self, plan: PoolingPlan, batch: KeyedJagged, numbers: Tensor, count: int
    ) -> DeviceNumberedBags:
        """See `Bags.numbered`."""
        on_gpu = self._plans.get(plan, len(batch.features))
        return DeviceNumberedBags(on_gpu, batch, numbers, count, deterministic=self._deterministic)

    def split(self, plan: PoolingPlan, batch: KeyedJagged, owners: Owners, rank: int) -> BagParts:
        """See `Bags.split`; waits for the device once, for the counts."""
        return split_on_device(plan, batch, owners, rank)


class DeviceNumberedBags:
    """See `NumberedBags`."""

    def __init__(
        self,
        plan: DevicePlan,
        batch: KeyedJagged,
        numbers: Tensor,
        count: int,
        *,
        deterministic: bool,
    ) -> None:
        """See `Bags.numbered`; see `DeviceBags`."""
        self._plan, self._count, self._deterministic = plan, count, deterministic
        weights = None if batch.weights is None else batch.weights.clone()
        self._batch = replace(batch, values=numbers, offsets=batch.offsets.clone(), weights=weights)
        self._slots = numbers.to(torch.int32)

    def pool(self, rows: Tensor, out: Tensor) -> None:
        """See `NumberedBags.pool`."""
        batch = self._batch
        pooled_forward(rows, self._plan, batch, self._slots, out, one_hot=batch.is_one_hot)

    def sums(self, grad: Tensor) -> Tensor:
        """See `NumberedBags.sums`."""
        part = GradientPart(self._batch, self._slots, grad.to(self._slots.device))
        exact = self._deterministic
        return sums_by_row(self._plan, [part], self._count, deterministic=exact)
