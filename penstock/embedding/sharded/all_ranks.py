"""What all ranks of a collection do together: it is done on all of them, or refused on all."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager

from penstock.embedding.sharded.agreement import told_to_all
from penstock.embedding.sharded.store import Ranks
from penstock.errors import CheckpointError, CheckpointFailedElsewhere


def all_do(ranks: Ranks | None, task: str, remains: str) -> AbstractContextManager[None]:
    """See `told_to_all`; a rank that could do its part says what remains as it was.

    Raises:
      CheckpointFailedElsewhere: another rank could not.
    """
    return told_to_all(
        (lambda number: number) if ranks is None else ranks.total,
        lambda failed: CheckpointFailedElsewhere(
            f"{failed} other ranks cannot {task}, which say why; {remains}"
        ),
    )


def check_one_for_all(ranks: Ranks | None, given: object, told: str) -> None:
    """Refuses, on all ranks, that they were given unlike things: each would keep its own rows.

    Args:
      ranks: None: nobody else.
      given: what is to be alike, by its repr.
      told: what this rank was given, and what to do.

    Raises:
      CheckpointError: they were.
    """
    if ranks is None:
        return
    digest = hashlib.blake2b(repr(given).encode(), digest_size=7).digest()
    mine = int.from_bytes(digest, "little")
    if ranks.total(mine != ranks.agree(mine)):
        raise CheckpointError(
            f"the ranks were given unlike tables to load, rank {ranks.part[0]} {told}. Nothing was "
            "changed"
        )
