"""What all ranks of a collection do together: it is done on all of them, or refused on all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.embedding.sharded.store import Ranks
from penstock.errors import CheckpointError


@contextmanager
def told_to_all(ranks: Ranks | None, task: str, remains: str) -> Iterator[None]:
    """Ends when every rank has done its part of a task; one that could not ends it for all.

    Raises:
      CheckpointError: another rank could not.
    """
    error: OSError | CheckpointError | None = None
    try:
        yield
    except (OSError, CheckpointError) as raised:
        error = raised
    failed = 0 if ranks is None else ranks.total(error is not None)
    if error is not None:
        raise error
    if failed:
        raise CheckpointError(f"{failed} other ranks cannot {task}, which say why; {remains}")


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
