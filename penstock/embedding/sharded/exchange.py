"""What travels between ranks: blocks of rows to each, by torch.distributed's all-to-all.

Every call begins with headers of one size, whatever the call and the tables: so ranks that are not
at the same one find out, instead of waiting in different collectives. A rank with nothing to send
takes part like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, distributed

from penstock.errors import GroupError

Result = TypeVar("Result")
CALLS = ("look-up", "update", "norm", "find", "erase", "check")
_FIRST_COLUMNS = 64
"""Of a header that goes with the first message; others need another one."""


class Exchange(Protocol):
    """The ranks that hold a table together. All of them make the same calls in the same order."""

    rank: int
    size: int

    def headers(self, call: str, said: int, to_each: Tensor) -> Tensor:
        """Tells every rank how much will come, and compares what they are about to do.

        Args:
          call: one of `CALLS`.
          said: what all ranks must say alike.
          to_each: [ranks, n] int64 on the CPU; n are the tables of the store.

        Returns:
          [ranks, n] int64 on the CPU, of each.

        Raises:
          GroupError: a rank is at another call, or gone.
        """

    def to_all(self, call: str, rows: Tensor, sent: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Sends rows [n, ...] to ranks, in their order, `sent` to each; returns those that came.

        Args:
          call: for messages.
          rows: [sum of `sent`, ...].
          sent: to each rank.
          wanted: from each rank.

        Raises:
          GroupError: a rank is gone.
        """

    def combined(self, call: str, numbers: Tensor, *, largest: bool = False) -> Tensor:
        """The sums, or the largest, of the ranks' numbers [...], one by one.

        Raises:
          GroupError: a rank is gone.
        """


class Collective:
    """An `Exchange` of torch.distributed."""

    def __init__(self, group: distributed.ProcessGroup, device: torch.device) -> None:
        """Of a process group.

        Args:
          group: Gloo carries arrays of the CPU, others those of `device`.
          device: where blocks are given and wanted.
        """
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self._device = device
        is_gloo = distributed.get_backend(group) == "gloo"
        on_gpu = device if device.type == "cuda" else torch.device("cuda")
        self._wire = torch.device("cpu") if is_gloo else on_gpu
        self._number = 0

    def headers(self, call: str, said: int, to_each: Tensor) -> Tensor:
        """See `Exchange.headers`."""
        self._number += 1
        width = to_each.shape[1]
        alike = alike_of(self._number, call, said, width)
        first = torch.zeros(self.size, len(alike) + _FIRST_COLUMNS, dtype=torch.int64)
        first[:, : len(alike)] = alike
        first[:, len(alike) : len(alike) + width] = to_each[:, :_FIRST_COLUMNS]
        theirs = self._to_each(call, first)
        check_alike(self.rank, alike, theirs[:, : len(alike)])
        theirs = theirs[:, len(alike) : len(alike) + width]
        if width > _FIRST_COLUMNS:
            theirs = torch.cat([theirs, self._to_each(call, to_each[:, _FIRST_COLUMNS:])], 1)
        return theirs

    def _to_each(self, call: str, rows: Tensor) -> Tensor:
        """Sends a row to each rank; returns those that came, on the CPU."""
        mine = rows.contiguous().to(self._wire)
        came = torch.empty_like(mine)
        self._run(call, lambda: distributed.all_to_all_single(came, mine, group=self.group))
        return came.cpu()

    def to_all(self, call: str, rows: Tensor, sent: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """See `Exchange.to_all`."""
        rows = rows.contiguous().to(self._wire)
        came = rows.new_empty(sum(wanted), *rows.shape[1:])
        split = list(wanted), list(sent)
        self._run(call, lambda: distributed.all_to_all_single(came, rows, *split, group=self.group))
        return came.to(self._device)

    def combined(self, call: str, numbers: Tensor, *, largest: bool = False) -> Tensor:
        """See `Exchange.combined`."""
        total = numbers.detach().clone().to(self._wire)
        operation = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
        self._run(call, lambda: distributed.all_reduce(total, operation, group=self.group))
        return total.to(numbers.device)

    def _run(self, call: str, collective: Callable[[], Result]) -> Result:
        try:
            return collective()
        except RuntimeError as error:
            raise GroupError(
                f"rank {self.rank} of {self.size} could not finish its {call} of tables: another "
                f"rank is gone, or did not come within the group's timeout ({error}). Start all "
                "ranks again from what they saved last"
            ) from error


def alike_of(number: int, call: str, said: int, num_tables: int) -> Tensor:
    """[4] int64: what ranks must have alike."""
    return torch.tensor([number, CALLS.index(call), said, num_tables], dtype=torch.int64)


def check_alike(rank: int, mine: Tensor, theirs: Tensor) -> None:
    """Refuses ranks at different calls.

    Args:
      rank: this one.
      mine: [4] from `alike_of`.
      theirs: [ranks, 4].

    Raises:
      GroupError: names the first other rank, and both calls.
    """
    others = (theirs != mine).any(1).nonzero()[:, 0].tolist()
    if not others:
        return
    other = others[0]
    both = [
        f"rank {who} at call {number} of its {num_tables} tables ({CALLS[call]}, {said})"
        for who, (number, call, said, num_tables) in (
            (rank, mine.tolist()),
            (other, theirs[other].tolist()),
        )
    ]
    raise GroupError(
        f"{both[0]}, {both[1]}: all ranks look up and update as often, in the same order; a rank "
        "without samples gives an empty batch"
    )
