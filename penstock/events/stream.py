"""The stream: takes what a process tells and gives it to every sink, in the order it was told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol

from penstock.errors import PenstockError
from penstock.events.event import Event, Role, check


class Sink(Protocol):
    """Something that takes events in: a file, a display, a server of metrics."""

    def take(self, event: Event) -> None:
        """Takes an event, one at a time; passes over kinds that it has no use for.

        Raises:
          PenstockError: it cannot go on; it gets no further event. It tells nothing itself.
        """

    def close(self) -> None:
        """Lets go of files and threads. Called once; no event follows."""


class EventStream:
    """Events of one process. Safe to use from several threads.

    Args:
      role: of this process.
      clock: the time in s since 1970, UTC.
    """

    def __init__(self, role: Role, clock: Callable[[], float] = time.time) -> None:
        self._role = role
        self._clock = clock
        self._lock = threading.Lock()
        self._sinks: list[Sink] = []
        self._failed: list[Sink] = []
        """Those that have raised."""

    def add(self, *sinks: Sink) -> None:
        """Adds sinks behind those that are there; they get what is told from now on."""
        with self._lock:
            self._sinks += sinks

    def tell(self, kind: str, step: int, values: Mapping[str, Any]) -> Event:
        """Makes an event of this process, and gives it to the sinks.

        Args:
          kind: one of `registry.KINDS`.
          step: steps trained by now.
          values: by the names of the kind's fields; not changed afterwards.

        Raises:
          EventError: the registry does not know it; no sink has seen it.
          PenstockError: a sink cannot go on; the others have the event all the same.
        """
        event = Event(kind, step, self._clock(), self._role, values)
        check(event)
        errors: list[PenstockError] = []
        with self._lock, ExitStack() as rest:
            for sink in reversed(self._sinks):  # called from the last on, whatever one raises
                rest.callback(self._give, sink, event, errors)
        if errors:
            raise errors[0]
        return event

    def _give(self, sink: Sink, event: Event, errors: list[PenstockError]) -> None:
        """Gives an event to a sink, which gets no more if it raises anything."""
        has_it = False
        try:
            sink.take(event)
            has_it = True
        except PenstockError as error:
            errors.append(error)
        finally:
            if not has_it:
                self._sinks.remove(sink)
                self._failed.append(sink)

    def close(self) -> None:
        """Closes all sinks; the first to come is the last to go."""
        with self._lock:
            sinks = [*self._sinks, *self._failed]
            self._sinks, self._failed = [], []
        with ExitStack() as rest:
            for sink in sinks:
                rest.callback(sink.close)


class Latest:
    """A sink that remembers the newest event of each kind."""

    def __init__(self) -> None:
        self._events: dict[str, Event] = {}

    def take(self, event: Event) -> None:
        """Remembers it."""
        self._events[event.kind] = event

    def of(self, kind: str) -> Event | None:
        """The newest one of a kind."""
        return self._events.get(kind)

    def close(self) -> None:
        """Nothing to let go of."""
