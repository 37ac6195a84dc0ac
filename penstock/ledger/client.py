"""Asks for the ledger that another process keeps, and starts that process on the first rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import zmq

from penstock.errors import DataError, GroupError, JobNote
from penstock.ledger.file import ExtentPlace, LedgerFile
from penstock.ledger.service import MOST_BYTES

_ANSWER_S, _PATIENCE_S, _POLL_MS = 0.5, 60.0, 50
"""How long an answer may take before it is asked for again, twice as long each time, and before
that is given up."""
_MOST_STARTS, _WITHIN_S = 5, 60.0
_START_S = 60.0


class Ranks(Protocol):
    """Who asks."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def gathered_bytes(self, content: bytes) -> list[bytes]:
        """What each of them says."""


class Address(NamedTuple):
    """Where to ask, and as whom."""

    endpoint: str
    public: str
    """The service's key."""
    client_public: str
    client_secret: str


class LedgerClient:
    """A ledger elsewhere. Safe to share by threads, which take turns.

    A request whose answer does not come is sent again, to the same answer.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._is_closed = False
        self._number = 0
        self._socket: zmq.Socket[bytes] | None = None

    def history(self, epoch: int, lane: int) -> list[ExtentPlace]:
        """See `LedgerFile.history`."""
        return [(file, start) for file, start in self._ask("history", epoch, lane)]

    def take(
        self, epoch: int, lane: int, turn: int, upcoming: Sequence[ExtentPlace]
    ) -> ExtentPlace | None:
        """See `LedgerFile.take`."""
        said = self._ask("take", epoch, lane, turn, list(upcoming))
        return None if said is None else (said[0], said[1])

    def block(self, epoch: int, number: int, sizes: Sequence[int]) -> list[int] | None:
        """See `LedgerFile.block`."""
        rows: list[int] | None = self._ask("block", epoch, number, list(sizes))
        return rows

    def add_block(self, epoch: int, number: int, sizes: Sequence[int], rows: Sequence[int]) -> None:
        """See `LedgerFile.add_block`."""
        self._ask("add_block", epoch, number, list(sizes), list(rows))

    def close(self) -> None:
        """Who asks meanwhile gets an error."""
        self._is_closed = True
        with self._lock:
            self._drop()

    def _ask(self, *request: Any) -> Any:
        with self._lock:
            self._number += 1
            content = json.dumps([self._number, *request]).encode()
            end_s, patience_s = time.monotonic() + _PATIENCE_S, _ANSWER_S
            while time.monotonic() < end_s:
                said = self._answer(content, patience_s)
                patience_s *= 2
                if said is None:
                    self._drop()  # the next one begins anew, to the service's next life as well
                elif said[1] == "done":
                    return said[2]
                else:
                    raise DataError(f"ledger at {self._address.endpoint}: {said[2]}")
            raise GroupError(
                f"the ledger of the run, at {self._address.endpoint}, has not answered for "
                f"{_PATIENCE_S:g} s: its process or the network to it is gone"
            )

    def _answer(self, content: bytes, patience_s: float) -> list[Any] | None:
        """None: there is none."""
        asked = self._connected()
        asked.send(content)
        end_s = time.monotonic() + patience_s
        while time.monotonic() < end_s:
            if self._is_closed:
                raise DataError(f"ledger at {self._address.endpoint}: closed")
            if asked.poll(_POLL_MS):
                said: list[Any] = json.loads(asked.recv())
                return said if said[0] == self._number else None
        return None

    def _connected(self) -> zmq.Socket[bytes]:
        if self._socket is None:
            made: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
            made.curve_serverkey = self._address.public.encode()
            made.curve_publickey = self._address.client_public.encode()
            made.curve_secretkey = self._address.client_secret.encode()
            made.maxmsgsize, made.linger = MOST_BYTES, 0
            made.connect(self._address.endpoint)
            self._socket = made
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Service:
    """The process that keeps a ledger, started again when it dies."""

    def __init__(self, path: Path, host: str) -> None:
        """Starts it.

        Args:
          path: of the ledger.
          host: address of this machine on which it listens, and no other.

        Raises:
          DataError: it cannot be started, or cannot open the ledger.
        """
        public, secret = (key.decode() for key in zmq.curve_keypair())
        client_public, client_secret = (key.decode() for key in zmq.curve_keypair())
        self._said = {
            "path": str(path),
            "host": host,
            "port": 0,
            "secret": secret,
            "public": public,
            "client": client_public,
        }
        self._is_closed = threading.Event()
        self._starts: deque[float] = deque(maxlen=_MOST_STARTS)
        self.process = self._started()
        """It may be another one at any time."""
        endpoint = f"tcp://{host}:{self._said['port']}"
        self.address = Address(endpoint, public, client_public, client_secret)
        self._watch = threading.Thread(target=self._keep, name="penstock-ledger", daemon=True)
        self._watch.start()

    def close(self) -> None:
        """Ends it."""
        self._is_closed.set()
        self._watch.join()
        self._end()

    def _end(self) -> None:
        process = self.process
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "penstock.ledger.service"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(_START_S, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(self._said).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        said = json.loads(line) if line else {"error": "its process ended before it said anything"}
        if "error" in said:
            process.wait()
            raise DataError(f"the ledger cannot be kept: {said['error']}")
        self._said["port"] = said["port"]
        self._starts.append(time.monotonic())
        return process

    def _keep(self) -> None:
        while not self._is_closed.wait(0.05):
            if self.process.poll() is None:
                continue
            self._end()
            long_ago = time.monotonic() - _WITHIN_S
            if len(self._starts) == _MOST_STARTS and self._starts[0] > long_ago:
                return  # who asks says that nobody answers
            try:
                self.process = self._started()
            except DataError as error:
                warnings.warn(str(error), JobNote, 2)
                self._starts.append(time.monotonic())
                self._is_closed.wait(1.0)


class _Kept(LedgerClient):
    """On the rank that started the service."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.address)
        self._service = service

    def close(self) -> None:
        """Ends the service, too."""
        super().close()
        self._service.close()


