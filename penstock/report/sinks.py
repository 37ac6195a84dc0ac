"""Sinks in a run folder besides metrics.jsonl: TensorBoard, summary.json, run.log."""

from __future__ import annotations

import json
import math

from torch.utils.tensorboard.writer import SummaryWriter

from penstock.events.event import Event, measurements, to_json
from penstock.events.registry import KINDS
from penstock.report.folder import RunFolder, cannot_write, replace_file


class TensorBoard:
    """tensorboard/: the numbers of events that make curves, as `train/tables/user/rows`.

    Args:
      folder: of the run.
      step: where the run begins; of what an earlier process told, later steps are hidden.

    Raises:
      ConfigError: it cannot be written.
    """

    def __init__(self, folder: RunFolder, step: int) -> None:
        self._folder = folder
        try:
            self._writer = SummaryWriter(
                str(folder.tensorboard), purge_step=step + 1 if step else None
            )
        except OSError as error:
            raise cannot_write(folder.path, error) from None

    def take(self, event: Event) -> None:
        """Adds a point to each curve; what is not finite is none.

        Raises:
          ConfigError: the disk is full, or gone.
        """
        if not KINDS[event.kind].is_computed:
            return
        try:
            for path, _, quantity, value in measurements(event):
                if quantity.unit.is_number and math.isfinite(value):
                    name = "/".join((event.kind, *path))
                    self._writer.add_scalar(name, value, event.step, walltime=event.time_s)
        except OSError as error:
            raise cannot_write(self._folder.path, error) from None

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            self._writer.close()
        except OSError as error:
            self._folder.note(
                f"{self._folder.tensorboard}: {error}; its last numbers are in metrics.jsonl"
            )


class SummaryFile:
    """summary.json: the values of the event that ends a run."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def take(self, event: Event) -> None:
        """Writes a summary, over an older one.

        Raises:
          ConfigError: the disk is full, or gone.
        """
        if event.kind != "summary":
            return
        try:
            text = json.dumps(to_json(event.values), indent=2) + "\n"
            replace_file(self._folder.summary_file, text)
        except OSError as error:
            raise cannot_write(self._folder.path, error) from None

    def close(self) -> None:
        """Nothing is open."""


class RunLog:
    """run.log: what went wrong, in words; where it cannot be written, it is lost."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def take(self, event: Event) -> None:
        """Adds the words of a fault."""
        if event.kind in {"failed", "warning"}:
            self._folder.note(event.values["text"])

    def close(self) -> None:
        """Nothing is open."""
