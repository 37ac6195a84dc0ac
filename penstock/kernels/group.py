"""Groups the keys of a batch by row: a sort by slot, then lists of what is to be summed.

Needs slots alone, no gradient, so that a store can do it on another stream while vectors are
gathered and the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.occurrences import WINDOW, GradientPart, Grouping
from penstock.kernels.plan import DevicePlan
from penstock.kernels.pool import bag_scales, size_scale
from penstock.kernels.sort import sort_by_slot

ENTERS: tl.constexpr = tl.constexpr(256)
LEAVES: tl.constexpr = tl.constexpr(512)
_SEQUENCE: tl.constexpr = tl.constexpr(3)
_MOST_ELEMENTS = 2**31 - 1


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
def _describe_kernel(
    sources,
    factors,
    tables,
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
    D: tl.constexpr,
    KEYS: tl.constexpr,
    ONE_HOT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TABLES: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """By position of the key: where its gradient begins, by what factor, of which table."""
    position = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    is_key = position < num_keys
    if ONE_HOT:
        bag = position
    else:
        low = tl.zeros((KEYS,), tl.int64)
        bag = last_not_above(offsets, low, low + num_bags, position, is_key)
    sample = bag % batch_size
    feature = tl.load(feature_of_packed + bag // batch_size, mask=is_key, other=-1)
    is_served = feature >= 0
    if OTHERS:
        tl.store(slots + position, -1, mask=is_key & (feature < 0))
    kind = tl.load(pooling + feature, mask=is_served, other=0)
    column = tl.load(column_of + feature, mask=is_served, other=0)
    source = (first_row + sample) * stride + column
    if SEQUENCES:
        first = tl.load(offsets + bag, mask=is_key, other=0)
        source += tl.where(kind == _SEQUENCE, position - first, 0) * D
    tl.store(sources + position, source.to(sources.dtype.element_ty), mask=is_key)
    if TABLES:
        table = tl.load(table_of + feature, mask=is_served, other=0)
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


@triton.jit
def _earlier(a, b):
    return tl.minimum(a, b)


@triton.jit
def _pieces_kernel(
    sources,
    factors,
    piece_places,
    piece_kinds,
    piece_slots,
    piece_tables,
    long_places,
    counts,
    sorted_slots,
    order,
    unsorted_sources,
    unsorted_factors,
    unsorted_tables,
    num_keys,
    PLACES: tl.constexpr,
    WINDOW: tl.constexpr,
    FACTORS: tl.constexpr,
    TABLES: tl.constexpr,
):
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    is_key = place < num_keys
    slot = tl.load(sorted_slots + place, mask=is_key, other=-1)
    before = tl.load(sorted_slots + place - 1, mask=is_key & (place > 0), other=-1)
    after = tl.load(sorted_slots + place + 1, mask=place + 1 < num_keys, other=-1)
    position = tl.load(order + place, mask=is_key, other=0)
    source = tl.load(unsorted_sources + position, mask=is_key, other=0)
    tl.store(sources + place, source, mask=is_key)
    if FACTORS:
        factor = tl.load(unsorted_factors + position, mask=is_key, other=0.0)
        tl.store(factors + place, factor, mask=is_key)
    has_row = is_key & (slot >= 0)
    is_head = has_row & (slot != before)
    is_first = is_head | (has_row & (place % WINDOW == 0))
    is_last = (slot != after) | (place % WINDOW == WINDOW - 1)
    # The first end at or after each place; ends cannot lie beyond the window.
    windows = tl.reshape(tl.where(is_last, place, num_keys), (PLACES // WINDOW, WINDOW))
    end = tl.reshape(tl.associative_scan(windows, 1, _earlier, reverse=True), (PLACES,))
    beyond = tl.load(sorted_slots + end + 1, mask=is_first & (end + 1 < num_keys), other=-1)
    leaves = beyond == slot
    kind = end - place + 1 + tl.where(is_head, 0, ENTERS) + tl.where(leaves, LEAVES, 0)
    number = tl.cumsum(is_first.to(tl.int32), 0)
    pieces = tl.max(number)
    if pieces > 0:
        number += tl.atomic_add(counts, pieces, sem="relaxed") - 1
    tl.store(piece_places + number, place, mask=is_first)
    tl.store(piece_kinds + number, kind, mask=is_first)
    tl.store(piece_slots + number, slot, mask=is_first)
    if TABLES:
        table = tl.load(unsorted_tables + position, mask=is_first, other=0)
        tl.store(piece_tables + number, table, mask=is_first)
    heads = tl.sum(is_head.to(tl.int32))
    if heads > 0:
        tl.atomic_add(counts + 2, heads, sem="relaxed")
    is_long = is_head & leaves
    longs = tl.sum(is_long.to(tl.int32))
    if longs > 0:
        number = tl.cumsum(is_long.to(tl.int32), 0) - 1
        number += tl.atomic_add(counts + 1, longs, sem="relaxed")
        tl.store(long_places + 4 * number, place, mask=is_long)
        tl.store(long_places + 4 * number + 2, slot, mask=is_long)
        if TABLES:
            table = tl.load(unsorted_tables + position, mask=is_long, other=0)
            tl.store(long_places + 4 * number + 3, table, mask=is_long)
        stop = tl.zeros((PLACES,), tl.int32) + num_keys
        last = last_not_above(sorted_slots, place, stop, slot, is_long)
        tl.store(long_places + 4 * number + 1, last, mask=is_long)


def _described(
    plan: DevicePlan,
    part: GradientPart,
    first_row: int,
    into: tuple[Tensor, Tensor | None, Tensor],
    one_hot: bool,
) -> None:
    sources, factors, tables = into
    batch = part.batch
    scales = bag_scales(plan, batch)
    num_keys = len(batch.values)
    _describe_kernel[(triton.cdiv(num_keys, 512),)](
        sources,
        sources if factors is None else factors,
        tables,
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
        D=plan.dim,
        KEYS=512,
        ONE_HOT=one_hot,
        WEIGHTED=batch.weights is not None,
        SCALED=plan.divides and factors is not None,
        SEQUENCES=plan.has_sequences,
        TABLES=len(tables) > 0,
        OTHERS=not plan.serves_all,
    )


def group_keys(
    plan: DevicePlan, parts: Sequence[GradientPart], *, needs_tables: bool, one_hot: bool = False
) -> Grouping:
    """Groups the keys of look-ups by slot.

    Args:
      plan: of all parts.
      parts: batches and slots; gradients are not looked at. Several are taken one after the other.
      needs_tables: whether rows need the number of their table: its settings, or marks of use.
      one_hot: every bag is known to hold one key.

    Effects: on the current stream, without synchronisation. Slots of other stores' keys, which may
    be anything, become -1.
    """
    device = parts[0].slots.device
    sizes = [len(part.slots) for part in parts]
    num_keys = sum(sizes)
    rows = sum(part.batch.batch_size for part in parts)
    scaled = plan.divides and not one_hot
    has_factors = scaled or any(part.batch.weights is not None for part in parts)
    width = torch.int32 if rows * plan.stride <= _MOST_ELEMENTS else torch.int64
    unsorted = torch.empty(num_keys, dtype=width, device=device)
    factors = torch.empty(num_keys, device=device) if has_factors else None
    tables = torch.empty(num_keys if needs_tables else 0, dtype=torch.int32, device=device)
    row = start = 0
    for part, size in zip(parts, sizes, strict=True):
        if size:
            span = slice(start, start + size)
            part_factors = None if factors is None else factors[span]
            into = unsorted[span], part_factors, tables[span]
            _described(plan, part, row, into, one_hot)
        start, row = start + size, row + part.batch.batch_size
    slots = parts[0].slots if len(parts) == 1 else torch.cat([part.slots for part in parts])
    return _pieces(slots, unsorted, factors, tables)


def _pieces(slots: Tensor, unsorted: Tensor, factors: Tensor | None, tables: Tensor) -> Grouping:
    num_keys, device = len(slots), slots.device
    sorted_slots, order = sort_by_slot(slots)
    words = torch.empty(4, num_keys, dtype=torch.int32, device=device)
    long_places = torch.empty(num_keys // WINDOW + 1, 4, dtype=torch.int32, device=device)
    grouping = Grouping(
        torch.empty_like(unsorted),
        None if factors is None else torch.empty_like(factors),
        words[0],
        words[1],
        words[2],
        words[3],
        long_places,
        torch.zeros(3, dtype=torch.int32, device=device),
    )
    if num_keys:
        _pieces_kernel[(triton.cdiv(num_keys, 1024),)](
            grouping.sources,
            grouping.sources if grouping.factors is None else grouping.factors,
            *grouping[2:8],
            sorted_slots,
            order,
            unsorted,
            unsorted if factors is None else factors,
            tables,
            num_keys,
            PLACES=1024,
            WINDOW=WINDOW,
            FACTORS=factors is not None,
            TABLES=len(tables) > 0,
        )
    return grouping
