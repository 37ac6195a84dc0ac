"""Where a run begins: at its newest checkpoint, or at the first windows that are complete."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from penstock.config import Job, StreamsSource
from penstock.data.windows.folders import Tries
from penstock.data.windows.growing import Listing
from penstock.data.windows.served import first_listing, first_waits
from penstock.position import Position
from penstock.ranks.group import Group
from penstock.ranks.together import from_first, together
from penstock.training.checkpoint.checkpoint import position_of
from penstock.training.trained import newest_of_run


class Beginning(NamedTuple):
    """Where a run begins to read."""

    after: Position | None
    """Where it stopped; None: it is a new one."""
    listing: Listing | None
    """Of streams that grow, the first windows of a new run; None: of others."""


def newest_of_all(run: Path, group: Group) -> Path:
    """The newest checkpoint of a run as the first rank sees it."""
    return run / from_first(group, lambda: newest_of_run(run).relative_to(run).as_posix())


def beginning_of(
    job: Job, run: Path, group: Group, tell: Callable[[str], None], *, resume: bool
) -> Beginning:
    """Finds where to begin. Where streams grow, waits until a window is complete.

    Every rank reads what the first one has listed.

    Args:
      job: what to read.
      run: its folder.
      group: every rank of it comes to this place.
      tell: told on the first rank, once, that it waits, and for what.
      resume: whether it goes on.

    Raises:
      CheckpointError: there is no checkpoint to go on from, or it is of another job.
      DataError: files cannot be listed.
      Interrupted: a signal came meanwhile.
    """
    if resume:
        with together(group, "find where to go on"):
            return Beginning(position_of(newest_of_all(run, group), job), None)
    source = job.data.source
    if not isinstance(source, StreamsSource) or not source.grows:
        return Beginning(None, None)

    tries, is_told = Tries(), False

    def listed() -> Any:
        # The first time an error may be one of the job.
        found = tries.of(lambda: first_listing(source), tell) if is_told else first_listing(source)
        return "waiting" if found is None else found.to_plain()

    while (said := from_first(group, listed)) == "waiting":
        if not is_told and group.rank == 0:
            tell(f"no window is complete yet; waiting for {first_waits(source)}")
        is_told = True
        time.sleep(source.poll_s)
    return Beginning(None, Listing.from_plain(said))
