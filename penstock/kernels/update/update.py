"""Updates: gradients summed by row, one optimizer step a row, in place.

A program, one warp, takes some pieces of segments (see `Grouping`): the short ones, which most rows
of a batch have, some at once; the others a few places at a time. Pieces that are whole segments end
in a step of their row; the sums of others go to scratch memory, and a second kernel adds them up.

In deterministic mode sums are in fixed point (`fixed_point`), and rules in the host's arithmetic.
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
from penstock.kernels.tiles import (
    ELEMENTS_PER_WARP,
    REGISTERS,
    WIDE_REGISTERS,
    full_device,
    power_of_two,
    warp_tile,
)
from penstock.kernels.update.fixed_point import (
    from_units,
    in_units,
    largest_kernel,
    largest_share,
    scratch_row,
    share_of,
    sources_of,
    spread_largest_kernel,
    units_exponent,
)
from penstock.kernels.update.group import ENTERS, group_keys
from penstock.kernels.update.occurrences import (
    SHORT,
    WINDOW,
    GradientPart,
    Grouping,
    Pieces,
    RowArrays,
    RuleNumbers,
    RuleOptions,
    Shares,
    UpdateForm,
    UpdateRules,
    sum_bits,
)
from penstock.kernels.update.reference import step_seed
from penstock.kernels.update.rules import step_rows

_SHORT_WAVES, _LONG_WAVES = 2, 3
"""How often the programs for short pieces, and for segments of several, fill the device."""


@triton.jit
def _load_pieces(pieces, num_keys, piece, count, BACK: tl.constexpr, TABLES: tl.constexpr):
    """Kind, place, slot and table of pieces `piece` [R] of one list; kind 0 beyond its end."""
    place_of = pieces + (num_keys - 1 - piece if BACK else piece)
    kind_of = place_of + num_keys
    slot_of = kind_of + num_keys
    place = tl.load(place_of, mask=piece < count, other=0)
    kind = tl.load(kind_of, mask=piece < count, other=0)
    slot = tl.load(slot_of, mask=piece < count, other=0)
    table = slot
    if TABLES:
        table = tl.load(slot_of + num_keys, mask=piece < count, other=0)
    return kind, place, slot, table


@triton.jit
def _step_pieces(
    rows, shares, work, count, num_keys, program, programs, sum_bits, numbers, step_seed,
    form: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """This program's part of one of the two lists."""
    values, _, _ = rows
    grad, sources, factors = shares
    scratch, largest, pieces, _ = work
    D: tl.constexpr = form.D
    COLUMNS: tl.constexpr = form.COLUMNS
    FACTORS: tl.constexpr = form.FACTORS
    TABLES: tl.constexpr = form.TABLES
    column = tl.arange(0, COLUMNS)
    is_column = (column < D)[None, :]
    begin, stride = program * ROWS, programs * ROWS
    piece = begin + tl.arange(0, ROWS)
    # What comes next is known before this is done: two pieces ahead where they lie, one ahead where
    # their gradients do.
    kind, place, slot, table = _load_pieces(pieces, num_keys, piece, count, BACK, TABLES)
    source = sources_of(sources, place, 0, kind & (ENTERS - 1), KEYS)
    next_kind, next_place, next_slot, next_table = _load_pieces(
        pieces, num_keys, piece + stride, count, BACK, TABLES
    )
    for _ in range(begin, count, stride):
        next_source = sources_of(sources, next_place, 0, next_kind & (ENTERS - 1), KEYS)
        length = kind & (ENTERS - 1)
        is_whole = (kind > 0) & (kind < ENTERS)
        row = values + slot.to(tl.int64)[:, None] * D + column[None, :]
        w = tl.load(row, mask=is_whole[:, None] & is_column, other=0.0).to(tl.float32)
        there = scratch_row(place, kind, form.WINDOW)
        if form.EXACT:
            most = largest_share(grad, sources, factors, place, length, D, COLUMNS, KEYS, FACTORS)
            most = tl.where(is_whole, most, tl.load(largest + there, mask=kind >= ENTERS, other=0))
            exponent = units_exponent(most, sum_bits)[:, None]
            total = tl.zeros((ROWS, COLUMNS), tl.int64)
        else:
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
        longest = tl.max(length) if BACK else KEYS
        for n in range(0, longest, KEYS):
            following = sources_of(sources, place, n + KEYS, length, KEYS)
            # In order; none of these loads waits for another.
            for k in tl.static_range(KEYS):
                inside = n + k < length
                share = share_of(
                    grad, source[k], factors, place + n + k, inside, D, COLUMNS, FACTORS
                )
                total += in_units(share, exponent) if form.EXACT else share
            source = following
        if tl.max(kind) >= ENTERS:
            part = scratch + there[:, None] * D + column[None, :]
            tl.store(part, total, mask=(kind >= ENTERS)[:, None] & is_column)
        gradient = from_units(total, most[:, None], sum_bits) if form.EXACT else total
        step_rows(rows, slot, is_whole, w, gradient, table, numbers, step_seed, form)
        kind, place, slot, table = next_kind, next_place, next_slot, next_table
        source = next_source
        piece += stride
        next_kind, next_place, next_slot, next_table = _load_pieces(
            pieces, num_keys, piece + stride, count, BACK, TABLES
        )


