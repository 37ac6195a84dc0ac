"""Insertions into the index: entries for keys that have none, without a lock.

A key claims its entry by one compare-and-swap with its place in the call; others that meet the
claim compare keys there, so nobody waits for anybody. Payloads are written by a later kernel, for
which each key leaves three words: `winner`, the place of the key that has the entry (-1: the key
was there before); of winners `entry`, which one, and `rank`, the value of the counter of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.index.find import (
    IndexView,
    Misses,
    keys_of_feature,
    probe_slots,
    programs_for,
    search_arguments,
    store_slots,
)
from penstock.kernels.index.probe import (
    CLAIMED,
    ERASED,
    PAYLOAD,
    PAYLOAD_BITS,
    TABLE_BITS,
    next_bucket,
    probe_start,
    table_of,
)
from penstock.kernels.launch import launch
from penstock.kernels.plan import DevicePlan
from penstock.types import KeyedJagged

_KEYS = 16
_WARPS = 1


@triton.jit
def claim_entries(
    entries, num_buckets, salt, keys, n, key, table, left, found, winner, num_keys, allocated,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gives entries to the keys `key` [BLOCK] at places `n` of the call, where `left`.

    Args:
      entries: of the index, which nobody reads meanwhile but for claims.
      num_buckets: int64.
      salt: int64.
      keys: [num_keys] int64 of the call.
      n: [BLOCK] int64.
      key: [BLOCK] int64.
      table: [BLOCK] int32.
      left: [BLOCK] bool.
      found: [num_keys] int32, gets the payload of keys that are there.
      winner: [3, num_keys] int64: `winner`, `entry`, `rank`.
      num_keys: of the call.
      allocated: [1] int64 counter, rises by the number of winners.
      BLOCK: number of keys.
    """
    lane = tl.arange(0, 8)[None, :]
    word = tl.arange(0, 16)[None, :]
    tag = table.to(tl.int64) + 1
    home, step = probe_start(key, table, salt, num_buckets)
    bucket = home
    # The first free entry on the way, and what it holds.
    free = tl.full((BLOCK,), -1, tl.int64)
    free_meta = tl.zeros((BLOCK,), tl.int64)
    has_won = n < 0
    mine = tl.zeros((BLOCK,), tl.int64)
    while tl.max(left.to(tl.int32), 0) > 0:
        # Not from a cache of this processor's own: others claim meanwhile.
        place = entries + bucket[:, None] * 16 + word
        words = tl.load(place, mask=left[:, None], other=0, volatile=True)
        their_key, meta = tl.split(tl.reshape(words, (BLOCK, 8, 2)))
        is_table = ((meta >> PAYLOAD_BITS) & TABLE_BITS) == tag[:, None]
        is_claimed = is_table & (meta >= CLAIMED)
        # The key of a claimed entry may not be written yet: it is in the call.
        in_call = tl.load(keys + (meta & PAYLOAD), mask=is_claimed, other=0)
        their_key = tl.where(is_claimed, in_call, their_key)
        is_it = is_table & (their_key == key[:, None])
        # One number tells all: what stands for the key, or -1 to -8 for the first empty entry,
        # or -9 to -16 for the first erased one where none is empty.
        free_rank = tl.where(meta == 0, -1 - lane, tl.where(meta == ERASED, -9 - lane, -99))
        code = tl.max(tl.where(is_it, meta, free_rank.to(tl.int64)), 1)
        is_found = left & (code > 0)
        was_there = is_found & (code < CLAIMED)
        tl.store(found + n, (code & PAYLOAD).to(tl.int32), mask=was_there)
        tl.store(winner + n, tl.where(was_there, -1, code & PAYLOAD), mask=is_found)
        left = left & (is_found == 0)
        is_empty = code >= -8
        is_new = left & (free < 0) & (code >= -16)
        its_lane = tl.where(is_empty, -1 - code, -9 - code)
        free = tl.where(is_new, bucket * 8 + its_lane, free)
        free_meta = tl.where(is_new, tl.where(is_empty, 0, ERASED), free_meta)
        wants = left & is_empty
        if tl.max(wants.to(tl.int32), 0) > 0:
            target = tl.where(wants, free, bucket * 8)
            # No entry is ever -1.
            expected = tl.where(wants, free_meta, -1)
            claim = (tag << PAYLOAD_BITS) | n | CLAIMED
            old = tl.atomic_cas(entries + target * 2 + 1, expected, claim, sem="relaxed")
            won = wants & (old == expected)
            has_won = has_won | won
            mine = tl.where(won, target, mine)
            left = left & (won == 0)
        # Beaten to it: perhaps by an equal key. Look again from the beginning.
        bucket = tl.where(wants, home, next_bucket(bucket, step, num_buckets))
        free = tl.where(wants, -1, free)
    wins = has_won.to(tl.int64)
    total = tl.sum(wins, 0)
    if total > 0:
        base = tl.atomic_add(allocated, total, sem="relaxed")
        tl.store(winner + n, n, mask=has_won)
        tl.store(winner + num_keys + n, mine, mask=has_won)
        rank = winner + num_keys + num_keys
        tl.store(rank + n, base + tl.cumsum(wins, 0) - wins, mask=has_won)
        # While it is claimed nobody reads it.
        tl.store(entries + mine * 2, key, mask=has_won)


