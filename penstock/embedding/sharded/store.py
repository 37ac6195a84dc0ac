"""A store whose rows are spread over the ranks of a process group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, distributed

from penstock.config import TableConfig
from penstock.embedding import checks
from penstock.embedding.retention import Clock, RetentionState, retains
from penstock.embedding.sharded.agreement import check_made_alike
from penstock.embedding.sharded.bags import Bags
from penstock.embedding.sharded.defaults import Defaults, PartStore, without_refused
from penstock.embedding.sharded.exchange import Collective, Exchange
from penstock.embedding.sharded.lookups import LookUps, Parts, ShardedLookup
from penstock.embedding.sharded.routes import Arrived, Owners, arrived, wanted_of
from penstock.embedding.sharded.shard_map import ShardMap
from penstock.embedding.store import (
    Candidates,
    Cursor,
    FindResult,
    PooledGradient,
    PooledLookup,
    PoolingPlan,
    Store,
    StoreMemory,
    TableCounters,
    TableRows,
)
from penstock.errors import ConfigError, GroupError
from penstock.types import KeyedJagged

Reduction = Literal["mean", "sum"]
NO_TABLES: Mapping[str, int] = MappingProxyType({})


class Ranks(NamedTuple):
    """Over whom tables are spread."""

    group: distributed.ProcessGroup
    reduction: Reduction = "mean"
    """Of gradients; see `ShardedStore`."""

    @property
    def part(self) -> tuple[int, int]:
        """This rank's number, and how many there are."""
        return self.group.rank(), self.group.size()

    def agree(self, number: int) -> int:
        """The first rank's number, on all of them."""
        return self.total(number if self.group.rank() == 0 else 0)

    def total(self, number: int) -> int:
        """The sum over ranks; waits until every rank is there."""
        return int(self._exchange().combined("agreement", torch.tensor(number)))

    def check_alike(self, made: Mapping[str, str]) -> None:
        """See `check_made_alike`."""
        check_made_alike(self._exchange(), made)

    def _exchange(self) -> Collective:
        return Collective(self.group, torch.device("cpu"))


class AlikeRanks(Ranks):
    """Ranks that were found to have made the same collection."""


