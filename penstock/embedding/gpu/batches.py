"""What a GPU store makes of plans and batches: arrays on its device, and what a look-up leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from penstock.config import TableConfig
from penstock.embedding.rules.optimizer import Hypers
from penstock.embedding.store import PooledLookup, PoolingPlan, own_copy
from penstock.errors import ConfigError
from penstock.kernels.index.find import Misses
from penstock.kernels.index.index import KeyBatch
from penstock.kernels.plan import POOLING_CODES, DevicePlan, FeatureOnDevice
from penstock.kernels.update.group import group_keys
from penstock.kernels.update.occurrences import GradientPart, Grouping
from penstock.types import KeyedJagged

_MOST_HYPER_ROWS = 1 << 14
MANY_KEYS = 1 << 17
"""From here on the GPU is the limit of a step, not the host that starts its kernels: it is worth
more launches, or a second stream.
"""


class GpuLookup(PooledLookup):
    """What an update needs of a look-up."""

    is_applied = False
    num_defaults = 0
    """Default rows of the store: the first slots."""

    def __init__(
        self,
        store: object,
        plan: PoolingPlan,
        batch: KeyedJagged,
        slots: Tensor,
        erase_version: int,
    ) -> None:
        super().__init__(store, plan, batch)
        self.batch = batch
        """See `held`."""
        self._keys_version = batch.values._version
        self.slots = slots
        """[N] int32 by position in the packed keys; -1: no row."""
        self.erase_version = erase_version
        """Slots hold as long as no row was erased since."""
        self.misses: Misses | None = None
        """Keys read without a row (`insert` was False)."""
        self._grouping: Grouping | None = None
        self._is_grouped: torch.cuda.Event | None = None

    @cached_property
    def num_missing(self) -> int:
        """Keys read without a row; waits for the device."""
        return 0 if self.misses is None else int(self.misses.number)

    def reads_default(self) -> Tensor:
        """See `PooledLookup`."""
        return (self.slots >= 0) & (self.slots < self.num_defaults)

    def own_keys(self) -> None:
        """Keeps a copy of the keys: an update has to look them up once more."""
        self.batch = replace(self.batch, values=self.batch.values.clone())
        self._keys_version = self.batch.values._version

    def batch_again(self, *, keys: bool) -> KeyedJagged:
        """The batch as it was looked up, to be read once more; without `keys` all but those.

        Raises:
          ConfigError: keys were changed since. They are not copied where no rule evicts rows.
        """
        if keys and self.batch.values._version != self._keys_version:
            raise ConfigError(
                "keys on a GPU were changed between look-up and update, which has to find rows "
                "that were erased since: erase rows before the look-up, or leave the keys alone"
            )
        if not self.batch.is_one_hot:
            return self.batch
        count = self.batch.values.numel()
        return replace(self.batch, offsets=torch.arange(count + 1, device=self.slots.device))

    def slots_of_plan(self, plan: DevicePlan) -> Tensor:
        """[N] int64 slots; 0 of keys without one and of keys that are another store's."""
        slots = self.slots
        if not plan.serves_all and self.batch_size:
            ends = self.batch_again(keys=False).offsets[:: self.batch_size]
            is_ours = torch.repeat_interleave(
                plan.table_of_packed >= 0, ends.diff(), output_size=slots.numel()
            )
            slots = torch.where(is_ours, slots, 0)
        return slots.clamp(min=0).long()

    knows_tables = False
    """Whether the grouping has the numbers of tables."""

    @property
    def grouping(self) -> Grouping | None:
        """What `group_ahead` made; it may not be done."""
        return self._grouping

    def found_again(self, slots: Tensor, erase_version: int) -> None:
        """Takes slots of a later search; every key that gets a row has one now."""
        self.slots, self.erase_version = slots, erase_version
        self.misses = self._grouping = self._is_grouped = None
        self.__dict__.pop("num_missing", None)

    def group_ahead(
        self, plan: DevicePlan, num_slots: int, counts: Tensor, *, needs_tables: bool
    ) -> None:
        """Sorts the keys by row for the update, if they are many beside what follows.

        Args:
          plan: of the look-up.
          num_slots: slots are below.
          counts: [4] int32 zeros, nobody else's, made on the current stream.
          needs_tables: see `group_keys`.
        """
        self.knows_tables = needs_tables

        def group() -> Grouping:
            return group_keys(
                plan,
                [GradientPart(self.batch, self.slots, self.slots)],
                needs_tables=needs_tables,
                num_slots=num_slots,
                one_hot=self.batch.is_one_hot,
                counts=counts,
            )

        device = self.slots.device
        if device.type != "cuda" or self.slots.numel() < MANY_KEYS:
            self._grouping = group()
            return
        stream, begin, self._is_grouped = _side(device)
        current = torch.cuda.current_stream(device)
        begin.record(current)
        stream.wait_event(begin)
        # Not by a context manager, which takes as long as three kernels to start.
        torch.cuda.set_stream(stream)
        try:
            self._grouping = group()
            self._is_grouped.record(stream)
        finally:
            torch.cuda.set_stream(current)
        weights = [] if self.batch.weights is None else [self.batch.weights]
        for tensor in (self.slots, counts, self.batch.values, self.batch.offsets, *weights):
            tensor.record_stream(stream)

    def grouped(self) -> Grouping | None:
        """What `group_ahead` made, for the current stream."""
        if self._grouping is None or self._is_grouped is None:
            return self._grouping
        # What the grouping holds is made on the side stream, and freed for it alone: the next one
        # begins there by waiting for all that this stream has begun with it.
        torch.cuda.current_stream(self.slots.device).wait_event(self._is_grouped)
        return self._grouping


