"""Steps that the device may still be at: the host learns a few steps later what became of each.

On a GPU the host only starts work. If it waited for the loss of every step, the GPU would wait for
the host in turn; so it begins some steps more before it looks at the first of them. On the CPU a
step is done when it returns, and is looked at at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.position import Position
from penstock.training.steps.feed import Fed
from penstock.training.steps.step import StepResult

AHEAD = {"cpu": 0, "cuda": 4}
"""By kind of device: steps that may be in flight when the next one begins."""


class Place(NamedTuple):
    """Where a run was before a step."""

    step: int
    position: Position
    updates: int
    """`EmbeddingCollection.step`."""


class Seen(NamedTuple):
    """What a step saw before its update."""

    before: Place
    fed: Sequence[Fed]
    is_finite: bool
    """Whether all numbers were, of this step and of those before it: it was applied."""
    losses: Sequence[Tensor]
    """Of each batch, see `StepResult`; on the CPU."""
    outputs: Sequence[Tensor]
    """Of each batch, see `StepResult`."""


class _Begun:
    """A step, and copies to the CPU of what the host wants of it, which may be under way."""

    def __init__(
        self, before: Place, fed: Sequence[Fed], result: StepResult, *, copies_outputs: bool
    ) -> None:
        self._before, self._fed = before, fed
        outputs = map(_begin_copy, result.outputs) if copies_outputs else result.outputs
        self._told = [_begin_copy(result.is_raised), *map(_begin_copy, result.losses), *outputs]
        self._is_done: torch.cuda.Event | None = None
        if result.is_raised.is_cuda:
            self._is_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_done.record(torch.cuda.current_stream(result.is_raised.device))

    def seen(self) -> Seen:
        """Waits until the step is done."""
        if self._is_done is not None:
            self._is_done.synchronize()
        is_raised, *rest = self._told
        count = len(self._fed)
        is_finite = not bool(is_raised)
        return Seen(self._before, self._fed, is_finite, rest[:count], rest[count:])


class InFlight:
    """The steps of a run that the host has begun and not looked at, in order."""

    def __init__(self, device: torch.device, *, copies_outputs: bool) -> None:
        """None yet.

        Args:
          device: of the steps.
          copies_outputs: whether outputs are wanted on the CPU.
        """
        self._copies_outputs = copies_outputs
        self.most = AHEAD[device.type]
        """Steps that need not be looked at before the next one begins."""
        self._begun: deque[_Begun] = deque()

    def add(self, before: Place, fed: Sequence[Fed], result: StepResult) -> None:
        """A step that was begun."""
        self._begun.append(_Begun(before, fed, result, copies_outputs=self._copies_outputs))

    def seen(self, most: int = 0) -> Iterator[Seen]:
        """Waits for all but the last `most` steps, and yields what they saw, in order."""
        while len(self._begun) > most:
            yield self._begun.popleft().seen()

    def clear(self) -> None:
        """Forgets all of them."""
        self._begun.clear()


def _begin_copy(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return there.copy_(values, non_blocking=True)