@triton.jit(do_not_specialize=["num_keys", "other_programs", "sum_bits", "step_seed"])
def _pieces_kernel(
    rows: RowArrays, shares: Shares, work: Pieces, num_keys, other_programs, sum_bits,
    step_seed, numbers: RuleNumbers, form: tl.constexpr,
):  # fmt: skip
    # Programs are started in order: those of the other pieces first, which differ in length, some
    # pieces each, so that whoever is done early takes the next; then those of the short ones, which
    # are all alike, in long strides.
    program = tl.program_id(0)
    if program < other_programs:
        _step_pieces(
            rows, shares, work, tl.load(work.counts + 1), num_keys, program, other_programs,
            sum_bits, numbers, step_seed, form, form.ROWS, form.KEYS, True,
        )  # fmt: skip
    else:
        _step_pieces(
            rows, shares, work, tl.load(work.counts), num_keys, program - other_programs,
            tl.num_programs(0) - other_programs, sum_bits, numbers, step_seed, form,
            form.SHORT_ROWS, form.SHORT, False,
        )  # fmt: skip


@triton.jit
def _parts(scratch, first, last, D: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """[PARTS, COLUMNS] sums of the pieces that enter the windows from `first` to `last`, or 0."""
    window = first + tl.arange(0, PARTS)
    column = tl.arange(0, COLUMNS)
    there = scratch + window.to(tl.int64)[:, None] * (2 * D) + column[None, :]
    return tl.load(there, mask=(window <= last)[:, None] & (column < D)[None, :], other=0)


@triton.jit(do_not_specialize=["sum_bits", "step_seed"])
def _long_kernel(
    rows: RowArrays, scratch, largest, long_places, counts, sum_bits, step_seed,
    numbers: RuleNumbers, form: tl.constexpr,
):  # fmt: skip
    """Segments of several pieces: adds their sums and takes the step."""
    values, _, _ = rows
    D: tl.constexpr = form.D
    COLUMNS: tl.constexpr = form.COLUMNS
    PARTS: tl.constexpr = form.PARTS
    WINDOW: tl.constexpr = form.WINDOW
    column = tl.arange(0, COLUMNS)
    one = tl.zeros((1,), tl.int32)
    for number in range(tl.program_id(0), tl.load(counts + 2), tl.num_programs(0)):
        place = tl.load(long_places + 4 * number + one)
        last = tl.load(long_places + 4 * number + 1)
        slot = tl.load(long_places + 4 * number + 2 + one)
        begin, end = tl.load(long_places + 4 * number) // WINDOW, last // WINDOW
        is_row = one == 0
        row = values + slot.to(tl.int64)[:, None] * D + column[None, :]
        w = tl.load(row, mask=(column < D)[None, :], other=0.0).to(tl.float32)
        first = scratch + (place // WINDOW).to(tl.int64)[:, None] * (2 * D) + D + column[None, :]
        total = tl.load(first, mask=(column < D)[None, :], other=0)
        ahead = _parts(scratch, begin + 1, end, D, COLUMNS, PARTS)
        for window in range(begin + 1, end + 1, PARTS):
            parts = ahead
            ahead = _parts(scratch, window + PARTS, end, D, COLUMNS, PARTS)
            total += tl.sum(parts, 0)[None, :]
        table = slot
        if form.TABLES:
            table = tl.load(long_places + 4 * number + 3 + one)
        gradient = total
        if form.EXACT:
            most = tl.load(largest + (place // WINDOW).to(tl.int64) * 2 + 1)
            gradient = from_units(total, most[:, None], sum_bits)
        step_rows(rows, slot, is_row, w, gradient, table, numbers, step_seed, form)


@triton.jit
def _cancel_kernel(counts, skip, COUNTS: tl.constexpr):
    """Takes all pieces off their lists, so that no program finds one, if `skip` is set."""
    if tl.load(skip) != 0:
        tl.store(counts + tl.arange(0, COUNTS), tl.zeros((COUNTS,), tl.int32))


def apply_gradients(
    rows: RowArrays,
    plan: DevicePlan,
    parts: Sequence[GradientPart],
    hypers: Tensor,
    step: int,
    rules: UpdateRules,
    skip: Tensor | None = None,
) -> Tensor:
    """One optimizer step of each row of the look-ups' slots, on the sum of its gradients.

    Args:
      rows: changed in place.
      plan: of all parts, but for columns that a part has elsewhere.
      parts: look-ups with their gradients. If there are several, gradients are copied together.
      hypers: [T, HYPER_FIELDS] float32, or [1, HYPER_FIELDS] where all tables have the same.
      step: number of the update; it decides how narrow values are rounded.
      rules: of the rows.
      skip: [] float32 on the device; if it is 1 when the update runs, no row changes.

    Returns:
      [] int32, rows updated, on the device.

    Effects: on the current stream, without synchronisation.
    """
    words = rows.usage.shape[1]
    rule, clips, bounds, deterministic, usage, own_bits = rules
    assert (words > 0) == (usage is not None)
    options = RuleOptions(rule, clips, bounds, deterministic, hypers.size(0) == 1, words)
    grouping = parts[0].grouping if len(parts) == 1 else None
    if grouping is None:
        one_hot = parts[0].batch.is_one_hot
        grouping = group_keys(plan, parts, needs_tables=options.needs_tables, one_hot=one_hot)
    grad = parts[0].grad if len(parts) == 1 else torch.cat([part.grad.view(-1) for part in parts])
    bits = own_bits or sum_bits(sum(part.slots.numel() for part in parts))
    numbers = (bits, _signed_word(step_seed(step)), hypers, *(usage or (hypers, hypers)))
    if skip is not None:
        launch(_cancel_kernel, (1,), (grouping.counts, skip), COUNTS=grouping.counts.numel())
    if grouping.sources.numel():
        _step(rows, plan.dim, grouping, grad, numbers, options)
    return grouping.counts[3]


def _signed_word(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


class _Compiled(NamedTuple):
    """How the kernels of an update are compiled, and started."""

    other_waves: int
    """How often the programs for other pieces fill the device."""
    form: UpdateForm
    pieces: dict[str, int]
    """Options of the compiler; of the others, too."""
    long: dict[str, int]
    largest: dict[str, int]


@lru_cache(maxsize=256)
def _compiled(dim: int, state_dim: int, options: RuleOptions, has_factors: bool) -> _Compiled:
    columns = power_of_two(dim)
    vectors, num_warps = warp_tile(columns)
    keys = min(8, vectors)
    form = UpdateForm(
        D=dim,
        COLUMNS=columns,
        WINDOW=WINDOW,
        SHORT=SHORT,
        SHORT_ROWS=max(1, vectors // SHORT),
        ROWS=vectors // keys,
        KEYS=keys,
        PARTS=2 * vectors,
        FACTORS=has_factors,
        **options.compiled(),
    )
    warps = {"num_warps": num_warps}
    of_rule = {**options.options, **warps}
    registers = {}
    if not options.exact and columns <= ELEMENTS_PER_WARP:
        registers["maxnreg"] = REGISTERS if state_dim <= 1 else WIDE_REGISTERS
    # A program takes fewer wide pieces at once.
    waves = 8 if columns >= 64 else 4
    return _Compiled(waves, form, {**of_rule, **registers}, of_rule, warps)


def _step(
    rows: RowArrays,
    dim: int,
    grouping: Grouping,
    grad: Tensor,
    numbers: tuple[Tensor | int, ...],
    options: RuleOptions,
) -> None:
    num_keys, device = grouping.sources.numel(), grad.device
    sources, factors, pieces, long_places, counts = grouping
    compiled = _compiled(dim, rows.state.shape[1], options, factors is not None)
    windows = -(-num_keys // WINDOW)
    scratch_type = torch.int64 if options.exact else torch.float32
    scratch = torch.empty(2 * windows, dim, dtype=scratch_type, device=device)
    largest = pieces  # where it is not read
    if options.exact:
        largest = torch.empty(2 * windows, dtype=torch.int32, device=device)
    shares = (grad, sources, sources if factors is None else factors)
    full = full_device(device)
    others = min(compiled.other_waves * full, num_keys // (SHORT + 1) + 1)
    shorts = min(_SHORT_WAVES * full, -(-num_keys // compiled.form.SHORT_ROWS))
    long_grid = (min(windows, _LONG_WAVES * full),)
    if options.exact:
        launch(
            largest_kernel,
            (min(num_keys, 2 * full),),
            (largest, *shares, pieces, counts, num_keys),
            form=compiled.form,
            **compiled.largest,
        )
        launch(
            spread_largest_kernel,
            long_grid,
            (largest, long_places, counts),
            WINDOW=WINDOW,
            PARTS=128,
        )
    launch(
        _pieces_kernel,
        (others + shorts,),
        (*rows, *shares, scratch, largest, pieces, counts, num_keys, others, *numbers),
        form=compiled.form,
        **compiled.pieces,
    )
    launch(
        _long_kernel,
        long_grid,
        (*rows, scratch, largest, long_places, counts, *numbers),
        form=compiled.form,
        **compiled.long,
    )
