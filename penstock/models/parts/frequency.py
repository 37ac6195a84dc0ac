"""How often items come, estimated from the batches in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MULTIPLIERS = (-7046029254386353131, -4658895280553007687)
"""Odd 64-bit numbers, one for each row of counters (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)."""


class FrequencySketch(nn.Module):
    """A count-min sketch whose counts fade: share of each item among the samples of late.

    Each item has a counter in each of two rows; the smaller one counts, since items that share a
    counter can only make it too large. Counters and the total fade by (1 - 1 / memory) a step, so
    that what is popular now counts. All state is in buffers, and so in a checkpoint.

    Args:
      buckets: counters of a row, 8 bytes each.
      memory: steps after which a count has faded to 1/e.
    """

    def __init__(self, buckets: int, memory: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.keep = 1.0 - 1.0 / memory
        self.counts: Tensor
        self.counted_at: Tensor
        self.total: Tensor
        self.step: Tensor
        self.register_buffer("counts", torch.zeros(len(_MULTIPLIERS) * buckets))
        steps = torch.zeros(len(_MULTIPLIERS) * buckets, dtype=torch.int32)
        self.register_buffer("counted_at", steps)
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, items: Tensor) -> Tensor:
        """Counts the items of a batch, and says how frequent each is, this batch included.

        Args:
          items: [B] int64 hashes: equal where the items are.

        Returns:
          [B] float32 natural logarithm of the probability that a sample has the item.
        """
        self.step += 1
        self.total.mul_(self.keep).add_(items.numel())
        places = self._places(items).flatten()
        age = self.step - self.counted_at[places]
        # Of equal places all are given the same number.
        self.counts[places] *= self.keep**age
        self.counted_at[places] = self.step.to(torch.int32)
        self.counts.index_add_(0, places, torch.ones_like(self.counts[places]))
        of_rows = self.counts[places].view(len(_MULTIPLIERS), -1)
        return torch.log(of_rows.min(0).values / self.total).to(torch.float32)

    def _places(self, items: Tensor) -> Tensor:
        """[rows, B] of the counters of each item."""
        multipliers = torch.tensor(_MULTIPLIERS, device=items.device).unsqueeze(1)
        mixed = items * multipliers
        mixed = (mixed ^ ((mixed >> 32) & 0xFFFFFFFF)) * multipliers
        bucket = ((mixed >> 24) & 0xFFFFFFFFFF) % self.buckets
        rows = torch.arange(len(_MULTIPLIERS), device=items.device)
        return bucket + rows.unsqueeze(1) * self.buckets
