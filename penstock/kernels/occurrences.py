"""What an update is given: rows, gradients, numbers of the rules."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from penstock.types import KeyedJagged

SGD, ADAGRAD, ROW_WISE_ADAGRAD, ADAM, MOMENTUM_SGD, ROW_WISE_ADAM, FTRL, LAMB = range(8)
"""Numbers of the rules, as in csrc/row_kernels.h."""
HYPER_FIELDS = 10
"""Learning rate, weight decay, clip norm, eps, momentum, 1 - beta1, 1 - beta2, l1, 1 / bias1,
1 / bias2: the order of csrc/row_kernels.h."""
WINDOW = 32
"""Places that one piece of a segment may span; see `Grouping`."""


class RowArrays(NamedTuple):
    """The arenas of a store."""

    values: Tensor
    """[slots, D] float32, bfloat16 or float16."""
    state: Tensor
    """[slots, S] float32; S may be 0."""
    usage: Tensor
    """[slots, 0, 1 or 2] int32: time of the last use, number of uses, as unsigned words."""


class UsageRules(NamedTuple):
    """By what rows with marks of use are marked."""

    now: Tensor
    """[T] int64 time, in the unit of the table's eviction."""
    half_life: Tensor
    """[T] int64 of the number of uses; 0: none."""


class Grouping(NamedTuple):
    """The keys of look-ups sorted by slot, so that those of a row, a segment, lie side by side.

    Windows of `WINDOW` places cut long segments into pieces, which are summed one by one; where
    pieces begin and end depends on the slots alone, so the order of every sum does.
    """

    sources: Tensor
    """[N] int32 or int64 by place: first element of the gradient, as one array."""
    factors: Tensor | None
    """[N] float32 by place: of the gradient; None: all 1."""
    piece_places: Tensor
    """[N] int32: first place of each piece, in no particular order."""
    piece_kinds: Tensor
    """[N] int32: length; + `ENTERS` if the segment began before; + `LEAVES` if it goes on after."""
    piece_slots: Tensor
    """[N] int32"""
    piece_tables: Tensor
    """[N] int32"""
    long_places: Tensor
    """[N / WINDOW + 1, 4] int32 of segments of several pieces: first place, last place, slot,
    table.
    """
    counts: Tensor
    """[3] int32: pieces, long segments, rows."""


class GradientPart(NamedTuple):
    """The gradient of one look-up."""

    batch: KeyedJagged
    slots: Tensor
    """[N] int32 by position in the packed keys; below 0: no row, no update."""
    grad: Tensor
    """[B, plan.stride] float32, contiguous."""
    grouping: Grouping | None = None
    """Of `slots`; None: made by the update."""
