"""One run's report: the stream of its events, and the sinks that take them in."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from penstock.config import Job
from penstock.data.source import RowCount
from penstock.errors import PenstockError
from penstock.events.event import Role
from penstock.events.registry import KINDS, METRICS, field_named
from penstock.events.stream import EventStream, Latest
from penstock.position import Position
from penstock.report.display import Display
from penstock.report.environment import hardware, versions
from penstock.report.folder import RunFolder
from penstock.report.json_lines import JsonLines
from penstock.report.sinks import RunLog, SummaryFile, TensorBoard
from penstock.report.terminal import Stream, console_of


class Report:
    """What a run tells; this one, of a rank that is not the first, tells nothing.

    What it could tell, the first rank does, with a `RunReport`.
    """

    def start(self, step: int, position: Position, window_is_open: bool = False) -> None:
        """Begins at `step`."""

    def advance(self, step: int, samples: int) -> None:
        """Moves the bar after a step."""

    def tell(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Tells an event."""

    def warn(self, text: str) -> None:
        """Tells what does not end the run."""

    def measured(self, step: int) -> Mapping[str, Any] | None:
        """What was measured after `step`; None: nothing that is known here."""
        return None

    def final_metrics(self, step: int) -> dict[str, Any]:
        """The metrics of the summary."""
        return {}

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
        return {}

    def close(self) -> None:
        """Lets go of files."""


