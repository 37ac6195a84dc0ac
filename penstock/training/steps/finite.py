"""Whether all numbers of a step are finite: told on the device, so that nobody has to wait for it.

The updates of a step read the flag where they run: of a step with a number that is not finite, and
of every step after it, they change nothing. The host hears of it later (`in_flight`).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Flag:
    """Of one run. Raised by a number that is NaN or infinite, it stays up until it is cleared."""

    def __init__(self, device: torch.device) -> None:
        """On the device that the updates run on."""
        # 0, or NaN: one addition notes a number, whatever it is.
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def note(self, number: Tensor) -> None:
        """Raises the flag if a number, [] of any float type, is not finite."""
        self._sum.add_(number.detach(), alpha=0)

    @property
    def sum(self) -> Tensor:
        """[] float32 on the device: 0, or NaN where the flag is up."""
        return self._sum

    def raised(self) -> Tensor:
        """[] float32 on the device, nobody else's: 1 where the flag is up by now, else 0."""
        return self._sum.isnan().float()

    def clear(self) -> None:
        """Takes it down."""
        self._sum.zero_()
