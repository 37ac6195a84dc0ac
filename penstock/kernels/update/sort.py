"""Sorts words, stably: equal ones stay in the order of their positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import launch

MOST_COUNTED = 1 << 14
"""So many words are sorted by counting for each how many come before it: one launch, while a radix
sort takes a dozen."""


@triton.jit(do_not_specialize=["num"])
def _rank_kernel(sorted_words, order, words, num, MINE: tl.constexpr, OTHERS: tl.constexpr):
    position = tl.program_id(0) * MINE + tl.arange(0, MINE)
    is_mine = position < num
    own = tl.load(words + position, mask=is_mine, other=0)
    before = tl.zeros((MINE, OTHERS), tl.int32)
    for first in range(0, num, OTHERS):
        place = first + tl.arange(0, OTHERS)
        other = tl.load(words + place, mask=place < num, other=2147483647)
        # Equal ones stay in the order of their positions.
        is_equal = (other[None, :] == own[:, None]) & (place[None, :] < position[:, None])
        before += ((other[None, :] < own[:, None]) | is_equal).to(tl.int32)
    rank = tl.sum(before, 1)
    tl.store(sorted_words + rank, own, mask=is_mine)
    tl.store(order + rank, position, mask=is_mine)


def sort_words(words: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts, stably.

    Args:
      words: [N] int32.

    Returns:
      [N] int32 words in rising order, and [N] int32 or int64 the positions that they come from.
    """
    num = words.numel()
    if not 0 < num <= MOST_COUNTED:
        return torch.sort(words, stable=True)
    sorted_words, order = torch.empty_like(words), torch.empty_like(words)
    mine = 8
    launch(
        _rank_kernel,
        (-(-num // mine),),
        (
            sorted_words,
            order,
            words,
            num,
        ),
        MINE=mine,
        OTHERS=1024,
        num_warps=4,
    )
    return sorted_words, order
