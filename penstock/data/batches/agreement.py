"""What the readers of lanes tell each other: how a block is dealt, and what is in it.

A pure function of what all lanes offer, so that every rank comes to the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from penstock.data.batches.lane_queue import Offer
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.quarantine import LeftOut
from penstock.errors import GroupError
from penstock.position import Counts, FileTag, LanePosition

UNLIMITED = 2**63 - 1


class ReaderGroup(Protocol):
    """The ranks that read the lanes; all make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This one's number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def gathered_bytes(self, content: bytes) -> list[bytes]:
        """What each of them says."""


class LaneBlock(NamedTuple):
    """A lane's part of a block."""

    position: LanePosition
    counts: Counts
    """Of its rows."""
    tags: Sequence[tuple[int, FileTag]]
    """Number and identity of files, as far as they were read for it."""
    malformed: Sequence[LeftOut]
    ended: Sequence[tuple[int, int]] = ()
    """Extents that the lane read to their end, where lanes take them in turn: file and start."""
    left_out: int = 0
    """Rows at the end of the data among which no negative can be drawn."""


class Agreement:
    """Between the ranks that read the lanes; alone, one has nothing to ask."""

    def __init__(self, ranks: ReaderGroup | None) -> None:
        """None: one process reads all lanes."""
        self._ranks = None if ranks is None or ranks.size == 1 else ranks
        self._is_over = False

    def offers(self, mine: Mapping[int, Offer]) -> dict[int, Offer]:
        """Those of all lanes by their number."""
        if self._ranks is None:
            return dict(mine)
        said = [[number, *offer] for number, offer in mine.items()]
        return {
            number: Offer(*offer)
            for of_rank in self._told("offers", said)
            for number, *offer in of_rank
        }

    def blocks(self, mine: Mapping[int, LaneBlock]) -> dict[int, LaneBlock]:
        """Those of all lanes by their number."""
        if self._ranks is None:
            return dict(mine)
        said = [[number, block.position.to_dict(), *block[1:]] for number, block in mine.items()]
        return {
            number: LaneBlock(
                LanePosition.from_dict(position),
                Counts(*counts),
                [(file, FileTag(*tag)) for file, tag in tags],
                [LeftOut(FileTag(*tag), *rest) for tag, *rest in malformed],
                [(file, start) for file, start in ended],
                left_out,
            )
            for of_rank in self._told("blocks", said)
            for number, position, counts, tags, malformed, ended, left_out in of_rank
        }

    def from_first(self, say: Callable[[], Any]) -> Any:
        """What the first rank says, on every rank: plain data as JSON has it, not None."""
        if self._ranks is None:
            return say()
        return self._told("first", say() if self._ranks.rank == 0 else False)[0]

    def in_first(self, do: Callable[[], None]) -> None:
        """Has the first rank do something, before any goes on."""

        def done() -> bool:
            do()
            return True

        self.from_first(done)

    def leave(self) -> None:
        """Tells the others, who wait for it, that nothing more comes from this rank."""
        if self._ranks is not None and not self._is_over:
            self._is_over = True
            self._ranks.gathered_bytes(b"null")

    def _told(self, what: str, said: Any) -> list[Any]:
        assert self._ranks is not None
        told = self._ranks.gathered_bytes(json.dumps({what: said}).encode())
        found = [json.loads(content) for content in told]
        for rank, content in enumerate(found):
            if content is None:
                self._is_over = True
                raise GroupError(
                    f"rank {rank} stopped reading its part of the data, and says why; rank "
                    f"{self._ranks.rank} cannot go on without it"
                )
        return [content[what] for content in found]


class Dealt(NamedTuple):
    """How many rows each lane gives to a block."""

    rows: list[int]
    is_last: list[bool]
    """Whether they are the last of the lane in the epoch."""
    window: int
    """Of event time, of which all of them are."""


Asking: TypeAlias = Callable[[Sequence[int], int, int], Sequence[Offer]]
"""Given the rows wanted of each lane, the memory that each may take and the last window of event
time that they may be of, asks all lanes."""


def deal(plan: LoaderPlan, offers: Asking, window: int) -> Dealt:
    """Asks the lanes for rows until a block is full, or nothing is left.

    Every lane gives as many; where one has fewer, the others make up for it. A block has rows of
    one window of event time, so that lanes stay at one, and what it holds does not depend on which
    later windows are there yet. Only at the end of a window or an epoch is it no multiple of whole
    batches.

    Args:
      plan: with the size of the block.
      offers: asks all lanes.
      window: that of the block before, or any earlier one.
    """
    lanes, unit = plan.num_lanes, plan.rows_of_whole_batches
    found, window = _full(lanes, plan.block_rows, plan.block_bytes // lanes, offers, window)
    if not is_whole_window(found) and sum(offer.rows for offer in found) < unit:
        # Not one batch fits into the memory: there is one all the same.
        found, window = _full(lanes, unit, UNLIMITED, offers, window)
    rows = [offer.rows for offer in found]
    if not is_whole_window(found):
        rows = without(rows, sum(rows) % unit)
    is_last = [one.is_last and n == one.rows for one, n in zip(found, rows, strict=True)]
    return Dealt(rows, is_last, window)


def is_whole_window(found: Sequence[Offer]) -> bool:
    """Whether lanes offer all that they have of the window."""
    return all(offer.is_last or offer.next_window is not None for offer in found)


def _full(
    lanes: int, rows: int, most_bytes: int, offers: Asking, window: int
) -> tuple[Sequence[Offer], int]:
    """Offers of so many rows together, or of all that there are; and their window."""
    evenly = [rows // lanes + (lane < rows % lanes) for lane in range(lanes)]
    wanted = list(evenly)
    while True:
        found = offers(wanted, most_bytes, window)
        missing = rows - sum(offer.rows for offer in found)
        nexts = [offer.next_window for offer in found if offer.next_window is not None]
        if missing == rows and nexts and is_whole_window(found):
            # As if this were the first window asked for: it may be, where others are listed.
            window, wanted = min(nexts), list(evenly)
            continue
        # Each time one lane more has come to its end; or nothing is missing.
        able = [
            n
            for n, offer in enumerate(found)
            if not (offer.is_last or offer.is_limited or offer.next_window is not None)
        ]
        if missing <= 0 or not able:
            return found, window
        for place, lane in enumerate(able):
            wanted[lane] += missing // len(able) + (place < missing % len(able))


def without(rows: Sequence[int], excess: int) -> list[int]:
    """Takes some rows off, of each lane in proportion to what it has."""
    total = sum(rows)
    left = [n - n * excess // total for n in rows] if excess else list(rows)
    over = sum(left) - (total - excess)
    for lane in sorted(range(len(left)), key=lambda lane: (-left[lane], lane))[:over]:
        left[lane] -= 1
    return left
