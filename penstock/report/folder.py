"""The run folder: which files a run writes, and how they go on after a restart.

job.yaml (every field), metrics.jsonl, tensorboard/, checkpoints/, summary.json, quarantine.jsonl;
ledger.db, where lanes read at their own pace; plots/ is what `inspect` draws; run.log keeps what
went wrong; run.lock is there while a process trains.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from penstock.config import Job, parse_job
from penstock.data.dataset import paths_of
from penstock.data.output import refuse_read, refuse_uri
from penstock.embedding.durable_files import MANIFEST
from penstock.errors import ConfigError
from penstock.events.event import values_from_json
from penstock.events.registry import KINDS
from penstock.job_file import dump_yaml, read_fields
from penstock.locking import FileLock, Held, holder_of
from penstock.training.checkpoint.checkpoint import BEST, latest_checkpoint
from penstock.training.trained import newest_of_run

_LOCK = "run.lock"
_POLL_S = 0.05
_NOTE = re.compile(r"process (\d+) on (.*)")


def default_folder(job: Job, runs: Path = Path("runs")) -> Path:
    """A folder that does not exist yet: `runs/<job name>-<local time>`."""
    stem = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, again = runs / stem, 1
    while folder.exists():
        again += 1
        folder = runs / f"{stem}-{again}"
    return folder


class RunFolder:
    """Files of one run, and who may write them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job_file = path / "job.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.quarantine_file = path / "quarantine.jsonl"
        self.ledger_file = path / "ledger.db"
        self.checkpoints = path / "checkpoints"
        self.log_file = path / "run.log"
        self.tensorboard = path / "tensorboard"
        self.plots = path / "plots"
        self.has_lock = True
        """False: its file system has no locks, so that nothing keeps a second process out."""

    def refuse_unless_new(self) -> None:
        """Raises `ConfigError` if there is something in the folder already."""
        refuse_uri(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; name a folder with --out")
        if not self.path.exists() or all(item.name == _LOCK for item in self.path.iterdir()):
            return
        if latest_checkpoint(self.checkpoints) is not None:
            remedy = "continue that run with --resume, or name another folder with --out"
        elif self.job_file.exists():
            remedy = "that run wrote no checkpoint: remove the folder, or name another with --out"
        else:
            remedy = "name another folder with --out"
        raise ConfigError(f"{self.path} is not empty; {remedy}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes the folder, if need be, and keeps other processes from training in it.

        Whoever only reads the folder needs no leave. A folder in which nothing was written is gone
        afterwards.

        Raises:
          ConfigError: another process trains in it, or it cannot be written.
        """
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock.take(self.path / _LOCK, signed=True)
        except Held as held:
            holder = str(held) or "another process"
            raise ConfigError(
                f"{self.path}: {holder} is training in this run folder; wait for it or stop it, or "
                "name another folder with --out"
            ) from None
        except OSError as error:
            raise cannot_write(self.path, error) from None
        self.has_lock = lock.is_enforced
        try:
            yield
        finally:
            lock.release()
            if is_new:
                with suppress(OSError):  # there is something in it
                    self.path.rmdir()

    def check_is_held(self) -> None:
        """Raises `ConfigError` where the first rank holds the folder and this one does not see it.

        That is: it lies in a file system of another machine's own.
        """
        if not (self.path / _LOCK).exists():
            raise ConfigError(
                f"{self.path}: this rank, on {socket.gethostname()}, does not see the run folder "
                "that rank 0 holds: name one in a file system that all machines share (--out)"
            )

    def refuse_unless_fit(self, job: Job, *, resume: bool) -> None:
        """Refuses a folder in which the job cannot train.

        Raises:
          ConfigError: the job reads what the run writes, or will; or there is something already.
          CheckpointError: with `resume`, there is no checkpoint to go on from.
        """
        self._refuse_data(job)
        if resume:
            newest_of_run(self.path)
        else:
            self.refuse_unless_new()

    def _refuse_data(self, job: Job) -> None:
        below = (self.checkpoints / "any", self.tensorboard / "any")
        files = (self.job_file, self.metrics_file, self.summary_file, self.quarantine_file)
        refuse_read((*files, self.ledger_file, self.log_file, *below), paths_of(job))

    def write_job(self, job: Job) -> bool:
        """Writes job.yaml.

        Returns:
          Whether the job asks for other metrics, or for those of other data, than the job.yaml
          that was there, or that one is lost.

        Raises:
          ConfigError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            measures_other = self._measures_other(job)
            replace_file(self.job_file, dump_yaml(job))
        except OSError as error:
            raise cannot_write(self.path, error) from None
        return measures_other

    def _measures_other(self, job: Job) -> bool:
        """Whether a job asks for another evaluation than the one in job.yaml."""
        try:
            before = parse_job(read_fields(self.job_file), is_record=True)
        except ConfigError:
            return True  # it is lost or of another version
        return (before.evaluation.metrics, before.data.evaluation_source) != (
            job.evaluation.metrics,
            job.data.evaluation_source,
        )

    def note(self, text: str) -> None:
        """Adds to run.log what has no other place; where that cannot be written, it is lost."""
        with suppress(OSError), self.log_file.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {text}\n")

    def note_lost_display(self, error: OSError) -> None:
        """Says in run.log that the run goes on though nobody can see it."""
        reason = error.strerror or error
        self.note(f"standard output: {reason}; training goes on, and shows nothing more")

    def read_summary(self) -> dict[str, Any]:
        """Reads summary.json.

        Raises:
          ConfigError: it cannot be read.
        """
        try:
            content = json.loads(self.summary_file.read_text(encoding="utf-8"))
            return values_from_json(KINDS["summary"].fields, content)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{self.summary_file}: cannot be read: {error}; remove it, and the run writes it"
            ) from None


def files_of_run(path: Path) -> list[str]:
    """What a run folder, or the checkpoint that `path` is, holds of a run: no place for others."""
    if (path / MANIFEST).is_file():
        return [str(path)]
    if path.name == BEST and not path.exists():
        path = path.parent
    folder = RunFolder(path)
    return [
        str(each)
        for each in (
            folder.job_file,
            folder.metrics_file,
            folder.summary_file,
            folder.quarantine_file,
            folder.ledger_file,
            folder.log_file,
            folder.checkpoints,
            folder.tensorboard,
        )
        if each.exists()
    ]


def stop_run(run: Path, patience_s: float) -> None:
    """Sends SIGTERM to the process that trains in a run folder and waits until it has let go.

    Args:
      run: the folder.
      patience_s: how long to wait.

    Raises:
      ConfigError: nobody trains there, on another machine or as another user somebody does, or it
        has not stopped in time.
    """
    lock = run / _LOCK
    try:
        holder = holder_of(lock)
    except OSError as error:
        raise ConfigError(f"{lock}: cannot be looked at: {error.strerror}") from None
    if holder is None:
        raise ConfigError(f"{run}: no process trains in this folder; there is nothing to suspend")
    found = _NOTE.fullmatch(holder)
    if found is None:
        raise ConfigError(f"{lock}: held by somebody that it does not name ({holder!r}); stop it")
    number, host = int(found[1]), found[2]
    if host != socket.gethostname():
        raise ConfigError(f"{run}: trained by process {number} on {host}; suspend it there")
    try:
        os.kill(number, signal.SIGTERM)
    except PermissionError:
        raise ConfigError(
            f"{run}: trained by process {number}, of another user; suspend it as that one"
        ) from None
    except ProcessLookupError:
        pass  # it has just ended
    end_s = time.monotonic() + patience_s
    while holder_of(lock) == holder:
        if time.monotonic() > end_s:
            raise ConfigError(
                f"{run}: process {number} was asked to stop and has not done so for "
                f"{patience_s:g} s; it stops after its step, and must write a checkpoint: wait on, "
                "or ask again, which stops it without one"
            )
        time.sleep(_POLL_S)


def cannot_write(path: Path, error: OSError) -> ConfigError:
    """What to raise where a run folder is full, or gone."""
    return ConfigError(f"{path}: cannot write the run folder: {error}; name another with --out")


def replace_file(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
