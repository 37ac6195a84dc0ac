"""Starts the ranks of a run as processes of this machine, and ends when all of them have; no torch.

They find each other by a file in a folder that only this user can read, and talk over the loopback
interface: nothing listens to the network. One that fails ends the others, too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import IO, NamedTuple

from penstock.interruption import Interruption
from penstock.locking import FileLock, Held
from penstock.ranks.environment import LAUNCHER, LOST, MEETING, RANK, words_of

GRACE_S = 5.0
"""How long the others have to end by themselves after one has failed."""
_TERMINATED_S = 3.0
"""And then, after SIGTERM, before they are killed."""
_POLL_S = 0.02
_LINE_BYTES = 1 << 13
_PREFIX, _LOCK = "penstock-ranks-", "lock"
_NEW_S = 60.0


class Outcome(NamedTuple):
    """How ranks ended."""

    status: int
    """0, or the exit status of the first that failed: 128 and the signal's number where one killed
    it.
    """
    words: str | None
    """Which that was, and why; None: all ended well."""


@dataclass
class _Rank:
    """A process, and how it ended."""

    number: int
    process: subprocess.Popen[bytes]
    words: threading.Thread | None
    status: int | None = None
    """As `Popen.returncode`; None: it runs."""
    was_ended: bool = False
    """By us."""


@dataclass
class _Ranks:
    """All processes, in the order of their numbers."""

    every: list[_Rank] = field(default_factory=list)
    ended: list[_Rank] = field(default_factory=list)
    """In the order in which they did."""
    signals: list[int] = field(default_factory=list)
    """That came to the launcher."""
    passed_on: int = 0
    """How many of them."""

    def look(self) -> bool:
        """Notes which have ended; returns whether any runs."""
        for rank in self.every:
            if rank.status is None and (status := rank.process.poll()) is not None:
                rank.status = status
                self.ended.append(rank)
        return len(self.ended) < len(self.every)

    def pass_signals_on(self) -> None:
        """Sends what has come since the last time."""
        while self.passed_on < len(self.signals):
            self.send(self.signals[self.passed_on])
            self.passed_on += 1

    def send(self, number: int) -> None:
        """Sends a signal to all that run."""
        for rank in self.every:
            if rank.status is None:
                with suppress(ProcessLookupError):
                    rank.process.send_signal(number)

    def end(self, number: int) -> None:
        """Ends all that run, which then did not fail by themselves."""
        for rank in self.every:
            rank.was_ended |= rank.status is None
        self.send(number)

    def first_failed(self) -> _Rank | None:
        """The one that failed first, and by itself; None: none failed."""
        failed = [rank for rank in self.ended if rank.status and not rank.was_ended]
        return min(failed, key=lambda rank: rank.status == LOST, default=None)


def launch(command: Sequence[str], size: int, stop: Interruption) -> Outcome:
    """Runs a command as so many ranks of this machine, until all have ended.

    Signals are passed on to all ranks, each as often as it comes. Standard output and error are
    those of rank 0; what other ranks print is shown on the standard error, each line with its rank.
    Ranks are killed by the kernel should this process die.

    Args:
      command: with arguments.
      size: number of ranks.
      stop: what signals do until now; not while this runs.
    """
    _remove_left_folders()
    with (
        TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as folder,
        _locked(Path(folder)),
    ):
        ranks = _Ranks()
        # Only noted there: a rank that is just being started is to get it as well.
        with stop.handed_to(ranks.signals.append):
            try:
                for rank in range(size):
                    ranks.every.append(_start(command, rank, size, Path(folder)))
                _wait(ranks)
            finally:
                ranks.end(signal.SIGKILL)
                for one in ranks.every:
                    one.process.wait()
        return _outcome(ranks, Path(folder))


@contextmanager
def _locked(folder: Path) -> Iterator[FileLock]:
    lock = FileLock.take(folder / _LOCK, signed=False)
    try:
        yield lock
    finally:
        lock.release()


def _remove_left_folders() -> None:
    """Removes folders of launchers that were killed: nobody holds their locks."""
    for folder in Path(gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError, Held):
            found = folder.lstat()
            # One that has just been made is not locked yet.
            is_old = time.time() - found.st_mtime > _NEW_S
            if is_old and found.st_uid == os.getuid():
                _remove_unless_held(folder)


def _remove_unless_held(folder: Path) -> None:
    with _locked(folder) as lock:
        if lock.is_enforced:
            shutil.rmtree(folder)


def _start(command: Sequence[str], rank: int, size: int, folder: Path) -> _Rank:
    is_first = rank == 0
    process = subprocess.Popen(
        command,
        env=rank_environment(os.environ, rank, size, folder),
        stdin=subprocess.DEVNULL,
        stdout=None if is_first else subprocess.PIPE,
        stderr=None if is_first else subprocess.STDOUT,
        # A terminal sends Ctrl-C to all of its foreground: it must reach a rank once, from here.
        start_new_session=True,
    )
    words = None
    if process.stdout is not None:
        arguments = process.stdout, f"rank {rank}: ".encode()
        words = threading.Thread(target=_pass_on, args=arguments, daemon=True)
        words.start()
    return _Rank(rank, process, words)


def rank_environment(
    environment: Mapping[str, str], rank: int, size: int, folder: Path
) -> dict[str, str]:
    """The variables of a rank on this machine."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    threads = max(1, _cores() // size)
    return {
        "OMP_NUM_THREADS": str(threads),
        **environment,
        RANK: str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        MEETING: str(folder / "meeting"),
        LAUNCHER: str(os.getpid()),
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _wait(ranks: _Ranks) -> None:
    """Waits until all have ended; from the first failure on not for long."""
    failed_s: float | None = None
    is_terminated = False
    while ranks.look():
        ranks.pass_signals_on()
        time.sleep(_POLL_S)
        if failed_s is None:
            if ranks.first_failed() is not None:
                failed_s = time.monotonic()
            continue
        waited_s = time.monotonic() - failed_s
        if waited_s > GRACE_S and not is_terminated:
            is_terminated = True
            ranks.end(signal.SIGTERM)
        if waited_s > GRACE_S + _TERMINATED_S:
            return


def _pass_on(words: IO[bytes], prefix: bytes) -> None:
    """Shows each line that a rank prints, on the standard error; where that fails, it is lost."""
    with words:
        while line := words.readline(_LINE_BYTES):
            with suppress(OSError):
                os.write(2, prefix + line.rstrip(b"\n") + b"\n")


def _outcome(ranks: _Ranks, folder: Path) -> Outcome:
    for rank in ranks.every:
        if rank.words is not None:
            rank.words.join(1.0)  # what a rank has started may hold the pipe
    failed = ranks.first_failed()
    if failed is None:
        return Outcome(0, None)
    assert failed.status
    status, who = failed.status, f"rank {failed.number} of {len(ranks.every)}"
    if status < 0:
        name = signal.Signals(-status).name
        is_asked = -status in ranks.signals
        text = f"stopped by {name}" if is_asked else f"error: {who} was killed by {name}"
        return Outcome(128 - status, text)
    words = words_of(folder, failed.number)
    if words is None and status - 128 in ranks.signals:
        words = f"stopped by {signal.Signals(status - 128).name}; left at once"
    elif words is None:
        words = f"error: {who} ended first, with exit status {status}; what it said is above"
    elif status < 128:
        # The job is wrong, or rank 0 has looked for all.
        is_of_all = status != LOST and all(
            words_of(folder, one.number) == words or (failed.number == 0 and one.status == LOST)
            for one in ranks.every
        )
        words = f"error: {words}" if is_of_all else f"error: {who}: {words}"
        hung = [str(one.number) for one in ranks.every if one.was_ended]
        if status == LOST and hung:
            words += f". Still there was rank {', '.join(hung)}: it did not come to the others"
    return Outcome(2 if status == LOST else status, words)
