"""What a loader delivers: sizes of blocks and batches, shuffling, epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from penstock.position import Position

_PLAIN_BLOCK_ROWS = 8_192


@dataclass(frozen=True, slots=True)
class LoaderPlan:
    """What a loader delivers. Equal plans over equal files deliver equal batches."""

    batch_size: int
    block_rows: int
    """Rows that are joined, and shuffled if `shuffled`; their samples are whole batches."""
    shuffled: bool
    seed: int
    epochs: int
    start: Position
    """With the lanes into which the data is divided."""
    samples_per_row: int = 1
    """More than 1 where negatives are drawn."""
    redraws: bool = False
    """Whether negatives depend on seed and epoch as well as on the block."""
    block_bytes: int = 2**63 - 1
    """Of decoded rows: a block that would be larger has fewer rows, as many whole batches as fit
    (at least one)."""
    joins_windows: bool = False
    """Whether rows among which no negative can be drawn count as of the lane's next window of event
    time: where negatives are drawn, and the data has windows."""
    most_malformed: tuple[int | None, float | None] = (None, None)
    """Rows that may be left out as malformed, and which share of those read; None: any."""
    trains: bool = True
    """Positions then identify the files, and an epoch without a good row is an error."""

    @classmethod
    def of(
        cls,
        batch_size: int,
        block_rows: int,
        seed: int,
        epochs: int,
        start: Position,
        *,
        shuffled: bool,
        samples_per_row: int = 1,
        redraws: bool = False,
    ) -> LoaderPlan:
        """Rounds the block up to whole batches, so that only an epoch's last batch is short.

        `block_rows` 0: as many as make no difference.
        """
        plan = cls(
            batch_size,
            block_rows or _PLAIN_BLOCK_ROWS,
            shuffled,
            seed,
            epochs,
            start,
            samples_per_row,
            redraws,
        )
        unit = plan.rows_of_whole_batches
        return replace(plan, block_rows=-(-plan.block_rows // unit) * unit)

    @property
    def num_lanes(self) -> int:
        """Into which the data is divided."""
        return len(self.start.lanes)

    @property
    def rows_of_whole_batches(self) -> int:
        """A block's rows are a multiple of these."""
        return self.batch_size // math.gcd(self.batch_size, self.samples_per_row)

    @property
    def sizes_of_blocks(self) -> tuple[int, int]:
        """Rows of a block, and of what it is a multiple: by these a ledger knows blocks again."""
        return self.block_rows, self.rows_of_whole_batches

    def rows_to_begin_a_block(self, rows: int) -> int:
        """Rows that a lane must have left after `rows` of it for its part of another block.

        Fewer belong to the last one. Negatives are drawn among the rows of a block, so that none
        may be short.
        """
        return 1 if self.samples_per_row == 1 else max(rows, 1)
