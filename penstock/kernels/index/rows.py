"""New rows: a slot for every key that claimed an entry, and what the row begins with."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.device import is_interpreted
from penstock.kernels.index.find import Misses
from penstock.kernels.index.index import Claims, Index, KeyBatch
from penstock.kernels.index.probe import PAYLOAD_BITS, initial_values, narrowed, row_seed, table_of
from penstock.kernels.launch import launch
from penstock.kernels.update.occurrences import RowArrays

_ROWS = 256 if is_interpreted() else 16
_PROGRAMS = 2048
COUNT_BITS = tl.constexpr(32)
"""Of the word that tells the host how many rows there are, below the insertion's number."""


class Initial(NamedTuple):
    """What the rows of each table begin with."""

    kind: Tensor
    """[T] int32, see `initializer.KINDS`."""
    scale: Tensor
    """[T] float32."""
    seed: Tensor
    """[T] int64."""
    state: Tensor
    """[T] float32: of every float of the optimizer state."""
    now: Tensor
    """[T] int64: the time, in the unit of the table's eviction."""


class Count(NamedTuple):
    """How the host learns how many rows there are."""

    allocated: Tensor
    """[1] int64 rows made so far, on the device."""
    message: Tensor
    """[1] int64 in memory of the host that the device may write: `number`, then `allocated`."""
    number: int
    """Of this insertion; below 2^31."""


class Slots(NamedTuple):
    """Slots of new rows: rank r takes `free[r]`, beyond those `first_unused` and following."""

    free: Tensor
    """[n] int64."""
    first_unused: int


class Destination(NamedTuple):
    """Where new rows go, and where they are counted."""

    slots: Slots
    """Which must be usable."""
    rows: RowArrays
    of_table: Tensor
    """[T] int64, rises by the rows of each table."""
    report: Count
    """Is written for the host."""


class _Keys(NamedTuple):
    """The arrays of a `KeyBatch`."""

    keys: Tensor
    offsets: Tensor
    tables: Tensor


class _Counters(NamedTuple):
    """What rises with the rows made."""

    of_table: Tensor
    allocated: Tensor
    message: Tensor


class _RowForm(NamedTuple):
    """Constants: columns of value, state and marks of use; tiles of them; keys of a program."""

    D: int
    S: int
    U: int
    COLUMNS: int
    STATES: int
    BLOCK: int


