"""Batches on all ranks at once: a rank that has none, fails or is to stop is heard by all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from penstock.errors import FailedElsewhere, GroupError, Interrupted, PenstockError
from penstock.interruption import Interruption
from penstock.ranks.group import Group

Item = TypeVar("Item")
_HAS_ONE, _HAS_ENDED, _FAILED, _IS_TO_STOP = range(4)


def in_step(items: Iterable[Item], group: Group, stop: Interruption) -> Iterator[Item]:
    """Yields the items while every rank has another one.

    Args:
      items: as many on each rank.
      group: every rank of it comes to each item.
      stop: signals, which then end all ranks at the same item.

    Raises:
      Interrupted: a signal came, here or elsewhere. Nothing is lost but an item nobody had yet.
      PenstockError: what came of asking for an item here; every rank has heard of it.
      FailedElsewhere: that happened on another rank.
      GroupError: a rank is gone, or has other items.
    """
    if group.size == 1:
        yield from items
        return
    source = iter(items)
    while True:
        item: Item | None = None
        error: PenstockError | None = None
        try:
            with stop.at_once():
                item = next(source, None)
            state = _HAS_ENDED if item is None else _HAS_ONE
        except PenstockError as raised:
            error, state = raised, _FAILED
        except Interrupted as raised:
            if raised.is_repeated:
                raise
            state = _IS_TO_STOP
        told = group.gathered(torch.tensor([state, stop.signal or 0])).tolist()
        states = [one for one, _ in told]
        if _IS_TO_STOP in states:
            raise Interrupted(max(number for _, number in told))
        if error is not None:
            error.is_known_to_all = True
            raise error
        if _FAILED in states:
            rank = states.index(_FAILED)
            raise FailedElsewhere(f"rank {rank} could not read its part of the data, and says why")
        if states != [state] * group.size:
            raise GroupError(
                f"rank {group.rank} has {'no' if item is None else 'another'} batch, and others "
                "do not agree; give all ranks the same job and files"
            )
        if item is None:
            return
        yield item
