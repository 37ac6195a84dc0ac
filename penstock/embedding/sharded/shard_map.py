"""Whose a row is: (table, key) to one of a fixed number of buckets, buckets to ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
        owners = torch.arange(NUM_BUCKETS) * num_ranks // NUM_BUCKETS
        return cls(num_ranks, tuple(owners.tolist()))

    def on(self, device: torch.device) -> Tensor:
        """[`NUM_BUCKETS`] int64 owners."""
        return torch.tensor(self.owners, dtype=torch.int64, device=device)

    def resized(self, weights: Sequence[int]) -> ShardMap:
        """The map of other ranks that takes the fewest buckets away from where they are.

        Args:
          weights: of each rank, by which it gets its share of the buckets; 0: none. Not all 0.
        """
        room = _quotas(weights, self._counts(len(weights)))
        owners: list[int] = []
        for owner in self.owners:
            stays = owner < len(room) and room[owner] > 0
            owners.append(owner if stays else -1)
            if stays:
                room[owner] -= 1
        free = (rank for rank, number in enumerate(room) for _ in range(number))
        return ShardMap(
            len(weights), tuple(owner if owner >= 0 else next(free) for owner in owners)
        )

    def _counts(self, num_ranks: int) -> list[int]:
        """Buckets of each of the first ranks."""
        counts = [0] * num_ranks
        for owner in self.owners:
            if owner < num_ranks:
                counts[owner] += 1
        return counts


def _quotas(weights: Sequence[int], held: Sequence[int]) -> list[int]:
    """Buckets of each rank: its share, rounded down, and one more where most of that is cut off.

    Of equal remainders those come first that hold more than their share already.
    """
    total = sum(weights)
    shares = [divmod(NUM_BUCKETS * weight, total) for weight in weights]
    quotas = [whole for whole, _ in shares]

    def first(rank: int) -> tuple[int, int, int]:
        return -shares[rank][1], quotas[rank] - held[rank], rank

    for rank in sorted(range(len(quotas)), key=first)[: NUM_BUCKETS - sum(quotas)]:
        quotas[rank] += 1
    return quotas


class Plan(NamedTuple):
    """The way from one map to another."""

    buckets: dict[tuple[int, int], tuple[int, ...]]
    """By rank before and rank after, those that stay included."""

    @classmethod
    def between(cls, before: ShardMap, after: ShardMap) -> Plan:
        """Of two maps."""
        found: dict[tuple[int, int], list[int]] = {}
        for bucket, pair in enumerate(zip(before.owners, after.owners, strict=True)):
            found.setdefault(pair, []).append(bucket)
        return cls({pair: tuple(found[pair]) for pair in sorted(found)})

    @property
    def num_moved(self) -> int:
        """Buckets that change their rank; a rank has the same number before and after."""
        return sum(len(some) for (one, other), some in self.buckets.items() if one != other)

    def sources(self, rank: int) -> tuple[int, ...]:
        """Ranks before that have buckets of a rank after."""
        return tuple(one for one, other in self.buckets if other == rank)
