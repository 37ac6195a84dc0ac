"""One table of `DictStore`: rows, counted keys, and its rules, applied one after the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.config import AdmitAtRandom, AdmitFrequent, TableConfig
from penstock.embedding.retention import (
    EVICTED_BEYOND_NEED,
    MAX_COUNT,
    MAX_TIME,
    MAX_USES,
    NUMBERS,
    Clock,
    Limits,
    admission_bits,
    admission_threshold,
    precedence,
    sweep_period,
)
from penstock.embedding.rules.initializer import initial_values
from penstock.embedding.rules.optimizer import initial_state, rule_of
from penstock.embedding.rules.rounding import DTYPES

FloatArray = NDArray[np.float64]


@dataclass
class DictRow:
    """Value and optimizer state, and marks of use."""

    value: FloatArray
    state: FloatArray
    last_use: int = 0
    uses: int = 0


@dataclass
class DictTable:
    """One table: rows, counted keys, default row, counters; and its rules, applied one by one."""

    config: TableConfig
    limits: Limits
    seed: int
    default: DictRow
    rows: dict[int, DictRow] = field(default_factory=dict)
    candidates: dict[int, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NUMBERS, 0))

    def initial(self, keys: list[int], seed: int) -> list[DictRow]:
        """What the rows of keys begin with, in a store of a seed."""
        config, dtype = self.config, DTYPES[self.config.dtype]
        first = initial_values(
            config.initializer, seed, config.name, np.array(keys, np.int64), config.dim
        )
        values = torch.from_numpy(first).to(dtype).double().numpy()
        state = initial_state(config.optimizer)
        dim = rule_of(config.optimizer).state_dim(config.dim)
        return [DictRow(value, np.full(dim, state), self.numbers["now"]) for value in values]

    def aged_uses(self, row: DictRow) -> int:
        """Uses of a row, halved as often as it is due."""
        half_life = self.config.eviction.half_life if self.config.eviction else None
        if half_life is None:
            return row.uses
        return row.uses >> max(0, self.numbers["now"] // half_life - row.last_use // half_life)

    def use(self, row: DictRow) -> None:
        """Marks a row as used now."""
        if self.config.eviction is not None:
            if self.config.eviction.order == "lfu":
                row.uses = min(self.aged_uses(row) + 1, MAX_USES)
            row.last_use = self.numbers["now"]

    def advance(self, clock: Clock) -> bool:
        """Whether rows left."""
        eviction, admission, numbers = self.config.eviction, self.config.admission, self.numbers
        in_seconds = eviction is not None and eviction.unit == "seconds"
        now = max(numbers["now"], min(clock.seconds if in_seconds else clock.step, MAX_TIME))
        numbers["now"] = now
        gone = []
        if eviction is not None and eviction.ttl is not None:
            period = sweep_period(eviction.ttl)
            if now // period != numbers["swept"] // period:
                numbers["swept"] = now
                gone = [k for k, row in self.rows.items() if now - row.last_use > eviction.ttl]
                self._evict(gone)
        if isinstance(admission, AdmitFrequent) and clock.step > numbers["step"]:
            half_life = admission.half_life_steps
            halvings = numbers["candidates_are_full"]
            if half_life is not None:
                passed = clock.step // half_life - numbers["step"] // half_life
                halvings = max(halvings, min(passed, 16))
            halved = {key: count >> halvings for key, count in self.candidates.items()}
            self.candidates = {key: count for key, count in halved.items() if count}
            numbers["candidates_are_full"] = 0
        numbers["step"] = max(numbers["step"], clock.step)
        return bool(gone)

    def admit(self, keys: list[int], step: int, *, explicit: bool) -> list[int]:
        """The absent keys that get rows; counts the others, and makes room. Not order-bound."""
        absent = Counter(key for key in keys if key not in self.rows)
        admission = self.config.admission
        wanted, uncounted = [], []
        for key, count in absent.items():
            if explicit or admission is None:
                wanted.append(key)
            elif isinstance(admission, AdmitAtRandom):
                draw = admission_bits(self.seed, np.array([key]), step)[0]
                if int(draw) < admission_threshold(admission):
                    wanted.append(key)
            else:
                total = min(self.candidates.get(key, 0) + count, MAX_COUNT)
                if key in self.candidates:
                    self.candidates[key] = total
                if total >= admission.min_count:
                    wanted.append(key)
                elif key not in self.candidates:
                    uncounted.append(key)
        room = self._make_room(len(wanted), set(keys))
        wanted = sorted(wanted, key=_precedence)[:room]
        for key in wanted:
            self.candidates.pop(key, None)
        # Before those admitted now gave up their places.
        self._count(uncounted, absent)
        if not explicit:
            self.numbers["admitted"] += len(wanted)
            given = set(wanted)
            self.numbers["refused"] += sum(n for key, n in absent.items() if key not in given)
        return wanted

    def _count(self, keys: list[int], counts: Counter[int]) -> None:
        room = self.limits.max_candidates - len(self.candidates)
        if len(keys) > room:
            self.numbers["candidates_are_full"] = 1
        for key in sorted(keys, key=_precedence)[:room]:
            self.candidates[key] = min(counts[key], MAX_COUNT)

    def _make_room(self, wanted: int, protected: set[int]) -> int:
        missing = wanted - (self.limits.max_rows - len(self.rows))
        if missing > 0 and self.config.eviction is not None:
            leaving = sorted(
                (self._rank(key, row), key)
                for key, row in self.rows.items()
                if key not in protected
            )
            count = missing + self.limits.max_rows // EVICTED_BEYOND_NEED
            self._evict([key for _, key in leaving[:count]])
        return self.limits.max_rows - len(self.rows)

    def _rank(self, key: int, row: DictRow) -> tuple[int, int, int]:
        assert self.config.eviction is not None
        uses = self.aged_uses(row) if self.config.eviction.has_uses else 0
        return uses, row.last_use, _precedence(key)

    def _evict(self, keys: list[int]) -> None:
        for key in keys:
            age = self.numbers["now"] - self.rows.pop(key).last_use
            self.numbers["evicted_age"] += max(0, age)
        self.numbers["evicted"] += len(keys)


def _precedence(key: int) -> int:
    return int(precedence(np.array([key], np.int64))[0])
