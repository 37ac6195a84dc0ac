"""What the kernels of look-ups and updates compute, in plain torch: their twins in the tests.

Slow and obvious. Sums and rules are computed in float64, so that a kernel is compared with
something better than itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.kernels.plan import MEAN, SEQUENCE, SQRT_N, DevicePlan
from penstock.types import KeyedJagged

SMALLEST_DIVISOR = torch.finfo(torch.float32).tiny
"""A smaller sum of weights counts as 0: its inverse is beyond float32."""


def describe(plan: DevicePlan, batch: KeyedJagged) -> tuple[Tensor, Tensor, Tensor]:
    """Where each key's vector goes, and by what factor.

    Returns:
      feature [N] int64 of the plan, -1: another store's; source [N] int64, the key's first element
      of the output as one array; factor [N] float32.
    """
    size, num = batch.batch_size, len(batch.values)
    lengths = batch.offsets.diff()
    bag = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    feature = plan.feature_of_packed.long()[bag // max(1, size)]
    known = feature.clamp(min=0)
    place = torch.arange(num, device=lengths.device) - batch.offsets[bag]
    source = bag % max(1, size) * plan.stride + plan.column.long()[known]
    weights = batch.weights if batch.weights is not None else torch.ones(num, device=bag.device)
    wide = weights.double()
    pooling = plan.pooling.long()[known]
    total = torch.zeros(len(lengths), dtype=torch.float64, device=bag.device)
    total.index_add_(0, bag, torch.where(pooling == SQRT_N, wide * wide, wide))
    divisor = torch.where(pooling == SQRT_N, total[bag].sqrt(), total[bag]).float()
    divides = (pooling == MEAN) | (pooling == SQRT_N)
    scale = torch.where(divisor.abs() < SMALLEST_DIVISOR, 0.0, 1.0 / divisor)
    factor = torch.where(divides, scale, 1.0) * weights
    return feature, source + torch.where(pooling == SEQUENCE, place, 0) * plan.dim, factor


def pooled_forward(
    values: Tensor, plan: DevicePlan, batch: KeyedJagged, slots: Tensor, out: Tensor
) -> None:
    """Twin of `pool.pooled_forward` without initial values.

    Args:
      values: [slots, D].
      plan: its columns of `out` are written, all others left alone.
      batch: keys of N positions.
      slots: [N] int32; -1 adds nothing.
      out: [B, plan.stride] float32.
    """
    feature, source, factor = describe(plan, batch)
    columns = torch.arange(plan.dim, device=out.device)
    flat = out.view(-1)
    for number in range(plan.num_features):
        first, wide = int(plan.column[number]), plan.dim * max(1, int(plan.max_keys[number]))
        out[:, first : first + wide] = 0.0
    used = (feature >= 0) & (slots >= 0)
    vectors = values[slots[used].long()].double() * factor[used, None].double()
    places = source[used, None] + columns
    total = torch.zeros(len(flat), dtype=torch.float64, device=out.device)
    total.index_add_(0, places.view(-1), vectors.view(-1))
    flat[places.view(-1)] = total[places.view(-1)].float()
