"""What an update is given: rows, gradients, numbers of the rules."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from penstock.kernels.plan import DevicePlan
from penstock.types import KeyedJagged

SGD, ADAGRAD, ROW_WISE_ADAGRAD, ADAM, MOMENTUM_SGD, ROW_WISE_ADAM, FTRL, LAMB, ADAMW = range(9)
"""Numbers of the rules, as in csrc/rows/row_kernels.h."""
HYPER_FIELDS = 11
"""Learning rate, weight decay, clip norm, eps, momentum, 1 - beta1, 1 - beta2, l1, 1 / bias1,
1 / bias2, weight bound: the order of csrc/rows/row_kernels.h."""
WINDOW = 64
"""Places of a grouping: segments are cut where windows end, so that the order of sums depends on
the slots alone, and no program has much more to sum than another."""
SHORT = 2
"""Places of a short piece, at most: most rows of a batch have no more."""


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
    """[T] int64 of the number of uses; 0: none; -1: it is a score, and stays as it is."""


class Grouping(NamedTuple):
    """The keys of look-ups sorted by row: those of one, a segment, lie side by side.

    Of one segment the positions rise, and look-ups follow one another. Where a window ends segments
    are cut into pieces. Short pieces are listed from the front of their arrays, all others from the
    back, both in no particular order.
    """

    sources: Tensor
    """[N] int32 or int64 by place: first element of the gradient, as one array."""
    factors: Tensor | None
    """[N] float32 by place: of the gradient; None: all 1."""
    pieces: Tensor
    """[4, N] int32: of each piece its first place; its kind (length, + `ENTERS` if the segment
    began before, + `LEAVES` if it goes on after); slot; table, undefined where nobody needs it."""
    long_places: Tensor
    """[N / WINDOW + 1, 4] int32 of segments of several pieces: first place, last place, slot,
    table.
    """
    counts: Tensor
    """[4] int32: short pieces, other pieces, long segments, rows."""


class GradientPart(NamedTuple):
    """The gradient of one look-up."""

    batch: KeyedJagged
    slots: Tensor
    """[N] int32 by position in the packed keys; below 0: no row, no update."""
    grad: Tensor
    """[B, stride of its plan] float32, contiguous."""
    grouping: Grouping | None = None
    """Of `slots`; None: made by the update."""
    plan: DevicePlan | None = None
    """Where the columns of `grad` are, if not where the plan of all parts has them."""


class UpdateRules(NamedTuple):
    """How the rows of a store are updated, the same at every step."""

    rule: int
    """Number of the optimizer."""
    clips: bool = True
    """Whether the clip norm of any table is above 0."""
    bounds: bool = True
    """Whether the weight bound of any table is above 0."""
    deterministic: bool = False
    """The bits of csrc/rows/row_kernels.cc, whatever the order of the samples."""
    usage: UsageRules | None = None
    """Where rows have marks of use."""


class RuleOptions(NamedTuple):
    """What decides how the kernels of updates are compiled."""

    rule: int
    clips: bool
    bounds: bool
    exact: bool
    one_hyper: bool
    """All tables have the same settings."""
    usage_words: int

    @property
    def needs_tables(self) -> bool:
        """Whether a row needs the number of its table."""
        return self.usage_words > 0 or not self.one_hyper

    def compiled(self) -> dict[str, int]:
        """As constants of a kernel, and options of its compiler."""
        return {
            "TABLES": self.needs_tables,
            "RULE": self.rule,
            "CLIPPED": self.clips,
            "BOUNDED": self.bounds,
            "EXACT": self.exact,
            "ONE_HYPER": self.one_hyper,
            "WORDS": self.usage_words,
            # The host's bits have no fused multiply-add.
            "enable_fp_fusion": not self.exact,
        }
