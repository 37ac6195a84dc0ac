"""What all ranks of a run do at one place: each its part of a task, or what the first one says."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

import torch

from penstock.embedding.sharded.agreement import told_to_all
from penstock.errors import CheckpointFailedElsewhere, ConfigError, FailedElsewhere
from penstock.ranks.group import Group

Said = TypeVar("Said")


def together(
    group: Group, task: str, raised: type[FailedElsewhere] = FailedElsewhere
) -> AbstractContextManager[None]:
    """A block that ends when every rank has done its part; one that could not ends it for all.

    Args:
      group: every rank of it comes to this place.
      task: what is done, as "write a checkpoint".
      raised: on ranks that could do their part.

    Raises:
      OSError, PenstockError: this rank's own.
      FailedElsewhere: another rank's, which says why.
      GroupError: a rank is gone.
    """
    return told_to_all(
        partial(summed, group),
        lambda failed: raised(f"{failed} of {group.size} ranks cannot {task}, which say why"),
    )


def of_checkpoint(group: Group, task: str) -> AbstractContextManager[None]:
    """`together`, of a part of a checkpoint."""
    return together(group, task, CheckpointFailedElsewhere)


def from_first(group: Group, say: Callable[[], Said]) -> Said:
    """What the first rank says, on every rank: plain data as JSON has it, NaN included.

    Args:
      group: every rank of it comes to this place.
      say: called on the first rank alone.

    Raises:
      PenstockError: what `say` raised, on the first rank.
      FailedElsewhere: that it did, on the others.
      GroupError: a rank is gone.
    """
    if group.size == 1:
        return say()
    said: Said | None = None
    with together(group, "go on"):
        if group.rank == 0:
            said = say()
    words: Said = json.loads(group.gathered_bytes(json.dumps(said).encode())[0])
    return words


def summed(group: Group, number: int) -> int:
    """The sum of what ranks have of something.

    Args:
      group: every rank of it comes to this place.
      number: of this rank.

    Raises:
      GroupError: a rank is gone.
    """
    return int(group.gathered(torch.tensor(number)).sum())


def check_alike(group: Group, what: str, mine: str) -> None:
    """Refuses ranks that were given unlike things.

    Args:
      group: every rank of it comes to this place.
      what: for the message, as "the job".
      mine: what this rank was given, as text.

    Raises:
      ConfigError: on every rank.
    """
    every = group.gathered_bytes(mine.encode())
    other = next((rank for rank, one in enumerate(every) if one != every[0]), None)
    if other is not None:
        raise ConfigError(
            f"{what} is another one on rank {other} than on rank 0: give every rank the same "
            "command"
        )
