"""Lanes: the fixed number of parts into which training data is divided, whoever reads them.

Each lane has extents of its own and shuffles its own rows; a batch has samples of all lanes. Which
they are depends on the number of lanes alone, so that the same batches come about on any number of
ranks, each of which reads some lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.data.source import Extent


class Lane(NamedTuple):
    """One of the lanes."""

    number: int
    of: int
    """How many there are."""

    def extents(
        self, extents: Sequence[Extent], files: Mapping[str, int]
    ) -> Iterator[tuple[int, Extent]]:
        """Number and extent of those that are this lane's, in order; found as they are asked for.

        An extent's lane does not depend on other files, so that it stays the same where files grow
        and others are added. FORMAT: never change it; positions go on from it.

        Args:
          extents: of a part; those of one file side by side.
          files: numbers of the part's files.
        """
        path, place = None, 0
        for number, extent in enumerate(extents):
            place = place + 1 if extent.path == path else 0
            path = extent.path
            if (files[path] + place) % self.of == self.number:
                yield number, extent


def lanes_of_rank(lanes: int, rank: int, ranks: int) -> range:
    """The lanes that a rank reads."""
    return range(rank, lanes, ranks)


def batches_of(samples: Sequence[int], begin: int, batch_size: int) -> list[NDArray[np.int64]]:
    """Deals the samples of a block to batches: each has of all lanes, as evenly as can be.

    Args:
      samples: of each lane.
      begin: samples of the block that were delivered; the first batch follows them.
      batch_size: of all lanes together.

    Returns:
      Of each lane [batches + 1]: which of its samples each batch begins with.

    FORMAT: never change it; a block that was begun is finished in its order.
    """
    total = sum(samples)
    starts = np.arange(begin, total, batch_size)
    cuts = np.append(starts, total)
    if len(samples) == 1:
        return [cuts]
    # Where each sample of a lane would stand, were they spread evenly over the block.
    places = np.concatenate([(2 * np.arange(n) + 1) / (2 * max(n, 1)) for n in samples])
    lanes = np.repeat(np.arange(len(samples)), samples)
    in_order = lanes[np.argsort(places, kind="stable")]
    return [np.searchsorted(np.flatnonzero(in_order == lane), cuts) for lane in range(len(samples))]
