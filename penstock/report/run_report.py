"""One run's report: the run folder and the terminal, fed by the story in `penstock/run.py`."""

from __future__ import annotations

import math
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from penstock.config import Job
from penstock.data.source import RowCount
from penstock.report.display import Display, rules_table, slices_tables, summary_table, tables_table
from penstock.report.environment import hardware, peak_memory_bytes, versions
from penstock.report.folder import RunFolder
from penstock.report.terminal import Stream, console_of
from penstock.types import Position

_SUMMARIZED = (
    "loss",
    "auc",
    "teacher_auc",
    "share_of_teacher",
    "log_loss",
    "normalized_entropy",
    "calibration",
    "rmse",
    "mae",
    "bias",
    "grouped_auc",
    "slices",
    "tasks",
)
"""Metrics that go from the last evaluation into the summary."""


class RunReport:
    """Writes a run's metrics and shows them.

    Args:
      folder: where the files go.
      job: what is run.
      total_samples: gives the samples that the whole run will see, as far as they are known by
        then, for the ETA.
      console: where to print; None: the standard output.
    """

    def __init__(
        self,
        folder: RunFolder,
        job: Job,
        total_samples: Callable[[], RowCount | None],
        console: Console | None = None,
    ) -> None:
        self._folder = folder
        self._job = job
        self._console = console or console_of(Stream(sys.stdout, folder.note_lost_display))
        self._display = Display(self._console, total_samples)
        self._last_training: dict[str, Any] = {}
        self._last_evaluation: tuple[int, dict[str, Any]] | None = None
        self._has_evaluated = False

    def start(self, step: int, position: Position, window_is_open: bool = False) -> None:
        """Begins at `step`: earlier lines of metrics.jsonl stay, later ones are removed.

        Args:
          step: steps trained so far.
          position: reached so far.
          window_is_open: the steps since the last log are still to be logged; then a line of them
            that is there already, from a process that died after it, is removed too.
        """
        for line in self._folder.start(self._job, step, window_is_open):
            kind, at = line.pop("kind"), line.pop("step")
            if kind == "evaluation":
                self._last_evaluation = at, _with_nan(line)
            else:
                self._last_training = _with_nan(line)
        if not self._folder.has_lock:
            self._display.line(
                f"{self._folder.path}: this file system has no locks; see to it yourself that no "
                "other process trains in this run folder"
            )
        if step:
            self._display.line(f"resumed at step {step:,} ({position.samples:,} samples)")
        if position.version_1 is not None:
            self._display.line(
                "warning: the checkpoint is of an older version, which does not say what files it "
                "was taken on: whether these are the same cannot be verified"
            )
        self._display.start(position.samples)

    def advance(self, step: int, samples: int) -> None:
        """Moves the bar after a step."""
        self._display.advance(step, samples)

    def training(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Records the metrics of a window of steps that ends with `step`."""
        self._last_training = dict(metrics)
        window = {"window_samples" if k == "samples" else k: v for k, v in metrics.items()}
        self._folder.append_metrics("train", step, {"samples": samples, **window})
        self._display.training(step, samples, metrics)

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Records an evaluation after `step`."""
        self._last_evaluation = step, metrics
        self._has_evaluated = True
        self._folder.append_metrics("evaluation", step, metrics)
        self._display.evaluation(step, metrics)

    def evaluation_at(self, step: int) -> dict[str, Any] | None:
        """The evaluation recorded after `step`, by this process or the one it resumes."""
        if self._last_evaluation is not None and self._last_evaluation[0] == step:
            return self._last_evaluation[1]
        return None

    def final_metrics(self, step: int) -> dict[str, Any]:
        """The metrics of the summary after the last step, and what they were measured on."""
        evaluation = self.evaluation_at(step)
        if evaluation is not None:
            found, where = evaluation, "held-out part"
        else:
            found, where = self._last_training, "last training steps, before their update"
        metrics = {name: found[name] for name in _SUMMARIZED if name in found}
        metrics |= {name: found[name] for name in found if name.startswith("recall_")}
        samples = 0 if evaluation is None else evaluation["samples"]
        return {"measured_on": where, "evaluation_samples": samples, **metrics}

    def failed(self, error: BaseException) -> None:
        """Keeps in run.log what ends the run; of errors in a user's model, where they came up."""
        chain = traceback.format_exception(error) if error.__cause__ is not None else [str(error)]
        self._folder.note("".join(chain).rstrip())

    def stopped(self, step: int, *, is_kept: bool) -> None:
        """Says that the run stopped after `step`, with a checkpoint or not, and how to go on."""
        self._display.stop()
        command = ["penstock", "train", str(self._folder.job_file), "--out", str(self._folder.path)]
        kept = "the checkpoint is complete" if is_kept else "the last checkpoint is an earlier one"
        self._display.line(f"stopped after step {step:,}; {kept}. Continue:")
        self._display.line(f"  {shlex.join([*command, '--resume'])}")

    def has_nothing_new(self, step: int) -> bool:
        """Whether the summary is of `step` and of an evaluation that was made before."""
        if self._has_evaluated or not self._folder.summary_file.exists():
            return False
        return self._folder.read_summary().get("steps") == step

    def nothing_new(self, step: int, max_steps: int | None) -> dict[str, Any]:
        """Says that a run that was finished found nothing to do; returns its summary."""
        self._display.stop()
        why = "every row was trained on; files that are added behind the others would be"
        if max_steps is not None and step >= max_steps:
            why = f"training.max_steps is {max_steps:,}"
        self._display.line(f"nothing new to train: the run has finished at step {step:,}: {why}")
        return self._folder.read_summary()

    def finished(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Writes summary.json and shows the final table; returns the whole summary."""
        whole = {
            "name": self._job.name,
            **summary,
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": versions(),
            "hardware": hardware(),
        }
        self._folder.write_summary(whole)
        self._display.stop()
        if len(whole["tables"]) > 1:
            self._console.print(tables_table(whole["tables"]))
            rules = rules_table(whole["tables"])
            if rules is not None:
                self._console.print(rules)
        for table in slices_tables(whole):
            self._console.print(table)
        self._console.print(summary_table(whole))
        self._display.line(f"run folder: {self._folder.path}")
        return whole

    def close(self) -> None:
        """Takes the bar away and closes the files."""
        self._display.stop()
        self._folder.close()


def _with_nan(line: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; null stands for it in metrics.jsonl."""
    return {
        name: _with_nan(value)
        if isinstance(value, Mapping)
        else math.nan
        if value is None
        else value
        for name, value in line.items()
    }
