"""Groups the keys of a batch by row: a sort by slot, and where each one's gradient lies.

Needs slots alone, no gradient, so that a store can do it on another stream while vectors are
gathered and the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.launch import launch
from penstock.kernels.plan import DevicePlan
from penstock.kernels.pool import bag_scales, size_scale
from penstock.kernels.update.occurrences import SHORT, WINDOW, GradientPart, Grouping
from penstock.kernels.update.sort import sort_words

_SEQUENCE: tl.constexpr = tl.constexpr(3)
_MOST_ELEMENTS = 2**31 - 1
_TABLE_BITS = 16
_KEYS = 512
_PLACES = 512
ENTERS: tl.constexpr = tl.constexpr(256)
LEAVES: tl.constexpr = tl.constexpr(512)


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
def bag_of(offsets, num_bags, num_keys, position, is_key):
    """[B] int32: the bag of each key of a batch.

    Begins where it would be if all bags were of one size, and widens the search from there: bags
    of one size take three loads, others some more, and none as many as a search among all bags.
    """
    none = position * 0
    share = (none + num_bags).to(tl.float32) / (none + num_keys).to(tl.float32)
    low = tl.minimum((position.to(tl.float32) * share).to(tl.int32), num_bags - 1)
    high = low + 1
    reach = none + 1
    is_above = is_key & (tl.load(offsets + low, mask=is_key, other=0) > position)
    while tl.max(is_above.to(tl.int32)) > 0:
        high = tl.where(is_above, low, high)
        low = tl.where(is_above, tl.maximum(low - reach, 0), low)
        reach = reach * 2
        is_above = is_above & (tl.load(offsets + low, mask=is_above, other=0) > position)
    is_inside = is_key & (high < num_bags)
    is_below = is_inside & (tl.load(offsets + high, mask=is_inside, other=0) <= position)
    while tl.max(is_below.to(tl.int32)) > 0:
        low = tl.where(is_below, high, low)
        high = tl.where(is_below, tl.minimum(high + reach, num_bags), high)
        reach = reach * 2
        is_inside = is_below & (high < num_bags)
        is_below = is_inside & (tl.load(offsets + high, mask=is_inside, other=0) <= position)
    return last_not_above(offsets, low, high, position, is_key)


class _ByPosition(NamedTuple):
    """What is found of a look-up's keys, by position."""

    sources: Tensor
    factors: Tensor
    tables: Tensor
    words: Tensor


class _OfKeys(NamedTuple):
    """What is known of them."""

    slots: Tensor
    weights: Tensor
    scales: Tensor
    offsets: Tensor


class _OfFeatures(NamedTuple):
    """Arrays of a `DevicePlan`."""

    feature_of_packed: Tensor
    table: Tensor
    pooling: Tensor
    column: Tensor


class _DescribeForm(NamedTuple):
    """Constants: columns; keys of a program; what is wanted."""

    D: int
    KEYS: int
    WEIGHTED: bool
    SCALED: bool
    SEQUENCES: bool
    TABLES: bool


@triton.jit(do_not_specialize=["num_keys", "batch_size", "num_bags", "first_element"])
def _describe_kernel(
    found: _ByPosition, given: _OfKeys, plan: _OfFeatures, num_keys, batch_size, num_bags, stride,
    first_element, slot_bits, table_mask, form: tl.constexpr,
):  # fmt: skip
    """By position of the key: the word that it is sorted by, and all that the update asks for."""
    sources, factors, tables, words = found
    slots, weights, scales, offsets = given
    feature_of_packed, table_of, pooling, column_of = plan
    # In 32 bits, as N is: divisions of 64 would take longer than all else.
    position = tl.program_id(0) * form.KEYS + tl.arange(0, form.KEYS)
    is_key = position < num_keys
    bag = bag_of(offsets, num_bags, num_keys, position, is_key)
    packed = bag // batch_size
    sample = bag - packed * batch_size
    feature = tl.load(feature_of_packed + packed, mask=is_key, other=-1)
    is_served = feature >= 0
    slot = tl.load(slots + position, mask=is_served, other=-1)
    table = tl.load(table_of + feature, mask=is_served, other=0)
    word = slot | ((table & table_mask) << slot_bits)
    tl.store(words + position, tl.where(slot < 0, -1, word), mask=is_key)
    kind = tl.load(pooling + feature, mask=is_served, other=0)
    column = tl.load(column_of + feature, mask=is_served, other=0)
    source = first_element + sample.to(tl.int64) * stride + column
    if form.SEQUENCES:
        first = tl.load(offsets + bag, mask=is_key, other=0)
        source += tl.where(kind == _SEQUENCE, position - first, 0) * form.D
    tl.store(sources + position, source.to(sources.dtype.element_ty), mask=is_key)  # type: ignore[attr-defined]
    if form.TABLES:
        tl.store(tables + position, table, mask=is_key)
    if form.WEIGHTED:
        factor = tl.load(weights + position, mask=is_key, other=0.0)
        if form.SCALED:
            factor = tl.load(scales + bag, mask=is_key, other=0.0) * factor
        tl.store(factors + position, factor, mask=is_key)
    elif form.SCALED:
        first = tl.load(offsets + bag, mask=is_key, other=0)
        last = tl.load(offsets + bag + 1, mask=is_key, other=0)
        tl.store(factors + position, size_scale(kind, last - first), mask=is_key)


