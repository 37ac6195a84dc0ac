"""Which keys have rows: admission, eviction, budgets; the numbers that all stores share.

Every decision is a pure function of (seed, table, key, step, what the table holds), so it is the
same for any number of threads and any order of the samples within a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ByteSize
from torch import Tensor

from penstock.config import AdmitAtRandom, AdmitFrequent, Constant, TableConfig
from penstock.embedding.rules.initializer import mix64, table_seed
from penstock.errors import ConfigError

UNLIMITED = 2**64 - 1
ENTRY_BYTES = 24
"""Of index, a key: 16 at a load of two thirds. What `TableConfig.max_bytes` counts."""
LISTED_BYTES = 8
"""Of the list of a table's keys, so that looking through the table costs what it holds: a row of a
table with eviction, and a key that is counted.
"""
COUNT_BYTES = ENTRY_BYTES + LISTED_BYTES
"""Of a key that is counted but has no row."""
MAX_TIME = 2**32 - 1
"""The latest time that a mark of use can say: seconds reach it in 2106. Later ones read as it."""
SWEEPS_PER_TTL = 16
EVICTED_BEYOND_NEED = 32
"""When a table is full, a 32nd of its rows leaves beyond those whose room is needed, so that the
rows need not be compared at every step.
"""
CANDIDATE_SHARE = 8
"""With `min_count` and a budget, an eighth of it is for the counts of keys without a row."""
MAX_COUNT = 2**16 - 1
MAX_USES = 2**32 - 1
_NO_LIMIT = 2**62
# FORMAT: never change; the draws of a resumed run are these.
_ADMISSION_SALT = 0xD1B54A32D192ED03


# FORMAT: the order is that of the tensor `retention` of checkpoints and of csrc/tables/retention.h.
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
    "ahead",
)
"""now: the last time seen, in the unit of the eviction; step: the last step; swept: when rows were
last looked through for their `ttl`; candidates_are_full: counts are halved at the next step. Since
the beginning: rows admitted in training; keys refused, each time; rows evicted, and the sum of the
times that they had been unused for; gradients dropped because their row had left; rows imported
with a last use after `now`, which became `now`.
"""


_COUNTS = NUMBERS[NUMBERS.index("admitted") :]
"""Those that sum up over ranks."""


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
        given = tensors["retention"].tolist()
        # Version 1 knew fewer.
        given += [0] * (len(NUMBERS) - len(given))
        numbers = dict(zip(NUMBERS, given, strict=True))
        return cls(tensors["default_value"], tensors["default_state"], numbers)

    def of_rank(self, part: int, rank: int, num_ranks: int) -> RetentionState:
        """What one of several ranks takes over of the part that some rank remembered.

        What was counted since the beginning goes to one rank, so that the sum over ranks stays.
        """
        if part % num_ranks == rank:
            return self
        return replace(self, numbers=self.numbers | dict.fromkeys(_COUNTS, 0))

    def joined(self, other: RetentionState) -> RetentionState:
        """Of two parts of a table: the later times, the sum of what was counted."""
        numbers = {name: max(number, other.numbers[name]) for name, number in self.numbers.items()}
        sums = {name: self.numbers[name] + other.numbers[name] for name in _COUNTS}
        return replace(self, numbers=numbers | sums)

    def let_go(self, table: TableConfig, limits: Limits, keys: Tensor, usage: Tensor) -> Tensor:
        """Which rows leave where there are more than the table holds; counts them as evicted.

        Args:
          table: with eviction.
          limits: of the table.
          keys: [n] int64 of all its rows.
          usage: [n, 1 or 2] int64 marks of use.

        Returns:
          [n] bool.
        """
        assert table.eviction is not None
        now = self.numbers["now"]
        last_use = usage[:, 0].numpy()
        uses = np.zeros_like(last_use)
        if table.eviction.has_uses:
            half_life = table.eviction.half_life
            uses = usage[:, 1].numpy()
            if half_life is not None:
                uses = uses >> (now // half_life - last_use // half_life).clip(0, 63)
        number = max(0, len(keys) - limits.max_rows)
        first = np.lexsort((precedence(keys.numpy()), last_use, uses))[:number]
        self.numbers["evicted"] += number
        self.numbers["evicted_age"] += int((now - last_use[first]).clip(min=0).sum())
        leaving = torch.zeros(len(keys), dtype=torch.bool)
        leaving[torch.from_numpy(first)] = True
        return leaving

    def let_counts_go(self, limits: Limits, keys: Tensor) -> Tensor:
        """Which counts leave where there is room for fewer: those of the highest hash.

        Args:
          limits: of the table.
          keys: [n] int64 that are counted.

        Returns:
          [n] bool.
        """
        if len(keys) <= limits.max_candidates:
            return torch.zeros(len(keys), dtype=torch.bool)
        self.numbers["candidates_are_full"] = 1
        hashes = precedence(keys.numpy())
        limit = np.partition(hashes, limits.max_candidates)[limits.max_candidates]
        return torch.from_numpy(hashes >= limit)


def checked_numbers(numbers: Mapping[str, int]) -> dict[str, int]:
    """Numbers that a store may take up; a time beyond `MAX_TIME` is that.

    Raises:
      ConfigError: a number is missing or negative.
    """
    for name in NUMBERS:
        if not 0 <= numbers.get(name, -1) < 2**63:
            raise ConfigError(
                f"retention state: {name} is {numbers.get(name)}; take it from retention_state"
            )
    return {name: numbers[name] for name in NUMBERS} | {"now": min(numbers["now"], MAX_TIME)}


def check_usage(usage: Tensor) -> None:
    """Refuses marks of use that no table has.

    Raises:
      ConfigError: a time or a number of uses is not in 0 to 2^32 - 1.
    """
    bad = (usage < 0) | (usage > MAX_USES)
    if bool(bad.any()):
        raise ConfigError(
            f"usage: {int(usage[bad][0])} is no time or number of uses; they lie in 0 to {MAX_USES}"
        )


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
    return 2 if table.eviction.has_uses else 1


def overhead_bytes(table: TableConfig) -> int:
    """Bytes of a row besides value, state and marks of use."""
    return ENTRY_BYTES + (LISTED_BYTES if table.eviction is not None else 0)


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
    bytes_each = row_bytes + overhead_bytes(table)
    rows = (table.max_bytes - for_counts) // bytes_each
    candidates = for_counts // COUNT_BYTES
    if rows < 1 or (for_counts and candidates < 1):
        raise ConfigError(
            f"table {table.name!r}: max_bytes {_budget(table)} holds no row: one takes "
            f"{bytes_each} bytes; raise max_bytes"
        )
    return Limits(rows, candidates)


def share_of(table: TableConfig, num_ranks: int) -> TableConfig:
    """What one of several ranks may hold of a table: its share of the budget of bytes."""
    if table.max_bytes is None or table.placement == "whole" or num_ranks == 1:
        return table
    fields = dict(table) | {
        "max_bytes": ByteSize(table.max_bytes // num_ranks),
        "whole_bytes": table.max_bytes,
        "num_ranks": num_ranks,
    }
    return TableShare.model_construct(table.model_fields_set, **fields)


class TableShare(TableConfig):
    """A table of which this rank holds a share, `max_bytes` among what that is."""

    whole_bytes: ByteSize
    """`max_bytes` of the table over all ranks."""
    num_ranks: int


def _budget(table: TableConfig) -> str:
    """`max_bytes` as the job has it, and what this rank has of it."""
    if isinstance(table, TableShare):
        share = f"{int(table.max_bytes or 0)} on each of {table.num_ranks} ranks"
        return f"{int(table.whole_bytes)} ({share})"
    return str(int(table.max_bytes or 0))


def over_budget(table: TableConfig, limits: Limits) -> str:
    """Message for rows that a table must take and cannot."""
    return (
        f"table {table.name!r} holds {limits.max_rows} rows, all that its max_bytes of "
        f"{_budget(table)} takes; raise max_bytes, or set eviction"
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
    """[n] uint64: a key's draw at a step, from `admission_seed`; as csrc/tables/retention.h."""
    at_step = mix64(np.array([step], dtype=np.uint64) ^ np.uint64(seed))
    return mix64(keys.view(np.uint64) ^ at_step)


