"""The ranks of a run, and what they tell each other: small arrays and words, beside the tables'.

A run on one process is a group of one, which waits for nobody; nothing else knows the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch import Tensor, distributed

from penstock.embedding.sharded.store import Ranks
from penstock.errors import ConfigError, GroupError

Result = TypeVar("Result")


class Group(Protocol):
    """The ranks of a run. All of them make the same calls in the same order."""

    rank: int
    size: int
    tables: Ranks | None
    """Over whom tables are spread; None: this process has them all."""

    def gathered(self, values: Tensor) -> Tensor:
        """[size, ...] on the CPU: each rank's values, of one shape and type on all of them.

        Raises:
          GroupError: a rank is gone.
        """

    def gathered_bytes(self, content: bytes) -> list[bytes]:
        """Each rank's content, of any length.

        Raises:
          GroupError: a rank is gone.
        """

    def add(self, values: Tensor) -> None:
        """Makes `values`, on the run's device, their sum over ranks, in place.

        Raises:
          GroupError: a rank is gone.
        """

    def beside(self) -> Group:
        """The same ranks on a channel of their own, for a thread that calls when it likes."""


class Alone:
    """One process."""

    rank, size = 0, 1
    tables: Ranks | None = None

    def gathered(self, values: Tensor) -> Tensor:
        """See `Group.gathered`."""
        return values.cpu()[None]

    def gathered_bytes(self, content: bytes) -> list[bytes]:
        """See `Group.gathered_bytes`."""
        return [content]

    def add(self, values: Tensor) -> None:
        """See `Group.add`."""

    def beside(self) -> Alone:
        """See `Group.beside`."""
        return self


ALONE = Alone()


def refuse_ranks_left_out(group: Group) -> None:
    """Refuses to train alone in a script whose processes have made a group of torch's.

    Each would train the whole job, in one folder.

    Raises:
      ConfigError: `group` is of one, and torch's default group is not.
    """
    if group.size > 1 or not distributed.is_initialized():
        return
    size = distributed.get_world_size()
    if size > 1:
        raise ConfigError(
            f"this process is one of {size} ranks of torch.distributed, and would train alone: "
            "start the job by `penstock train` under the same launcher, or do it in a process that "
            "has made no group"
        )


class Processes:
    """A `Group` of torch.distributed."""

    def __init__(self, tables: Ranks, words: distributed.ProcessGroup, timeout: timedelta) -> None:
        """Takes groups of the same ranks.

        Args:
          tables: carries rows and dense gradients: Gloo on CPUs, NCCL on GPUs.
          words: Gloo's; nobody else uses it meanwhile.
          timeout: how long ranks wait for each other, on channels that are made of it as well.
        """
        self.tables: Ranks | None = tables
        self._rows, self._words = tables.group, words
        self.rank, self.size = words.rank(), words.size()
        self._timeout = timeout

    def gathered(self, values: Tensor) -> Tensor:
        """See `Group.gathered`."""
        mine = values.detach().cpu().contiguous()
        every = mine.new_empty((self.size, *mine.shape))
        self._run(lambda: distributed.all_gather(list(every.unbind()), mine, group=self._words))
        return every

    def gathered_bytes(self, content: bytes) -> list[bytes]:
        """See `Group.gathered_bytes`."""
        sizes = self.gathered(torch.tensor(len(content)))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        if content:  # torch takes no empty buffer
            padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        every = self.gathered(padded)
        return [every[rank, :size].numpy().tobytes() for rank, size in enumerate(sizes.tolist())]

    def add(self, values: Tensor) -> None:
        """See `Group.add`."""
        self._run(lambda: distributed.all_reduce(values, group=self._rows))

    def beside(self) -> Processes:
        """See `Group.beside`."""
        assert self.tables is not None
        ranks = distributed.get_process_group_ranks(self._words)
        words = distributed.new_group(ranks, backend="gloo", timeout=self._timeout)
        return Processes(self.tables, words, self._timeout)

    def _run(self, collective: Callable[[], Result]) -> Result:
        try:
            return collective()
        except RuntimeError as error:
            raise GroupError(
                f"rank {self.rank} of {self.size} lost the others: one is gone, or did not come "
                f"within the group's timeout ({error}). What a rank said before it ended tells why"
            ) from error
