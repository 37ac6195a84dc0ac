"""The report of a run over ranks: the first one writes and shows it, the others stay silent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from rich.console import Console

from penstock.config import Job
from penstock.data.source import RowCount
from penstock.ranks.environment import is_started_by_us
from penstock.ranks.group import Group
from penstock.ranks.together import check_alike, together
from penstock.report.folder import RunFolder
from penstock.report.run_report import RunReport
from penstock.types import Position


class Report(Protocol):
    """What a run tells; see `RunReport`."""

    def start(self, step: int, position: Position, window_is_open: bool = False) -> None:
        """Begins at `step`."""

    def advance(self, step: int, samples: int) -> None:
        """Moves the bar after a step."""

    def tell(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Tells an event."""

    def warn(self, text: str) -> None:
        """Tells what does not end the run."""

    def measured(self, step: int) -> Mapping[str, Any] | None:
        """What was measured after `step`."""

    def final_metrics(self, step: int) -> dict[str, Any]:
        """The metrics of the summary."""

    def failed(self, step: int, error: BaseException) -> None:
        """Tells what ends the run."""

    def stopped(self, step: int, *, is_whole: bool) -> None:
        """Tells that the run stopped, and how to go on."""

    def not_begun(self, step: int) -> None:
        """Tells that there is no checkpoint."""

    def ended(
        self,
        summary: Mapping[str, Any],
        has_moved: bool,
        max_steps: int | None,
        no_better: str | None = None,
    ) -> dict[str, Any]:
        """Tells that a run came to its end; returns the content of summary.json."""

    def close(self) -> None:
        """Lets go of files."""


class SilentReport(Report):
    """The `Report` of a rank that is not the first: what it could tell, the first one tells.

    What it does not define does nothing.
    """

    def final_metrics(self, step: int) -> dict[str, Any]:
        """See `Report`: the first rank knows."""
        return {}

    def ended(
        self,
        summary: Mapping[str, Any],
        has_moved: bool,
        max_steps: int | None,
        no_better: str | None = None,
    ) -> dict[str, Any]:
        """See `Report`: the first rank knows."""
        return {}


def report_of(
    group: Group,
    folder: RunFolder,
    job: Job,
    total_samples: Callable[[], RowCount | None],
    console: Console | None = None,
) -> Report:
    """The report of this rank; see `RunReport` for the arguments."""
    if group.rank:
        return SilentReport()
    options = ["--nproc", str(group.size)] if is_started_by_us(os.environ) else []
    return RunReport(folder, job, total_samples, console, options)


@contextmanager
def held(folder: RunFolder, job: Job, group: Group, check: Callable[[], None]) -> Iterator[None]:
    """The folder is this run's alone while the block runs; the first rank holds it for all.

    Args:
      folder: the same on all ranks, in a file system that all of them see.
      job: likewise.
      group: every rank of it comes to this place.
      check: refuses a folder that the run may not use; called on the first rank, before and after
        others can change it.

    Raises:
      ConfigError, CheckpointError: what `check` raised, or the folder is in use or cannot be
        written, on the first rank; or ranks were given unlike ones.
      FailedElsewhere: on the others.
    """
    check_alike(group, "the job", job.model_dump_json())
    check_alike(group, "the run folder", str(folder.path.absolute()))
    with ExitStack() as holding:
        with together(group, f"train in {folder.path}"):
            if group.rank == 0:
                check()
                holding.enter_context(folder.held())
                check()  # again: a process that has ended may have been at it
        with together(group, f"see {folder.path}"):
            folder.check_is_held()
        yield