class RunReport(Report):
    """What a run tells: kept in its folder, shown on the terminal.

    Args:
      folder: where the files go.
      job: what is run.
      total_samples: gives the samples that the whole run will see, as far as they are known by
        then, for the ETA.
      console: where to print; None: the standard output.
      options: of the command line, besides the job and the folder, to go on with.
    """

    def __init__(
        self,
        folder: RunFolder,
        job: Job,
        total_samples: Callable[[], RowCount | None],
        console: Console | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._options = tuple(options)
        self._job = job
        console = console or console_of(Stream(sys.stdout, folder.note_lost_display))
        self._display = Display(console, total_samples, folder.path)
        self._latest = Latest()
        self._events = EventStream(Role("trainer", 0))
        self._log = _Warnings(self)
        self._told: set[str] = set()
        """Kinds of which this process has told something."""
        self._step = 0

    def start(self, step: int, position: Position, window_is_open: bool = False) -> None:
        """Begins at `step`: what was told of later steps is taken back.

        Args:
          step: steps trained so far.
          position: reached so far.
          window_is_open: the steps since the last log are still to be logged; then a line of them
            that is there already, from a process that died after it, is taken back too.

        Raises:
          ConfigError: the folder cannot be read or written.
        """
        measures_other = self._folder.write_job(self._job)
        last = {name: step for name, kind in KINDS.items() if kind.is_computed}
        last["train"] -= window_is_open
        # What was measured at this step is measured anew if something else is asked for.
        last["evaluation"] -= measures_other
        lines = JsonLines(self._folder.metrics_file, last)
        for event in lines.kept:
            self._latest.take(event)
        board = TensorBoard(self._folder, step)
        summary, log = SummaryFile(self._folder), RunLog(self._folder)
        self._events.add(self._latest, lines, board, summary, log, self._display)
        logging.getLogger("penstock").addHandler(self._log)
        self.tell("start", step, {"samples": position.samples})
        if not self._folder.has_lock:
            self.warn(
                f"{self._folder.path}: this file system has no locks; see to it yourself that no "
                "other process trains in this run folder"
            )
        if position.version_1 is not None:
            self.warn(
                "the checkpoint is of an older version, which does not say what files it was "
                "taken on: whether these are the same cannot be verified"
            )

    def advance(self, step: int, samples: int) -> None:
        """Moves the bar after a step. No event: that would be one a step."""
        self._display.advance(step, samples)

    def tell(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Tells an event to all sinks; see `EventStream.tell`."""
        self._told.add(kind)
        self._step = step
        self._events.tell(kind, step, values)

    def warn(self, text: str) -> None:
        """Tells what does not end the run."""
        self.tell("warning", self._step, {"text": text})

    def measured_at(self, step: int) -> bool:
        """Whether this process, or the one that it goes on from, has measured after `step`."""
        return self.measured(step) is not None

    def measured(self, step: int) -> Mapping[str, Any] | None:
        """What was measured after `step`, by this process or the one that it goes on from."""
        event = self._latest.of("evaluation")
        return event.values if event is not None and event.step == step else None

    def final_metrics(self, step: int) -> dict[str, Any]:
        """The metrics of the summary after the last step, and what they were measured on."""
        is_held_out = self.measured_at(step)
        event = self._latest.of("evaluation" if is_held_out else "train")
        found = {} if event is None else event.values
        return {
            "measured_on": "held-out part"
            if is_held_out
            else "last training steps, before their update",
            "evaluation_samples": found["samples"] if is_held_out else 0,
            **{name: value for name, value in found.items() if field_named(METRICS, name)},
        }

    def failed(self, step: int, error: BaseException) -> None:
        """Tells what ends the run; of errors in a user's model, where they came up."""
        chain = traceback.format_exception(error) if error.__cause__ is not None else [str(error)]
        self._tell_at_the_end("failed", step, {"text": "".join(chain).rstrip()})

    def stopped(self, step: int, *, is_whole: bool) -> None:
        """Tells that the run stopped after `step`, and how to go on.

        Args:
          step: steps trained.
          is_whole: whether the newest checkpoint is of this step.
        """
        command = ["penstock", "train", str(self._folder.job_file), "--out", str(self._folder.path)]
        command += [*self._options, "--resume"]
        values = {"is_whole": is_whole, "command": shlex.join(command)}
        self._tell_at_the_end("stopped", step, values)

    def not_begun(self, step: int) -> None:
        """Tells that there is no checkpoint, and what becomes of the folder."""
        text = (
            "nothing was trained and there is no checkpoint: mend what is wrong, remove "
            f"{self._folder.path} or name another folder, and train anew"
        )
        self._tell_at_the_end("warning", step, {"text": text})

    def _tell_at_the_end(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Tells an event where an error is on its way, which no other may take the place of."""
        try:
            self.tell(kind, step, values)
        except PenstockError as error:
            self._folder.note(str(error))

    def ended(
        self,
        summary: Mapping[str, Any],
        has_moved: bool,
        max_steps: int | None,
        no_better: str | None = None,
    ) -> dict[str, Any]:
        """Tells that a run came to its end, or that one that had found nothing to do.

        Args:
          summary: what the run amounts to.
          has_moved: whether this process has read anything.
          max_steps: of the job.
          no_better: why evaluations end the run; None: they do not.

        Returns:
          The content of summary.json.
        """
        step = summary["steps"]
        if not has_moved and self.has_nothing_new(step):
            return self.nothing_new(step, max_steps, no_better)
        return self.finished(summary)

    def has_nothing_new(self, step: int) -> bool:
        """Whether the summary is of `step` and of an evaluation that was made before."""
        if "evaluation" in self._told or not self._folder.summary_file.exists():
            return False
        return self._folder.read_summary().get("steps") == step

    def nothing_new(
        self, step: int, max_steps: int | None, no_better: str | None = None
    ) -> dict[str, Any]:
        """Tells that a run that was finished found nothing to do; returns its summary.

        Args:
          step: steps trained.
          max_steps: of the job.
          no_better: why evaluations end the run; None: they do not.
        """
        why = "every row was trained on; files that are added behind the others would be"
        if no_better is not None:
            why = no_better
        elif max_steps is not None and step >= max_steps:
            why = f"training.max_steps is {max_steps:,}"
        self.tell("nothing_new", step, {"text": why})
        return self._folder.read_summary()

    def finished(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Tells the summary of a run that came to its end; returns all of it."""
        whole = {
            "name": self._job.name,
            **summary,
            "versions": versions(),
            "hardware": hardware(),
        }
        self.tell("summary", whole["steps"], whole)
        return whole

    def close(self) -> None:
        """Takes the bar away and closes the files."""
        logging.getLogger("penstock").removeHandler(self._log)
        self._events.close()


class _Warnings(logging.Handler):
    """Makes events of what the package's loggers warn of, such as a checkpoint passed over."""

    def __init__(self, report: RunReport) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Tells it."""
        self._report.warn(record.getMessage())