def held(batch: KeyedJagged, device: torch.device, plan: DevicePlan, *, keys: bool) -> KeyedJagged:
    """A batch on a device, with what an update needs of it in memory of its own.

    Offsets of bags of one key each need no copy, unless they are read beside the caller's stream.

    Args:
      batch: anywhere; a copy from pinned memory is waited for.
      device: the store's.
      plan: of the look-up.
      keys: whether keys are copied, too: an update looks them up again where rows have left since.
    """
    if batch.values.device != device:
        return own_copy(batch, device)
    weights = batch.weights
    if not batch.is_one_hot or weights is not None or not plan.serves_all:
        weights = None if weights is None else weights.clone()
        batch = replace(batch, offsets=batch.offsets.clone(), weights=weights)
    return replace(batch, values=batch.values.clone()) if keys else batch


class PlanCache:
    """Plans on the device, each made once."""

    def __init__(self, dim: int, device: torch.device) -> None:
        self._dim = dim
        self._device = device
        self._made: dict[tuple[PoolingPlan, int], DevicePlan] = {}
        self._last: tuple[PoolingPlan, int, DevicePlan] | None = None

    def get(self, plan: PoolingPlan, num_packed: int) -> DevicePlan:
        """The plan for batches of `num_packed` features."""
        last = self._last
        # A plan of many features takes longer to hash than a kernel to start.
        if last is None or last[0] is not plan or last[1] != num_packed:
            last = self._last = plan, num_packed, self._get(plan, num_packed)
        return last[2]

    def _get(self, plan: PoolingPlan, num_packed: int) -> DevicePlan:
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
            )._replace(is_by_key=plan.is_by_key)
        return self._made[name]


@lru_cache(maxsize=16)
def _side(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Event, torch.cuda.Event]:
    """A stream beside the current one; events of when it may begin, and when it is done.

    One of each is enough: all that a stream does after an event was after the one before it too.
    """
    # Before the gathering of vectors, whose programs would else take every processor first.
    stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    return stream, torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]


def keys_of(plan: DevicePlan, batch: KeyedJagged) -> KeyBatch:
    """Keys and tables of a batch on the device."""
    return KeyBatch(batch.values, batch.offsets, plan.table_of_packed, batch.batch_size)


class HypersOnDevice:
    """Optimizer settings of the tables of one store; those of some steps are copied at once."""

    def __init__(self, tables: Sequence[TableConfig], device: torch.device) -> None:
        self._hypers = Hypers(tables)
        self._device = device
        self.are_one = self._hypers.are_one
        """Whether all tables have the same settings."""
        rows = 1 if self.are_one else len(tables)
        self._steps_at_once = max(1, min(64, _MOST_HYPER_ROWS // rows))
        if self._hypers.are_constant:
            self._steps_at_once = 1
        self._first = 0
        self._rate_factor = 1.0
        self._copies: Sequence[Tensor] = ()

    def at(self, step: int, rate_factor: float = 1.0) -> Tensor:
        """[T, fields of `Hyper`] float32 for the update number `step`; [1, ...]: all alike."""
        ahead = 0 if self._hypers.are_constant else step - self._first
        is_same = rate_factor == self._rate_factor
        if not is_same or not 0 <= ahead < len(self._copies):
            # A factor that has changed may change with every step.
            steps = range(step, step + (self._steps_at_once if is_same else 1))
            rows = slice(0, 1) if self.are_one else slice(None)
            hypers = torch.from_numpy(
                np.stack([self._hypers.at(each, rate_factor)[rows] for each in steps])
            )
            # A copy from memory that is not pinned waits for the device.
            if self._device.type == "cuda":
                hypers = hypers.pin_memory()
            self._copies = hypers.to(self._device, non_blocking=True).unbind()
            self._first, self._rate_factor, ahead = step, rate_factor, 0
        return self._copies[ahead]


class Counters:
    """Zeros on the device, some at a time: a thousand times as many are cleared together."""

    def __init__(self, device: torch.device, size: int, dtype: torch.dtype) -> None:
        self._device = device
        self._size = size
        self._dtype = dtype
        self._left: list[Tensor] = []

    def take(self) -> Tensor:
        """[size] zeros that nobody else has."""
        if not self._left:
            zeros = torch.zeros(1024, self._size, dtype=self._dtype, device=self._device)
            self._left = list(zeros.unbind())
        return self._left.pop()
