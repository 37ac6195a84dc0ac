"""What the kernels of the index compute, in plain torch: their twins in the tests, and for checks.

Words of 64 bits are int64, which wraps as uint64 does; shifts to the right are made logical.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BUCKET = 8
_PAYLOAD = (1 << 40) - 1
_LOW = 0xFFFFFFFF


def mix64(x: Tensor) -> Tensor:
    """csrc/index/hashing.h: finalizer of MurmurHash3."""
    x = (x ^ _shifted(x, 33)) * -0x00AE502812AA7333
    x = (x ^ _shifted(x, 33)) * -0x3B314601E57A13AD
    return x ^ _shifted(x, 33)


def probe_start(keys: Tensor, tables: Tensor, salt: int, num_buckets: int) -> tuple[Tensor, Tensor]:
    """Twin of `probe.probe_start`: [n] int64 bucket, [n] int64 step."""
    hashed = mix64(keys ^ (2 * tables + 1) * salt)
    # The upper word of a product of 64 and 32 bits, in halves.
    high, low = _shifted(hashed, 32), hashed & _LOW
    bucket = _shifted(high * num_buckets + _shifted(low * num_buckets, 32), 32)
    return bucket, 1 + ((hashed & 0xFFFF) * min(num_buckets - 1, 65536) >> 16)


def find(entries: Tensor, salt: int, keys: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `probe.find_entry`.

    Args:
      entries: [capacity, 2] int64; fewer than 2^34.
      salt: of the index.
      keys: [n] int64.
      tables: [n] int64.

    Returns:
      [n] int64 payload, -1: absent; [n] int64 entry, 0 where absent.
    """
    num_buckets = len(entries) // _BUCKET
    buckets = entries.view(num_buckets, _BUCKET, 2)
    bucket, step = probe_start(keys, tables, salt, num_buckets)
    payload, entry = torch.full_like(keys, -1), torch.zeros_like(keys)
    left = torch.arange(len(keys), device=keys.device)
    while len(left):
        their_keys, meta = buckets[bucket].unbind(2)
        is_it = (their_keys == keys[left, None]) & (meta >> 40 == tables[left, None] + 1)
        is_found = is_it.any(1)
        lane = is_it.long().argmax(1)
        payload[left[is_found]] = (meta & _PAYLOAD)[is_it]
        entry[left[is_found]] = (bucket * _BUCKET + lane)[is_found]
        goes_on = ~is_found & (meta != 0).all(1)
        left, step = left[goes_on], step[goes_on]
        bucket = (bucket[goes_on] + step) % num_buckets
    return payload, entry


def is_consistent(entries: Tensor, salt: int) -> bool:
    """Whether every key is found, at the entry that it has."""
    taken = (entries[:, 1] > 1).nonzero()[:, 0]
    keys, meta = entries[taken].unbind(1)
    payload, entry = find(entries, salt, keys.contiguous(), (meta >> 40) - 1)
    return bool((entry == taken).all() and (payload == meta & _PAYLOAD).all())


def _shifted(x: Tensor, places: int) -> Tensor:
    return x >> places & ((1 << (64 - places)) - 1)