@triton.jit
def _source_of(
    position, is_key, unsorted, plan, batch_size, stride, ONE_HOT: tl.constexpr,
    TABLES: tl.constexpr,
):  # fmt: skip
    """Where the gradient of a key begins, int64, and its table."""
    sources, tables, _ = unsorted
    feature_of_packed, column_of, table_of = plan
    table = (position * 0).to(tl.int32)
    if ONE_HOT:
        # In 32 bits: a division of 64 takes longer than all else here.
        packed = position.to(tl.int32) // batch_size
        sample = position.to(tl.int32) - packed * batch_size
        feature = tl.load(feature_of_packed + packed, mask=is_key, other=0)
        source = sample.to(tl.int64) * stride + tl.load(column_of + feature, mask=is_key, other=0)
        if TABLES:
            table = tl.load(table_of + feature, mask=is_key, other=0)
    else:
        source = tl.load(sources + position, mask=is_key, other=0).to(tl.int64)
        if TABLES:
            table = tl.load(tables + position, mask=is_key, other=0)
    return source, table


@triton.jit
def _earlier(a, b):
    return tl.minimum(a, b)


class _Listed(NamedTuple):
    """The arrays of a `Grouping`."""

    sources: Tensor
    factors: Tensor
    pieces: Tensor
    long_places: Tensor
    counts: Tensor


class _Unsorted(NamedTuple):
    """What was found by position."""

    sources: Tensor
    tables: Tensor
    factors: Tensor


class _Columns(NamedTuple):
    """Arrays of a `DevicePlan`, for batches of one key a bag."""

    feature_of_packed: Tensor
    column: Tensor
    table: Tensor


class _ListForm(NamedTuple):
    """Constants: places of a program, of a window and of a short piece; what is wanted."""

    PLACES: int
    WINDOW: int
    SHORT: int
    ONE_HOT: bool
    FACTORS: bool
    TABLES: bool


