"""Groups the keys of a batch by row: a sort by slot, and where each one's gradient lies.

Needs slots alone, no gradient, so that a store can do it on another stream while vectors are
gathered and the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.occurrences import GradientPart, Grouping
from penstock.kernels.plan import DevicePlan
from penstock.kernels.pool import bag_scales, size_scale
from penstock.kernels.sort import sort_words

_SEQUENCE: tl.constexpr = tl.constexpr(3)
_MOST_ELEMENTS = 2**31 - 1
_TABLE_BITS = 16
_KEYS = 512


@triton.jit
def last_not_above(numbers, low, high, wanted, is_wanted):
    """Greatest i in [low, high) with numbers[i] <= wanted; numbers rise, numbers[low] is."""
    while tl.max(tl.where(is_wanted, high - low, 0)) > 1:
        middle = (low + high) // 2
        number = tl.load(numbers + middle, mask=is_wanted, other=0)
        is_low = number <= wanted
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
    return low


@triton.jit
def source_of(
    position, is_key, sources, tables, feature_of_packed, column_of, table_of, batch_size, stride,
    ONE_HOT: tl.constexpr, TABLES: tl.constexpr,
):  # fmt: skip
    """Where the gradient of a key begins, int64, and its table."""
    table = (position * 0).to(tl.int32)
    if ONE_HOT:
        feature = tl.load(feature_of_packed + position // batch_size, mask=is_key, other=0)
        column = tl.load(column_of + feature, mask=is_key, other=0)
        source = (position % batch_size).to(tl.int64) * stride + column
        if TABLES:
            table = tl.load(table_of + feature, mask=is_key, other=0)
    else:
        source = tl.load(sources + position, mask=is_key, other=0).to(tl.int64)
        if TABLES:
            table = tl.load(tables + position, mask=is_key, other=0)
    return source, table


@triton.jit
def _describe_kernel(
    sources,
    factors,
    tables,
    words,
    slots,
    weights,
    scales,
    offsets,
    feature_of_packed,
    table_of,
    pooling,
    column_of,
    num_keys,
    batch_size,
    num_bags,
    stride,
    first_row,
    slot_bits,
    table_mask,
    D: tl.constexpr,
    KEYS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TABLES: tl.constexpr,
):
    """By position of the key: the word that it is sorted by, and all that the update asks for."""
    position = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    is_key = position < num_keys
    low = tl.zeros((KEYS,), tl.int64)
    bag = last_not_above(offsets, low, low + num_bags, position, is_key)
    sample = bag % batch_size
    feature = tl.load(feature_of_packed + bag // batch_size, mask=is_key, other=-1)
    is_served = feature >= 0
    slot = tl.load(slots + position, mask=is_served, other=-1)
    table = tl.load(table_of + feature, mask=is_served, other=0)
    word = slot | ((table & table_mask) << slot_bits)
    tl.store(words + position, tl.where(slot < 0, -1, word), mask=is_key)
    kind = tl.load(pooling + feature, mask=is_served, other=0)
    column = tl.load(column_of + feature, mask=is_served, other=0)
    source = (first_row + sample) * stride + column
    if SEQUENCES:
        first = tl.load(offsets + bag, mask=is_key, other=0)
        source += tl.where(kind == _SEQUENCE, position - first, 0) * D
    tl.store(sources + position, source.to(sources.dtype.element_ty), mask=is_key)
    if TABLES:
        tl.store(tables + position, table, mask=is_key)
    if WEIGHTED:
        factor = tl.load(weights + position, mask=is_key, other=0.0)
        if SCALED:
            factor = tl.load(scales + bag, mask=is_key, other=0.0) * factor
        tl.store(factors + position, factor, mask=is_key)
    elif SCALED:
        first = tl.load(offsets + bag, mask=is_key, other=0)
        last = tl.load(offsets + bag + 1, mask=is_key, other=0)
        tl.store(factors + position, size_scale(kind, last - first), mask=is_key)


class _Arrays(NamedTuple):
    words: Tensor
    sources: Tensor
    tables: Tensor | None
    factors: Tensor | None


def _described(
    plan: DevicePlan, part: GradientPart, first_row: int, into: _Arrays, bits: tuple[int, int]
) -> None:
    batch, (words, sources, tables, factors) = part.batch, into
    scales = bag_scales(plan, batch)
    num_keys = len(batch.values)
    slot_bits, table_bits = bits
    _describe_kernel[(triton.cdiv(num_keys, _KEYS),)](
        sources,
        sources if factors is None else factors,
        sources if tables is None else tables,
        words,
        part.slots,
        sources if batch.weights is None else batch.weights,
        sources if scales is None else scales,
        batch.offsets,
        plan.feature_of_packed,
        plan.table,
        plan.pooling,
        plan.column,
        num_keys,
        batch.batch_size,
        len(batch.offsets) - 1,
        plan.stride,
        first_row,
        slot_bits,
        (1 << table_bits) - 1,
        D=plan.dim,
        KEYS=_KEYS,
        WEIGHTED=batch.weights is not None,
        SCALED=plan.divides and factors is not None,
        SEQUENCES=plan.has_sequences,
        TABLES=tables is not None,
    )


def group_keys(
    plan: DevicePlan,
    parts: Sequence[GradientPart],
    *,
    needs_tables: bool,
    num_slots: int = 1 << 31,
    one_hot: bool = False,
) -> Grouping:
    """Groups the keys of look-ups by slot.

    Args:
      plan: of all parts.
      parts: batches and slots; gradients are not looked at. Several are taken one after the other.
      needs_tables: whether rows need the number of their table: its settings, or marks of use.
      num_slots: slots are below. If they leave bits for it, keys are sorted by table first: the
        gradients of one feature are few enough for the cache, those of all are not.
      one_hot: every bag is known to hold one key.

    Effects: on the current stream, without synchronisation.
    """
    device = parts[0].slots.device
    if one_hot and plan.serves_all and len(parts) == 1 and parts[0].batch.weights is None:
        return Grouping(*sort_words(parts[0].slots), 31, True, None, None, None)
    sizes = [len(part.slots) for part in parts]
    num_keys = sum(sizes)
    rows = sum(part.batch.batch_size for part in parts)
    has_factors = plan.divides or any(part.batch.weights is not None for part in parts)
    width = torch.int32 if rows * plan.stride <= _MOST_ELEMENTS else torch.int64
    whole = _Arrays(
        torch.empty(num_keys, dtype=torch.int32, device=device),
        torch.empty(num_keys, dtype=width, device=device),
        torch.empty(num_keys, dtype=torch.int32, device=device) if needs_tables else None,
        torch.empty(num_keys, device=device) if has_factors else None,
    )
    slot_bits = max(1, (num_slots - 1).bit_length())
    bits = slot_bits, min(31 - slot_bits, _TABLE_BITS)
    row = start = 0
    for part, size in zip(parts, sizes, strict=True):
        if size:
            span = slice(start, start + size)
            into = _Arrays(*(None if array is None else array[span] for array in whole))
            _described(plan, part, row, into, bits)
        start, row = start + size, row + part.batch.batch_size
    return Grouping(*sort_words(whole.words), slot_bits, False, *whole[1:])
