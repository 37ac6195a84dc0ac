"""Default rows of tables over ranks: each rank has a copy, and all copies take the same step.

A key that its owner refuses reads the table's default row there. So that the copies stay one row,
the gradients of all refused keys are summed over the ranks, one small array an update, and every
copy takes one step on the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from penstock.config import TableConfig
from penstock.embedding.retention import refuses
from penstock.embedding.sharded.exchange import Exchange
from penstock.embedding.store import (
    DefaultGradients,
    PooledGradient,
    PoolingPlan,
    Store,
)
from penstock.kernels.update.occurrences import sum_bits


class PartStore(Store, Protocol):
    """A store that holds a part of each table: what one over ranks asks of that of each rank."""

    def apply_gradients(
        self,
        plan: PoolingPlan,
        gradients: Sequence[PooledGradient],
        step: int,
        rate_factor: float = 1.0,
        defaults: DefaultGradients | None = None,
        *,
        skip: Tensor | None = None,
    ) -> int | Tensor:
        """See `Store.apply_gradients`.

        With `defaults` the gradients of refused keys change nothing: default rows take these, each
        as it is, and are not counted among the rows. There must be a gradient, by key.
        """


class Refused(NamedTuple):
    """The gradients of keys that were refused."""

    tables: Tensor
    """[m] int64."""
    shares: Tensor
    """[m, D] float32."""
    num_keys: int
    """Of the update, refused or not."""

    @classmethod
    def of(cls, gradients: Sequence[PooledGradient]) -> Refused:
        """Of one or more gradients by key, each with its batch."""
        tables, shares = [], []
        for lookup, batch, grad in gradients:
            assert batch is not None
            places = lookup.reads_default().nonzero()[:, 0]
            tables.append(torch.searchsorted(batch.offsets[1:], places, right=True))
            shares.append(grad[places])
        num_keys = sum(gradient.lookup.num_keys for gradient in gradients)
        return cls(torch.cat(tables), torch.cat(shares), num_keys)


def without_refused(gradient: PooledGradient) -> PooledGradient:
    """The same, by key, with zeros for keys that were refused."""
    reads = gradient.lookup.reads_default()
    return gradient._replace(grad=gradient.grad.masked_fill(reads[:, None], 0.0))


class Defaults:
    """The default rows of a store's tables, over the ranks."""

    def __init__(
        self, exchange: Exchange, tables: Sequence[TableConfig], *, deterministic: bool
    ) -> None:
        """Of a store.

        Args:
          exchange: of the ranks.
          tables: of the store.
          deterministic: sums are in fixed point, with the bits that one store has of all ranks'
            keys.
        """
        self._exchange = exchange
        self._num_tables = len(tables)
        self._deterministic = deterministic
        self._are_shared = exchange.size > 1 and any(map(refuses, tables))

    def of(self, call: str, gradients: Sequence[PooledGradient]) -> DefaultGradients | None:
        """What they take of the gradients of all ranks; all of those must call it.

        Args:
          call: for messages.
          gradients: here, by key, each with its batch; as many on every rank.

        Returns:
          The same on each rank. None: none refuses keys, or there is no other rank.

        Raises:
          GroupError: a rank is gone.
        """
        if not self._are_shared or not gradients:
            return None
        refused = Refused.of(gradients)
        if self._deterministic:
            return _in_fixed_point(self._exchange, call, refused, self._num_tables)
        tables, shares, _ = refused
        # The last column counts: a sum may be 0.
        sums = shares.new_zeros(self._num_tables, shares.shape[1] + 1)
        sums[:, :-1].index_add_(0, tables, shares)
        sums[:, -1] = torch.bincount(tables, minlength=self._num_tables)
        sums = self._exchange.combined(call, sums)
        return DefaultGradients(sums[:, :-1].contiguous(), sums[:, -1] > 0)


def _in_fixed_point(
    exchange: Exchange, call: str, refused: Refused, num_tables: int
) -> DefaultGradients:
    """As csrc/rows/row_kernels.cc sums the gradients of a row."""
    tables, shares, num_keys = refused
    magnitudes = shares.abs().amax(1).double()
    magnitudes = torch.where(magnitudes.isfinite(), magnitudes, torch.inf)
    largest = magnitudes.new_zeros(num_tables + 1).scatter_reduce_(0, tables, magnitudes, "amax")
    largest[-1] = num_keys
    largest = exchange.combined(call, largest, largest=True)
    bits = sum_bits(int(largest[-1]) * exchange.size)
    largest = largest[:-1, None]
    exponents = bits - torch.frexp(largest).exponent.long()
    units = torch.zeros(num_tables, shares.shape[1] + 1, dtype=torch.int64, device=shares.device)
    in_units = (shares * _power_of_two(exponents)[tables]).round_().long()
    units[:, :-1].index_add_(0, tables, in_units)
    units[:, -1] = torch.bincount(tables, minlength=num_tables)
    units = exchange.combined(call, units)
    sums = (units[:, :-1] * _power_of_two(-exponents)).float()
    return DefaultGradients(
        sums.masked_fill_(~largest.isfinite(), torch.nan).contiguous(), units[:, -1] > 0
    )


def _power_of_two(exponents: Tensor) -> Tensor:
    """Float64, exact."""
    return ((exponents + 1023) << 52).view(torch.float64)