def precedence(keys: NDArray[np.int64]) -> NDArray[np.uint64]:
    """[n] uint64: orders keys where nothing else does; no two keys are equal in it."""
    return mix64(keys.view(np.uint64))


def policy_of(table: TableConfig, seed: int, limits: Limits) -> dict[str, Any]:
    """The table's rules as csrc/tables/retention.h takes them."""
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
        "by_uses": eviction is not None and eviction.has_uses,
        "counts_uses": eviction is not None and eviction.order == "lfu",
        "in_seconds": eviction is not None and eviction.unit == "seconds",
        "ttl": (eviction and eviction.ttl) or 0,
        "half_life": (eviction and eviction.half_life) or 0,
        "retains": retains(table),
        "refuses": refuses(table),
        "default_value": default_of(table),
    }


class Schedule(NamedTuple):
    """Rules of all tables, of which one line says what is due; each [T]."""

    max_rows: NDArray[Any]
    max_candidates: NDArray[Any]
    evicts: NDArray[Any]
    in_seconds: NDArray[Any]
    expires: NDArray[Any]
    periods: NDArray[Any]
    """Of sweeps; 1 where rows do not expire."""
    min_counts: NDArray[Any]
    """bool: whether keys are counted."""
    forgets: NDArray[Any]
    count_half_lives: NDArray[Any]
    """1 where counts are not forgotten."""

    @classmethod
    def of(cls, tables: Sequence[TableConfig], limits: Sequence[Limits]) -> Schedule:
        """Of a store's tables, in order."""
        evictions = [table.eviction for table in tables]
        ttls = [one.ttl if one is not None else None for one in evictions]
        counting = [
            table.admission if isinstance(table.admission, AdmitFrequent) else None
            for table in tables
        ]
        half_lives = [rule and rule.half_life_steps for rule in counting]
        return cls(
            np.array([min(one.max_rows, _NO_LIMIT) for one in limits], dtype=np.int64),
            np.array([min(one.max_candidates, _NO_LIMIT) for one in limits], dtype=np.int64),
            np.array([one is not None for one in evictions]),
            np.array([one is not None and one.unit == "seconds" for one in evictions]),
            np.array([ttl is not None for ttl in ttls]),
            np.array([1 if ttl is None else sweep_period(ttl) for ttl in ttls], dtype=np.int64),
            np.array([rule is not None for rule in counting]),
            np.array([half_life is not None for half_life in half_lives]),
            np.array([half_life or 1 for half_life in half_lives], dtype=np.int64),
        )
