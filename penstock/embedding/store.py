"""The contract of a store: rows by (table, key) on one device, for tables of one row layout.

A row is a value of `dim` floats and its optimizer state. `HostStore` (C++) and `DictStore` (plain
Python, the oracle of the tests) satisfy it; one test suite runs on both. Tables are numbered in the
order in which the store was given them.

A table may have rules of admission, eviction and budget (`retention.py`). Then a new key may be
refused, and rows leave. Keys without a row of a table that refuses read its default row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.config import Optimizer, Pooling, TableConfig, ValueType
from penstock.embedding.retention import Clock, RetentionState, usage_dim
from penstock.embedding.rules.optimizer import rule_of
from penstock.embedding.rules.rounding import DTYPES
from penstock.errors import ConfigError
from penstock.types import KeyedJagged

MOST_UPDATE_KEYS = 2**31 - 1
"""Of all look-ups of one update: kernels count places in 32 bits, and sums in fixed point give up a
bit for each twice as many.
"""


class RowLayout(NamedTuple):
    """What tables must have in common to share a store."""

    dim: int
    optimizer: type[Optimizer]
    state_dim: int
    usage_dim: int
    """Marks of use, 32-bit words; see `retention.usage_dim`."""
    value_type: ValueType

    @classmethod
    def of(cls, table: TableConfig) -> RowLayout:
        """Layout of a table's rows."""
        state_dim = rule_of(table.optimizer).state_dim(table.dim)
        return cls(table.dim, type(table.optimizer), state_dim, usage_dim(table), table.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return DTYPES[self.value_type]

    @property
    def row_bytes(self) -> int:
        """Bytes of value, state and marks of use of one row."""
        return self.dtype.itemsize * self.dim + 4 * (self.state_dim + self.usage_dim)


class TableRows(NamedTuple):
    """Rows of one table."""

    keys: Tensor
    """[n] int64."""
    values: Tensor
    """[n, D] in the table's dtype; given, float32 will do: it is rounded to nearest even."""
    state: Tensor
    """[n, S] float32 optimizer state; S may be 0."""
    usage: Tensor | None = None
    """[n, 1 or 2] int64 in tables with eviction: time of the last use, in the eviction's unit; for
    lfu also the number of uses, as aged then. None, given: used now, never before.
    """


class Candidates(NamedTuple):
    """Keys that are counted but have no row yet."""

    keys: Tensor
    """[n] int64."""
    counts: Tensor
    """[n] int64, 1 to 65535."""


class FindResult(NamedTuple):
    """What `find` and `find_or_insert` return; copies, valid for ever."""

    values: Tensor
    """[n, D] float32; where the key was absent, its initial value or the default row's."""
    state: Tensor
    """[n, S] float32; where the key was absent, the initial state or the default row's."""
    found: Tensor
    """[n] bool: the key had a row before the call."""


class StoreMemory(NamedTuple):
    """Bytes and slots of a store."""

    rows: int
    free_slots: int
    slot_capacity: int
    """rows + free_slots == slot_capacity, always; default rows aside."""
    index_bytes: int
    row_bytes: int
    """Memory of the rows: that of `slot_capacity` of them."""


class TableCounters(NamedTuple):
    """What each table of a store holds and has done; copies."""

    rows: NDArray[np.int64]
    """[T]."""
    candidates: NDArray[np.int64]
    """[T] keys that are counted but have no row."""
    numbers: NDArray[np.int64]
    """[T, N] as `retention.NUMBERS`; zeros in a table without rules."""


@dataclass(frozen=True, slots=True)
class PooledFeature:
    """One feature that a store serves."""

    packed_feature: int
    """Number of the feature in the packed batch."""
    table: int
    """Number of the table in the store."""
    pooling: Pooling
    """No `max`: a collection makes it of sequences."""
    column: int
    """First column in the output."""
    max_keys: int | None = None
    """Positions of a sequence, of `dim` columns each; None for the other poolings."""


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """All features that a store serves, and the width of the output they write into."""

    features: tuple[PooledFeature, ...]
    stride: int
    is_by_key: bool = False
    """Every key is a row of the output, by its place in the batch: see `by_key`."""
    _hash: int = field(init=False, repr=False, compare=False)
    _reads: tuple[tuple[int, int, Pooling], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for feature in self.features:
            numbers = feature.packed_feature, feature.table, feature.column, self.stride
            is_sequence = feature.pooling == "sequence"
            has_positions = feature.max_keys is not None
            if min(numbers) < 0 or feature.pooling == "max" or is_sequence != has_positions:
                raise ConfigError(f"{feature} of a plan of {self.stride} columns: not possible")
        # A look-up notes where the row of each packed key is, once.
        served = Counter(feature.packed_feature for feature in self.features)
        twice = sorted(number for number, count in served.items() if count > 1)
        if twice:
            raise ConfigError(
                f"feature {twice[0]} of the packed batch is served twice by one store; pack its "
                "keys once for each that reads them"
            )

        # Plans are looked up twice a step, and have as many features as the model.
        object.__setattr__(self, "_hash", hash((self.features, self.stride, self.is_by_key)))
        reads = tuple((each.packed_feature, each.table, each.pooling) for each in self.features)
        object.__setattr__(self, "_reads", reads)

    @classmethod
    def by_key(cls, num_tables: int, dim: int) -> PoolingPlan:
        """Rows as they are: below pooling.

        Its batches have a feature for each table, in order, one sample, and no weights: a bag holds
        all keys that are wanted of a table. Output and gradient are [N, dim], a row a key.
        """
        features = tuple(PooledFeature(table, table, "sum", 0) for table in range(num_tables))
        return cls(features, dim, is_by_key=True)

    @classmethod
    def of_table(cls, table: int, dim: int) -> PoolingPlan:
        """One feature of one table."""
        return cls((PooledFeature(0, table, "sum", 0),), dim)

    def __hash__(self) -> int:
        return self._hash

    def reads_as(self, other: PoolingPlan) -> bool:
        """Whether it is of the same features, tables and poolings, wherever their columns are."""
        is_alike = self.is_by_key == other.is_by_key and self._reads == other._reads
        return self is other or is_alike


class PooledLookup:
    """What a store returns of a look-up, and takes with its gradient, once.

    It holds all that the update needs: the batch's arrays may be changed or used again as soon as
    the look-up has returned. (Keys on a GPU are not copied where no rule evicts rows: if somebody
    erases rows in between, changed keys are refused.)
    """

    def __init__(self, store: object, plan: PoolingPlan, batch: KeyedJagged) -> None:
        """Of a store, by a plan."""
        self.store = store
        self.plan = plan
        self.batch_size = batch.batch_size
        self.num_keys = batch.values.numel()
        self.is_weighted = batch.weights is not None
        self.num_outputs = self.num_keys if plan.is_by_key else self.batch_size
        """Rows of the output, and of its gradient."""

    @property
    def num_missing(self) -> int:
        """Keys read without a row (`insert` was False)."""
        raise NotImplementedError

    @property
    def is_applied(self) -> bool:
        """Whether an update has taken its gradient."""
        raise NotImplementedError

    def reads_default(self) -> Tensor:
        """[N] bool, of a look-up by key: which keys read their table's default row."""
        raise NotImplementedError


class PooledGradient(NamedTuple):
    """The gradient of one pooled look-up."""

    lookup: PooledLookup
    """What `pooled_lookup` returned."""
    batch: KeyedJagged | None
    """What was looked up, if that is to be compared with the look-up: its size alone is, and
    nothing of it is read again.
    """
    grad: Tensor
    """[B, stride of the look-up's plan] float32, contiguous; by key [N, dim]."""


class DefaultGradients(NamedTuple):
    """What the default rows of tables take in an update, over all stores that hold the tables."""

    sums: Tensor
    """[T, D] float32: of the gradients of all keys that were refused; on the store's device."""
    touched: Tensor
    """[T] bool: there was such a key. The other default rows take no step."""


class Store(Protocol):
    """Rows by (table, key).

    Calls may come from any thread; they run one at a time. That goes for `memory`, `counters` and
    other questions too, which wait for an update at work (`num_rows` need not). Nobody may change
    the arrays of a call while it runs; on the host that would give wrong numbers, but no crash.

    A process may fork: the fork waits for the call at hand, and the child's store has what the
    parent's had. (A GPU's memory does not survive a fork.)

    Errors, besides those that verbs name:
      ConfigError: arguments of a wrong type or shape; nothing is done.
      CapacityError: there is no memory for what a call needs on its way. Rows that it made stay;
        the store is whole and can be used on.
    """

    layout: RowLayout

    @property
    def tables(self) -> Sequence[TableConfig]:
        """In the order of their numbers."""

    def find(self, table: int, keys: Tensor) -> FindResult:
        """Reads rows; never inserts.

        Args:
          table: number of the table.
          keys: [n] int64, any value, duplicates allowed.
        """

    def find_or_insert(self, table: int, keys: Tensor) -> FindResult:
        """Reads rows; an absent key gets one, with initial value and state, if it is admitted.

        Raises:
          CapacityError: the store cannot hold another row; rows inserted so far stay.
        """

    def insert_or_assign(self, table: int, rows: TableRows) -> int:
        """Writes rows and returns how many keys were new; of equal keys the last one stays.

        Every key is admitted; in a full table other rows are evicted for it.

        Raises:
          CapacityError: as `find_or_insert`; or the table's budget holds fewer rows (those that
            fit are written).
        """

    def erase(self, table: int, keys: Tensor) -> int:
        """Removes rows and returns how many there were; absent keys are no error."""

    def export_batch(self, table: int, cursor: Cursor, max_rows: int) -> tuple[TableRows, Cursor]:
        """Copies up to `max_rows` rows, in no particular order, each once.

        Begin with `CURSOR_START`; the end is reached when no rows come back.

        Raises:
          StaleExportError: a row was added, removed or changed since the export began.
        """

    def num_rows(self, table: int) -> int:
        """Rows of a table."""

    def set_learning_rate(self, table: int, learning_rate: float) -> None:
        """Changes the rate of one table, from the next update on, of earlier look-ups too.

        Raises:
          ConfigError: it is no number above 0; nothing has changed then.
        """

    def advance(self, clock: Clock) -> None:
        """Moves the time on (never back). Rows beyond their `ttl` leave, counts are halved."""

    def num_candidates(self, table: int) -> int:
        """Keys of a table that are counted but have no row."""

    def export_candidates(
        self, table: int, cursor: Cursor, max_keys: int
    ) -> tuple[Candidates, Cursor]:
        """As `export_batch`, for counted keys; rows that change make it stale, too."""

    def import_candidates(self, table: int, candidates: Candidates) -> None:
        """Sets the counts of keys; those that have a row are passed over."""

    def counters(self) -> TableCounters:
        """Rows, candidates and numbers of all tables at once."""

    def retention_state(self, table: int) -> RetentionState:
        """What else the table remembers: its default row and counters."""

    def set_retention_state(self, table: int, state: RetentionState) -> None:
        """Inverse of `retention_state`; also sets the time, without evicting."""

    def pooled_lookup(
        self,
        plan: PoolingPlan,
        batch: KeyedJagged,
        *,
        insert: bool,
        out: Tensor,
        reads_vectors: bool = False,
    ) -> PooledLookup:
        """Pools every bag of the plan's features into `out` [B, plan.stride] float32.

        A plan by key reads rows instead, [N, dim].

        Args:
          plan: features, tables, columns.
          batch: the packed keys, with or without weights.
          insert: absent keys get rows, where admitted; those refused are counted (`refused` in
            the table's `retention_state`). Without it absent keys are counted in `num_missing` of
            the result.
          out: columns of other stores' features are left alone.
          reads_vectors: whether `read_looked_up` will be called; a store over ranks must know.

        Returns:
          What `apply_gradients` needs to know of this look-up: copies, of the batch too.

        Raises:
          ConfigError: the offsets do not rise from 0 to the number of keys; the weights are not
            one finite float32 a key; a bag has more keys than its sequence has positions.
          CapacityError: as `find_or_insert`; `out` is then undefined.
        """

    def read_looked_up(self, lookup: PooledLookup) -> Tensor:
        """The vector that each key read, [N, D] float32 by place in the packed batch; copies.

        Keys of features that are not the plan's have undefined ones. To be called right after the
        look-up: rows are read as they are.
        """

    def check_gradients(self, plan: PoolingPlan, gradients: Sequence[PooledGradient]) -> None:
        """Refuses what `apply_gradients` would refuse as wrong; changes nothing.

        Raises:
          ConfigError: a look-up is another store's, or by a plan of other features (their columns
            may differ), was applied before or is given twice; its batch is of another size; a
            gradient is not contiguous float32 [B, stride], on the CPU or the store's device; they
            are of more than `MOST_UPDATE_KEYS` keys.
        """

    def apply_gradients(
        self,
        plan: PoolingPlan,
        gradients: Sequence[PooledGradient],
        step: int,
        rate_factor: float = 1.0,
        *,
        skip: Tensor | None = None,
    ) -> int | Tensor:
        """One optimizer step for each row touched, on the sum of its gradients; returns the rows.

        A store on a GPU returns their number as a tensor [] on its device, so as not to wait.

        Every table's learning rate is multiplied by `rate_factor`; 0 is allowed but for `ftrl`,
        whose rows would read NaN.

        It is computed in float32; values of another dtype are then rounded by
        `rounding.round_update`, so that `step` must rise from update to update.

        Sums run in the order of (look-up, feature, sample, key), so the bits of the result do not
        depend on the number of threads. A key's gradient is that of its vector times the factor
        that the look-up gave it: a key of weight 0 is touched like any other. Keys refused in the
        look-up update the default row. A row erased since the look-up begins anew; in a table with
        rules, its gradient is dropped and counted.

        A row whose new value, or the state that divides its step, is beyond float32 reads NaN from
        then on (docs/optimizers.md): the next look-up shows it.

        `skip`, [] float32 on the store's device, is read where the update runs: if it is 1 no row,
        state or mark of use changes, nor a default row, and 0 rows are returned. None: as 0.

        Raises:
          ConfigError: see `check_gradients`. Nothing is done.
          CapacityError: there is no memory, for new rows or on the way. No row has taken the step,
            and the gradients may be given again.
          PartialUpdateError: there was none when some rows had taken the step already.
        """

    def gradient_norm(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient], norm_type: float
    ) -> float | Tensor:
        """Norm of what `apply_gradients` would give to rows; changes none of them.

        That is the p-norm, `norm_type` above 0 or infinite, of all columns of the sums by row: as
        of the coalesced gradient of a sparse nn.EmbeddingBag. Keys refused in the look-up count as
        one row, the default row. Infinite or NaN where a gradient is not finite.

        Returns:
          A number; of a store on a GPU a tensor [] on its device. No number of threads changes its
          bits.

        Raises:
          ConfigError, CapacityError: as `apply_gradients`.
        """

    def memory(self) -> StoreMemory:
        """Bytes and slots."""

    def check_invariants(self) -> None:
        """Raises AssertionError if rows, slots and index disagree; reads everything: for tests."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where an export goes on."""

    place: int = 0
    """In the store's own order."""
    version: int | None = None
    """Of the store's content that it is of; None: the export begins."""


CURSOR_START = Cursor()


def own_copy(batch: KeyedJagged, device: torch.device) -> KeyedJagged:
    """The batch on a device, in memory of its own: the caller may change his as he likes."""
    return replace(
        batch,
        values=batch.values.to(device, copy=True),
        offsets=batch.offsets.to(device, copy=True),
        weights=None if batch.weights is None else batch.weights.to(device, copy=True),
    )
