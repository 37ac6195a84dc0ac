"""Updates: gradients summed by row, one optimizer step a row, in place.

A program, one warp, takes a window of the grouped keys and goes over it in tiles of some places,
whose gradients it asks for at once. Sums run down the tile, inside each thread; a row takes its
step where its segment ends. Segments that reach beyond a window leave sums in scratch memory, which
a second kernel adds up. `exact` is the deterministic mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels import exact
from penstock.kernels.group import group_keys, source_of
from penstock.kernels.occurrences import (
    WINDOW,
    GradientPart,
    Grouping,
    RowArrays,
    RuleOptions,
    UsageRules,
)
from penstock.kernels.plan import DevicePlan
from penstock.kernels.reference_update import step_seed
from penstock.kernels.rules import step_rows
from penstock.kernels.tiles import (
    WARP_COLUMNS,
    places_of_tile,
    power_of_two,
    programs_of,
)


@triton.jit
def _next_in_segment(is_head, total, next_is_head, next_total):
    return is_head | next_is_head, tl.where(next_is_head != 0, next_total, total + next_total)


@triton.jit
def _windows_kernel(
    values,
    state,
    usage,
    grad,
    scratch,
    is_through,
    long_windows,
    counts,
    words,
    order,
    sources,
    tables,
    factors,
    feature_of_packed,
    column_of,
    table_of,
    num_keys,
    batch_size,
    stride,
    slot_mask,
    hypers,
    step_seed,
    now,
    half_life,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE_HOT: tl.constexpr,
    FACTORS: tl.constexpr,
    TABLES: tl.constexpr,
    RULE: tl.constexpr,
    CLIPPED: tl.constexpr,
    ONE_HYPER: tl.constexpr,
    WORDS: tl.constexpr,
):
    window = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    is_column = (column < D)[None, :]
    row = tl.arange(0, PLACES)
    # Sum of the segment that reaches into the tile, and the segments that began in the window.
    carried = tl.zeros((COLUMNS,), tl.float32)
    heads = 0
    for first in range(window * WINDOW, window * WINDOW + WINDOW, PLACES):
        place = first + row
        is_key = place < num_keys
        word = tl.load(words + place, mask=is_key, other=-1)
        before = tl.load(words + place - 1, mask=is_key & (place > 0), other=-1)
        after = tl.load(words + place + 1, mask=place + 1 < num_keys, other=-1)
        position = tl.load(order + place, mask=is_key, other=0)
        has_row = word >= 0
        is_head = has_row & (word != before)
        is_end = has_row & (word != after)
        began = heads + tl.cumsum(is_head.to(tl.int32), 0)
        is_whole = is_end & (began > 0)
        slot = word & slot_mask
        value_row = values + slot.to(tl.int64)[:, None] * D + column[None, :]
        source, table = source_of(
            position, has_row, sources, tables, feature_of_packed, column_of, table_of, batch_size,
            stride, ONE_HOT, TABLES,
        )  # fmt: skip
        share_row = grad + source[:, None] + column[None, :]
        share = tl.load(share_row, mask=has_row[:, None] & is_column, other=0.0)
        w = tl.load(value_row, mask=is_whole[:, None] & is_column, other=0.0).to(tl.float32)
        if FACTORS:
            share *= tl.load(factors + position, mask=has_row, other=0.0)[:, None]
        continues = (row == 0) & (is_head == 0)
        share += tl.where(continues[:, None], carried[None, :], 0.0)
        starts = is_head.to(tl.int32)[:, None] + tl.zeros((PLACES, COLUMNS), tl.int32)
        _, total = tl.associative_scan((starts, share), 0, _next_in_segment)
        carried = tl.sum(tl.where((row == PLACES - 1)[:, None], total, 0.0), 0)
        heads += tl.sum(is_head.to(tl.int32))
        # The segment that entered the window ends here.
        is_last_part = is_end & (began == 0)
        part = scratch + window.to(tl.int64) * (2 * D) + column[None, :] + row[:, None] * 0
        tl.store(part, total, mask=is_last_part[:, None] & is_column)
        step_rows(
            values, state, usage, slot, is_whole, w, total, table, hypers, step_seed, now,
            half_life, D, COLUMNS, RULE, CLIPPED, False, ONE_HYPER, WORDS,
        )  # fmt: skip
    _close_window(
        scratch + window.to(tl.int64) * (2 * D) + column, carried, heads, window,
        window * WINDOW + WINDOW - 1, is_through, long_windows, counts, words, num_keys, D, COLUMNS,
    )  # fmt: skip


@triton.jit
def _load_tile(
    first, end, values, grad, words, order, sources, tables, factors, feature_of_packed, column_of,
    table_of, num_keys, batch_size, stride, slot_mask,
    D: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr, ONE_HOT: tl.constexpr,
    FACTORS: tl.constexpr, TABLES: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of places, and the values of rows whose segments end there."""
    column = tl.arange(0, COLUMNS)
    is_column = (column < D)[None, :]
    place = first + tl.arange(0, PLACES)
    is_key = place < tl.minimum(num_keys, end)
    word = tl.load(words + place, mask=is_key, other=-1)
    before = tl.load(words + place - 1, mask=is_key & (place > 0), other=-1)
    after = tl.load(words + place + 1, mask=is_key & (place + 1 < num_keys), other=-1)
    position = tl.load(order + place, mask=is_key, other=0)
    has_row = word >= 0
    is_end = has_row & (word != after)
    slot = word & slot_mask
    source, table = source_of(
        position, has_row, sources, tables, feature_of_packed, column_of, table_of, batch_size,
        stride, ONE_HOT, TABLES,
    )  # fmt: skip
    share_row = grad + source[:, None] + column[None, :]
    share = tl.load(share_row, mask=has_row[:, None] & is_column, other=0.0)
    value_row = values + slot.to(tl.int64)[:, None] * D + column[None, :]
    w = tl.load(value_row, mask=is_end[:, None] & is_column, other=0.0)
    if FACTORS:
        share *= tl.load(factors + position, mask=has_row, other=0.0)[:, None]
    is_head = has_row & (word != before)
    return is_head.to(tl.int32), is_end.to(tl.int32), slot, table, share, w