class ShardedStore:
    """Satisfies `Store`: every rank holds the rows that are its own, and reads those of all.

    All ranks call `pooled_lookup`, `apply_gradients`, `gradient_norm`, `find` and `erase` in the
    same order, each with a batch of its own, perhaps an empty one. Whatever else is asked is of
    this rank's rows: `num_rows`, `export_batch`, `memory`, `counters`. Of rows and counts that are
    given, a rank takes its own and leaves the others be: give them to all ranks.

    Of each row that any rank's batch touched an update makes one step, on the sum of its gradients
    over the ranks (`mean`: divided by their number, as DistributedDataParallel does with those of
    parameters, so that a loss that is the mean of a rank's samples gives the step of all samples'
    mean).

    Whether a key gets a row is for its owner to say, who sees its occurrences on all ranks; each
    rank has a copy of every default row, and all copies take one step an update (`defaults`).
    """

    def __init__(
        self,
        local: PartStore,
        bags: Bags,
        ranks: Exchange,
        *,
        device: torch.device,
        deterministic: bool,
        reduction: Reduction,
        shard_map: ShardMap | None = None,
        wholes: Mapping[str, int] = NO_TABLES,
    ) -> None:
        """Over a store that holds this rank's rows, and is empty.

        Args:
          local: nobody else's; of the same tables in the same order on every rank.
          bags: of its device.
          ranks: of the group.
          device: of `local`.
          deterministic: `local` is: then bits do not depend on the number of ranks either (with
            the reduction `sum`, up to 2^22 keys an update). Every occurrence of a key travels.
          reduction: `mean` or `sum`.
          shard_map: of the ranks; None: as many buckets for each.
          wholes: ranks of the tables that are not spread, by name.
        """
        self.local, self.layout = local, local.layout
        self.ranks, self.device = ranks, device
        names = [table.name for table in local.tables]
        self.shard_map = shard_map or ShardMap.even(ranks.size)
        self.owners = Owners.by(self.shard_map, names, wholes, device)
        self._names = tuple(names)
        # What counts how often a key occurs must see every occurrence.
        once = not deterministic and not any(map(retains, local.tables))
        self._defaults = Defaults(ranks, local.tables, deterministic=deterministic)
        share = 1.0 / ranks.size if reduction == "mean" else 1.0
        self._parts = Parts(local, bags, ranks, self.owners, self._names, device, once, share)
        self._lookups = LookUps(self._parts)

    @property
    def tables(self) -> Sequence[TableConfig]:
        """See `Store.tables`."""
        return self.local.tables

    def pooled_lookup(
        self,
        plan: PoolingPlan,
        batch: KeyedJagged,
        *,
        insert: bool,
        out: Tensor,
        reads_vectors: bool = False,
    ) -> ShardedLookup:
        """See `Store.pooled_lookup`; `num_missing` counts those of all ranks that this one owns."""
        fit = {"dim": self.layout.dim, "num_tables": len(self.tables)}
        checks.check_lookup(plan, batch, out, device=self.device, **fit)
        checks.check_batch(plan, batch)
        options = {"insert": insert, "reads": reads_vectors}
        return self._lookups.look_up(self, plan, batch.to(self.device), out, **options)

    def read_looked_up(self, lookup: PooledLookup) -> Tensor:
        """See `Store.read_looked_up`."""
        assert isinstance(lookup, ShardedLookup)
        assert lookup.vectors is not None
        vectors, lookup.vectors = lookup.vectors, None
        return vectors

    def check_gradients(self, plan: PoolingPlan, gradients: Sequence[PooledGradient]) -> None:
        """See `Store.check_gradients`."""
        checks.check_gradients(self, self.device, plan, gradients)

    def apply_gradients(
        self,
        plan: PoolingPlan,
        gradients: Sequence[PooledGradient],
        step: int,
        rate_factor: float = 1.0,
        *,
        skip: Tensor | None = None,
    ) -> int | Tensor:
        """See `Store.apply_gradients`; the rows are this rank's, default rows aside.

        `skip` is alike on all ranks.
        """
        if skip is not None and not skip.is_cuda and bool(skip):
            self.check_gradients(plan, gradients)
            return 0
        rates = [table.optimizer.learning_rate * rate_factor for table in self.tables]
        own_plan, parts = self._own_gradients("update", plan, gradients, step, rates)
        defaults = self._defaults.of("update", parts)
        rows = self.local.apply_gradients(own_plan, parts, step, rate_factor, defaults, skip=skip)
        for gradient in gradients:
            gradient.lookup.is_applied = True  # type: ignore[misc]
        return rows

    def gradient_norm(
        self, plan: PoolingPlan, gradients: Sequence[PooledGradient], norm_type: float
    ) -> Tensor:
        """See `Store.gradient_norm`; of the rows of all ranks, the same number on each."""
        rates = [0.0] * len(self.tables)
        own_plan, parts = self._own_gradients("norm", plan, gradients, 0, rates)
        of_defaults = torch.zeros((), dtype=torch.float64)
        defaults = self._defaults.of("norm", parts)
        if defaults is not None:
            of_defaults = torch.linalg.vector_norm(defaults.sums.double().cpu(), norm_type)
            parts = [without_refused(part) for part in parts]
        own = torch.as_tensor(
            self.local.gradient_norm(own_plan, parts, norm_type), dtype=torch.float64
        )
        if math.isinf(norm_type):
            largest = self.ranks.combined("norm", own, largest=True)
            return torch.maximum(largest, of_defaults.to(own.device))
        total = self.ranks.combined("norm", own**norm_type) + of_defaults**norm_type
        return total ** (1 / norm_type)

    def _own_gradients(
        self,
        call: str,
        plan: PoolingPlan,
        gradients: Sequence[PooledGradient],
        step: int,
        rates: Sequence[float],
    ) -> tuple[PoolingPlan, list[PooledGradient]]:
        """The gradients of all ranks for this rank's rows; rates by table are alike on all."""
        self.check_gradients(plan, gradients)
        bits = torch.tensor(rates, dtype=torch.float64).view(torch.int64)
        mine = bits.expand(self.ranks.size, -1)
        theirs = self.ranks.headers(call, len(gradients) << 40 | step, mine)
        _check_rates(self.ranks.rank, self._names, mine, theirs)
        lookups = [gradient.lookup for gradient in gradients]
        plans = [lookup.sums_plan for lookup in lookups if isinstance(lookup, ShardedLookup)]
        own_plan = plans[0] if plans and None not in plans else None
        parts = []
        for gradient in gradients:
            lookup = gradient.lookup
            assert isinstance(lookup, ShardedLookup)
            take = lookup.gradients_by_key if own_plan is None else lookup.gradients
            parts += take(call, gradient.grad)
        return own_plan or self._parts.by_key, parts

    def find(self, table: int, keys: Tensor) -> FindResult:
        """See `Store.find`; each rank may ask for keys of its own."""
        lookup, block = self._ask("find", table, keys)
        found = self.local.find(table, block.block.values)
        parts = []
        for part in found:
            back = block.as_they_came(part.to(self.device))
            wire = back.to(torch.uint8) if back.dtype == torch.bool else back
            mine = self.ranks.to_all("find", wire, block.per_rank, lookup[1])
            parts.append(mine[lookup[0]].to(back.dtype))
        return FindResult(*parts)

    def find_or_insert(self, table: int, keys: Tensor) -> FindResult:
        """Not there over ranks: look batches up."""
        raise ConfigError("find_or_insert of a table over ranks: look up a batch with insert=True")

    def erase(self, table: int, keys: Tensor) -> int:
        """See `Store.erase`; returns how many there were of the keys that all ranks gave."""
        _, block = self._ask("erase", table, keys)
        number = self.local.erase(table, block.block.values)
        return int(self.ranks.combined("erase", torch.tensor(number)))

    def _ask(self, call: str, table: int, keys: Tensor) -> tuple[tuple[Tensor, list[int]], Arrived]:
        """Sends keys of one table to their owners: which each is of those sent, and what came."""
        checks.check_table(table, self.tables)
        offsets = torch.tensor([0, keys.numel()], device=keys.device)
        batch = KeyedJagged((self._names[table],), keys, offsets)
        plan = PoolingPlan.of_table(table, self.layout.dim)
        checks.check_keys(batch, self.device)
        wanted, counts, numbers, _ = wanted_of(plan, batch.to(self.device), self.owners, once=False)
        sent = counts.sum(1).tolist()
        came = self.ranks.headers(call, table, counts)
        asked = self.ranks.to_all(call, wanted, sent, came.sum(1).tolist())
        return (numbers, sent), arrived(self._names, asked, came)

    def insert_or_assign(self, table: int, rows: TableRows) -> int:
        """See `Store.insert_or_assign`: rows that are this rank's; it returns how many were new."""
        own = self.owners.places_of(self.ranks.rank, table, rows.keys.to(self.device))
        return self.local.insert_or_assign(
            table,
            TableRows(*(None if part is None else part[own.to(part.device)] for part in rows)),  # type: ignore[arg-type]
        )

    def export_batch(self, table: int, cursor: Cursor, max_rows: int) -> tuple[TableRows, Cursor]:
        """See `Store.export_batch`; this rank's rows."""
        return self.local.export_batch(table, cursor, max_rows)

    def num_rows(self, table: int) -> int:
        """See `Store.num_rows`; this rank's."""
        return self.local.num_rows(table)

    def advance(self, clock: Clock) -> None:
        """See `Store.advance`."""
        self.local.advance(clock)

    def set_learning_rate(self, table: int, learning_rate: float) -> None:
        """See `Store.set_learning_rate`; on all ranks alike."""
        self.local.set_learning_rate(table, learning_rate)

    def num_candidates(self, table: int) -> int:
        """See `Store.num_candidates`; this rank's."""
        return self.local.num_candidates(table)

    def export_candidates(
        self, table: int, cursor: Cursor, max_keys: int
    ) -> tuple[Candidates, Cursor]:
        """See `Store.export_candidates`; this rank's."""
        return self.local.export_candidates(table, cursor, max_keys)

    def import_candidates(self, table: int, candidates: Candidates) -> None:
        """See `Store.import_candidates`; those that are this rank's."""
        own = self.owners.places_of(self.ranks.rank, table, candidates.keys.to(self.device))
        parts = (part[own.to(part.device)] for part in candidates)
        self.local.import_candidates(table, Candidates(*parts))

    def counters(self) -> TableCounters:
        """See `Store.counters`; this rank's."""
        return self.local.counters()

    def retention_state(self, table: int) -> RetentionState:
        """See `Store.retention_state`; this rank's."""
        return self.local.retention_state(table)

    def set_retention_state(self, table: int, state: RetentionState) -> None:
        """See `Store.set_retention_state`; this rank's."""
        self.local.set_retention_state(table, state)

    def memory(self) -> StoreMemory:
        """See `Store.memory`; this rank's."""
        return self.local.memory()

    def check_invariants(self) -> None:
        """See `Store.check_invariants`; this rank's."""
        self.local.check_invariants()


def _check_rates(rank: int, names: Sequence[str], mine: Tensor, theirs: Tensor) -> None:
    unlike = (mine != theirs).nonzero().tolist()
    if unlike:
        other, table = unlike[0]
        one, two = (float(each[other, table].view(torch.float64)) for each in (mine, theirs))
        raise GroupError(
            f"table {names[table]!r} learns at the rate {one} on rank {rank} and {two} on rank "
            f"{other}: set rates, and step schedulers, on all ranks alike. None of its rows was "
            "updated"
        )


def on_any_rank(stores: Sequence[Store], is_so: bool) -> bool:
    """Whether something is so on any rank over which stores are spread; all of them ask.

    Raises:
      GroupError: a rank is at another call, or gone.
    """
    store = stores[0] if stores else None
    if not isinstance(store, ShardedStore):
        return is_so
    said = torch.full((store.ranks.size, len(store.tables)), int(is_so), dtype=torch.int64)
    return bool(store.ranks.headers("check", 0, said).any())
