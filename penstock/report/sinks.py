"""Sinks in a run folder besides metrics.jsonl: TensorBoard, summary.json, run.log."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from itertools import count
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from penstock.events.event import Event, measurements, to_json
from penstock.events.registry import KINDS
from penstock.report.folder import RunFolder, cannot_write, replace_file

_NUMBERS = count()


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
            folder.tensorboard.mkdir(exist_ok=True)
            # Written here: SummaryWriter has a thread, whose errors end up on the standard error.
            self._file = _event_file(folder.tensorboard).open("wb")
            self._records = RecordWriter(self._file)
            self._add(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
            if step:
                begins = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._add(event_pb2.Event(step=step + 1, session_log=begins))
        except OSError as error:
            raise cannot_write(folder.path, error) from None

    def take(self, event: Event) -> None:
        """Adds a point to each curve; what is not finite is none.

        Raises:
          ConfigError: the disk is full, or gone.
        """
        if not KINDS[event.kind].is_computed:
            return
        points = [
            summary_pb2.Summary.Value(tag="/".join((event.kind, *path)), simple_value=value)
            for path, _, quantity, value in measurements(event)
            if quantity.unit.is_number and math.isfinite(value)
        ]
        told = summary_pb2.Summary(value=points)
        try:
            self._add(event_pb2.Event(wall_time=event.time_s, step=event.step, summary=told))
        except OSError as error:
            raise cannot_write(self._folder.path, error) from None

    def _add(self, record: event_pb2.Event) -> None:
        self._records.write(record.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        try:
            self._records.close()
        except OSError as error:
            self._folder.note(
                f"{self._folder.tensorboard}: {error}; its last numbers are in metrics.jsonl"
            )


def _event_file(folder: Path) -> Path:
    """A new name, by which boards read what is in a folder in the order in which it was begun."""
    parts = f"{int(time.time()):010}", socket.gethostname(), str(os.getpid()), str(next(_NUMBERS))
    return folder / ".".join(("events.out.tfevents", *parts))


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
