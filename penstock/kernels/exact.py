"""Updates in deterministic mode: the bits of csrc/row_kernels.cc, whatever the order of samples.

Sums are in fixed point: the unit is the row's largest share times 2^-40. So a row's shares are gone
over twice: for the largest, then for the sum. Windows of `WINDOW` places cut long segments into
pieces; a kernel takes some pieces, and those that are no whole segments meet in scratch memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.group import last_not_above, source_of
from penstock.kernels.occurrences import WINDOW, Grouping, RowArrays, RuleOptions
from penstock.kernels.plan import DevicePlan
from penstock.kernels.rules import step_rows
from penstock.kernels.tiles import num_warps_of, power_of_two, programs_of, vectors_of_tile

ENTERS: tl.constexpr = tl.constexpr(256)
LEAVES: tl.constexpr = tl.constexpr(512)
_LARGEST: tl.constexpr = tl.constexpr(0x7F7FFFFF)
"""Bits of the largest finite float32."""
_PLACES = 1024


class _Pieces(NamedTuple):
    """Runs of one row inside one window."""

    sources: Tensor
    """[N] int64 by place: first element of the gradient."""
    factors: Tensor | None
    """[N] float32 by place: of the gradient; None: all 1."""
    places: Tensor
    """[N] int32: first place of each piece, in no particular order."""
    kinds: Tensor
    """[N] int32: length; + `ENTERS` if the segment began before; + `LEAVES` if it goes on after."""
    slots: Tensor
    """[N] int32"""
    tables: Tensor
    """[N] int32"""
    long_places: Tensor
    """[windows + 1, 4] int32 of segments of several pieces: first place, last place, slot, table.
    """
    counts: Tensor
    """[3] int32: pieces, long segments, rows."""


@triton.jit
def _earlier(a, b):
    return tl.minimum(a, b)


@triton.jit
def _list_kernel(
    sources,
    factors,
    piece_places,
    piece_kinds,
    piece_slots,
    piece_tables,
    long_places,
    counts,
    words,
    order,
    unsorted_sources,
    unsorted_tables,
    unsorted_factors,
    feature_of_packed,
    column_of,
    table_of,
    num_keys,
    batch_size,
    stride,
    slot_mask,
    PLACES: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE_HOT: tl.constexpr,
    FACTORS: tl.constexpr,
    TABLES: tl.constexpr,
):
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    is_key = place < num_keys
    word = tl.load(words + place, mask=is_key, other=-1)
    before = tl.load(words + place - 1, mask=is_key & (place > 0), other=-1)
    after = tl.load(words + place + 1, mask=place + 1 < num_keys, other=-1)
    position = tl.load(order + place, mask=is_key, other=0)
    has_row = word >= 0
    source, table = source_of(
        position, has_row, unsorted_sources, unsorted_tables, feature_of_packed, column_of,
        table_of, batch_size, stride, ONE_HOT, TABLES,
    )  # fmt: skip
    tl.store(sources + place, source, mask=is_key)
    if FACTORS:
        factor = tl.load(unsorted_factors + position, mask=is_key, other=0.0)
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
    number = tl.cumsum(is_first.to(tl.int32), 0)
    pieces = tl.max(number)
    if pieces > 0:
        number += tl.atomic_add(counts, pieces, sem="relaxed") - 1
    tl.store(piece_places + number, place, mask=is_first)
    tl.store(piece_kinds + number, kind, mask=is_first)
    tl.store(piece_slots + number, slot, mask=is_first)
    if TABLES:
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
            tl.store(long_places + 4 * number + 3, table, mask=is_long)
        stop = tl.zeros((PLACES,), tl.int32) + num_keys
        last = last_not_above(words, place, stop, word, is_long)
        tl.store(long_places + 4 * number + 1, last, mask=is_long)


@triton.jit
def _shares(grad, sources, factors, place, inside, D: tl.constexpr, COLUMNS: tl.constexpr,
            FACTORS: tl.constexpr):  # fmt: skip
    """[R, KEYS, COLUMNS] float32: what occurrences at `place` add to the gradient of their row."""
    column = tl.arange(0, COLUMNS)[None, None, :]
    source = tl.load(sources + place, mask=inside, other=0).to(tl.int64)
    is_there = inside[:, :, None] & (column < D)
    share = tl.load(grad + source[:, :, None] + column, mask=is_there, other=0.0)
    if FACTORS:
        factor = tl.load(factors + place, mask=inside, other=0.0)
        share = share * factor[:, :, None]
    return share


@triton.jit
def _magnitude(share):
    """Bits that rise with the absolute value; NaN is above all."""
    return share.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _largest_share(grad, sources, factors, place, length, D: tl.constexpr, COLUMNS: tl.constexpr,
                   KEYS: tl.constexpr, FACTORS: tl.constexpr):  # fmt: skip
    """[R] int32: the largest magnitude of each piece."""
    key = tl.arange(0, KEYS)[None, :]
    most = tl.zeros(place.shape, tl.int32)
    for n in range(0, tl.max(length), KEYS):
        inside = n + key < length[:, None]
        share = _shares(
            grad, sources, factors, place[:, None] + n + key, inside, D, COLUMNS, FACTORS
        )
        most = tl.maximum(most, tl.max(tl.max(_magnitude(share), 2), 1))
    return most


@triton.jit
def _units_exponent(largest):
    """40 - frexp's exponent of the number with these bits; it may be subnormal."""
    wide = largest.to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
    return 40 - ((wide >> 52) - 1022)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _in_units(share, exponent):
    """int64, to nearest even: adding 1.5 * 2^52 leaves no bits behind the point."""
    big = 6755399441055744.0
    return (share.to(tl.float64) * _power_of_two(exponent) + big - big).to(tl.int64)


