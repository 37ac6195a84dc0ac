"""A bounded queue between two threads that ends, fails and closes; nobody ever polls."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The channel was closed by `close`; whoever works for it stops. Internal to the loader."""


class Ended(Exception):
    """The producer ended the channel and all its items were taken. Internal to the loader."""


def nobody_listens() -> None:
    """In place of what is told of news."""


class Channel(Generic[T]):
    """Passes items from one producer to one consumer in order.

    The producer ends it with `end` or `fail`, the consumer stops it with `close`.
    """

    def __init__(self, capacity: int, on_news: Callable[[], None] = nobody_listens) -> None:
        """Has none yet.

        Args:
          capacity: how many wait for the consumer.
          on_news: called by the producer after it has added some or ended.
        """
        self._capacity, self._on_news = capacity, on_news
        self._items: deque[T] = deque()
        self._wanted = 0
        """Room that the producer waits for; 0: it does not wait."""
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None

    def put(self, *items: T) -> None:
        """Adds items, all at once; blocks until there is room for them.

        Several wake the consumer once. As many as the capacity or fewer.

        Raises:
          Closed: the consumer closed the channel.
        """
        with self._changed:
            self._wanted = len(items)
            self._changed.wait_for(lambda: self._closed or self._room() >= len(items))
            self._wanted = 0
            if self._closed:
                raise Closed
            self._items.extend(items)
            self._changed.notify_all()
        self._on_news()

    def _room(self) -> int:
        return self._capacity - len(self._items)

    def is_empty(self) -> bool:
        """Whether the consumer took everything so far."""
        with self._changed:
            return not self._items

    def get(self) -> T:
        """Takes the oldest item; blocks while there is none.

        Raises:
          Ended: the producer ended the channel and all items were taken.
          Closed: the channel was closed.
          Exception: what the producer failed with, after the items before it.
        """
        with self._changed:
            self._changed.wait_for(self._has_news)
            return self._get()

    def get_now(self) -> T | None:
        """As `get`; None where that would block."""
        with self._changed:
            return self._get() if self._has_news() else None

    def _has_news(self) -> bool:
        return self._closed or self._ended or bool(self._items)

    def _get(self) -> T:
        if self._closed:
            raise Closed
        if self._items:
            item = self._items.popleft()
            if 0 < self._wanted <= self._room():
                self._changed.notify_all()
            return item
        if self._error is not None:
            raise self._error
        raise Ended

    def end(self) -> None:
        """Says that no item follows."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._on_news()

    def fail(self, error: BaseException) -> None:
        """Ends the channel with an error that `get` raises."""
        self._error = error
        self.end()

    def close(self) -> None:
        """Drops the items and wakes both sides; may be called from any thread, more than once."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