@triton.jit(do_not_specialize=["batch_size", "num_keys"])
def claim_kernel(
    entries, num_buckets, salt, keys, offsets, tables, batch_size, num_features, missing,
    num_missing, found, winner, num_keys, allocated, BLOCK: tl.constexpr,
):  # fmt: skip
    """Claims entries for the keys at the places `missing`."""
    count = tl.load(num_missing)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    while first < count:
        i = first + tl.arange(0, BLOCK)
        left = i < count
        n = tl.load(missing + i, mask=left, other=0)
        key = tl.load(keys + n, mask=left, other=0)
        table = table_of(n, offsets, batch_size, tables, num_features)
        claim_entries(
            entries, num_buckets, salt, keys, n, key, table, left, found, winner, num_keys,
            allocated, BLOCK,
        )  # fmt: skip
        first += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit(do_not_specialize=["batch_size", "num_keys"])
def _find_or_claim_kernel(
    slots, missing, counter, entries, num_buckets, salt, keys, offsets, packed_feature, table_of,
    absent, batch_size, winner, num_keys, allocated, KEYS: tl.constexpr,
):  # fmt: skip
    begin, end, tables, instead = keys_of_feature(
        offsets, packed_feature, table_of, absent, batch_size, KEYS
    )
    step = tl.num_programs(0).to(tl.int64) * KEYS
    for first in range(begin + tl.program_id(0).to(tl.int64) * KEYS, end, step):
        place = first + tl.arange(0, KEYS)
        is_key = place < end
        key = tl.load(keys + place, mask=is_key, other=0)
        # A claim of this call, or an entry too old in a cache, looks absent; the claim tells.
        slot = probe_slots(entries, num_buckets, salt, key, tables, is_key, KEYS)
        store_slots(slots, missing, counter, place, is_key, slot, instead)
        is_missing = is_key & (slot < 0)
        if tl.max(is_missing.to(tl.int32), 0) > 0:
            claim_entries(
                entries, num_buckets, salt, keys, place, key, tables, is_missing, slots, winner,
                num_keys, allocated, KEYS,
            )  # fmt: skip


def find_or_claim(
    index: IndexView,
    plan: DevicePlan,
    batch: KeyedJagged,
    absent: Tensor,
    slots: Tensor,
    misses: Misses,
    claims: Tensor,
    allocated: Tensor,
) -> None:
    """`find_slots`, and an entry for each key that has none, in one launch.

    Args:
      index: with room for all keys of the batch.
      plan: features and tables.
      batch: keys and offsets, on the device.
      absent: [T] int32, what an absent key of a table gets until its row is made.
      slots: [N] int32, written by position; those of other stores' keys are left alone.
      misses: get the absent keys, of which there must be none yet.
      claims: [3, N] int64, gets `winner`, `entry`, `rank` of absent keys.
      allocated: [1] int64 counter, rises by the number of winners.

    Effects: on the current stream, without synchronisation. Entries are claimed until rows are made
    for them.
    """
    num_keys = batch.values.numel()
    if not num_keys or not plan.num_features:
        return
    launch(
        _find_or_claim_kernel,
        programs_for(plan, num_keys, _KEYS),
        (
            *search_arguments(index, plan, batch, absent, slots, misses),
            claims,
            num_keys,
            allocated,
        ),
        KEYS=_KEYS,
        num_warps=_WARPS,
    )
