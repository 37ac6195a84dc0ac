"""The report of a run over ranks: the first one writes and shows it, the others stay silent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console

from penstock.config import Job
from penstock.data.source import RowCount
from penstock.ranks.environment import is_started_by_us
from penstock.ranks.group import Group
from penstock.ranks.together import check_alike, together
from penstock.report.folder import RunFolder
from penstock.report.run_report import Report, RunReport


def report_of(
    group: Group,
    folder: RunFolder,
    job: Job,
    total_samples: Callable[[], RowCount | None],
    console: Console | None = None,
) -> Report:
    """The report of this rank; see `RunReport` for the arguments."""
    if group.rank:
        return Report()
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