def open_ledger(
    path: Path | None, ranks: Ranks | None, begin: Callable[[], None] = lambda: None
) -> LedgerFile | LedgerClient:
    """The ledger of a run: in this process, or in one that all ranks ask.

    Args:
      path: of its file; None, of one process alone: in memory.
      ranks: every one of them comes to this place; None: one process.
      begin: what the first one does before; it may raise DataError.

    Raises:
      DataError: it cannot be opened.
      GroupError: on the other ranks, that the first one could not.
    """
    if ranks is None or ranks.size == 1:
        begin()
        return LedgerFile(path)
    assert path is not None
    kept: _Kept | None = None
    said = b"null"
    try:
        if ranks.rank == 0:
            begin()
            service = Service(path, _host())
            kept = _Kept(service)
            said = json.dumps(service.address).encode()
    finally:
        told = json.loads(ranks.gathered_bytes(said)[0])
    if kept is not None:
        return kept
    if told is None:
        raise GroupError("rank 0 cannot open the ledger of the run, and says why")
    return LedgerClient(Address(*told))


def _host() -> str:
    """Address of this machine, rank 0's, at which the other ranks find it, and nobody else."""
    variables = os.environ
    if variables.get("LOCAL_WORLD_SIZE") == variables.get("WORLD_SIZE"):
        return "127.0.0.1"
    name = variables.get("MASTER_ADDR", "127.0.0.1")
    try:
        found = [info[4][0] for info in socket.getaddrinfo(name, None, socket.AF_INET)]
    except OSError as error:
        raise DataError(f"MASTER_ADDR {name!r}: no address of it is known here: {error}") from None
    # Its own name is often a loopback address to a machine, which others cannot reach.
    far = [str(one) for one in found if not str(one).startswith("127.")]
    return far[0] if far else _way_out()


def _way_out() -> str:
    """Address of the interface that leads to other networks; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address
