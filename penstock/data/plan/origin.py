"""Where rows come from, in words for messages; put together only when somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penstock.data.source import Place, Span


class PlacedRows(NamedTuple):
    """Rows [start, stop) of the chunk at a place."""

    place: Place
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Some rows of a block."""

    rows: Sequence[PlacedRows]
    """All rows of the block, in order."""
    start: int
    """Rows of the block that come before."""
    stop: int
    shuffled: bool
    """Then any row of the block may be among them."""

    def __str__(self) -> str:
        low, high = self.start, self.stop
        if self.shuffled:
            low, high = 0, sum(one.stop - one.start for one in self.rows)
        spans: list[Span] = []
        before = 0
        for place, first, end in self.rows:
            begin, until = max(low - before, 0), min(high - before, end - first)
            before += end - first
            if begin >= until:
                continue
            span = place.span(first + begin, first + until)
            if spans and spans[-1].path == span.path and spans[-1].unit == span.unit:
                # Batches of text may begin in the stretch in which the one before ended.
                spans[-1] = spans[-1]._replace(stop=max(span.stop, spans[-1].stop))
            else:
                spans.append(span)
        words = ", ".join(map(str, spans[:2]))
        if len(spans) > 2:
            words = f"{spans[0]} to {spans[-1]}"
        return words + (" (shuffled)" if self.shuffled else "")


@dataclass(frozen=True, slots=True)
class Origins:
    """Some rows of several lanes."""

    parts: Sequence[Origin]

    def __str__(self) -> str:
        words = [str(part) for part in self.parts[:2]]
        more = len(self.parts) - len(words)
        return " and ".join(words) + (f" and {more} more places" if more > 0 else "")