@triton.jit
def _from_units(units, largest):
    """float32 gradient [R, COLUMNS] from sums in units, and the largest magnitude [R, 1]."""
    scale = _power_of_two(-_units_exponent(largest))
    total = (units.to(tl.float64) * scale).to(tl.float32)
    total = tl.where(largest == 0, 0.0, total)
    return tl.where(largest <= _LARGEST, total, float("nan"))


@triton.jit
def _scratch_row(place, kind, WINDOW: tl.constexpr):
    """Where the sum of a piece that is no whole segment goes: each window has two such rows."""
    return (place // WINDOW).to(tl.int64) * 2 + tl.where((kind & ENTERS) != 0, 0, 1)


@triton.jit
def _largest_kernel(
    largest,
    grad,
    sources,
    factors,
    piece_places,
    piece_kinds,
    counts,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Largest magnitude of each piece that is no whole segment, by scratch row."""
    count = tl.load(counts)
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        piece = start + tl.arange(0, ROWS)
        kind = tl.load(piece_kinds + piece, mask=piece < count, other=0)
        is_part = kind >= ENTERS
        place = tl.load(piece_places + piece, mask=is_part, other=0)
        length = tl.where(is_part, kind & (ENTERS - 1), 0)
        most = _largest_share(grad, sources, factors, place, length, D, COLUMNS, KEYS, FACTORS)
        tl.store(largest + _scratch_row(place, kind, WINDOW), most, mask=is_part)


@triton.jit
def _spread_largest_kernel(largest, long_places, counts, WINDOW: tl.constexpr, PARTS: tl.constexpr):
    """Gives all pieces of a segment the segment's largest magnitude."""
    for number in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        begin = tl.load(long_places + 4 * number) // WINDOW
        end = tl.load(long_places + 4 * number + 1) // WINDOW
        first = largest + 2 * begin.to(tl.int64) + 1
        most = tl.zeros((PARTS,), tl.int32) + tl.load(first)
        for window in range(begin + 1, end + 1, PARTS):
            part = window + tl.arange(0, PARTS)
            there = tl.load(largest + 2 * part.to(tl.int64), mask=part <= end, other=0)
            most = tl.maximum(most, there)
        all_parts = tl.max(most)
        tl.store(first, all_parts)
        for window in range(begin + 1, end + 1, PARTS):
            part = window + tl.arange(0, PARTS)
            tl.store(largest + 2 * part.to(tl.int64), all_parts, mask=part <= end)


@triton.jit
def _pieces_kernel(
    values,
    state,
    usage,
    grad,
    scratch,
    largest,
    sources,
    factors,
    piece_places,
    piece_kinds,
    piece_slots,
    piece_tables,
    counts,
    hypers,
    step_seed,
    now,
    half_life,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    FACTORS: tl.constexpr,
    TABLES: tl.constexpr,
    RULE: tl.constexpr,
    CLIPPED: tl.constexpr,
    ONE_HYPER: tl.constexpr,
    WORDS: tl.constexpr,
):
    count = tl.load(counts)
    column = tl.arange(0, COLUMNS)
    key = tl.arange(0, KEYS)[None, :]
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        piece = start + tl.arange(0, ROWS)
        is_piece = piece < count
        kind = tl.load(piece_kinds + piece, mask=is_piece, other=0)
        place = tl.load(piece_places + piece, mask=is_piece, other=0)
        slot = tl.load(piece_slots + piece, mask=is_piece, other=0)
        length = kind & (ENTERS - 1)
        is_whole = is_piece & (kind < ENTERS)
        # Asked for before the gradients, which take longer.
        row = values + slot.to(tl.int64)[:, None] * D + column[None, :]
        is_row = is_whole[:, None] & (column < D)[None, :]
        w = tl.load(row, mask=is_row, other=0.0).to(tl.float32)
        most = _largest_share(grad, sources, factors, place, length, D, COLUMNS, KEYS, FACTORS)
        there = _scratch_row(place, kind, WINDOW)
        most = tl.where(is_whole, most, tl.load(largest + there, mask=kind >= ENTERS, other=0))
        exponent = _units_exponent(most)[:, None, None]
        total = tl.zeros((ROWS, COLUMNS), tl.int64)
        for n in range(0, tl.max(length), KEYS):
            inside = n + key < length[:, None]
            share = _shares(
                grad, sources, factors, place[:, None] + n + key, inside, D, COLUMNS, FACTORS
            )
            total += tl.sum(_in_units(share, exponent), 1)
        is_part = (kind >= ENTERS)[:, None] & (column < D)[None, :]
        part = scratch + _scratch_row(place, kind, WINDOW)[:, None] * D + column[None, :]
        tl.store(part, total, mask=is_part)
        table = slot
        if TABLES:
            table = tl.load(piece_tables + piece, mask=is_piece, other=0)
        gradient = _from_units(total, most[:, None])
        step_rows(
            values, state, usage, slot, is_whole, w, gradient, table, hypers, step_seed, now,
            half_life, D, COLUMNS, RULE, CLIPPED, True, ONE_HYPER, WORDS,
        )  # fmt: skip


@triton.jit
def _long_kernel(
    values,
    state,
    usage,
    scratch,
    largest,
    long_places,
    counts,
    hypers,
    step_seed,
    now,
    half_life,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    TABLES: tl.constexpr,
    RULE: tl.constexpr,
    CLIPPED: tl.constexpr,
    ONE_HYPER: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Segments of several pieces: adds their sums and takes the step."""
    column = tl.arange(0, COLUMNS)
    one = tl.zeros((1,), tl.int32)
    for number in range(tl.program_id(0), tl.load(counts + 1), tl.num_programs(0)):
        place = tl.load(long_places + 4 * number + one)
        last = tl.load(long_places + 4 * number + 1)
        slot = tl.load(long_places + 4 * number + 2 + one)
        begin, end = tl.load(long_places + 4 * number) // WINDOW, last // WINDOW
        is_row = one == 0
        row = values + slot.to(tl.int64)[:, None] * D + column[None, :]
        w = tl.load(row, mask=(column < D)[None, :], other=0.0).to(tl.float32)
        first = scratch + (place // WINDOW).to(tl.int64)[:, None] * (2 * D) + D + column[None, :]
        total = tl.load(first, mask=(column < D)[None, :], other=0)
        for window in range(begin + 1, end + 1, PARTS):
            part = window + tl.arange(0, PARTS)
            there = scratch + part.to(tl.int64)[:, None] * (2 * D) + column[None, :]
            is_there = (part <= end)[:, None] & (column < D)[None, :]
            total += tl.sum(tl.load(there, mask=is_there, other=0), 0)[None, :]
        table = slot
        if TABLES:
            table = tl.load(long_places + 4 * number + 3 + one)
        most = tl.load(largest + (place // WINDOW).to(tl.int64) * 2 + 1)
        gradient = _from_units(total, most[:, None])
        step_rows(
            values, state, usage, slot, is_row, w, gradient, table, hypers, step_seed, now,
            half_life, D, COLUMNS, RULE, CLIPPED, True, ONE_HYPER, WORDS,
        )  # fmt: skip


def _listed(plan: DevicePlan, grouping: Grouping, batch_size: int, needs_tables: bool) -> _Pieces:
    words, order, slot_bits, one_hot, sources, tables, factors = grouping
    num_keys, device = len(words), words.device
    numbers = torch.empty(4, num_keys, dtype=torch.int32, device=device)
    pieces = _Pieces(
        torch.empty(num_keys, dtype=torch.int64, device=device),
        None if factors is None else torch.empty_like(factors),
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        torch.empty(num_keys // WINDOW + 1, 4, dtype=torch.int32, device=device),
        torch.zeros(3, dtype=torch.int32, device=device),
    )
    if num_keys:
        _list_kernel[(triton.cdiv(num_keys, _PLACES),)](
            pieces.sources,
            pieces.sources if pieces.factors is None else pieces.factors,
            *pieces[2:],
            words,
            order,
            order if sources is None else sources,
            order if tables is None else tables,
            order if factors is None else factors,
            plan.feature_of_packed,
            plan.column,
            plan.table,
            num_keys,
            batch_size,
            plan.stride,
            (1 << slot_bits) - 1,
            PLACES=_PLACES,
            WINDOW=WINDOW,
            ONE_HOT=one_hot,
            FACTORS=factors is not None,
            TABLES=needs_tables,
        )
    return pieces


def step(
    rows: RowArrays,
    plan: DevicePlan,
    grouping: Grouping,
    grad: Tensor,
    numbers: tuple[Tensor | int, ...],
    options: RuleOptions,
) -> Tensor:
    """One optimizer step of each row of the grouping.

    Args:
      rows: changed in place.
      plan: of the look-ups.
      grouping: their keys.
      grad: [B, plan.stride] float32 of all look-ups, one after the other.
      numbers: settings, seed of the rounding, times and half-lives, as the kernels take them.
      options: of the rule.

    Returns:
      [] int32, rows updated, on the device.
    """
    pieces = _listed(plan, grouping, len(grad), options.needs_tables)
    num_keys, device = len(grouping.words), grad.device
    if not num_keys:
        return pieces.counts[2]
    columns = power_of_two(plan.dim)
    vectors = vectors_of_tile(columns)
    keys = min(4, vectors)
    windows = triton.cdiv(num_keys, WINDOW)
    scratch = torch.empty(2 * windows, plan.dim, dtype=torch.int64, device=device)
    largest = torch.empty(2 * windows, dtype=torch.int32, device=device)
    factors = pieces.sources if pieces.factors is None else pieces.factors
    shares = (grad, pieces.sources, factors)
    tile = {"D": plan.dim, "COLUMNS": columns, "WINDOW": WINDOW}
    some = {**tile, "ROWS": vectors // keys, "KEYS": keys, "FACTORS": pieces.factors is not None}
    # The host's bits have no fused multiply-add.
    rules = {
        **options.compiled(),
        "enable_fp_fusion": False,
        "num_warps": num_warps_of(columns),
    }
    grid = (min(triton.cdiv(num_keys, vectors // keys), programs_of(device)),)
    long_grid = (min(windows, programs_of(device)),)
    _largest_kernel[grid](largest, *shares, pieces.places, pieces.kinds, pieces.counts, **some)
    _spread_largest_kernel[long_grid](
        largest, pieces.long_places, pieces.counts, WINDOW=WINDOW, PARTS=128
    )
    lists = (pieces.places, pieces.kinds, pieces.slots, pieces.tables, pieces.counts)
    _pieces_kernel[grid](
        *rows, grad, scratch, largest, *shares[1:], *lists, *numbers, **some, **rules
    )
    _long_kernel[long_grid](
        *rows, scratch, largest, pieces.long_places, pieces.counts, *numbers, PARTS=vectors, **tile,
        **rules,
    )  # fmt: skip
    return pieces.counts[2]
