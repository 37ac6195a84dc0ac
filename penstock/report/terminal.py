"""Where words go: a terminal, a pipe or a file, which may close, fill up, or know ASCII alone.

What a command is for (the tables of `inspect`) must arrive: where it cannot, the command ends.
What only accompanies work (the progress of training) may be lost: that is noted once.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TextIO, cast

from rich.console import Console

from penstock.errors import ConfigError

RED, YELLOW = 31, 33
"""As terminals number them."""
_PIPE_WIDTH = 160
_LEAST_WIDTH, _MOST_WIDTH = 40, 1000
_STANDARD_FILES = (0, 1, 2)


class NobodyReads(BaseException):
    """Whoever read the standard output is gone, as after `| head -1`: no reason to go on."""


class Stream(io.TextIOBase):
    """A text stream around another one, which says what happens where words cannot be written.

    A character that the stream's encoding lacks is written as an escape.

    Args:
      inner: where words go; None: it is closed.
      failed: called with the reason where they cannot be written; may raise. Unless it does,
        nothing more is written.
    """

    def __init__(self, inner: TextIO | None, failed: Callable[[OSError], None]) -> None:
        self._inner = inner
        self.failed = failed
        self._is_given_up = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the inner stream."""
        return getattr(self._inner, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._inner is not None and not self._inner.closed and self._inner.isatty()

    def fileno(self) -> int:
        """The descriptor of the inner stream."""
        if self._inner is None:
            raise io.UnsupportedOperation("fileno: the stream is closed")
        return self._inner.fileno()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, text: str, /) -> int:
        """Writes, or gives up for good."""
        shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda inner: inner.write(shown))
        return len(text)

    def flush(self) -> None:
        """Flushes, or gives up for good."""
        self._try(lambda inner: inner.flush())

    def close(self) -> None:
        """Ends this stream, also when it is collected; the inner one stays as it is."""
        self._is_given_up = True
        super().close()

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self._is_given_up:
            return
        try:
            if self._inner is None:
                raise OSError(errno.EBADF, "it is closed")
            act(self._inner)
        except (OSError, ValueError) as error:  # ValueError: closed by somebody in this process
            self._is_given_up = True
            self.failed(error if isinstance(error, OSError) else OSError(str(error)))


def needed(error: OSError) -> None:
    """For output that a command is for. Raises `NobodyReads`, or `ConfigError` with the reason."""
    if isinstance(error, BrokenPipeError):
        raise NobodyReads from None
    raise ConfigError(f"standard output: cannot be written: {error.strerror or error}") from None


def ignored(error: OSError) -> None:
    """For output that may be lost."""


def console_of(stream: TextIO | Stream) -> Console:
    """A console of a width that makes sense, whatever the environment says of the terminal."""
    file = cast(IO[str], stream)
    console = Console(file=file)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # A file or a pipe has no width; 80 columns would break most tables.
        return Console(file=file, width=_PIPE_WIDTH)
    width = min(max(console.width or 80, _LEAST_WIDTH), _MOST_WIDTH)
    return console if width == console.width else Console(file=file, width=width)


def say(text: str) -> None:
    """Prints a line that only accompanies what was done."""
    print(text, file=Stream(sys.stdout, ignored), flush=True)


def complain(text: str, color: int = RED) -> None:
    """Prints a line on the standard error, coloured on a terminal; where that fails, it is lost."""
    stream = Stream(sys.stderr, ignored)
    print(f"\x1b[{color}m{text}\x1b[0m" if stream.isatty() else text, file=stream, flush=True)


@contextmanager
def standard_streams() -> Iterator[Stream]:
    """Guards the standard output and error of a command line; yields the former.

    Where they are closed, their descriptors lead nowhere: the next file that is opened would get
    them, and with them what libraries print. Output is `needed`, unless `Stream.failed` is set.
    """
    for number in _STANDARD_FILES:
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    out, errors = sys.stdout, sys.stderr
    guarded = Stream(out, needed)
    sys.stdout, sys.stderr = guarded, Stream(errors, ignored)
    try:
        yield guarded
    finally:
        sys.stdout, sys.stderr = out, errors
        for stream in (out, errors):
            if stream is not None and not stream.closed:
                _settle(stream)


def _settle(stream: TextIO) -> None:
    """Flushes; what cannot be written is thrown away, so that Python does not try it at exit."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
