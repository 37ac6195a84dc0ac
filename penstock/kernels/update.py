"""Updates: gradients summed by row, one optimizer step a row, in place.

A program takes some pieces of segments (see `Grouping`). Those that are whole segments end in a
step of their row; the sums of others go to scratch memory, and a second kernel adds them up.

In deterministic mode sums are in fixed point: the unit is the row's largest share times 2^-40, as
in csrc/row_kernels.cc, whose bits they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import occurrences
from penstock.kernels.group import ENTERS, LEAVES, group_keys
from penstock.kernels.occurrences import GradientPart, Grouping, RowArrays, UsageRules
from penstock.kernels.plan import DevicePlan
from penstock.kernels.reference_update import step_seed
from penstock.kernels.rules import step_rows
from penstock.kernels.tiles import num_warps_of, power_of_two, programs_of, vectors_of_tile

_LARGEST: tl.constexpr = tl.constexpr(0x7F7FFFFF)
"""Bits of the largest finite float32."""


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
    EXACT: tl.constexpr,
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
        if EXACT:
            most = _largest_share(grad, sources, factors, place, length, D, COLUMNS, KEYS, FACTORS)
            there = _scratch_row(place, kind, WINDOW)
            most = tl.where(is_whole, most, tl.load(largest + there, mask=kind >= ENTERS, other=0))
            exponent = _units_exponent(most)[:, None, None]
            total = tl.zeros((ROWS, COLUMNS), tl.int64)
        else:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for n in range(0, tl.max(length), KEYS):
            inside = n + key < length[:, None]
            share = _shares(
                grad, sources, factors, place[:, None] + n + key, inside, D, COLUMNS, FACTORS
            )
            if EXACT:
                total += tl.sum(_in_units(share, exponent), 1)
            else:
                total += tl.sum(share, 1)
        is_part = (kind >= ENTERS)[:, None] & (column < D)[None, :]
        part = scratch + _scratch_row(place, kind, WINDOW)[:, None] * D + column[None, :]
        tl.store(part, total, mask=is_part)
        table = slot
        if TABLES:
            table = tl.load(piece_tables + piece, mask=is_piece, other=0)
        gradient = total
        if EXACT:
            gradient = _from_units(total, most[:, None])
        step_rows(
            values, state, usage, slot, is_whole, w, gradient, table, hypers, step_seed, now,
            half_life, D, COLUMNS, RULE, CLIPPED, EXACT, ONE_HYPER, WORDS,
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
    EXACT: tl.constexpr,
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
        gradient = total
        if EXACT:
            most = tl.load(largest + (place // WINDOW).to(tl.int64) * 2 + 1)
            gradient = _from_units(total, most[:, None])
        step_rows(
            values, state, usage, slot, is_row, w, gradient, table, hypers, step_seed, now,
            half_life, D, COLUMNS, RULE, CLIPPED, EXACT, ONE_HYPER, WORDS,
        )  # fmt: skip


class _Options(NamedTuple):
    """What decides how kernels are compiled."""

    rule: int
    clipped: bool
    exact: bool
    one_hyper: bool
    words: int


def apply_gradients(
    rows: RowArrays,
    plan: DevicePlan,
    parts: Sequence[GradientPart],
    hypers: Tensor,
    *,
    rule: int,
    step: int,
    clips: bool = True,
    deterministic: bool = False,
    usage_rules: UsageRules | None = None,
) -> Tensor:
    """One optimizer step of each row of the look-ups' slots, on the sum of its gradients.

    Args:
      rows: changed in place.
      plan: of all parts.
      parts: look-ups with their gradients. If there are several, gradients are copied together.
      hypers: [T, HYPER_FIELDS] float32, or [1, HYPER_FIELDS] where all tables have the same.
      rule: number of the optimizer.
      step: number of the update; it decides how narrow values are rounded.
      clips: whether the clip norm of any table is above 0.
      deterministic: the bits of csrc/row_kernels.cc, whatever the order of the samples.
      usage_rules: where rows have marks of use.

    Returns:
      [] int32, rows updated, on the device.

    Effects: on the current stream, without synchronisation.
    """
    words = rows.usage.shape[1]
    assert (words > 0) == (usage_rules is not None)
    options = _Options(rule, clips, deterministic, len(hypers) == 1, words)
    grouping = parts[0].grouping if len(parts) == 1 else None
    if grouping is None:
        grouping = group_keys(plan, parts, needs_tables=words > 0 or len(hypers) > 1)
    grad = parts[0].grad if len(parts) == 1 else torch.cat([part.grad for part in parts])
    if len(grouping.sources):
        numbers = (hypers, _signed_word(step_seed(step)), *(usage_rules or (hypers, hypers)))
        _step(rows, plan.dim, grouping, grad, numbers, options)
    return grouping.counts[2]


def _signed_word(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _step(
    rows: RowArrays,
    dim: int,
    grouping: Grouping,
    grad: Tensor,
    numbers: tuple[Tensor | int, ...],
    options: _Options,
) -> None:
    num_keys, device = len(grouping.sources), grad.device
    columns = power_of_two(dim)
    vectors = vectors_of_tile(columns)
    keys = min(4, vectors)
    windows = triton.cdiv(num_keys, occurrences.WINDOW)
    scratch_type = torch.int64 if options.exact else torch.float32
    scratch = torch.empty(2 * windows, dim, dtype=scratch_type, device=device)
    largest = torch.empty(2 * windows if options.exact else 0, dtype=torch.int32, device=device)
    factors = grouping.sources if grouping.factors is None else grouping.factors
    tile = {"D": dim, "COLUMNS": columns, "WINDOW": occurrences.WINDOW}
    pieces = {**tile, "ROWS": vectors // keys, "KEYS": keys}
    pieces["FACTORS"] = grouping.factors is not None
    rules = {
        "TABLES": options.words > 0 or not options.one_hyper,
        "RULE": options.rule,
        "CLIPPED": options.clipped,
        "EXACT": options.exact,
        "ONE_HYPER": options.one_hyper,
        "WORDS": options.words,
        # The host's bits have no fused multiply-add.
        "enable_fp_fusion": not options.exact,
        "num_warps": num_warps_of(columns),
    }
    grid = (min(triton.cdiv(num_keys, vectors // keys), programs_of(device)),)
    long_grid = (min(windows, programs_of(device)),)
    if options.exact:
        _largest_kernel[grid](
            largest, grad, grouping.sources, factors, grouping.piece_places, grouping.piece_kinds,
            grouping.counts, **pieces,
        )  # fmt: skip
        _spread_largest_kernel[long_grid](
            largest, grouping.long_places, grouping.counts, WINDOW=occurrences.WINDOW, PARTS=128
        )
    _pieces_kernel[grid](
        *rows, grad, scratch, largest, grouping.sources, factors, grouping.piece_places,
        grouping.piece_kinds, grouping.piece_slots, grouping.piece_tables, grouping.counts,
        *numbers, **pieces, **rules,
    )  # fmt: skip
    _long_kernel[long_grid](
        *rows, scratch, largest, grouping.long_places, grouping.counts, *numbers,
        PARTS=max(1, vectors), **tile, **rules,
    )  # fmt: skip
