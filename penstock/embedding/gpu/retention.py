"""Which keys have rows in a GPU store: admission, eviction, budgets, by vectors on the device.

Decisions are those of the other stores (embedding/retention.py, csrc/retention/),
key by key. They are made for a whole call at once, and wait for the device, as only stores with
rules do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from penstock.config import AdmitAtRandom, AdmitFrequent, TableConfig
from penstock.embedding.gpu.counts import KeyCounts, by_table
from penstock.embedding.retention import (
    EVICTED_BEYOND_NEED,
    MAX_COUNT,
    MAX_TIME,
    NUMBERS,
    UNLIMITED,
    Clock,
    Limits,
    Schedule,
    admission_seed,
    admission_threshold,
    over_budget,
    retains,
)
from penstock.errors import CapacityError
from penstock.kernels.index.find import Misses
from penstock.kernels.index.index import Index, KeyBatch
from penstock.kernels.index.reference import mix64
from penstock.kernels.update.occurrences import UsageRules

_LOWEST = -(2**63)
_WORD = 0xFFFFFFFF
NOW, STEP, SWEPT, FULL, ADMITTED, REFUSED, EVICTED, EVICTED_AGE, DROPPED, AHEAD = range(
    len(NUMBERS)
)


class Access(NamedTuple):
    """What rules need of the store."""

    entries: Index
    usage: Tensor
    """[slots, 0, 1 or 2] int32."""
    rows_of_table: Tensor
    """[T] int64."""
    absent: Tensor
    """[T] int32: slot of the table's default row; -1: it refuses no key."""
    erase: Callable[[Tensor, Tensor], int]
    """Removes keys [n] of tables [n] int64."""


class _Newcomers(NamedTuple):
    """The different keys of a call that have no row; in the order of table and key."""

    keys: Tensor
    """[U] int64."""
    tables: Tensor
    """[U] int64."""
    counts: Tensor
    """[U] int64 occurrences in the call."""
    which: Tensor
    """[M] int64: of each miss, its newcomer."""


