"""Finds the rows of a batch's keys: the probe of every look-up.

See `probe` for the index. A bucket is read whole, each entry by one load of 16 bytes, and one
reduction over it tells found, absent and elsewhere apart.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.index.probe import next_bucket, probe_start
from penstock.kernels.launch import launch
from penstock.kernels.plan import DevicePlan
from penstock.types import KeyedJagged

_SLOT: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_KEYS = 16
_WARPS = 1
"""Of one program: a warp reads its 16 buckets in four loads, none of which waits for another."""
_TURNS = 4
_FULL = 8192
"""Programs that fill any GPU."""


class IndexView(NamedTuple):
    """An index as probes read it."""

    entries: Tensor
    """[capacity, 2] int64."""
    num_buckets: int
    salt: int


class Misses(NamedTuple):
    """Keys that were not found."""

    places: Tensor
    """[N] int64: the first `number` are places of keys in their call, in no particular order."""
    number: Tensor
    """[1] int64 how many."""


@triton.jit
def probe_slots(entries, num_buckets, salt, key, table, is_key, KEYS: tl.constexpr):
    """[KEYS] int32 slots of keys in an index that nobody changes meanwhile; -1: absent."""
    word = tl.arange(0, 16)[None, :]
    tag = table.to(tl.int64) + 1
    bucket, step = probe_start(key, table, salt, num_buckets)
    slot = tl.full((KEYS,), -1, tl.int32)
    left = is_key
    while tl.max(left.to(tl.int32)) > 0:
        words = tl.load(entries + bucket[:, None] * 16 + word, mask=left[:, None], other=0)
        their_key, meta = tl.split(tl.reshape(words, (KEYS, 8, 2)))
        is_it = (their_key == key[:, None]) & ((meta >> 40) == tag[:, None])
        # A slot if it is here, -1 if there is an empty entry, else -2.
        otherwise = tl.where(meta == 0, -1, -2)
        found = tl.max(tl.where(is_it, (meta & _SLOT).to(tl.int32), otherwise), 1)
        slot = tl.where(left & (found >= 0), found, slot)
        left = left & (found == -2)
        bucket = next_bucket(bucket, step, num_buckets)
    return slot


@triton.jit
def store_slots(slots, missing, counter, place, is_key, slot, instead):
    """Writes slots by place, `instead` where absent, and appends the absent ones to `missing`."""
    tl.store(slots + place, tl.where(slot < 0, instead, slot), mask=is_key)
    is_missing = is_key & (slot < 0)
    misses = is_missing.to(tl.int64)
    count = tl.sum(misses)
    if count > 0:
        rank = tl.atomic_add(counter, count, sem="relaxed") + tl.cumsum(misses, 0) - misses
        tl.store(missing + rank, place, mask=is_missing)


@triton.jit
def keys_of_feature(
    offsets, packed_feature, table_of, absent, batch_size, KEYS: tl.constexpr
):  # fmt: skip
    """First and last key of this program's feature; [KEYS] its table; what absent keys get."""
    feature = tl.program_id(1)
    first_bag = tl.load(packed_feature + feature).to(tl.int64) * batch_size
    begin = tl.load(offsets + first_bag)
    end = tl.load(offsets + first_bag + batch_size)
    table = tl.load(table_of + feature)
    tables = tl.zeros((KEYS,), tl.int32) + table
    instead = tl.load(absent + table)
    return begin, end, tables, instead


@triton.jit(do_not_specialize=["batch_size"])
def _find_kernel(
    slots,
    missing,
    counter,
    entries,
    num_buckets,
    salt,
    keys,
    offsets,
    packed_feature,
    table_of,
    absent,
    batch_size,
    KEYS: tl.constexpr,
):
    begin, end, tables, instead = keys_of_feature(
        offsets, packed_feature, table_of, absent, batch_size, KEYS
    )
    step = tl.num_programs(0).to(tl.int64) * KEYS
    for first in range(begin + tl.program_id(0).to(tl.int64) * KEYS, end, step):
        place = first + tl.arange(0, KEYS)
        is_key = place < end
        key = tl.load(keys + place, mask=is_key, other=0)
        slot = probe_slots(entries, num_buckets, salt, key, tables, is_key, KEYS)
        store_slots(slots, missing, counter, place, is_key, slot, instead)


def programs_for(plan: DevicePlan, num_keys: int, keys: int) -> tuple[int, int]:
    """Programs of a kernel that goes over each feature's keys in strides, some at a time.

    Those of many keys take several turns each: to start a program takes as long as to find a few.
    """
    most = -(-num_keys // (plan.table_of_packed.numel() * keys))
    return max(-(-most // _TURNS), min(most, _FULL // plan.num_features + 1)), plan.num_features


def search_arguments(
    index: IndexView,
    plan: DevicePlan,
    batch: KeyedJagged,
    absent: Tensor,
    slots: Tensor,
    misses: Misses,
) -> tuple[Tensor | int, ...]:
    """What kernels that search all keys of a plan's features begin with; see `find_slots`."""
    of_batch = batch.values, batch.offsets, plan.packed_feature, plan.table
    return slots, *misses, *index, *of_batch, absent, batch.batch_size


def find_slots(
    index: IndexView,
    plan: DevicePlan,
    batch: KeyedJagged,
    absent: Tensor,
    slots: Tensor,
    misses: Misses,
) -> None:
    """Finds the slots of all keys of the plan's features.

    Args:
      index: nobody may change it meanwhile.
      plan: features and tables.
      batch: keys and offsets, on the device.
      absent: [T] int32, what an absent key of a table gets.
      slots: [N] int32, written by position; those of other stores' keys are left alone.
      misses: get the absent keys, of which there must be none yet.

    Effects: on the current stream, without synchronisation.
    """
    num_keys = batch.values.numel()
    if not num_keys or not plan.num_features:
        return
    launch(
        _find_kernel,
        programs_for(plan, num_keys, _KEYS),
        search_arguments(index, plan, batch, absent, slots, misses),
        KEYS=_KEYS,
        num_warps=_WARPS,
    )
