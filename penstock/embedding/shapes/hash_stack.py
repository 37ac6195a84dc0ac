"""Hash stacks: a key's vector as the sum of a few rows that it shares with other keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from penstock.config import FeatureConfig, HashStack
from penstock.errors import ConfigError
from penstock.types import KeyedJagged

# FORMAT: never change these. Of splitmix64, as signed words.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def stacked_rows(stack: HashStack, keys: Tensor) -> Tensor:
    """The rows whose sum is the vector of each key: [n] int64 -> [n, rounds] int64.

    Round r has the rows r * size to (r + 1) * size - 1; which one is a hash of key and round.
    """
    rounds = torch.arange(stack.rounds, device=keys.device)
    mixed = _mix64(keys[:, None] + (rounds + 1) * _GOLDEN)
    # Without the sign bit: a remainder of torch has the sign of the divisor, but other bits.
    return (mixed & (2**63 - 1)) % stack.size + rounds * stack.size


class Stacks:
    """The features of a collection whose tables are hash stacks."""

    def __init__(
        self, features: Sequence[FeatureConfig], stacks: Sequence[HashStack | None]
    ) -> None:
        """Of features, and the stack of each one's table.

        Raises:
          ConfigError: a pooling that is no weighted sum.
        """
        for feature, stack in zip(features, stacks, strict=True):
            if stack is not None and feature.pooling not in {"sum", "mean", "sqrt_n"}:
                raise ConfigError(
                    f"feature {feature.name!r}: pooling {feature.pooling} of table "
                    f"{feature.table!r}, whose hash_stack makes {stack.rounds} rows of a key; pool "
                    "by sum, mean or sqrt_n, or give the feature a table without hash_stack"
                )
        self._stacks = tuple(stacks)
        self._rounds = torch.tensor([1 if one is None else one.rounds for one in stacks])
        self.any = any(one is not None for one in stacks)
        """Whether there is one."""
        factors = [
            1.0 if one is None else _factor(feature.pooling, one.rounds)
            for feature, one in zip(features, stacks, strict=True)
        ]
        self._factors = torch.tensor(factors, dtype=torch.float32)

    def spread(self, sparse: KeyedJagged) -> KeyedJagged:
        """Puts the rows of a key in its place, with its weight each."""
        size, device = sparse.batch_size, sparse.offsets.device
        if not len(sparse.values):
            return sparse
        feature = torch.repeat_interleave(sparse.offsets.diff()) // size
        times = self._rounds.to(device)[feature]
        ends = times.new_zeros(len(times) + 1)
        torch.cumsum(times, 0, out=ends[1:])
        key = torch.repeat_interleave(times)
        values = sparse.values[key]
        for stack in dict.fromkeys(one for one in self._stacks if one is not None):
            its = torch.tensor([one == stack for one in self._stacks], device=device)[feature]
            values[its[key]] = stacked_rows(stack, sparse.values[its]).flatten()
        weights = None if sparse.weights is None else sparse.weights[key]
        return replace(
            sparse,
            values=values,
            offsets=ends[sparse.offsets],
            weights=weights,
            is_checked=False,
            is_one_hot=False,
        )

    def factors_of(self, widths: Sequence[int]) -> Tensor:
        """[sum of widths] what each feature's columns are multiplied by."""
        return self._factors.repeat_interleave(torch.tensor(list(widths), dtype=torch.int64))


def _factor(pooling: str, rounds: int) -> float:
    """Of a sum over `rounds` times as many rows as there are keys."""
    return {"sum": 1.0, "mean": float(rounds), "sqrt_n": math.sqrt(rounds)}[pooling]


def _mix64(x: Tensor) -> Tensor:
    """A bijection of 64-bit words; shifts fill with zeros."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)
