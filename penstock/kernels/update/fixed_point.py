"""Sums in fixed point: the bits of csrc/rows/row_kernels.cc, whatever the order of the samples.

The unit is the largest share of a row times 2^-40 (less in updates of more than 2^22 keys), so the
shares of a row are gone over twice: for the largest, then for the sum. Pieces of long segments
learn the segment's largest in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.update.group import ENTERS
from penstock.kernels.update.occurrences import Shares

_LARGEST: tl.constexpr = tl.constexpr(0x7F7FFFFF)
"""Bits of the largest finite float32."""


@triton.jit
def sources_of(sources, place, first, length, KEYS: tl.constexpr):
    """Where the gradients of the keys `first` to `first + KEYS` of pieces begin, each [R]."""
    found = ()
    for k in tl.static_range(KEYS):
        source = tl.load(sources + place + first + k, mask=first + k < length, other=0)
        found = found + (source,)  # type: ignore[assignment]
    return found


@triton.jit
def share_of(grad, source, factors, place, inside, D: tl.constexpr, COLUMNS: tl.constexpr,
             FACTORS: tl.constexpr):  # fmt: skip
    """[R, COLUMNS] float32: what the keys at `place` [R] add to the gradient of their row."""
    column = tl.arange(0, COLUMNS)[None, :]
    is_there = inside[:, None] & (column < D)
    share = tl.load(grad + source.to(tl.int64)[:, None] + column, mask=is_there, other=0.0)
    if FACTORS:
        share = share * tl.load(factors + place, mask=inside, other=0.0)[:, None]
    return share


@triton.jit
def scratch_row(place, kind, WINDOW: tl.constexpr):
    """Where the sum of a piece that is no whole segment goes: each window has two such rows."""
    return (place // WINDOW).to(tl.int64) * 2 + tl.where((kind & ENTERS) != 0, 0, 1)


@triton.jit
def _magnitude(share):
    """Bits that rise with the absolute value; NaN is above all."""
    return share.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_share(grad, sources, factors, place, length, D: tl.constexpr, COLUMNS: tl.constexpr,
                   KEYS: tl.constexpr, FACTORS: tl.constexpr):  # fmt: skip
    """[R] int32: the largest magnitude of each piece."""
    most = tl.zeros(place.shape, tl.int32)
    for n in range(0, tl.max(length), KEYS):
        source = sources_of(sources, place, n, length, KEYS)
        for k in tl.static_range(KEYS):
            inside = n + k < length
            share = share_of(grad, source[k], factors, place + n + k, inside, D, COLUMNS, FACTORS)
            most = tl.maximum(most, tl.max(_magnitude(share), 1))
    return most


@triton.jit
def units_exponent(largest, sum_bits):
    """`sum_bits` - frexp's exponent of the number with these bits; it may be subnormal."""
    wide = largest.to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True)
    return sum_bits - ((wide >> 52) - 1022)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def in_units(share, exponent):
    """int64, to nearest even: adding 1.5 * 2^52 leaves no bits behind the point."""
    big = 6755399441055744.0
    return (share.to(tl.float64) * _power_of_two(exponent) + big - big).to(tl.int64)


@triton.jit
def from_units(units, largest, sum_bits):
    """float32 gradient [R, COLUMNS] from sums in units, and the largest magnitude [R, 1]."""
    scale = _power_of_two(-units_exponent(largest, sum_bits))
    total = (units.to(tl.float64) * scale).to(tl.float32)
    total = tl.where(largest == 0, 0.0, total)
    return tl.where(largest <= _LARGEST, total, float("nan"))


@triton.jit(do_not_specialize=["num_keys"])
def largest_kernel(largest, shares: Shares, pieces, counts, num_keys, form: tl.constexpr):
    """Largest magnitude of each piece that is no whole segment, by scratch row."""
    grad, sources, factors = shares
    ROWS: tl.constexpr = form.ROWS
    num_short = tl.load(counts)
    count = num_short + tl.load(counts + 1)
    for start in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        piece = start + tl.arange(0, ROWS)
        number = tl.where(piece < num_short, piece, num_keys - 1 - (piece - num_short))
        kind = tl.load(pieces + num_keys + number, mask=piece < count, other=0)
        is_part = kind >= ENTERS
        place = tl.load(pieces + number, mask=is_part, other=0)
        length = tl.where(is_part, kind & (ENTERS - 1), 0)
        most = largest_share(
            grad, sources, factors, place, length, form.D, form.COLUMNS, form.KEYS, form.FACTORS
        )
        tl.store(largest + scratch_row(place, kind, form.WINDOW), most, mask=is_part)


@triton.jit
def spread_largest_kernel(largest, long_places, counts, WINDOW: tl.constexpr, PARTS: tl.constexpr):
    """Gives all pieces of a segment the segment's largest magnitude."""
    for number in range(tl.program_id(0), tl.load(counts + 2), tl.num_programs(0)):
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
