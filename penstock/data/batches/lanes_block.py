"""The rows of a block that are read here, in the order of its batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from penstock import _core
from penstock.data.batches.blocks import Cut
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.columns.block import Block, Samples
from penstock.data.columns.negatives import ItemRows, NegativeColumns, draw_rows
from penstock.data.plan.lanes import batches_of
from penstock.data.plan.origin import Origin, Origins, PlacedRows


class LanesBlock:
    """Each lane's part is shuffled, and has its negatives drawn, by itself."""

    def __init__(self, cut: Cut, plan: LoaderPlan, negatives: NegativeColumns | None) -> None:
        """Joins the rows; next to nothing is copied.

        Raises:
          DataError: no negative can be drawn.
        """
        self._plan, self._negatives = plan, negatives
        self._epoch, self._number = cut.inside.epoch, cut.inside.block
        good = {lane: [one for one in some if one.size] for lane, some in cut.stretches.items()}
        self._placed = {
            lane: [PlacedRows(one.place, one.low, one.high) for one in some]
            for lane, some in good.items()
        }
        parts = [
            (one.rows, one.low, one.high)
            for some in good.values()
            for one in some
            if one.rows is not None
        ]
        self._block = Block(parts, negatives) if parts else None
        self._samples = {lane: cut.inside.lanes[lane].samples for lane in good}
        dealt = batches_of(
            [lane.samples for lane in cut.inside.lanes], cut.start.block_row, plan.batch_size
        )
        self.lane_sizes: list[list[int]] = np.stack([np.diff(cuts) for cuts in dealt], 1).tolist()
        """[batches, lanes] samples of each batch that is left."""
        self._dealt = {lane: dealt[lane] for lane in good}
        """Of each lane, which of its samples each batch begins with."""

    def batches(self) -> Iterator[Samples | None]:
        """What is read here of each batch that is left, by lanes; None: nothing."""
        sizes: list[int] = np.sum([np.diff(cuts) for cuts in self._dealt.values()], axis=0).tolist()
        samples, drawn = self._in_order(), self._draw()
        size_of_batch = self._plan.batch_size
        # With negatives a block has many more samples than rows; only some are copied at a time.
        at_once = -(-self._plan.block_rows // size_of_batch)
        done = 0
        for size, run in groupby(sizes):
            left = sum(1 for _ in run)
            while left:
                count = min(left, at_once)
                left -= count
                if not size or self._block is None:
                    yield from [None] * count
                    continue
                some = samples[done : done + count * size]
                done += count * size
                yield from self._block.batches(some, size, drawn)

    def origin(self, batch: int) -> object:
        """Where the samples of a batch come from, in words; by its number among those left."""
        per_row = self._plan.samples_per_row
        ranges = [
            Origin(
                self._placed[lane],
                int(cuts[batch]) // per_row,
                -(-int(cuts[batch + 1]) // per_row),
                self._plan.shuffled,
            )
            for lane, cuts in self._dealt.items()
            if cuts[batch] < cuts[batch + 1]
        ]
        return ranges[0] if len(ranges) == 1 else Origins(ranges)

    def _in_order(self) -> NDArray[np.int64] | range:
        """Samples of the block, batch by batch, and within a batch lane by lane."""
        orders, batches = [], []
        first = 0
        for lane, cuts in self._dealt.items():
            n = self._samples[lane]
            if len(self._dealt) == 1 and not self._plan.shuffled:
                return range(int(cuts[0]), n)
            order = np.arange(n)
            if self._plan.shuffled:
                key = np.random.SeedSequence(self._seed(lane)).generate_state(2, np.uint64)
                order = _core.shuffle(int(key[0]), int(key[1]), n)
            orders.append(order[cuts[0] :] + first if first else order[cuts[0] :])
            batches.append(np.repeat(np.arange(len(cuts) - 1, dtype=np.int32), np.diff(cuts)))
            first += n
        if len(orders) == 1:
            return orders[0]
        in_order: NDArray[np.int64] = np.concatenate(orders)[
            np.argsort(np.concatenate(batches), kind="stable")
        ]
        return in_order

    def _seed(self, lane: int) -> list[int]:
        seed = [self._plan.seed & (2**64 - 1), self._epoch, self._number]
        return seed if self._plan.num_lanes == 1 else [*seed, lane]

    def _draw(self) -> NDArray[np.int64] | None:
        """Rows from which the block's samples take their items; None: no negatives are drawn."""
        if self._negatives is None or self._block is None or self._block.item_rows is None:
            return None
        drawn, first = [], 0
        for lane, samples in self._samples.items():
            rows = samples // self._plan.samples_per_row
            if not rows:
                continue
            seed = self._seed(lane) if self._plan.redraws else self._fixed_seed(lane)
            some = _between(self._block.item_rows, first, first + rows)
            where = Origin(self._placed[lane], 0, rows, self._plan.shuffled)
            drawn.append(draw_rows(some, self._negatives, seed, str(where)) + first)
            first += rows
        return np.concatenate(drawn)

    def _fixed_seed(self, lane: int) -> list[int]:
        return [self._number] if self._plan.num_lanes == 1 else [self._number, lane]


def _between(rows: ItemRows, start: int, stop: int) -> ItemRows:
    def some(
        pair: tuple[NDArray[np.int64], NDArray[np.bool_]],
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        return pair[0][start:stop], pair[1][start:stop]

    users = None if rows.users is None else some(rows.users)
    return ItemRows(rows.items[start:stop], [some(part) for part in rows.parts], users)
