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


def sum_bits(num_keys: int) -> int:
    """Bits of a share in an update of so many keys in all, whose sums then stay below 2^62.

    As csrc/rows/row_kernels.h has it.
    """
    return 40 - max(0, (num_keys - 1).bit_length() - 22)


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


class RuleNumbers(NamedTuple):
    """What the rules of an update read, as its kernels take it."""

    hypers: Tensor
    now: Tensor
    half_life: Tensor


class Shares(NamedTuple):
    """Where the gradients of keys are, as kernels take them: see `Grouping`."""

    grad: Tensor
    sources: Tensor
    factors: Tensor


class Pieces(NamedTuple):
    """The pieces of a grouping, and where the sums of those that are no whole segment go."""

    scratch: Tensor
    """[2 * windows, D] float32 or int64."""
    largest: Tensor
    """[2 * windows] int32: the largest magnitude of each; in deterministic mode."""
    pieces: Tensor
    counts: Tensor


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
    sum_bits: int = 0
    """Bits of a share in deterministic mode; 0: as many as the number of keys allows."""


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
        """As constants of a kernel."""
        return {
            "TABLES": self.needs_tables,
            "RULE": self.rule,
            "CLIPPED": self.clips,
            "BOUNDED": self.bounds,
            "EXACT": self.exact,
            "ONE_HYPER": self.one_hyper,
            "WORDS": self.usage_words,
        }

    @property
    def options(self) -> dict[str, int]:
        """Of the kernels' compiler: the host's bits have no fused multiply-add."""
        return {"enable_fp_fusion": not self.exact}


class UpdateForm(NamedTuple):
    """How the kernels of an update are compiled: constants."""

    D: int
    COLUMNS: int
    """Of a tile: D, rounded up to a power of two."""
    WINDOW: int
    SHORT: int
    SHORT_ROWS: int
    """Short pieces that a program takes at once."""
    ROWS: int
    """Other pieces."""
    KEYS: int
    """Places of each of these."""
    PARTS: int
    """Pieces of a segment."""
    FACTORS: int
    TABLES: int
    RULE: int
    CLIPPED: int
    BOUNDED: int
    EXACT: int
    ONE_HYPER: int
    WORDS: int