class Rules:
    """The rules of the tables of one store, and what they remember."""

    def __init__(
        self, tables: Sequence[TableConfig], limits: Sequence[Limits], seed: int, now: Tensor
    ) -> None:
        """Nothing is counted yet.

        Args:
          tables: of the store, in order.
          limits: of each.
          seed: of the draws.
          now: [T] int64 on the store's device; kept at the time.
        """
        device = now.device
        self._tables = tuple(tables)
        self._schedule = Schedule.of(tables, limits)
        self._limits = tuple(limits)
        self._now = now
        self.counts = KeyCounts(len(tables), device)
        self._numbers = np.zeros((len(tables), len(NUMBERS)), dtype=np.int64)
        self._step = 0
        thresholds, least, halves, seeds = [], [], [], []
        for table in tables:
            admission, eviction = table.admission, table.eviction
            at_random = isinstance(admission, AdmitAtRandom)
            thresholds.append(admission_threshold(admission) if at_random else UNLIMITED)  # type: ignore[arg-type]
            least.append(admission.min_count if isinstance(admission, AdmitFrequent) else 0)
            is_scored = eviction is not None and eviction.order == "score"
            halves.append(-1 if is_scored else (eviction and eviction.half_life) or 0)
            seeds.append(admission_seed(seed, table.name))
        self._admit_below = _words(thresholds, device) ^ _LOWEST
        self._draws = torch.tensor([one != UNLIMITED for one in thresholds], device=device)
        self._seeds = _words(seeds, device)
        self._min_counts = torch.tensor(least, device=device)
        self._by_uses = torch.tensor(
            [table.eviction is not None and table.eviction.has_uses for table in tables],
            device=device,
        )
        self._ttls = torch.tensor(
            [(table.eviction and table.eviction.ttl) or 0 for table in tables], device=device
        )
        self._retains = torch.tensor([retains(table) for table in tables], device=device)
        self._half_lives = torch.tensor(halves, device=device)
        self.usage_rules = UsageRules(now, self._half_lives)
        """By what an update marks rows as used."""

    # --- what is remembered ---------------------------------------------------------------------

    def num_candidates(self, table: int) -> int:
        """Keys of a table that are counted but have no row."""
        return int(self.counts.of_table[table])

    def evicted(self, table: int) -> int:
        """Rows of a table that have left since the beginning."""
        return int(self._numbers[table, EVICTED])

    def numbers_of(self, table: int) -> dict[str, int]:
        """By the names of `NUMBERS`."""
        return dict(zip(NUMBERS, self._numbers[table].tolist(), strict=True))

    def set_numbers(self, table: int, numbers: dict[str, int]) -> None:
        """Inverse of `numbers_of`; also sets the time."""
        self._numbers[table] = [numbers[name] for name in NUMBERS]
        self._step = max(self._step, int(self._numbers[table, STEP]))
        self._now[table] = int(self._numbers[table, NOW])

    def all_numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """[T] int64 counted keys, [T, numbers] int64 as in `NUMBERS`; copies."""
        return self.counts.of_table.copy(), self._numbers.copy()

    def note_ahead(self, table: int, rows: int) -> None:
        """Counts rows that were imported with a last use after now."""
        self._numbers[table, AHEAD] += rows

    def import_counts(self, batch: KeyBatch, counts: Tensor, misses: Misses, table: int) -> None:
        """Sets the counts of keys of a table; those that have a row are passed over."""
        if not self._schedule.min_counts[table]:
            return
        places = misses.places[: int(misses.number)].sort().values
        keys, counts = batch.keys[places], counts[places]
        limit, tables = self._limits[table].max_candidates, torch.full_like(keys, table)
        is_new = self.counts.of(keys, tables) < 0
        self.counts.set(keys[~is_new], tables[~is_new], counts[~is_new])
        new = is_new.nonzero()[:, 0]
        room = max(0, limit - self.num_candidates(table))
        self.counts.add(keys[new[:room]], tables[new[:room]], counts[new[:room]])
        if len(new) > room:
            raise CapacityError(over_budget(self._tables[table], self._limits[table]))

    # --- admission ------------------------------------------------------------------------------

    def admit(
        self, access: Access, batch: KeyBatch, slots: Tensor, misses: Misses, *, explicit: bool
    ) -> Misses:
        """Which of the missing keys get rows; counts the others, and makes room.

        Args:
          access: to the store.
          batch: keys and tables.
          slots: [N] int32 of the batch; refused keys get their table's default row, or -1 if the
            call is explicit.
          misses: keys without a row.
          explicit: every key is admitted for which there is room.
        """
        places = misses.places[: int(misses.number)]
        one = _newcomers(batch, places)
        counted = self.counts.of(one.keys, one.tables)
        is_counted = counted >= 0
        least = self._min_counts[one.tables]
        total = (one.counts + counted.clamp(min=0)).clamp(max=MAX_COUNT)
        wanted = torch.ones_like(is_counted)
        if not explicit:
            wanted = (total >= least) & self._draw(one)
        uncounted = ~wanted & ~is_counted & (least > 0)
        gets_row = self._within_budget(access, batch, slots, one, wanted)
        # Counts: those that get rows give up their places first.
        left = is_counted & gets_row
        if bool(left.any()):
            self.counts.forget(one.keys[left], one.tables[left])
        if not explicit:
            still = is_counted & ~gets_row
            if bool(still.any()):
                self.counts.set(one.keys[still], one.tables[still], total[still])
            self._count(one, uncounted, total)
            self._tally(one, gets_row)
        refused = places[~gets_row[one.which]]
        instead = access.absent[batch.tables_of(refused)]
        slots[refused] = torch.full_like(instead, -1) if explicit else instead
        admitted = places[gets_row[one.which]]
        return Misses(admitted, torch.tensor([len(admitted)], device=places.device))

    def stay_away(
        self, batch: KeyBatch, slots: Tensor, before: Tensor, misses: Misses, absent: Tensor
    ) -> Misses:
        """Which rows that left since the look-up begin anew: those of tables without rules.

        Args:
          batch: keys and tables.
          slots: [N] int32 as found now; keys that read a default row get it again.
          before: [N] int32 as the look-up found them.
          misses: keys that have no row now; gradients of other keys are dropped, and counted.
          absent: [T] int32 slots of default rows.
        """
        everywhere = torch.arange(len(slots), device=slots.device)
        table = batch.tables_of(everywhere)
        default = absent[table.clamp(min=0)]
        on_default = (table >= 0) & (default >= 0) & (before == default)
        slots[on_default] = default[on_default]
        places = misses.places[: int(misses.number)]
        places = places[slots[places] < 0]
        tables = batch.tables_of(places)
        stays_away = self._retains[tables]
        self._numbers[:, DROPPED] += self._by_table(tables[stays_away])
        left = places[~stays_away]
        return Misses(left, torch.tensor([len(left)], device=slots.device))

    def _draw(self, one: _Newcomers) -> Tensor:
        """[U] bool: whether chance admits the keys at this step."""
        step = torch.tensor(self._step, device=one.keys.device)
        bits = mix64(one.keys ^ mix64(step ^ self._seeds)[one.tables]) ^ _LOWEST
        return ~self._draws[one.tables] | (bits < self._admit_below[one.tables])

    def _within_budget(
        self, access: Access, batch: KeyBatch, slots: Tensor, one: _Newcomers, wanted: Tensor
    ) -> Tensor:
        """[U] bool: wanted newcomers for which there is room; rows are evicted for them."""
        wanting = self._by_table(one.tables[wanted])
        room = self._schedule.max_rows - access.rows_of_table.cpu().numpy()
        missing = wanting - room
        is_due = (missing > 0) & self._schedule.evicts
        if is_due.any():
            beyond = self._schedule.max_rows // EVICTED_BEYOND_NEED
            room += self._evict_lowest(access, np.where(is_due, missing + beyond, 0), batch, slots)
        if not (wanting > room).any():
            return wanted
        return self._first(one, wanted, room)

    def _first(self, one: _Newcomers, those: Tensor, places: np.ndarray) -> Tensor:
        """[U] bool: as many of `those` [U] bool as their tables have `places` [T]."""
        which = those.nonzero()[:, 0]
        tables = one.tables[which]
        number = _number_within(tables, [_precedence(one.keys[which])])
        first = torch.zeros_like(those)
        first[which[number < torch.from_numpy(places).to(number.device)[tables]]] = True
        return first

    def _tally(self, one: _Newcomers, gets_row: Tensor) -> None:
        self._numbers[:, ADMITTED] += self._by_table(one.tables[gets_row])
        refused = torch.zeros(len(self._tables), dtype=torch.int64, device=one.keys.device)
        refused.index_add_(0, one.tables[~gets_row], one.counts[~gets_row])
        # Tables without rules refuse no key.
        self._numbers[:, REFUSED] += refused.cpu().numpy()

    def _count(self, one: _Newcomers, uncounted: Tensor, total: Tensor) -> None:
        """Begins to count keys, as far as there are places for them."""
        places = self._schedule.max_candidates - self.counts.of_table
        is_full = self._by_table(one.tables[uncounted]) > places
        if is_full.any():
            self._numbers[is_full, FULL] = 1
            uncounted = self._first(one, uncounted, places)
        self.counts.add(one.keys[uncounted], one.tables[uncounted], total[uncounted])

    # --- eviction and time ----------------------------------------------------------------------

    def _evict_lowest(
        self, access: Access, counts: np.ndarray, batch: KeyBatch, slots: Tensor
    ) -> np.ndarray:
        """Removes the rows that come first in the order of eviction; those of the batch stay.

        Args:
          access: to the store.
          counts: [T] int64 rows that leave, of each table.
          batch: keys and tables of the call.
          slots: [N] int32 of its keys.

        Returns:
          [T] int64 rows that left.
        """
        wanted = torch.from_numpy(counts).to(slots.device)
        keys, tables, theirs = _rows_of(access, wanted > 0)
        stays = torch.zeros(len(access.usage), dtype=torch.bool, device=keys.device)
        everywhere = torch.arange(len(slots), device=slots.device)
        stays[slots[(batch.tables_of(everywhere) >= 0) & (slots >= 0)].long()] = True
        may_leave = ~stays[theirs]
        keys, tables, theirs = keys[may_leave], tables[may_leave], theirs[may_leave]
        last_use, uses = self._usage_of(access, tables, theirs)
        number = _number_within(tables, [_precedence(keys), last_use, uses])
        leaves = number < wanted[tables]
        return self._evict(access, keys[leaves], tables[leaves], last_use[leaves])

    def _usage_of(self, access: Access, tables: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """[n] int64 last use, [n] int64 uses as aged by now; 0 where uses do not count."""
        marks = access.usage[slots].long() & _WORD
        last_use = marks[:, 0]
        if marks.shape[1] == 1:
            return last_use, torch.zeros_like(last_use)
        half_life = self._half_lives[tables]
        length = half_life.clamp(min=1)
        halvings = (self._now[tables] // length - last_use // length) * (half_life > 0)
        aged = torch.where(halvings > 31, 0, marks[:, 1] >> halvings.clamp(0, 31))
        return last_use, torch.where(self._by_uses[tables], aged, 0)

    def _evict(self, access: Access, keys: Tensor, tables: Tensor, last_use: Tensor) -> np.ndarray:
        """[T] int64: how many left, of each table."""
        ages = torch.zeros(len(self._tables), dtype=torch.int64, device=keys.device)
        ages.index_add_(0, tables, (self._now[tables] - last_use).clamp(min=0))
        left = self._by_table(tables)
        self._numbers[:, EVICTED] += left
        self._numbers[:, EVICTED_AGE] += ages.cpu().numpy()
        if len(keys):
            access.erase(keys, tables)
        return left

    def advance(self, access: Access, clock: Clock) -> bool:
        """Moves the time on; rows beyond their `ttl` leave, counts are halved.

        Returns:
          Whether counts were.
        """
        plan, numbers = self._schedule, self._numbers
        now = np.minimum(np.where(plan.in_seconds, clock.seconds, clock.step), MAX_TIME)
        numbers[:, NOW] = now = np.maximum(numbers[:, NOW], now)
        self._now.copy_(torch.from_numpy(now))
        is_due = plan.expires & (now // plan.periods != numbers[:, SWEPT] // plan.periods)
        if is_due.any():
            numbers[is_due, SWEPT] = now[is_due]
            self._evict_expired(access, torch.from_numpy(is_due).to(self._now.device))
        step = numbers[:, STEP]
        halves = plan.min_counts & (clock.step > step)
        passed = clock.step // plan.count_half_lives - step // plan.count_half_lives
        times = np.maximum(numbers[:, FULL], np.minimum(np.where(plan.forgets, passed, 0), 16))
        times[~halves] = 0
        numbers[halves, FULL] = 0
        numbers[:, STEP] = np.maximum(step, clock.step)
        self._step = max(self._step, clock.step)
        if not times.any():
            return False
        self.counts.halve(times)
        return True

    def _evict_expired(self, access: Access, is_due: Tensor) -> None:
        keys, tables, slots = _rows_of(access, is_due)
        last_use = access.usage[slots, 0].long() & _WORD
        gone = self._now[tables] - last_use > self._ttls[tables]
        self._evict(access, keys[gone], tables[gone], last_use[gone])

    def _by_table(self, tables: Tensor) -> np.ndarray:
        return by_table(tables, len(self._tables))


def _rows_of(access: Access, tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, tables and slots, each [n] int64, of the tables marked in `tables` [T] bool."""
    places = access.entries.places_of(tables)
    keys, slots = access.entries.at(places)
    return keys, (access.entries.entries[places, 1] >> 40) - 1, slots


def _number_within(tables: Tensor, keys: Sequence[Tensor]) -> Tensor:
    """[n] int64: the number of each element in its table, in the order of the last of `keys`.

    Args:
      tables: [n] int64.
      keys: each [n] int64; each decides where those after it are equal.
    """
    order = torch.arange(len(tables), device=tables.device)
    for key in (*keys, tables):
        order = order[key[order].argsort(stable=True)]
    in_order = tables[order]
    first = torch.searchsorted(in_order, in_order)
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), device=order.device) - first
    return number


def _newcomers(batch: KeyBatch, places: Tensor) -> _Newcomers:
    pairs = torch.stack([batch.tables_of(places), batch.keys[places]], 1)
    unique, which, counts = torch.unique(pairs, dim=0, return_inverse=True, return_counts=True)
    return _Newcomers(unique[:, 1].contiguous(), unique[:, 0].contiguous(), counts, which)


def _precedence(keys: Tensor) -> Tensor:
    """[n] int64 in the order of `retention.precedence`, whose words are unsigned."""
    return mix64(keys) ^ _LOWEST


def _words(words: Sequence[int], device: torch.device) -> Tensor:
    """[n] int64 of the same bits as unsigned words."""
    return torch.from_numpy(np.array(words, dtype=np.uint64).view(np.int64)).to(device)
