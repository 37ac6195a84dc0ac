"""What falls to a rank: one that never has a sample is told of, as it only waits for the others."""

from __future__ import annotations

import torch

from penstock.ranks.group import Group

_MOST_NAMED = 8


class Share:
    """The samples of this rank, until the ranks first compare theirs."""

    def __init__(self, group: Group, pieces: str) -> None:
        """Asks nobody.

        Args:
          group: of the run.
          pieces: what data is divided into, as a user says: row groups.
        """
        self._group, self._pieces = group, pieces
        self._samples = 0
        self._is_compared = group.size == 1

    def add(self, samples: int) -> None:
        """Takes what this rank has had of a batch."""
        self._samples += samples

    def warning(self) -> str | None:
        """Which ranks have had no sample so far; None: each has, or it was asked before.

        Every rank comes to this place.

        Raises:
          GroupError: a rank is gone.
        """
        if self._is_compared:
            return None
        self._is_compared = True
        every = self._group.gathered(torch.tensor(self._samples)).tolist()
        idle = [str(rank) for rank, samples in enumerate(every) if not samples]
        if not idle:
            return None
        named = ", ".join(idle[:_MOST_NAMED]) + (" and more" if len(idle) > _MOST_NAMED else "")
        pieces = self._pieces
        return (
            f"{len(idle)} of {len(every)} ranks have had no sample so far (rank {named}): the "
            f"data has too few {pieces} to fill the lanes of all; write more files, or smaller "
            f"{pieces}, or start fewer ranks: {len(every) - len(idle)}"
        )