@triton.jit
def _pick(numbers, is_it):
    """The number where is_it, of [PLACES]."""
    return tl.sum(tl.where(is_it, numbers, 0))


@triton.jit
def _pick_row(rows, is_it):
    """[COLUMNS]: the row where is_it, of [PLACES, COLUMNS]; inside each thread."""
    return tl.sum(tl.where(is_it[:, None], rows, 0.0), 0)


@triton.jit
def _wide_windows_kernel(
    values,
    state,
    usage,
    grad,
    scratch,
    is_through,
    long_windows,
    counts,
    words,
    order,
    sources,
    tables,
    factors,
    feature_of_packed,
    column_of,
    table_of,
    num_keys,
    batch_size,
    stride,
    slot_mask,
    hypers,
    step_seed,
    now,
    half_life,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLACES: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE_HOT: tl.constexpr,
    FACTORS: tl.constexpr,
    TABLES: tl.constexpr,
    RULE: tl.constexpr,
    CLIPPED: tl.constexpr,
    ONE_HYPER: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The same, for vectors that fill a warp: place after place, so that only ends take steps."""
    window = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    row = tl.arange(0, PLACES)
    one = tl.arange(0, 1)
    begin, end = window * WINDOW, window * WINDOW + WINDOW
    part = scratch + window.to(tl.int64) * (2 * D) + column
    total = tl.zeros((COLUMNS,), tl.float32)
    heads = 0
    is_head, is_end, slot, table, share, w = _load_tile(
        begin, end, values, grad, words, order, sources, tables, factors, feature_of_packed,
        column_of, table_of, num_keys, batch_size, stride, slot_mask, D, COLUMNS, PLACES, ONE_HOT,
        FACTORS, TABLES,
    )  # fmt: skip
    for first in range(begin, end, PLACES):
        # The next tile is on its way while this one is summed.
        next_head, next_end, next_slot, next_table, next_share, next_w = _load_tile(
            first + PLACES, end, values, grad, words, order, sources, tables, factors,
            feature_of_packed, column_of, table_of, num_keys, batch_size, stride, slot_mask, D,
            COLUMNS, PLACES, ONE_HOT, FACTORS, TABLES,
        )  # fmt: skip
        for i in tl.static_range(PLACES):
            is_it = row == i
            begins = _pick(is_head, is_it)
            total = tl.where(begins > 0, 0.0, total) + _pick_row(share, is_it)
            heads += begins
            if _pick(is_end, is_it) > 0:
                if heads > 0:
                    step_rows(
                        values, state, usage, _pick(slot, is_it) + one, one == 0,
                        _pick_row(w.to(tl.float32), is_it)[None, :], total[None, :],
                        _pick(table, is_it) + one, hypers, step_seed, now, half_life, D, COLUMNS,
                        RULE, CLIPPED, False, ONE_HYPER, WORDS,
                    )  # fmt: skip
                else:
                    # The segment that entered the window ends here.
                    tl.store(part, total, mask=column < D)
        is_head, is_end, slot, table = next_head, next_end, next_slot, next_table
        share, w = next_share, next_w
    _close_window(
        part, total, heads, window, end - 1, is_through, long_windows, counts, words, num_keys, D,
        COLUMNS,
    )  # fmt: skip


@triton.jit
def _close_window(
    part, total, heads, window, last, is_through, long_windows, counts, words, num_keys,
    D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Leaves the sum of a segment that goes on after the window, and says so."""
    word = tl.load(words + last, mask=last < num_keys, other=-1)
    after = tl.load(words + last + 1, mask=last + 1 < num_keys, other=-1)
    leaves = (word >= 0) & (word == after)
    tl.store(is_through + window, (leaves & (heads == 0)).to(tl.int32))
    if leaves:
        column = tl.arange(0, COLUMNS)
        tl.store(part + tl.where(heads > 0, D, 0), total, mask=column < D)
        if heads > 0:
            tl.store(long_windows + tl.atomic_add(counts, 1, sem="relaxed"), window)
    if heads > 0:
        tl.atomic_add(counts + 1, heads, sem="relaxed")


@triton.jit
def _long_kernel(
    values,
    state,
    usage,
    scratch,
    is_through,
    long_windows,
    counts,
    words,
    order,
    tables,
    feature_of_packed,
    table_of,
    num_windows,
    batch_size,
    slot_mask,
    hypers,
    step_seed,
    now,
    half_life,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    ONE_HOT: tl.constexpr,
    TABLES: tl.constexpr,
    RULE: tl.constexpr,
    CLIPPED: tl.constexpr,
    ONE_HYPER: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Segments of several windows: adds the sums of all and takes the step."""
    column = tl.arange(0, COLUMNS)
    is_column = (column < D)[None, :]
    one = tl.arange(0, 1)
    part = tl.arange(0, PARTS)
    for number in range(tl.program_id(0), tl.load(counts), tl.num_programs(0)):
        window = tl.load(long_windows + number + one)
        place = (window + 1) * WINDOW
        slot = tl.load(words + place) & slot_mask
        value_row = values + slot.to(tl.int64)[:, None] * D + column[None, :]
        w = tl.load(value_row, mask=is_column, other=0.0).to(tl.float32)
        begun = scratch + window.to(tl.int64)[:, None] * (2 * D) + D + column[None, :]
        total = tl.load(begun, mask=is_column, other=0.0)
        goes_on = 1
        while goes_on == 1:
            later = tl.max(window) + 1 + part
            through = tl.load(is_through + later, mask=later < num_windows, other=0)
            # The first window that the segment does not go through is its last.
            last = tl.min(tl.where(through == 0, part, PARTS))
            there = scratch + later.to(tl.int64)[:, None] * (2 * D) + column[None, :]
            is_part = (part <= last)[:, None] & is_column
            total += tl.sum(tl.load(there, mask=is_part, other=0.0), 0)[None, :]
            goes_on = (last == PARTS).to(tl.int32)
            window += PARTS
        table = slot
        if TABLES:
            position = tl.load(order + place)
            if ONE_HOT:
                feature = tl.load(feature_of_packed + position // batch_size)
                table = tl.load(table_of + feature)
            else:
                table = tl.load(tables + position)
        step_rows(
            values, state, usage, slot, one == 0, w, total, table, hypers, step_seed, now,
            half_life, D, COLUMNS, RULE, CLIPPED, False, ONE_HYPER, WORDS,
        )  # fmt: skip


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
    options = RuleOptions(rule, clips, len(hypers) == 1, words)
    grouping = parts[0].grouping if len(parts) == 1 else None
    if grouping is None:
        grouping = group_keys(plan, parts, needs_tables=options.needs_tables)
    grad = parts[0].grad if len(parts) == 1 else torch.cat([part.grad for part in parts])
    numbers = (hypers, _signed_word(step_seed(step)), *(usage_rules or (hypers, hypers)))
    if deterministic:
        return exact.step(rows, plan, grouping, grad, numbers, options)
    return _step(rows, plan, grouping, grad, numbers, options)


def _signed_word(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def _step(
    rows: RowArrays,
    plan: DevicePlan,
    grouping: Grouping,
    grad: Tensor,
    numbers: tuple[Tensor | int, ...],
    options: RuleOptions,
) -> Tensor:
    num_keys, device = len(grouping.words), grad.device
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    if not num_keys:
        return counts[1]
    columns = power_of_two(plan.dim)
    places, num_warps = places_of_tile(columns)
    num_windows = triton.cdiv(num_keys, WINDOW)
    scratch = torch.empty(2 * num_windows, plan.dim, device=device)
    is_through, long_windows = torch.empty(2, num_windows, dtype=torch.int32, device=device)
    words, order, slot_bits, one_hot, sources, tables, factors = grouping
    batch_size = len(grad)
    slot_mask = (1 << slot_bits) - 1
    compiled = {
        "D": plan.dim,
        "COLUMNS": columns,
        "WINDOW": WINDOW,
        "ONE_HOT": one_hot,
        **options.compiled(),
    }
    kernel = _wide_windows_kernel if columns >= WARP_COLUMNS else _windows_kernel
    kernel[(num_windows,)](
        *rows,
        grad,
        scratch,
        is_through,
        long_windows,
        counts,
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
        slot_mask,
        *numbers,
        PLACES=places,
        FACTORS=factors is not None,
        num_warps=num_warps,
        **compiled,
    )
    _long_kernel[(min(num_windows, programs_of(device)),)](
        *rows,
        scratch,
        is_through,
        long_windows,
        counts,
        words,
        order,
        order if tables is None else tables,
        plan.feature_of_packed,
        plan.table,
        num_windows,
        batch_size,
        slot_mask,
        *numbers,
        PARTS=places,
        num_warps=num_warps,
        **compiled,
    )
    return counts[1]
