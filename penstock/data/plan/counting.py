"""Work on many extents at once, on all cores: counting rows, where a source has to read for it."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeAlias, TypeVar

from penstock.data.source import Extent, Source

T = TypeVar("T")
R = TypeVar("R")

Progress: TypeAlias = Callable[[int, float | None], None]
"""Called with the rows so far and the share of the files that is done (None: unknown)."""
Stages: TypeAlias = Callable[[str], Progress]
"""Begins a stage of work by its name."""

_TICK_S = 0.25


def no_stages(name: str) -> Progress:
    """Shows no progress."""
    return lambda rows, share: None


def in_parallel(
    work: Callable[[T, Callable[[], bool]], R],
    items: Iterable[T],
    tick: Callable[[], None] = lambda: None,
) -> Generator[R]:
    """Does some work for each item on a thread a core and yields what comes of it, in order.

    Args:
      work: called with an item and a function that says whether nobody wants the result any more.
      items: taken little ahead of what is yielded.
      tick: called by the caller's thread every so often while it waits.

    Raises:
      Exception: what the work for the item raised.

    Effects: closing the iterator, or an error, waits for no thread; each ends at its next question.
    """
    threads = os.cpu_count() or 1
    stopped = threading.Event()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="counter")

    def result(future: Future[R]) -> R:
        while not future.done():
            # Woken now and then, the caller's thread also hears of signals.
            wait([future], _TICK_S)
            tick()
        return future.result()

    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item, stopped.is_set))
            if len(pending) >= 2 * threads:
                yield result(pending.popleft())
        while pending:
            yield result(pending.popleft())
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def count_rows(source: Source, extents: Sequence[Extent], stages: Stages) -> list[int]:
    """Rows of each extent; those that the source does not know are read, all extents at once.

    Args:
      source: of the extents.
      extents: each once.
      stages: told of the reading.

    Raises:
      DataError: a file cannot be read.
    """
    known = {extent: source.known_rows(extent) for extent in extents}
    unknown = [extent for extent, rows in known.items() if rows is None]
    if unknown:
        advance = stages("rows, to divide them")
        seen = sum(rows for rows in known.values() if rows is not None)
        lock = threading.Lock()

        def count(extent: Extent, is_unwanted: Callable[[], bool]) -> int:
            nonlocal seen
            total = 0
            for rows in source.row_counts(extent):
                total += rows
                with lock:
                    seen += rows
                if is_unwanted():
                    break
            return total

        def tick() -> None:
            expected = source.expected_rows(extents)
            advance(seen, min(seen / expected.rows, 1.0) if expected and expected.rows else None)

        for extent, rows in zip(unknown, in_parallel(count, unknown, tick), strict=True):
            known[extent] = rows
    return [rows for rows in known.values() if rows is not None]
