"""What a loader reads at a time: all of its part, or, of streams that grow, one span of windows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from penstock.data.batches.blocks import FileTags
from penstock.data.plan.parts import PartRows
from penstock.position import Position


class Stage(NamedTuple):
    """Files that are listed, and where to begin in them."""

    part: PartRows
    files: FileTags
    start: Position
    is_final: bool = True
    """Whether nothing comes behind it, so that rows which wait for others wait no longer."""


class Following(Protocol):
    """What comes behind a stage."""

    is_waiting: bool
    """Whether `after` has nothing yet."""
    waited_s: float
    """So far, for files to appear, when all before was delivered."""

    def after(
        self,
        end: Position,
        from_first: Callable[[Callable[[], Any]], Any],
        is_closed: threading.Event,
        is_taken: Callable[[], bool],
    ) -> Stage | None:
        """The next stage; waits until there is one. None: nothing comes any more.

        Args:
          end: behind all of the stage before.
          from_first: what the first rank says, as JSON has it, on every rank.
          is_closed: set when nobody wants it any longer.
          is_taken: whether all of the stage before was delivered.

        Raises:
          Closed: nobody does.
          DataError: files cannot be listed or opened.
        """
