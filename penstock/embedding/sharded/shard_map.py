"""Whose a row is: (table, key) to one of a fixed number of buckets, buckets to ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BUCKETS = 4096
"""FORMAT: never change it, nor what `bucket_of` computes: rows are kept by bucket."""
_BUCKET_SHIFT = 52
_FIRST = -0xAE502812AA7333  # MurmurHash3's finalizer: 0xFF51AFD7ED558CCD and
_SECOND = -0x3B314601E57A13AD  # 0xC4CEB9FE1A85EC53, as signed numbers.


def table_word(name: str) -> int:
    """[64-bit signed] word that stands for a table in `bucket_of`."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def table_words(names: Sequence[str]) -> Tensor:
    """[T] int64 words of tables, by number."""
    return torch.tensor([table_word(name) for name in names], dtype=torch.int64)


def bucket_of(words: Tensor, keys: Tensor) -> Tensor:
    """[n] int64 buckets, 0 to `NUM_BUCKETS` - 1, of keys.

    Args:
      words: [n] int64, or [1], of each key's table.
      keys: [n] int64, any value.
    """
    return bucket_of_mixed(mixed_of(words, keys))


def mixed_of(words: Tensor, keys: Tensor) -> Tensor:
    """[n] int64 hashes, whose upper bits are the buckets; see `bucket_of`."""
    mixed = keys ^ words
    for factor in (_FIRST, _SECOND):
        mixed = (mixed ^ ((mixed >> 33) & 0x7FFFFFFF)) * factor
    return mixed ^ ((mixed >> 33) & 0x7FFFFFFF)


def bucket_of_mixed(mixed: Tensor) -> Tensor:
    """[n] int64 buckets of hashes."""
    return (mixed >> _BUCKET_SHIFT) & (NUM_BUCKETS - 1)


@dataclass(frozen=True)
class ShardMap:
    """Buckets to ranks; a value."""

    num_ranks: int
    owners: tuple[int, ...]
    """Of each bucket."""

    @classmethod
    def even(cls, num_ranks: int) -> ShardMap:
        """As many buckets for each rank, but for one."""
        owners = tuple(bucket * num_ranks // NUM_BUCKETS for bucket in range(NUM_BUCKETS))
        return cls(num_ranks, owners)

    def on(self, device: torch.device) -> Tensor:
        """[`NUM_BUCKETS`] int64 owners."""
        return torch.tensor(self.owners, dtype=torch.int64, device=device)
