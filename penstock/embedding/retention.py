"""Which keys have rows: admission, eviction, budgets; the numbers that all stores share.

Every decision is a pure function of (seed, table, key, step, what the table holds), so it is the
same for any number of threads and any order of the samples within a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.config import AdmitAtRandom, AdmitFrequent, Constant, TableConfig
from penstock.embedding.initializer import mix64, table_seed
from penstock.errors import ConfigError

UNLIMITED = 2**64 - 1
ENTRY_BYTES = 24
"""Of index, a key: 16 at a load of two thirds. What `TableConfig.max_bytes` counts."""
SWEEPS_PER_TTL = 16
EVICTED_BEYOND_NEED = 32
"""When a table is full, a 32nd of its rows leaves beyond those whose room is needed, so that the
rows need not be compared at every step.
"""
CANDIDATE_SHARE = 8
"""With `min_count` and a budget, an eighth of it is for the counts of keys without a row."""
MAX_COUNT = 2**16 - 1
MAX_USES = 2**32 - 1
# FORMAT: never change; the draws of a resumed run are these.
_ADMISSION_SALT = 0xD1B54A32D192ED03


# FORMAT: the order is that of the tensor `retention` in a checkpoint and of csrc/retention.h.
NUMBERS = (
    "now",
    "step",
    "swept",
    "candidates_are_full",
    "admitted",
    "refused",
    "evicted",
    "evicted_age",
    "dropped",
)
"""now: the last time seen, in the unit of the eviction; step: the last step; swept: when rows were
last looked through for their `ttl`; candidates_are_full: counts are halved at the next step. Since
the beginning: rows admitted in training; keys refused, each time; rows evicted, and the sum of the
times that they had been unused for; gradients dropped because their row had left.
"""


class Limits(NamedTuple):
    """What a table may hold."""

    max_rows: int
    max_candidates: int
    """Keys that are counted but have no row."""


class Clock(NamedTuple):
    """The time by which stores judge rows."""

    step: int = 0
    seconds: int = 0
    """Since 1970 UTC."""


@dataclass(slots=True)
class RetentionState:
    """What a table remembers besides its rows and candidates; part of a checkpoint."""

    default_value: Tensor
    """[D] float32: what a refused key reads."""
    default_state: Tensor
    """[S] float32"""
    numbers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NUMBERS, 0))
    """By the names of `NUMBERS`."""

    def tensors(self) -> dict[str, Tensor]:
        """As tensors of fixed names."""
        numbers = torch.tensor([self.numbers[name] for name in NUMBERS], dtype=torch.int64)
        return {
            "default_value": self.default_value,
            "default_state": self.default_state,
            "retention": numbers,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RetentionState:
        """Inverse of `tensors`."""
        numbers = dict(zip(NUMBERS, tensors["retention"].tolist(), strict=True))
        return cls(tensors["default_value"], tensors["default_state"], numbers)


def retains(table: TableConfig) -> bool:
    """Whether the table has a rule at all; else every key gets a row, which stays."""
    rules = (table.admission, table.eviction, table.max_bytes)
    return any(rule is not None for rule in rules)


def refuses(table: TableConfig) -> bool:
    """Whether keys without a row read the table's default row, not their initial values."""
    return table.admission is not None or table.max_bytes is not None


def usage_dim(table: TableConfig) -> int:
    """32-bit words that a row has for marks of use: none, last use, or last use and their number.

    The last use is in the unit of the eviction.
    """
    if table.eviction is None:
        return 0
    return 2 if table.eviction.order == "lfu" else 1


def limits_of(table: TableConfig, row_bytes: int) -> Limits:
    """Numbers of rows and counted keys within `max_bytes`.

    Args:
      table: with its budget.
      row_bytes: of value, state and marks of use.

    Raises:
      ConfigError: the budget is less than one row.
    """
    if table.max_bytes is None:
        return Limits(UNLIMITED, UNLIMITED)
    for_counts = 0
    if isinstance(table.admission, AdmitFrequent):
        for_counts = table.max_bytes // CANDIDATE_SHARE
    rows = (table.max_bytes - for_counts) // (row_bytes + ENTRY_BYTES)
    candidates = for_counts // ENTRY_BYTES
    if rows < 1 or (for_counts and candidates < 1):
        raise ConfigError(
            f"table {table.name!r}: max_bytes {int(table.max_bytes)} holds no row: one takes "
            f"{row_bytes + ENTRY_BYTES} bytes; raise max_bytes"
        )
    return Limits(rows, candidates)


def over_budget(table: TableConfig, limits: Limits) -> str:
    """Message for rows that a table must take and cannot."""
    return (
        f"table {table.name!r} holds {limits.max_rows} rows, all that its max_bytes of "
        f"{int(table.max_bytes or 0)} takes; raise max_bytes, or set eviction"
    )


def sweep_period(ttl: int) -> int:
    """How often rows are looked through for their `ttl`."""
    return max(1, ttl // SWEEPS_PER_TTL)


def default_of(table: TableConfig) -> float:
    """First value of every column of the default row: the mean of the initial values."""
    return table.initializer.value if isinstance(table.initializer, Constant) else 0.0


def admission_seed(seed: int, table: str) -> int:
    """Seed of a table's draws."""
    return table_seed(seed, table) ^ _ADMISSION_SALT


def admission_threshold(rule: AdmitAtRandom) -> int:
    """A key is admitted at a step where its 64 random bits are below this."""
    return int(rule.probability * 2.0**64)


def admission_bits(seed: int, keys: NDArray[np.int64], step: int) -> NDArray[np.uint64]:
    """[n] uint64: a key's draw at a step, from `admission_seed`; csrc/retention.h has the same."""
    at_step = mix64(np.array([step], dtype=np.uint64) ^ np.uint64(seed))
    return mix64(keys.view(np.uint64) ^ at_step)


def precedence(keys: NDArray[np.int64]) -> NDArray[np.uint64]:
    """[n] uint64: orders keys where nothing else does; no two keys are equal in it."""
    return mix64(keys.view(np.uint64))


def policy_of(table: TableConfig, seed: int, limits: Limits) -> dict[str, Any]:
    """The table's rules as csrc/retention.h takes them."""
    admission, eviction = table.admission, table.eviction
    counted = admission if isinstance(admission, AdmitFrequent) else None
    return {
        "admission_seed": admission_seed(seed, table.name),
        "admit_below": admission_threshold(admission)
        if isinstance(admission, AdmitAtRandom)
        else UNLIMITED,
        "min_count": counted.min_count if counted else 0,
        "count_half_life": (counted and counted.half_life_steps) or 0,
        "max_rows": limits.max_rows,
        "max_candidates": limits.max_candidates,
        "evicts": eviction is not None,
        "by_uses": eviction is not None and eviction.order == "lfu",
        "in_seconds": eviction is not None and eviction.unit == "seconds",
        "ttl": (eviction and eviction.ttl) or 0,
        "half_life": (eviction and eviction.half_life) or 0,
        "retains": retains(table),
        "refuses": refuses(table),
        "default_value": default_of(table),
    }
