"""A look-up over ranks in either way of `ways`: what is asked for, what came, what an update takes.

A look-up is first divided by owner, then its header goes out, and with what the others' headers say
it is done.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from penstock.embedding.sharded import bag_parts
from penstock.embedding.sharded.bag_parts import message_bytes
from penstock.embedding.sharded.bags import Bags
from penstock.embedding.sharded.defaults import PartStore
from penstock.embedding.sharded.exchange import Exchange
from penstock.embedding.sharded.routes import Arrived, Owners, Served, arrived, served_of, wanted_of
from penstock.embedding.sharded.ways import ROWS, SUMS, Size, can_send_sums, header_of, way_of
from penstock.embedding.store import (
    PooledFeature,
    PooledGradient,
    PooledLookup,
    PoolingPlan,
)
from penstock.types import KeyedJagged


class Parts(NamedTuple):
    """What look-ups over ranks go through."""

    local: PartStore
    """Holds this rank's rows."""
    bags: Bags
    ranks: Exchange
    owners: Owners
    names: tuple[str, ...]
    """Of the tables."""
    device: torch.device
    once: bool
    """A key of a batch travels once, where rows travel; sums of bags may."""
    share: float
    """Of each rank's gradient."""

    @property
    def dim(self) -> int:
        """Columns of a row."""
        return self.local.layout.dim

    @property
    def by_key(self) -> PoolingPlan:
        """All tables, row by row."""
        return PoolingPlan.by_key(len(self.names), self.dim)


class ShardedLookup(PooledLookup):
    """What an update needs of a look-up over ranks."""

    is_applied = False
    sums_plan: PoolingPlan | None = None
    """Of what `gradients` returns; None: by key."""
    vectors: Tensor | None = None
    """[N, D] what each key read, where it was asked for."""
    own: tuple[PooledLookup, ...]
    """Of the store that holds this rank's rows."""

    @property
    def num_missing(self) -> int:
        """Keys of all ranks read without a row, of those that this rank owns."""
        return sum(lookup.num_missing for lookup in self.own)

    def gradients(self, call: str, grad: Tensor) -> list[PooledGradient]:
        """Of this rank's rows, from all ranks' gradients; all of them must call it.

        Args:
          call: for messages.
          grad: [B, plan.stride] here.
        """
        raise NotImplementedError

    def gradients_by_key(self, call: str, grad: Tensor) -> list[PooledGradient]:
        """The same, by key."""
        raise NotImplementedError


class Asked(Protocol):
    """A batch that is divided by owner."""

    counts: Tensor
    """[ranks, n] int64 on the CPU: what the header says to each."""
    size: Size

    def look_up(self, came: Tensor, *, insert: bool, out: Tensor) -> ShardedLookup:
        """Reads the rows of all ranks; `came` is [ranks, n] of the others' counts."""


class LookUps:
    """Look-ups over ranks, each in the way that its header asks for."""

    def __init__(self, parts: Parts) -> None:
        """Of a store's parts."""
        self._parts = parts
        self._may_sum = parts.once and parts.ranks.size > 1
        self._way = ROWS
        """That the look-up before took: alike on all ranks."""

    def look_up(
        self,
        store: object,
        plan: PoolingPlan,
        batch: KeyedJagged,
        out: Tensor,
        *,
        insert: bool,
        reads: bool,
    ) -> ShardedLookup:
        """See `Store.pooled_lookup`; all ranks call it.

        Args:
          store: that says it made the look-up.
          plan: not by key.
          batch: checked, on the device.
          out: [B, plan.stride].
          insert: absent keys get rows.
          reads: whether the vectors of keys are asked for.
        """
        can_choose = self._may_sum and can_send_sums(plan)
        # Divided as the look-up before was, and again where the headers say otherwise.
        way = self._way if can_choose else ROWS
        of = store, plan, batch
        told, theirs = self._asked(of, way, insert=insert, reads=reads)
        if can_choose:
            self._way = way_of(theirs[:, -len(Size._fields) :], self._parts.dim, way)
            if self._way != way:
                told, theirs = self._asked(of, self._way, insert=insert, reads=reads)
        return told.look_up(theirs[:, : -len(Size._fields)], insert=insert, out=out)

    def _asked(
        self, of: tuple[object, PoolingPlan, KeyedJagged], way: int, *, insert: bool, reads: bool
    ) -> tuple[Asked, Tensor]:
        """A batch divided by owner, and what the headers of all ranks say."""
        kind = AskedSums if way == SUMS else AskedRows
        told: Asked = kind(self._parts, *of, reads=reads)
        header = header_of(told.counts, told.size)
        return told, self._parts.ranks.headers("look-up", 2 * way + insert, header)


