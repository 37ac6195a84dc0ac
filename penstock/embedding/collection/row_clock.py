"""The time by which rows age where their eviction counts seconds: a watermark of event times."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from penstock.embedding.retention import MAX_TIME, Clock

MAX_JUMP_S = 86_400
CONFIRMATIONS = 8
"""Batches in a row that must have passed a time before the clock jumps there."""


@dataclass(slots=True)
class RowClock:
    """Follows the times of batches, ahead alone, and in bounded jumps.

    The time of a batch is the median of its event times: no few rows with a wrong one move it. The
    clock follows it up to `max_jump_s` ahead of itself. Where a batch is beyond that, its time is
    not believed yet: the clock goes where all of the last 8 batches have been, so that a gap in the
    data is passed after as many batches, and a stretch of wrong times that is shorter changes
    nothing. The first batch sets the clock.

    All of it is part of a checkpoint.
    """

    max_jump_s: int = MAX_JUMP_S
    now_s: int | None = None
    """Seconds since 1970 UTC; None: no batch had a time."""
    recent_s: list[int] = field(default_factory=list)
    """Times of the last batches, the newest at the end."""
    rows_ahead: int = 0
    """Rows so far whose event time was more than `max_jump_s` ahead of the clock."""

    def observe(self, event_time: Tensor) -> None:
        """Takes the times of the next batch: [B] int64, in ms since 1970 UTC.

        Those before 1970 count as 1970, those after 2106 as that.
        """
        if not event_time.numel():
            return
        seconds = torch.div(event_time, 1000, rounding_mode="floor").clamp(0, MAX_TIME)
        self._observe(int(seconds.median()))
        assert self.now_s is not None
        self.rows_ahead += int((seconds > self.now_s + self.max_jump_s).sum())

    def _observe(self, time_s: int) -> None:
        self.recent_s = [*self.recent_s[-(CONFIRMATIONS - 1) :], time_s]
        if self.now_s is None:
            self.now_s = time_s
        elif time_s <= self.now_s + self.max_jump_s:
            self.now_s = max(self.now_s, time_s)
        if len(self.recent_s) == CONFIRMATIONS:
            self.now_s = max(self.now_s, min(self.recent_s))

    def clock(self, step: int) -> Clock:
        """What stores go by at a step; where no batch had a time, by the machine's clock."""
        return Clock(step, int(time.time()) if self.now_s is None else self.now_s)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; how far it may jump is for the job to say."""
        return {name: value for name, value in asdict(self).items() if name != "max_jump_s"}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        now_s = state["now_s"]
        self.now_s = None if now_s is None else int(now_s)
        self.recent_s = [int(time_s) for time_s in state["recent_s"]]
        self.rows_ahead = int(state["rows_ahead"])
