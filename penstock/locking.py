"""A lock on a file: one process at a time, let go by the kernel when its holder dies, however."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_ATTEMPTS = 100
_MOST_NOTE_BYTES = 200


class Held(Exception):
    """Another process has the lock; the text says who, where that is known."""


def holder_of(path: Path) -> str | None:
    """What the note of a signed lock says of who holds it; None: nobody does.

    Raises:
      OSError: the file cannot be looked at.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(descriptor, _MOST_NOTE_BYTES, 0).decode(errors="replace").strip()
    finally:
        os.close(descriptor)
    return None


class FileLock:
    """An exclusive lock on a file, which is made for it and removed with it. Linux `flock`."""

    def __init__(self, path: Path, descriptor: int, is_enforced: bool) -> None:
        self._path = path
        self._descriptor = descriptor
        self.is_enforced = is_enforced
        """False: the file system has no locks, and nothing keeps another process out."""

    @classmethod
    def take(cls, path: Path, *, signed: bool) -> FileLock:
        """Takes the lock or fails at once.

        Args:
          path: of the file; its folder must be there.
          signed: write into the file who holds it, for the message of the next one.

        Raises:
          Held: another process has it, or another part of this one.
          OSError: the file cannot be made.
        """
        # Whoever held it may remove the file between our opening and our locking it.
        for _ in range(_ATTEMPTS):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                is_enforced = _flock(descriptor)
                if _is_at(descriptor, path):
                    if signed:
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"process {os.getpid()} on {_host()}\n".encode())
                    return cls(path, descriptor, is_enforced)
            except BlockingIOError:
                holder = os.pread(descriptor, _MOST_NOTE_BYTES, 0) if signed else b""
                os.close(descriptor)
                raise Held(holder.decode(errors="replace").strip()) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise Held("")

    def release(self) -> None:
        """Removes the file, if it is still at its path, and lets go."""
        # While it is locked, nobody else can have made this very file theirs. Where it cannot be
        # removed, it stays, and is nobody's.
        with suppress(OSError):
            if _is_at(self._descriptor, self._path):
                self._path.unlink()
        os.close(self._descriptor)


def _flock(descriptor: int) -> bool:
    """Locks; False: the file system cannot. Raises BlockingIOError: somebody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _host() -> str:
    return socket.gethostname()