class AskedRows:
    """The keys of a batch, each of which comes back as a row."""

    def __init__(
        self, parts: Parts, store: object, plan: PoolingPlan, batch: KeyedJagged, *, reads: bool
    ) -> None:
        """See `LookUps.look_up`."""
        self.parts, self._of, self._reads = parts, (store, plan, batch), reads
        wanted = wanted_of(plan, batch, parts.owners, once=parts.once)
        self._keys, self.counts, self._numbers, read = wanted
        self.sent = self.counts.sum(1).tolist()
        self.bags = parts.bags.numbered(plan, batch, self._numbers, self._keys.numel())
        num_bags = batch.batch_size * parts.owners.served(plan).elsewhere(parts.ranks.rank)
        self.size = Size(read, self._keys.numel(), num_bags, int(reads))

    def look_up(self, came: Tensor, *, insert: bool, out: Tensor) -> ShardedLookup:
        """See `Asked.look_up`."""
        parts = self.parts
        keys = parts.ranks.to_all("look-up", self._keys, self.sent, came.sum(1).tolist())
        block = arrived(parts.names, keys, came)
        rows = torch.empty(block.order.numel(), parts.dim, device=parts.device)
        own = parts.local.pooled_lookup(parts.by_key, block.block, insert=insert, out=rows)
        back = block.as_they_came(rows)
        mine = parts.ranks.to_all("look-up", back, block.per_rank, self.sent)
        self.bags.pool(mine, out)
        vectors = mine[self._numbers] if self._reads else None
        return RowsLookup(self._of, self, block, own, vectors)


class RowsLookup(ShardedLookup):
    """Of rows that travelled."""

    def __init__(
        self,
        of: tuple[object, PoolingPlan, KeyedJagged],
        asked: AskedRows,
        block: Arrived,
        own: PooledLookup,
        vectors: Tensor | None,
    ) -> None:
        super().__init__(*of)
        self._asked, self._block = asked, block
        self.own, self.vectors = (own,), vectors
        self.sent = asked.sent
        """Keys sent to each rank."""

    def gradients(self, call: str, grad: Tensor) -> list[PooledGradient]:
        """See `ShardedLookup.gradients`: a sum for each key sent."""
        parts, block = self._asked.parts, self._block
        sums = self._asked.bags.sums(grad)
        if parts.share != 1.0:
            sums *= parts.share
        came = parts.ranks.to_all(call, sums, self._asked.sent, block.per_rank)
        return [PooledGradient(self.own[0], block.block, block.as_block(came).contiguous())]

    gradients_by_key = gradients


class _SumsPlans(NamedTuple):
    """The features of a plan, in its order, each bag a sum."""

    own: PoolingPlan
    """Those that this rank serves, into the plan's columns."""
    sent: PoolingPlan
    """The same, into columns side by side."""
    columns: Tensor | None
    """[F * D] int64, which the plan's columns are; None: all, side by side."""
    served: Served
    of_rank: tuple[Tensor | None, ...]
    """Features that each rank serves; None: all."""
    absent: Tensor | None
    """Those that this rank does not; None: it serves all."""


@lru_cache(maxsize=64)
def _sums_plans(
    plan: PoolingPlan,
    dim: int,
    device: torch.device,
    wholes: tuple[int, ...],
    rank: int,
    num_ranks: int,
) -> _SumsPlans:
    served = served_of(plan, wholes, num_ranks)
    mine = [(n, plan.features[f]) for n, f in enumerate(served.features[rank])]
    own = [PooledFeature(n, each.table, "sum", each.column) for n, each in mine]
    sent = [PooledFeature(n, each.table, "sum", n * dim) for n, each in mine]
    plans = PoolingPlan(tuple(own), plan.stride), PoolingPlan(tuple(sent), dim * len(sent))
    of_rank = tuple(
        None if len(some) == len(plan.features) else torch.tensor(some, device=device)
        for some in served.features
    )
    others = sorted(set(range(len(plan.features))).difference(served.features[rank]))
    absent = torch.tensor(others, device=device) if others else None
    first = [each.column for each in plan.features]
    columns = torch.tensor(first)[:, None] + torch.arange(dim)
    if torch.equal(columns.flatten(), torch.arange(plan.stride)):
        return _SumsPlans(*plans, None, served, of_rank, absent)
    return _SumsPlans(*plans, columns.flatten().to(device), served, of_rank, absent)


