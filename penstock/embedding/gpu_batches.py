"""What a GPU store makes of plans and batches: arrays on its device, and what a look-up leaves."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from penstock.embedding.store import PoolingPlan
from penstock.kernels.index import KeyBatch, Misses
from penstock.kernels.occurrences import Grouping
from penstock.kernels.plan import POOLING_CODES, DevicePlan, FeatureOnDevice
from penstock.types import KeyedJagged


class GpuLookup:
    """What an update needs of a look-up."""

    def __init__(self, batch: KeyedJagged, slots: Tensor, erase_version: int) -> None:
        self.batch = batch
        """On the store's device."""
        self.slots = slots
        """[N] int32 by position in the packed keys; -1: no row."""
        self.erase_version = erase_version
        """Slots hold as long as no row was erased since."""
        self.misses: Misses | None = None
        """Keys read without a row (`insert` was False)."""
        self.grouping: Grouping | None = None
        """Of the slots, made beforehand."""

    @cached_property
    def num_missing(self) -> int:
        """Keys read without a row; waits for the device."""
        return 0 if self.misses is None else int(self.misses.number)

    def found_again(self, slots: Tensor, erase_version: int) -> None:
        """Takes slots of a later search; every key that gets a row has one now."""
        self.slots, self.erase_version = slots, erase_version
        self.misses = self.grouping = None
        self.__dict__.pop("num_missing", None)


class PlanCache:
    """Plans on the device, each made once."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self._dim = dim
        self._device = device
        self._made: dict[tuple[PoolingPlan, int], DevicePlan] = {}

    def get(self, plan: PoolingPlan, num_packed: int) -> DevicePlan:
        """The plan for batches of `num_packed` features."""
        name = plan, num_packed
        if name not in self._made:
            features = [
                FeatureOnDevice(
                    feature.packed_feature,
                    feature.table,
                    POOLING_CODES[feature.pooling],
                    feature.column,
                    feature.max_keys or 0,
                )
                for feature in plan.features
            ]
            self._made[name] = DevicePlan.make(
                features,
                num_packed=num_packed,
                stride=plan.stride,
                dim=self._dim,
                device=self._device,
            )
        return self._made[name]


def on_device(batch: KeyedJagged, device: torch.device) -> KeyedJagged:
    """The batch on a device; copies from pinned memory are not waited for."""
    if batch.values.device == device:
        return batch
    weights = None if batch.weights is None else batch.weights.to(device, non_blocking=True)
    return replace(
        batch,
        values=batch.values.to(device, non_blocking=True),
        offsets=batch.offsets.to(device, non_blocking=True),
        weights=weights,
    )


def keys_of(plan: DevicePlan, batch: KeyedJagged) -> KeyBatch:
    """Keys and tables of a batch on the device."""
    return KeyBatch(batch.values, batch.offsets, plan.table_of_packed, batch.batch_size)
