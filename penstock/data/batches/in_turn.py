"""How blocks are dealt where lanes take extents as they come to them: of what was read so far.

Which rows make a block then depends on who reads how fast. It is written down, and dealt again as
it was where the same data is read again.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.data.batches.agreement import (
    UNLIMITED,
    Asking,
    Dealt,
    is_whole_window,
    without,
)
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.turns import News
from penstock.errors import DataError

_WAIT_S = 0.005
"""After so long at most all ranks look again, as another one may have news."""


def deal_now(plan: LoaderPlan, offers: Asking, window: int, news: News) -> Dealt:
    """Waits until all lanes together have read a block, whoever read it, and takes that.

    As with `deal`, a block has rows of one window of event time, and but for the end of a window or
    an epoch it is whole batches. A lane gives in proportion to what it has.

    Args:
      plan: with the size of the block.
      offers: asks all lanes what they have so far.
      window: that of the block before, or any earlier one.
      news: wakes this rank.
    """
    lanes, unit = plan.num_lanes, plan.rows_of_whole_batches
    most_rows, most_bytes = plan.block_rows, plan.block_bytes // lanes
    while True:
        found = offers([most_rows] * lanes, most_bytes, window)
        rows = [offer.rows for offer in found]
        total, is_whole = sum(rows), is_whole_window(found)
        nexts = [offer.next_window for offer in found if offer.next_window is not None]
        if is_whole and not total and nexts:
            window = min(nexts)
            continue
        # No lane reads on, for want of memory.
        is_full = all(
            offer.is_limited or offer.is_last or offer.next_window is not None for offer in found
        )
        if is_whole or total >= most_rows or (is_full and total >= unit):
            break
        if is_full:
            # Not one batch fits into the memory: there is one all the same.
            most_rows, most_bytes = unit, UNLIMITED
        else:
            news.wait(_WAIT_S)
    most = min(total, most_rows)
    if not is_whole or total > most_rows:
        most -= most % unit
    rows = without(rows, total - most)
    is_last = [one.is_last and n == one.rows for one, n in zip(found, rows, strict=True)]
    return Dealt(rows, is_last, window)


def deal_again(
    rows: Sequence[int],
    offers: Asking,
    window: int,
    number: tuple[int, int],
    *,
    lanes: int,
    may_be_later: bool = False,
) -> Dealt:
    """Deals a block as it was dealt before; waits for the lanes to read it.

    Args:
      rows: of each lane.
      offers: asks all lanes, and waits for what is wanted.
      window: that of the block before, which is returned.
      number: epoch and number of the block, for the error.
      lanes: of the run.
      may_be_later: whether, if nothing is left, the block may be of windows that come next.

    Raises:
      DataError: a lane does not have so many rows, or the block is of other lanes.
    """
    if len(rows) != lanes:
        raise DataError(
            f"ledger: block {number[1]:,} of epoch {number[0]} has rows of {len(rows)} lanes, and "
            f"the run has {lanes}: it is of another run; remove it, to read on in another order"
        )
    found = offers(rows, UNLIMITED, UNLIMITED)
    if may_be_later and all(offer.is_last and not offer.rows for offer in found):
        return Dealt([0] * len(found), [True] * len(found), window)
    for lane, (offer, wanted) in enumerate(zip(found, rows, strict=True)):
        if offer.rows < wanted:
            raise DataError(
                f"ledger: block {number[1]:,} of epoch {number[0]} had {wanted:,} rows of lane "
                f"{lane}, which has only {offer.rows:,} left now; put the files back as they were, "
                "or remove the ledger, to read on in another order"
            )
    return Dealt(list(rows), [one.is_last for one in found], window)