class AskedSums:
    """The bags of a batch, which come back as a sum from each rank that has rows of their table."""

    def __init__(
        self, parts: Parts, store: object, plan: PoolingPlan, batch: KeyedJagged, *, reads: bool
    ) -> None:
        """See `LookUps.look_up`."""
        self.parts, self._of = parts, (store, plan, batch)
        part, owners = (parts.ranks.rank, parts.ranks.size), parts.owners
        self.plans = _sums_plans(plan, parts.dim, parts.device, owners.wholes, *part)
        size = batch.batch_size
        if size:
            made = parts.bags.split(plan, batch, owners, part[0])
        else:
            made = bag_parts.no_bags(plan, owners, part[0])
        self.made = made
        told = torch.tensor([size, made.form]).expand(part[1], -1)
        self.counts = torch.cat([made.counts, told], 1)
        num_sums = size * self.plans.served.elsewhere(part[0])
        self.size = Size(int(made.counts.sum()), made.different, num_sums, int(reads))
        counts = self.plans.served.counts.tolist()
        counts[part[0]] = 0
        self.back = [size * count for count in counts]
        """Sums that come from each rank."""

    def look_up(self, came: Tensor, *, insert: bool, out: Tensor) -> ShardedLookup:
        """See `Asked.look_up`."""
        parts, made, plans = self.parts, self.made, self.plans
        rank, of_each = parts.ranks.rank, plans.served.counts
        sent = self._bytes(self.counts, of_each)
        wanted = self._bytes(came, of_each[rank].expand(len(came)))
        message = parts.ranks.to_all("look-up", made.message, sent, wanted)
        self.made = made._replace(message=message[:0])
        if plans.of_rank[rank] is not None:
            came = torch.cat([came[:, list(plans.served.features[rank])], came[:, -2:]], 1)
        others, samples = bag_parts.joined(plans.sent, message, came, rank)
        own = parts.local.pooled_lookup(plans.own, made.own, insert=insert, out=out)
        sums = torch.empty(others.batch_size, plans.sent.stride, device=parts.device)
        of_others = parts.local.pooled_lookup(plans.sent, others, insert=insert, out=sums)
        asked = [size * len(plans.sent.features) for size in samples]
        mine = parts.ranks.to_all("look-up", sums.view(-1, parts.dim), asked, self.back)
        if out.shape[0]:
            self._add(mine, out)
        return SumsLookup(self._of, self, asked, (own, of_others), (made.own, others))

    def _bytes(self, counts: Tensor, features: Tensor) -> list[int]:
        """Of the messages that headers announce, of so many features [ranks] each."""
        samples, forms = counts[:, -2], counts[:, -1]
        sizes = message_bytes(counts[:, :-2].sum(1), samples * features, forms)
        sizes[self.parts.ranks.rank] = 0
        return [int(size) for size in sizes.tolist()]

    def _add(self, sums: Tensor, out: Tensor) -> None:
        """Adds sums [n, D] of other ranks to those that `out` has, and divides means."""
        columns, scales = self.plans.columns, self.made.scales
        total = out if columns is None else out[:, columns]
        by_feature = total.view(len(out), -1, self.parts.dim)
        if self.plans.absent is not None:
            by_feature.index_fill_(1, self.plans.absent, 0.0)
        for features, part in zip(self.plans.of_rank, torch.split(sums, self.back), strict=True):
            each = part.view(len(out), -1, self.parts.dim)
            if not each.numel():  # of this rank
                continue
            if features is None:
                by_feature += each
            else:
                by_feature.index_add_(1, features, each)
        if scales is not None:
            by_feature.mul_(scales[:, :, None])
        if columns is not None:
            out[:, columns] = total

    def for_rank(self, rank: int, side_by_side: Tensor) -> Tensor:
        """[B, n, D] of [B, F * D]: of the features that a rank serves."""
        plan, features = self._of[1], self.plans.of_rank[rank]
        by_feature = side_by_side.view(-1, len(plan.features), self.parts.dim)
        return by_feature if features is None else by_feature[:, features]

    def for_others(self, side_by_side: Tensor) -> Tensor:
        """[n, D]: what all other ranks get of [B, F * D]."""
        ranks, dim = self.parts.ranks, self.parts.dim
        others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        given = [self.for_rank(rank, side_by_side).reshape(-1, dim) for rank in others]
        return given[0] if len(given) == 1 else torch.cat(given)

    def of_sums(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the sums, this rank's share: [B, plan.stride], and [B, F * D]."""
        scales, share, columns = self.made.scales, self.parts.share, self.plans.columns
        grad = grad.to(self.parts.device)
        side_by_side = grad if columns is None else grad[:, columns]
        if scales is not None:
            factors = (scales * share)[:, :, None]
            side_by_side = (side_by_side.view(*scales.shape, -1) * factors).view_as(side_by_side)
        elif share != 1.0:
            side_by_side = side_by_side * share
        if columns is None:
            return side_by_side, side_by_side
        whole = torch.zeros_like(grad)
        whole[:, columns] = side_by_side
        return whole, side_by_side


class SumsLookup(ShardedLookup):
    """Of sums that travelled."""

    def __init__(
        self,
        of: tuple[object, PoolingPlan, KeyedJagged],
        asked: AskedSums,
        asked_of: list[int],
        own: tuple[PooledLookup, PooledLookup],
        batches: tuple[KeyedJagged, KeyedJagged],
    ) -> None:
        super().__init__(*of)
        self._asked, self._asked_of, self._batches = asked, asked_of, batches
        self.own, self.sums_plan = own, asked.plans.sent

    def gradients(self, call: str, grad: Tensor) -> list[PooledGradient]:
        """See `ShardedLookup.gradients`: of this rank's bags, and of the others'."""
        own, side_by_side = self._asked.of_sums(grad)
        grads = own, self._of_others(call, side_by_side)
        return [PooledGradient(*each) for each in zip(self.own, self._batches, grads, strict=True)]

    def gradients_by_key(self, call: str, grad: Tensor) -> list[PooledGradient]:
        """See `ShardedLookup.gradients_by_key`: where look-ups of both ways wait for one update."""
        asked = self._asked
        _, side_by_side = asked.of_sums(grad)
        own = asked.for_rank(asked.parts.ranks.rank, side_by_side)
        both = own, self._of_others(call, side_by_side)
        pairs = zip(self._batches, both, strict=True)
        return [self._by_key(batch, grads) for batch, grads in pairs if batch.batch_size]

    def _of_others(self, call: str, grad: Tensor) -> Tensor:
        parts, plan = self._asked.parts, self._asked.plans.sent
        rows = self._asked.for_others(grad)
        came = parts.ranks.to_all(call, rows, self._asked.back, self._asked_of)
        return came.view(self._batches[1].batch_size, plan.stride)

    def _by_key(self, batch: KeyedJagged, grad: Tensor) -> PooledGradient:
        """Of a batch of sums, and their gradients side by side: looked up again, key by key."""
        parts, features = self._asked.parts, self._asked.plans.sent.features
        size, device = batch.batch_size, parts.device
        bag = torch.repeat_interleave(batch.offsets.diff(), output_size=batch.values.numel())
        tables = torch.tensor([feature.table for feature in features], device=device)
        table = tables[bag // size]
        order = torch.argsort(table, stable=True)
        keys, bag = batch.values[order], bag[order]
        offsets = torch.zeros(len(parts.names) + 1, dtype=torch.int64, device=device)
        torch.cumsum(torch.bincount(table, minlength=len(parts.names)), 0, out=offsets[1:])
        of_keys = grad.reshape(size, len(features), parts.dim)[bag % size, bag // size]
        if batch.weights is not None:
            of_keys *= batch.weights[order, None]
        block = KeyedJagged(parts.names, keys, offsets, is_checked=True)
        rows = torch.empty_like(of_keys)
        lookup = parts.local.pooled_lookup(parts.by_key, block, insert=True, out=rows)
        return PooledGradient(lookup, block, of_keys)