@triton.jit(do_not_specialize=["batch_size", "num_keys", "num_free", "first_unused", "number"])
def _make_rows(entries, of_call: _Keys, batch_size, num_features, misses: Misses, winner, num_keys,
               free, num_free, first_unused, found, rows: RowArrays, initial: Initial,
               counters: _Counters, number, form: tl.constexpr):  # fmt: skip
    keys, offsets, tables = of_call
    missing, num_missing = misses
    values, state, usage = rows
    rows_of_table, allocated, message = counters
    D: tl.constexpr = form.D
    S: tl.constexpr = form.S
    U: tl.constexpr = form.U
    COLUMNS: tl.constexpr = form.COLUMNS
    STATES: tl.constexpr = form.STATES
    BLOCK: tl.constexpr = form.BLOCK
    entry = winner + num_keys
    rank = entry + num_keys
    count = tl.load(num_missing)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if tl.program_id(0) == 0:
        # One word: the host must not see half of it.
        tl.store(message, (first + number << COUNT_BITS) | tl.load(allocated))
    while first < count:
        i = first + tl.arange(0, BLOCK)
        active = i < count
        n = tl.load(missing + i, mask=active, other=0)
        chosen = tl.load(winner + n, mask=active, other=-1)
        active = active & (chosen >= 0)
        chosen = tl.where(active, chosen, 0)
        place = tl.load(rank + chosen, mask=active, other=0)
        reused = tl.load(free + place, mask=active & (place < num_free), other=0)
        slot = tl.where(place < num_free, reused, first_unused + place - num_free)
        tl.store(found + n, slot.to(tl.int32), mask=active)
        won = active & (chosen == n)
        table = table_of(n, offsets, batch_size, tables, num_features)
        table = tl.where(won, table, 0)
        key = tl.load(keys + n, mask=won, other=0)
        where = tl.load(entry + n, mask=won, other=0)
        meta = ((table.to(tl.int64) + 1) << PAYLOAD_BITS) | slot
        tl.store(entries + where * 2 + 1, meta, mask=won)
        # Mostly all are of one table.
        highest = tl.max(tl.where(won, table, 0), 0)
        of_highest = won & (table == highest)
        tl.atomic_add(rows_of_table + highest, tl.sum(of_highest.to(tl.int64), 0), sem="relaxed")
        others = won & (table != highest)
        tl.atomic_add(rows_of_table + table, others.to(tl.int64), mask=others, sem="relaxed")
        seed = row_seed(key, tl.load(initial.seed + table))
        kind, scale = tl.load(initial.kind + table), tl.load(initial.scale + table)
        for begin in tl.range(0, D, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            value = initial_values(seed[:, None], column[None, :], kind[:, None], scale[:, None])
            inside = won[:, None] & (column < D)[None, :]
            target = values + slot[:, None] * D + column[None, :]
            tl.store(target, narrowed(value, values.dtype.element_ty), mask=inside)  # type: ignore[attr-defined]
        of_state = tl.load(initial.state + table)
        for begin in tl.range(0, S, STATES):
            column = begin + tl.arange(0, STATES)
            inside = won[:, None] & (column < S)[None, :]
            target = state + slot[:, None] * S + column[None, :]
            tl.store(target, of_state[:, None] + tl.zeros((BLOCK, STATES), tl.float32), mask=inside)
        if U > 0:
            now = tl.load(initial.now + table)
            tl.store(usage + slot * U, now.to(tl.int32), mask=won)
            if U > 1:
                tl.store(usage + slot * U + 1, tl.zeros((BLOCK,), tl.int32), mask=won)
        first += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit(do_not_specialize=["batch_size", "first_unused"])
def _lend_rows(keys, offsets, tables, batch_size, num_features, missing, num_missing, first_unused,
               found, values, kinds, scales, seeds, D: tl.constexpr, COLUMNS: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    count = tl.load(num_missing)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    while first < count:
        i = first + tl.arange(0, BLOCK)
        n = tl.load(missing + i, mask=i < count, other=0)
        # Those of tables that refuse keys have a default row.
        lent = (i < count) & (tl.load(found + n, mask=i < count, other=0) < 0)
        slot = first_unused + i
        table = table_of(n, offsets, batch_size, tables, num_features)
        table = tl.where(lent, table, 0)
        seed = row_seed(tl.load(keys + n, mask=lent, other=0), tl.load(seeds + table))
        kind, scale = tl.load(kinds + table), tl.load(scales + table)
        for begin in tl.range(0, D, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            value = initial_values(seed[:, None], column[None, :], kind[:, None], scale[:, None])
            inside = lent[:, None] & (column < D)[None, :]
            target = values + slot[:, None] * D + column[None, :]
            tl.store(target, narrowed(value, values.dtype.element_ty), mask=inside)
        tl.store(found + n, slot.to(tl.int32), mask=lent)
        first += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def _read_initial(keys, count, table, kinds, scales, seeds, out, D: tl.constexpr,
                  COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    key = tl.load(keys + n, mask=n < count, other=0)
    seed = row_seed(key, tl.load(seeds + table + tl.zeros((BLOCK,), tl.int32)))
    kind = tl.load(kinds + table + tl.zeros((BLOCK,), tl.int32))
    scale = tl.load(scales + table + tl.zeros((BLOCK,), tl.int32))
    value = initial_values(seed[:, None], column[None, :], kind[:, None], scale[:, None])
    inside = (n < count)[:, None] & (column < D)[None, :]
    target = out + n[:, None] * D + column[None, :]
    tl.store(target, narrowed(value, out.dtype.element_ty), mask=inside)


def make_rows(
    index: Index,
    batch: KeyBatch,
    misses: Misses,
    claims: Claims,
    found: Tensor,
    to: Destination,
    initial: Initial,
) -> None:
    """Gives rows to the winners of `claims`, and their slots to all keys that met them.

    Args:
      index: whose entries are settled with the slots.
      batch: keys and tables.
      misses: as given to `Index.claim`.
      claims: from `Index.claim`.
      found: [N] int32 gets the slots.
      to: where the rows go.
      initial: what they begin with.
    """
    num_keys = batch.keys.numel()
    if not num_keys:
        return
    slots, rows, rows_of_table, report = to
    of_slots = slots.free, slots.free.numel(), slots.first_unused
    counters = rows_of_table, report.allocated, report.message
    launch(
        _make_rows,
        (min(_PROGRAMS, -(-num_keys // _ROWS)),),
        (
            index.entries,
            *batch,
            batch.tables.numel(),
            *misses,
            *claims,
            num_keys,
            *of_slots,
            found,
            *rows,
            *initial,
            *counters,
            report.number,
        ),
        form=_row_form(*(part.shape[1] for part in rows)),
        num_warps=4,
    )


def lend_rows(
    batch: KeyBatch, misses: Misses, first: int, found: Tensor, values: Tensor, initial: Initial
) -> None:
    """Writes initial values of missing keys into the slots from `first` on.

    Args:
      batch: keys and tables.
      misses: which are missing.
      first: slot; as many as there are misses must be usable.
      found: [N] int32 gets the slots, where it is below 0.
      values: [slots, D].
      initial: what rows begin with.
    """
    launch(
        _lend_rows,
        (min(_PROGRAMS, -(-batch.keys.numel() // _ROWS)),),
        (*batch, batch.tables.numel(), *misses, first, found, values, *initial[:3]),
        D=values.shape[1],
        COLUMNS=_columns(values.shape[1]),
        BLOCK=_ROWS,
        num_warps=4,
    )


def read_initial(keys: Tensor, table: int, initial: Initial, like: Tensor) -> Tensor:
    """First values of rows.

    Args:
      keys: [n] int64.
      table: whose.
      initial: of the tables.
      like: [any, D], of the dtype wanted.

    Returns:
      [n, D].
    """
    dim = like.shape[1]
    out = like.new_empty(len(keys), dim)
    if len(keys):
        columns = _columns(dim)
        launch(
            _read_initial,
            (triton.cdiv(len(keys), _ROWS), triton.cdiv(dim, columns)),
            (keys, len(keys), table, *initial[:3], out),
            D=dim,
            COLUMNS=columns,
            BLOCK=_ROWS,
            num_warps=4,
        )
    return out


@lru_cache(maxsize=64)
def _columns(dim: int) -> int:
    return min(128, int(triton.next_power_of_2(max(1, dim))))


@lru_cache(maxsize=64)
def _row_form(dim: int, state_dim: int, usage_dim: int) -> _RowForm:
    return _RowForm(dim, state_dim, usage_dim, _columns(dim), _columns(state_dim), _ROWS)