@triton.jit(do_not_specialize=["num_keys", "batch_size"])
def _list_kernel(
    listed: _Listed, words, order, unsorted: _Unsorted, plan: _Columns, num_keys, batch_size,
    stride, slot_mask, form: tl.constexpr,
):  # fmt: skip
    sources, factors, pieces, long_places, counts = listed
    PLACES: tl.constexpr = form.PLACES
    WINDOW: tl.constexpr = form.WINDOW
    SHORT: tl.constexpr = form.SHORT
    TABLES: tl.constexpr = form.TABLES
    kinds = pieces + num_keys
    slots = kinds + num_keys
    tables = slots + num_keys
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    is_key = place < num_keys
    word = tl.load(words + place, mask=is_key, other=-1)
    before = tl.load(words + place - 1, mask=is_key & (place > 0), other=-1)
    after = tl.load(words + place + 1, mask=place + 1 < num_keys, other=-1)
    position = tl.load(order + place, mask=is_key, other=0)
    has_row = word >= 0
    source, table = _source_of(
        position, has_row, unsorted, plan, batch_size, stride, form.ONE_HOT, TABLES
    )
    tl.store(sources + place, source.to(sources.dtype.element_ty), mask=is_key)  # type: ignore[attr-defined]
    if form.FACTORS:
        factor = tl.load(unsorted.factors + position, mask=is_key, other=0.0)
        tl.store(factors + place, factor, mask=is_key)
    slot = word & slot_mask
    is_head = has_row & (word != before)
    is_first = is_head | (has_row & (place % WINDOW == 0))
    is_last = (word != after) | (place % WINDOW == WINDOW - 1)
    # The first end at or after each place; ends cannot lie beyond the window.
    windows = tl.reshape(tl.where(is_last, place, num_keys), (PLACES // WINDOW, WINDOW))
    end = tl.reshape(tl.associative_scan(windows, 1, _earlier, reverse=True), (PLACES,))
    beyond = tl.load(words + end + 1, mask=is_first & (end + 1 < num_keys), other=-1)
    leaves = beyond == word
    kind = end - place + 1 + tl.where(is_head, 0, ENTERS) + tl.where(leaves, LEAVES, 0)
    is_short = is_first & (end - place < SHORT)
    is_other = is_first & (end - place >= SHORT)
    shorts = tl.cumsum(is_short.to(tl.int32), 0)
    others = tl.cumsum(is_other.to(tl.int32), 0)
    first_short = tl.atomic_add(counts, tl.max(shorts), sem="relaxed")
    first_other = tl.atomic_add(counts + 1, tl.max(others), sem="relaxed")
    number = tl.where(is_short, first_short + shorts - 1, num_keys - first_other - others)
    tl.store(pieces + number, place, mask=is_first)
    tl.store(kinds + number, kind, mask=is_first)
    tl.store(slots + number, slot, mask=is_first)
    if TABLES:
        tl.store(tables + number, table, mask=is_first)
    heads = tl.sum(is_head.to(tl.int32))
    if heads > 0:
        tl.atomic_add(counts + 3, heads, sem="relaxed")
    _list_long(
        long_places, counts, words, place, word, slot, table, is_head & leaves, num_keys, PLACES,
        WINDOW, TABLES,
    )  # fmt: skip


@triton.jit
def _list_long(
    long_places, counts, words, place, word, slot, table, is_long, num_keys,
    PLACES: tl.constexpr, WINDOW: tl.constexpr, TABLES: tl.constexpr,
):  # fmt: skip
    """Appends segments of several pieces, which begin at `place`."""
    longs = tl.sum(is_long.to(tl.int32))
    if longs > 0:
        number = tl.cumsum(is_long.to(tl.int32), 0) - 1
        number += tl.atomic_add(counts + 2, longs, sem="relaxed")
        tl.store(long_places + 4 * number, place, mask=is_long)
        tl.store(long_places + 4 * number + 2, slot, mask=is_long)
        if TABLES:
            tl.store(long_places + 4 * number + 3, table, mask=is_long)
        # Twice as far each time while the segment goes on; most end in the next window.
        reach = (place // WINDOW + 1) * WINDOW
        ahead = tl.full((PLACES,), WINDOW, tl.int32)
        goes_on = is_long
        while tl.max(goes_on.to(tl.int32)) > 0:
            there = reach + ahead
            word_there = tl.load(words + there, mask=goes_on & (there < num_keys), other=-1)
            goes_on = goes_on & (word_there == word)
            reach = tl.where(goes_on, there, reach)
            ahead = tl.where(goes_on, ahead * 2, ahead)
        stop = tl.minimum(reach + ahead, num_keys)
        last = last_not_above(words, reach, stop, word, is_long)
        tl.store(long_places + 4 * number + 1, last, mask=is_long)


class _Arrays(NamedTuple):
    """By position of the key."""

    words: Tensor
    """[N] int32: slots, perhaps with bits of the table above them; below 0: no row."""
    sources: Tensor | None
    """None: position n is that of the only key of bag n."""
    tables: Tensor | None
    factors: Tensor | None

    def part(self, span: slice) -> _Arrays:
        """Those of some positions."""
        optional = (
            None if array is None else array[span]
            for array in (self.sources, self.tables, self.factors)
        )
        return _Arrays(self.words[span], *optional)


def _described(
    plan: DevicePlan, part: GradientPart, first_element: int, into: _Arrays, bits: tuple[int, int]
) -> None:
    batch, (words, sources, tables, factors) = part.batch, into
    assert sources is not None
    scales = bag_scales(plan, batch)
    num_keys = batch.values.numel()
    slot_bits, table_bits = bits
    launch(
        _describe_kernel,
        (-(-num_keys // _KEYS),),
        (
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
            batch.offsets.numel() - 1,
            plan.stride,
            first_element,
            slot_bits,
            (1 << table_bits) - 1,
        ),
        form=_describe_form(
            plan.dim,
            batch.weights is not None,
            plan.divides and factors is not None,
            plan.has_sequences,
            tables is not None,
        ),
    )


def group_keys(
    plan: DevicePlan,
    parts: Sequence[GradientPart],
    *,
    needs_tables: bool,
    num_slots: int = 1 << 31,
    one_hot: bool = False,
    counts: Tensor | None = None,
) -> Grouping:
    """Groups the keys of look-ups by slot.

    Args:
      plan: of all parts.
      parts: batches and slots; gradients are not looked at. Several are taken one after the other.
      needs_tables: whether rows need the number of their table: its settings, or marks of use.
      num_slots: slots are below. If they leave bits for it, keys are sorted by table first: the
        gradients of one feature are few enough for the cache, those of all are not.
      one_hot: every bag is known to hold one key.
      counts: [4] int32 zeros, nobody else's, to save a launch.

    Effects: on the current stream, without synchronisation.
    """
    device = parts[0].slots.device
    if plan.is_by_key:
        rows = _rows_of(plan, parts, needs_tables=needs_tables)
        return _listed(plan, rows, 31, 1, counts, needs_tables=needs_tables)
    if one_hot and plan.serves_all and len(parts) == 1 and parts[0].batch.weights is None:
        slots, batch_size = parts[0].slots, parts[0].batch.batch_size
        words = _Arrays(slots, None, None, None)
        return _listed(plan, words, 31, batch_size, counts, needs_tables=needs_tables)
    sizes = [part.slots.numel() for part in parts]
    num_keys = sum(sizes)
    plans = [part.plan or plan for part in parts]
    elements = [part.batch.batch_size * own.stride for part, own in zip(parts, plans, strict=True)]
    has_factors = plan.divides or any(part.batch.weights is not None for part in parts)
    whole = _Arrays(
        torch.empty(num_keys, dtype=torch.int32, device=device),
        torch.empty(num_keys, dtype=_source_type(sum(elements)), device=device),
        torch.empty(num_keys, dtype=torch.int32, device=device) if needs_tables else None,
        torch.empty(num_keys, device=device) if has_factors else None,
    )
    slot_bits = max(1, (num_slots - 1).bit_length())
    bits = slot_bits, min(31 - slot_bits, _TABLE_BITS)
    first = start = 0
    for part, own, size, more in zip(parts, plans, sizes, elements, strict=True):
        if size:
            into = whole.part(slice(start, start + size))
            _described(own, part, first, into, bits)
        start, first = start + size, first + more
    size = parts[0].batch.batch_size
    return _listed(plan, whole, slot_bits, size, counts, needs_tables=needs_tables)


def _rows_of(plan: DevicePlan, parts: Sequence[GradientPart], *, needs_tables: bool) -> _Arrays:
    """Keys by place: each has a row of the gradient."""
    slots = torch.cat([part.slots for part in parts])
    num_keys, device = slots.numel(), slots.device
    places = torch.arange(num_keys, dtype=_source_type(num_keys * plan.dim), device=device)
    tables = None
    if needs_tables:
        of_parts = [
            torch.repeat_interleave(
                plan.table, part.batch.offsets.diff(), output_size=part.slots.numel()
            )
            for part in parts
        ]
        tables = torch.cat(of_parts)
    return _Arrays(slots, places * plan.dim, tables, None)


def _listed(
    plan: DevicePlan,
    unsorted: _Arrays,
    slot_bits: int,
    batch_size: int,
    counts: Tensor | None,
    *,
    needs_tables: bool,
) -> Grouping:
    words, order = sort_words(unsorted.words)
    num_keys, device = words.numel(), words.device
    sources = unsorted.sources
    is_one_hot = sources is None
    source_type = _source_type(batch_size * plan.stride) if sources is None else sources.dtype
    factors = unsorted.factors
    grouping = Grouping(
        torch.empty(num_keys, dtype=source_type, device=device),
        None if factors is None else torch.empty_like(factors),
        torch.empty(4, num_keys, dtype=torch.int32, device=device),
        torch.empty(num_keys // WINDOW + 1, 4, dtype=torch.int32, device=device),
        torch.zeros(4, dtype=torch.int32, device=device) if counts is None else counts,
    )
    if num_keys:
        launch(
            _list_kernel,
            (-(-num_keys // _PLACES),),
            (
                grouping.sources,
                grouping.sources if grouping.factors is None else grouping.factors,
                *grouping[2:],
                words,
                order,
                order if sources is None else sources,
                order if unsorted.tables is None else unsorted.tables,
                order if factors is None else factors,
                plan.feature_of_packed,
                plan.column,
                plan.table,
                num_keys,
                batch_size,
                plan.stride,
                (1 << slot_bits) - 1,
            ),
            form=_list_form(is_one_hot, factors is not None, needs_tables),
        )
    return grouping


@lru_cache(maxsize=256)
def _describe_form(
    dim: int, weighted: bool, scaled: bool, sequences: bool, tables: bool
) -> _DescribeForm:
    return _DescribeForm(dim, _KEYS, weighted, scaled, sequences, tables)


@lru_cache(maxsize=16)
def _list_form(one_hot: bool, factors: bool, tables: bool) -> _ListForm:
    return _ListForm(_PLACES, WINDOW, SHORT, one_hot, factors, tables)


def _source_type(elements: int) -> torch.dtype:
    return torch.int32 if elements <= _MOST_ELEMENTS else torch.int64
