"""Keeps a ledger for many ranks, in a process of its own: `python -m penstock.ledger.service`.

It answers one request at a time over ZeroMQ, encrypted, and only those who have the run's key. What
it has answered is in the file, so that another process can take its place at any moment. It ends
with the process that started it, whatever becomes of that.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from penstock.errors import PenstockError
from penstock.ledger.file import LedgerFile

MOST_BYTES = 1 << 26
"""Of a message."""


class _Keys:
    """The keys of those who may ask."""

    def __init__(self, *keys: str) -> None:
        self._keys = {key.encode() for key in keys}

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether somebody with a key may."""
        return key in self._keys


def serve(ledger: LedgerFile, socket: zmq.Socket[bytes]) -> None:
    """Answers for ever."""
    verbs: Mapping[str, Callable[..., Any]] = {
        "history": ledger.history,
        "take": ledger.take,
        "block": ledger.block,
        "add_block": ledger.add_block,
    }
    while True:
        asker, _, content = socket.recv_multipart()
        socket.send_multipart([asker, b"", json.dumps(_answer(verbs, content)).encode()])


def _answer(verbs: Mapping[str, Callable[..., Any]], content: bytes) -> list[Any]:
    try:
        number, verb, *arguments = json.loads(content)
    except ValueError:
        return [-1, "refused", "a request that is no list of JSON"]
    if verb not in verbs:
        return [number, "refused", f"a request for {verb!r}"]
    try:
        return [number, "done", verbs[verb](*arguments)]
    except PenstockError as error:
        return [number, "failed", str(error)]
    except (TypeError, ValueError) as error:
        return [number, "refused", f"a request {verb!r}: {error}"]


def _end_with_parent(ledger: LedgerFile) -> None:
    """Standard input ends when the process at its other end does."""
    while sys.stdin.buffer.read(1):
        pass
    ledger.close()
    os._exit(0)


def _say(what: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Reads from the first line of the standard input what to serve, and says there on which port.

    The line holds `path`, `host`, `port` (0: any), and `secret`, `public` and `client`: the keys of
    this process, and the public one of those who may ask.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the run stops first, and asks until then
    said = json.loads(sys.stdin.buffer.readline())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(credentials_provider=_Keys(said["client"]))
    socket = context.socket(zmq.ROUTER)
    socket.curve_server = True
    socket.curve_secretkey = said["secret"].encode()
    socket.curve_publickey = said["public"].encode()
    socket.maxmsgsize, socket.linger = MOST_BYTES, 0
    try:
        ledger = LedgerFile(Path(said["path"]))
        socket.bind(f"tcp://{said['host']}:{said['port'] or '*'}")
    except (PenstockError, zmq.ZMQError) as error:
        _say({"error": str(error)})
        os._exit(1)
    port = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(":", 1)[1])
    threading.Thread(target=_end_with_parent, args=(ledger,), daemon=True).start()
    _say({"port": port})
    serve(ledger, socket)


if __name__ == "__main__":
    main()
