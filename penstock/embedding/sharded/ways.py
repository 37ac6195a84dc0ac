"""What travels of a look-up: its unique rows, or sums of its bags; chosen by the fewer bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penstock.embedding.store import PoolingPlan

ROWS, SUMS = 0, 1
_KEY, _FLOAT = 8, 4
_WORTH_A_CHANGE = 0.8
"""Of the bytes that travel as it is: a change makes a rank divide one batch twice."""


class Size(NamedTuple):
    """Of one rank's look-up."""

    keys: int
    different: int
    """Keys that differ within their tables, or about as many."""
    sums: int
    """Of its bags, that other ranks make."""
    reads_vectors: int
    """1: the vectors of single keys will be asked for, which sums do not have."""


def can_send_sums(plan: PoolingPlan) -> bool:
    """Whether its bags may be summed up in parts, where the order of sums is free."""
    is_summed = all(feature.pooling != "sequence" for feature in plan.features)
    return is_summed and bool(plan.features) and not plan.is_by_key


def way_of(sizes: Tensor, dim: int, way: int) -> int:
    """The way in which fewer bytes travel, look-up and update together.

    Args:
      sizes: [ranks, 4] `Size` of each rank's look-up; alike on all ranks.
      dim: columns of a row.
      way: as it is; kept where the other one is not clearly better.
    """
    keys, different, sums, reads_vectors = sizes.sum(0).tolist()
    if reads_vectors:
        return ROWS
    others = sizes.shape[0] - 1
    # A key is another rank's with equal chances.
    share = others / sizes.shape[0]
    both_ways = 2 * _FLOAT * dim
    travels = {
        ROWS: share * different * (_KEY + both_ways),
        SUMS: share * keys * _KEY + sums * (1 + both_ways),
    }
    other = ROWS if way == SUMS else SUMS
    return other if travels[other] < _WORTH_A_CHANGE * travels[way] else way


def header_of(counts: Tensor, size: Size) -> Tensor:
    """[ranks, n + 4]: counts [ranks, n] int64 of what goes to each, and the size for all."""
    told = torch.tensor(size, dtype=torch.int64).expand(counts.shape[0], -1)
    return torch.cat([counts, told], 1)
