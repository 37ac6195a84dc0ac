"""One process at a time, and the next one as soon as the holder is gone, however it went."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from penstock import locking
from penstock.locking import FileLock, Held

HOLDER = """
import sys, time
from pathlib import Path
from penstock.locking import FileLock
lock = FileLock.take(Path(sys.argv[1]), signed=True)
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_holder_lets_go_and_is_named_before(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(Held) as held:
                FileLock.take(path, signed=True)
            assert str(held.value) == f"process {holder.pid} on {socket.gethostname()}"
        holder.send_signal(signal.SIGKILL)
    assert path.exists()  # what it left is in nobody's way
    FileLock.take(path, signed=True).release()
    assert not path.exists()


def test_a_lock_is_held_within_a_process_too_and_released_once(tmp_path):
    path = tmp_path / "lock"
    lock = FileLock.take(path, signed=False)
    with pytest.raises(Held, match="^$"):
        FileLock.take(path, signed=False)
    lock.release()
    assert not path.exists()
    again = FileLock.take(path, signed=True)
    assert again.is_enforced
    assert re.fullmatch(rf"process {os.getpid()} on .+\n", path.read_text())
    again.release()


def test_a_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """The holder may let go, and remove the file, between our opening and our locking it."""
    path, real, removed = tmp_path / "lock", fcntl.flock, []

    def flock(descriptor, how):
        if len(removed) < 3:
            path.unlink()
            removed.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FileLock.take(path, signed=True)
    with pytest.raises(Held):
        FileLock.take(path, signed=True)
    lock.release()
    assert len(removed) == 3
    monkeypatch.setattr(locking, "_is_at", lambda *_: False)
    open_before = os.listdir("/proc/self/fd")
    with pytest.raises(Held):
        FileLock.take(path, signed=True)
    assert os.listdir("/proc/self/fd") == open_before


def test_a_holder_is_named_alone(tmp_path):
    """What a process that was killed wrote may be longer than what its follower writes."""
    path = tmp_path / "lock"
    path.write_text(f"process {2**31} on a machine of a very long name indeed\n")
    lock = FileLock.take(path, signed=True)
    with pytest.raises(Held) as held:
        FileLock.take(path, signed=True)
    assert str(held.value) == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()


def test_what_replaced_the_file_is_not_removed(tmp_path):
    path = tmp_path / "lock"
    lock = FileLock.take(path, signed=False)
    path.rename(tmp_path / "moved")
    path.write_text("another's")
    lock.release()
    assert path.read_text() == "another's"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FileLock.take(tmp_path / "lock", signed=True)
    assert not lock.is_enforced
    lock.release()
    assert not list(tmp_path.iterdir())


def test_another_failure_is_one(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    open_before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Input/output error"):
        FileLock.take(tmp_path / "lock", signed=True)
    assert os.listdir("/proc/self/fd") == open_before
