"""The index of a GPU store: (table, key) -> a number, by open addressing; see `probe` for entries.

Keys of one call may repeat; see `claim` for how equal ones agree on one entry.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.device import is_interpreted
from penstock.kernels.index.claim import claim_kernel
from penstock.kernels.index.find import IndexView, Misses, probe_slots, store_slots
from penstock.kernels.index.probe import (
    BUCKET,
    ERASED,
    PAYLOAD_BITS,
    find_entry,
    next_bucket,
    probe_start,
    table_of,
)
from penstock.kernels.launch import launch

MAX_LOAD = 0.9
_BUCKET_ENTRIES = 8
_FEWEST_BUCKETS = 509
_KEYS = 2048 if is_interpreted() else 32
"""Of one program, a warp. The interpreter takes its time by operations, whatever their size."""
_WARPS = 1
_ENTRIES_AT_ONCE = 1 << 22
"""Of passes over all entries: bounds the memory that they take besides."""
_PROGRAMS = 4224
"""Of kernels that go over keys in strides: enough to fill any GPU, and cheap where there is nothing
to do.
"""


class KeyBatch(NamedTuple):
    """Keys and their tables: those of a packed batch, or of one table."""

    keys: Tensor
    """[N] int64."""
    offsets: Tensor
    """[F * B + 1] int64."""
    tables: Tensor
    """[F] int32: of each packed feature; -1: left out."""
    batch_size: int
    """B."""

    @classmethod
    def of_table(cls, keys: Tensor, table: int) -> KeyBatch:
        """All keys of one table."""
        offsets = torch.tensor([0, len(keys)], dtype=torch.int64, device=keys.device)
        tables = torch.tensor([table], dtype=torch.int32, device=keys.device)
        return cls(keys, offsets, tables, 1)

    def tables_of(self, places: Tensor) -> Tensor:
        """[n] int64: the tables of keys at `places` [n] int64."""
        begins = self.offsets[:: self.batch_size][1:].contiguous()
        return self.tables.long()[torch.searchsorted(begins, places, right=True)]


class Claims(NamedTuple):
    """What an insertion leaves for those who give it payloads."""

    of_keys: Tensor
    """[3, N] int64: `winner`, `entry`, `rank`."""

    @property
    def winner(self) -> Tensor:
        """[N] int64: place in the call of the key that has the entry; -1: the key was there."""
        return self.of_keys[0]

    @property
    def entry(self) -> Tensor:
        """[N] int64: of winners, their entry."""
        return self.of_keys[1]

    @property
    def rank(self) -> Tensor:
        """[N] int64: of winners, the value of the counter when they claimed."""
        return self.of_keys[2]


@triton.jit(do_not_specialize=["batch_size", "count"])
def _find(entries, num_buckets, salt, keys, offsets, tables, batch_size, num_features, count, found,
          absent, missing, counter, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = n < count
    table = table_of(tl.minimum(n, count - 1), offsets, batch_size, tables, num_features)
    active = active & (table >= 0)
    key = tl.load(keys + n, mask=active, other=0)
    payload = probe_slots(entries, num_buckets, salt, key, table, active, BLOCK)
    instead = tl.load(absent + table, mask=active & (payload < 0), other=-1)
    store_slots(found, missing, counter, n, active, payload, instead)


@triton.jit(do_not_specialize=["batch_size", "num_keys"])
def _settle(entries, offsets, tables, batch_size, num_features, missing, num_missing, winner,
            num_keys, payloads, BLOCK: tl.constexpr):  # fmt: skip
    entry = winner + num_keys
    count = tl.load(num_missing)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    while first < count:
        i = first + tl.arange(0, BLOCK)
        active = i < count
        n = tl.load(missing + i, mask=active, other=0)
        won = active & (tl.load(winner + n, mask=active, other=-1) == n)
        table = table_of(n, offsets, batch_size, tables, num_features)
        payload = tl.load(payloads + n, mask=won, other=0)
        place = tl.load(entry + n, mask=won, other=0)
        meta = ((table.to(tl.int64) + 1) << PAYLOAD_BITS) | payload
        tl.store(entries + place * 2 + 1, meta, mask=won)
        first += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def _erase(entries, num_buckets, salt, keys, tables, count, erased, freed, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    active = n < count
    key = tl.load(keys + n, mask=active, other=0)
    table = tl.load(tables + n, mask=active, other=0).to(tl.int32)
    payload, entry = find_entry(entries, num_buckets, salt, key, table, active, BLOCK)
    is_there = payload >= 0
    meta = ((table.to(tl.int64) + 1) << PAYLOAD_BITS) | payload
    expected = tl.where(is_there, meta, -1)
    gone = tl.full((BLOCK,), 0, tl.int64) + ERASED
    old = tl.atomic_cas(entries + entry * 2 + 1, expected, gone, sem="relaxed")
    # Of equal keys one erases it.
    is_mine = is_there & (old == expected)
    tl.store(erased + n, tl.where(is_mine, entry, -1), mask=active)
    tl.store(freed + n, tl.where(is_mine, payload, -1), mask=active)


@triton.jit
def _sweep(entries, erased, count, still, BLOCK: tl.constexpr):
    """Empties the erased entries of buckets that no probe has ever gone beyond."""
    lane = tl.arange(0, 8)
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(erased + n, mask=n < count, other=-1)
    active = entry >= 0
    place = (entry // BUCKET)[:, None] * 8 + lane[None, :]
    meta = tl.load(entries + place * 2 + 1, mask=active[:, None], other=1)
    is_end = tl.max((meta == 0).to(tl.int32), 1) > 0
    nothing = tl.zeros((BLOCK,), tl.int64)
    tl.store(entries + entry * 2 + 1, nothing, mask=active & is_end)
    stays = tl.sum((active & (is_end == 0)).to(tl.int64), 0)
    tl.atomic_add(still, stays, sem="relaxed")


@triton.jit
def _rehash(old_entries, old_capacity, entries, num_buckets, salt, BLOCK: tl.constexpr):
    lane = tl.arange(0, 8)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(old_entries + i * 2, mask=i < old_capacity, other=0)
    meta = tl.load(old_entries + i * 2 + 1, mask=i < old_capacity, other=0)
    left = meta > ERASED
    table = tl.where(left, (meta >> PAYLOAD_BITS) - 1, 0)
    bucket, step = probe_start(key, table, salt, num_buckets)
    while tl.max(left.to(tl.int32), 0) > 0:
        place = bucket[:, None] * 8 + lane[None, :]
        theirs = tl.load(entries + place * 2 + 1, mask=left[:, None], other=1, volatile=True)
        first_free = tl.min(tl.where(theirs == 0, lane[None, :], 8), 1)
        wants = left & (first_free < 8)
        target = bucket * 8 + tl.where(wants, first_free, 0)
        expected = tl.where(wants, tl.zeros((BLOCK,), tl.int64), -1)
        old = tl.atomic_cas(entries + target * 2 + 1, expected, meta, sem="relaxed")
        won = wants & (old == 0)
        tl.store(entries + target * 2, key, mask=won)
        left = left & (won == 0)
        bucket = tl.where(wants, bucket, next_bucket(bucket, step, num_buckets))


class Index:
    """(table, key) -> payload, a number from 0 to 2^31 - 1, on one device.

    The caller knows how many keys there are at most, and calls `reserve` before it inserts.
    """

    def __init__(self, device: torch.device) -> None:
        self.salt = int.from_bytes(os.urandom(8), "little", signed=True) | 1
        self.entries = torch.zeros(
            _FEWEST_BUCKETS * _BUCKET_ENTRIES, 2, dtype=torch.int64, device=device
        )
        self.num_erased = 0
        """Erased entries that still take room, at most."""

    @property
    def capacity(self) -> int:
        """Entries."""
        return self.entries.numel() // 2  # len() of a tensor is Python

    @property
    def num_buckets(self) -> int:
        """A probe begins at one of them."""
        return self.capacity // _BUCKET_ENTRIES

    @property
    def num_bytes(self) -> int:
        """Memory."""
        return 16 * self.capacity

    @property
    def view(self) -> IndexView:
        """As probes read it, until the next `reserve`."""
        return IndexView(self.entries, self.num_buckets, self.salt)

    def room(self) -> int:
        """How many keys it may hold as it is."""
        return int(MAX_LOAD * self.capacity) - self.num_erased

    def reserve(self, keys: int) -> None:
        """Makes room for so many keys in all; payloads stay, entries move.

        Raises:
          MemoryError: the device has no memory for it. Nothing changed.
        """
        if keys <= self.room():
            return
        capacity = self.capacity
        if keys > 0.6 * capacity:
            capacity = max(int(keys / 0.75), int(1.5 * capacity))
            capacity = _BUCKET_ENTRIES * prime_from(-(-capacity // _BUCKET_ENTRIES))
        try:
            entries = torch.zeros(capacity, 2, dtype=torch.int64, device=self.entries.device)
        except torch.OutOfMemoryError:
            raise MemoryError(f"an index of {capacity} entries") from None
        old = self.entries
        launch(
            _rehash,
            (triton.cdiv(len(old), _KEYS),),
            (old, len(old), entries, capacity // _BUCKET_ENTRIES, self.salt),
            BLOCK=_KEYS,
            num_warps=_WARPS,
        )
        self.entries, self.num_erased = entries, 0

    def find(self, batch: KeyBatch, absent: Tensor) -> tuple[Tensor, Misses]:
        """Payloads of keys.

        Args:
          batch: keys and tables.
          absent: [T] int32, what to give for an absent key of each table.

        Returns:
          [N] int32, undefined for keys of no table; and which keys are absent.
        """
        keys = batch.keys
        found = torch.empty(len(keys), dtype=torch.int32, device=keys.device)
        misses = Misses(torch.empty_like(keys), keys.new_zeros(1))
        if len(keys):
            launch(
                _find,
                (triton.cdiv(len(keys), _KEYS),),
                (*self.view, *_arguments(batch), len(keys), found, absent, *misses),
                BLOCK=_KEYS,
                num_warps=_WARPS,
            )
        return found, misses

    def claim(self, batch: KeyBatch, misses: Misses, found: Tensor, allocated: Tensor) -> Claims:
        """Gives entries to keys that have none; of equal keys one is the winner.

        Args:
          batch: keys and tables.
          misses: those to insert. Among them may be keys that are there.
          found: [N] int32 gets the payload of keys that are there.
          allocated: [1] int64 counter, rises by the number of winners.

        Returns:
          Who has which entry; `settle` must follow before anything else.
        """
        num_keys = batch.keys.numel()
        claims = Claims(torch.empty(3, num_keys, dtype=torch.int64, device=found.device))
        if num_keys:
            launch(
                claim_kernel,
                _strides(batch),
                (*self.view, *_arguments(batch), *misses, found, *claims, num_keys, allocated),
                BLOCK=_KEYS,
                num_warps=_WARPS,
            )
        return claims

    def settle(self, batch: KeyBatch, misses: Misses, claims: Claims, payloads: Tensor) -> None:
        """Writes the entries of the winners.

        Args:
          batch: keys and tables.
          misses: as given to `claim`.
          claims: from `claim`.
          payloads: [N] int64, read where a winner is.
        """
        if len(batch.keys):
            launch(
                _settle,
                _strides(batch),
                (self.entries, *_arguments(batch)[1:], *misses, *claims, len(batch.keys), payloads),
                BLOCK=_KEYS,
                num_warps=_WARPS,
            )

    def erase(self, keys: Tensor, tables: Tensor) -> Tensor:
        """Removes keys.

        Args:
          keys: [n] int64, contiguous, duplicates allowed.
          tables: [n] int64, contiguous.

        Returns:
          [n] int64: the payload of each key that was there, once; -1 for the others.
        """
        erased, freed = torch.empty_like(keys), torch.empty_like(keys)
        if not len(keys):
            return freed
        grid = (triton.cdiv(len(keys), _KEYS),)
        of_keys = keys, tables, len(keys), erased, freed
        launch(_erase, grid, (*self.view, *of_keys), BLOCK=_KEYS, num_warps=_WARPS)
        still = keys.new_zeros(1)
        of_erased = self.entries, erased, len(keys), still
        launch(_sweep, grid, of_erased, BLOCK=_KEYS, num_warps=_WARPS)
        self.num_erased += int(still)
        return freed

    def tables_at(self, first: int, last: int) -> Tensor:
        """[last - first] int64: the table of each entry; -1: it is free."""
        return (self.entries[first:last, 1] >> 40) - 1

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [n] int64 and payloads [n] int64 of entries in use."""
        part = self.entries[places]
        return part[:, 0].contiguous(), part[:, 1] & ((1 << 40) - 1)

    def places_of(self, tables: Tensor) -> Tensor:
        """[n] int64: the entries of the tables marked in `tables` [T] bool; one pass over all."""
        found = []
        for first in range(0, self.capacity, _ENTRIES_AT_ONCE):
            of_entries = self.tables_at(first, min(first + _ENTRIES_AT_ONCE, self.capacity))
            is_theirs = (of_entries >= 0) & tables[of_entries.clamp(min=0)]
            found.append(is_theirs.nonzero()[:, 0] + first)
        return torch.cat(found)


def _arguments(batch: KeyBatch) -> tuple[Tensor, Tensor, Tensor, int, int]:
    keys, offsets, tables, batch_size = batch
    return keys, offsets, tables, batch_size, tables.numel()


def _strides(batch: KeyBatch) -> tuple[int]:
    return (min(_PROGRAMS, -(-batch.keys.numel() // _KEYS)),)


def prime_from(number: int) -> int:
    """The least prime that is not below `number`."""
    number = max(2, number)
    while any(number % factor == 0 for factor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number
