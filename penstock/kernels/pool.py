"""Look-ups: vectors of a batch's keys gathered and pooled into the output, all features at once.

A program takes some neighbouring samples of one feature, whose keys lie side by side.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import launch
from penstock.kernels.plan import DevicePlan
from penstock.kernels.tiles import power_of_two, warp_tile
from penstock.types import KeyedJagged

_MEAN: tl.constexpr = tl.constexpr(1)
_SQRT_N: tl.constexpr = tl.constexpr(2)
_SMALLEST_DIVISOR: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["num_bags", "batch_size"])
def _bag_scales_kernel(
    scales,
    weights,
    offsets,
    feature_of_packed,
    pooling,
    num_bags,
    batch_size,
    BAGS: tl.constexpr,
):
    """By what weighted sums of bags are multiplied; divisors are summed in order, in fp64."""
    bag = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    is_bag = bag < num_bags
    feature = tl.load(feature_of_packed + bag // batch_size, mask=is_bag, other=-1)
    kind = tl.load(pooling + feature, mask=feature >= 0, other=0)
    divides = (kind == _MEAN) | (kind == _SQRT_N)
    first = tl.load(offsets + bag, mask=divides, other=0)
    last = tl.load(offsets + bag + 1, mask=divides, other=0)
    total = tl.zeros((BAGS,), tl.float64)
    for n in range(0, tl.max(last - first)):
        inside = first + n < last
        weight = tl.load(weights + first + n, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(kind == _SQRT_N, weight * weight, weight)
    divisor = tl.where(kind == _SQRT_N, tl.sqrt(tl.abs(total)), total).to(tl.float32)
    is_zero = tl.abs(divisor) < _SMALLEST_DIVISOR
    scale = tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.where(is_zero, 1.0, divisor)))
    tl.store(scales + bag, tl.where(divides, scale, 1.0), mask=is_bag)


@triton.jit
def size_scale(kind, size):
    """Factor of the unweighted sum of bags of `size` keys, rounded as the host rounds it."""
    count = tl.maximum(size, 1).to(tl.float32)
    divisor = tl.where(kind == _MEAN, count, tl.sqrt_rn(count))
    divides = (kind == _MEAN) | (kind == _SQRT_N)
    return tl.where(divides, tl.div_rn(1.0, divisor), 1.0)


@triton.jit
def _vectors(values, slots, weights, place, inside, D: tl.constexpr, COLUMNS: tl.constexpr,
             WEIGHTED: tl.constexpr):  # fmt: skip
    """[BAGS, COLUMNS] float32: rows of the keys at `place` [BAGS] times their weights; else 0."""
    column = tl.arange(0, COLUMNS)[None, :]
    slot = tl.load(slots + place, mask=inside, other=-1)
    row = values + slot.to(tl.int64)[:, None] * D + column
    vector = tl.load(row, mask=(slot >= 0)[:, None] & (column < D), other=0.0).to(tl.float32)
    if WEIGHTED:
        vector = vector * tl.load(weights + place, mask=inside, other=0.0)[:, None]
    return vector


class _OfFeatures(NamedTuple):
    """Arrays of a `DevicePlan`."""

    packed_feature: Tensor
    pooling: Tensor
    column: Tensor
    max_keys: Tensor


class _PoolForm(NamedTuple):
    """Constants: columns, and of a tile; bags and keys of a program; what the batch is like."""

    D: int
    COLUMNS: int
    BAGS: int
    KEYS: int
    ONE_HOT: bool
    WEIGHTED: bool
    SCALED: bool
    SEQUENCES: bool


@triton.jit(do_not_specialize=["batch_size"])
def _pool_kernel(
    out, values, slots, weights, scales, offsets, plan: _OfFeatures, batch_size, stride,
    form: tl.constexpr,
):  # fmt: skip
    """Pools the bags of this program: samples of axis 0, feature of axis 1."""
    packed_feature, pooling, column_of, max_keys = plan
    D: tl.constexpr = form.D
    COLUMNS: tl.constexpr = form.COLUMNS
    BAGS: tl.constexpr = form.BAGS
    KEYS: tl.constexpr = form.KEYS
    WEIGHTED: tl.constexpr = form.WEIGHTED
    feature = tl.program_id(1)
    sample = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    is_sample = sample < batch_size
    bag = tl.load(packed_feature + feature).to(tl.int64) * batch_size + sample
    kind = tl.load(pooling + feature)
    if form.ONE_HOT:
        first, last = bag, tl.where(is_sample, bag + 1, bag)
    else:
        first = tl.load(offsets + bag, mask=is_sample, other=0)
        last = tl.load(offsets + bag + 1, mask=is_sample, other=0)
    size = last - first
    column = tl.arange(0, COLUMNS)
    target = out + sample * stride + tl.load(column_of + feature)
    is_pooled = is_sample
    longest = tl.max(size)
    if form.SEQUENCES:
        # All positions are written; other poolings have none.
        most = tl.load(max_keys + feature)
        is_pooled = sample < tl.where(most == 0, batch_size, 0)
        longest = tl.where(most == 0, longest, 0)
        for n in range(0, most):
            vector = _vectors(
                values, slots, weights, first + n, first + n < last, D, COLUMNS, WEIGHTED
            )
            part = target[:, None] + n * D + column[None, :]
            tl.store(part, vector, mask=is_sample[:, None] & (column < D)[None, :])
    total = tl.zeros((BAGS, COLUMNS), tl.float32)
    for n in range(0, longest, KEYS):
        # In order; none of these loads waits for another.
        for k in tl.static_range(KEYS):
            place = first + n + k
            total += _vectors(values, slots, weights, place, place < last, D, COLUMNS, WEIGHTED)
    if form.SCALED:
        if WEIGHTED:
            scale = tl.load(scales + bag, mask=is_sample, other=0.0)[:, None]
            total = tl.where(scale == 0.0, 0.0, total * scale)
        else:
            total = total * size_scale(kind, size)[:, None]
    inside = is_pooled[:, None] & (column < D)[None, :]
    # Vectors leave the cache at once: rows that come again stay in it.
    tl.store(target[:, None] + column[None, :], total, mask=inside, cache_modifier=".cs")


def bag_scales(plan: DevicePlan, batch: KeyedJagged) -> Tensor | None:
    """[P * B] float32: factors of weighted sums; None where the batch or the plan needs none."""
    if batch.weights is None or not plan.divides:
        return None
    num_bags = batch.offsets.numel() - 1
    scales = torch.empty(num_bags, dtype=torch.float32, device=batch.offsets.device)
    if num_bags:
        launch(
            _bag_scales_kernel,
            (-(-num_bags // 128),),
            (
                scales,
                batch.weights,
                batch.offsets,
                plan.feature_of_packed,
                plan.pooling,
                num_bags,
                batch.batch_size,
            ),
            BAGS=128,
        )
    return scales


@lru_cache(maxsize=256)
def _pool_form(
    dim: int, few: bool, one_hot: bool, weighted: bool, scaled: bool, sequences: bool
) -> tuple[_PoolForm, int]:
    """And the number of warps; `few`: bags have one key at most, on average."""
    columns = power_of_two(dim)
    vectors, num_warps = warp_tile(columns)
    # About as many keys at once as a bag has: more would be masked, fewer wait for one another.
    keys = 1 if few else min(4, vectors)
    bags = max(1, vectors // 2 if keys == 1 else vectors // keys)
    form = _PoolForm(dim, columns, bags, keys, one_hot, weighted, scaled, sequences)
    return form, num_warps


def pooled_forward(
    values: Tensor,
    plan: DevicePlan,
    batch: KeyedJagged,
    slots: Tensor,
    out: Tensor,
    *,
    one_hot: bool = False,
) -> None:
    """Pools the rows of `slots` into the plan's columns of `out`.

    Args:
      values: [slots, D] float32, bfloat16 or float16.
      plan: features and columns.
      batch: offsets and weights, on the device of `values`.
      slots: [N] int32 by position in the packed keys; one below 0 adds nothing.
      out: [B, plan.stride] float32, contiguous; columns of other features are left alone.
      one_hot: every bag is known to hold one key, so that offsets need not be read.

    Effects: on the current stream, without synchronisation.
    """
    size = batch.batch_size
    if not size or not plan.num_features:
        return
    scales = bag_scales(plan, batch)
    few = one_hot or batch.values.numel() <= batch.offsets.numel() - 1
    weighted = batch.weights is not None
    form, num_warps = _pool_form(plan.dim, few, one_hot, weighted, plan.divides, plan.has_sequences)
    launch(
        _pool_kernel,
        (-(-size // form.BAGS), plan.num_features),
        (
            out,
            values,
            slots,
            slots if batch.weights is None else batch.weights,
            slots if scales is None else scales,
            batch.offsets,
            plan.packed_feature,
            plan.pooling,
            plan.column,
            plan.max_keys,
            size,
            plan.stride,
        ),
        form=form,
        num_warps=num_warps,
    )
