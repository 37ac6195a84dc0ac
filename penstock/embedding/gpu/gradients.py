"""The norm of gradients summed by row, from the kernels that update rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.plan import DevicePlan
from penstock.kernels.update.occurrences import (
    HYPER_FIELDS,
    SGD,
    GradientPart,
    RowArrays,
    UpdateRules,
)
from penstock.kernels.update.update import apply_gradients


def gradient_norm(
    plan: DevicePlan,
    parts: Sequence[GradientPart],
    norm_type: float,
    *,
    deterministic: bool,
) -> Tensor:
    """Norm of all columns of the rows' summed gradients, [] float32; waits for the device."""
    slots = torch.cat([part.slots for part in parts])
    used, number = torch.unique(slots, return_inverse=True)
    numbers = torch.where(slots < 0, -1, number.to(torch.int32))
    # One more than are used: there is a norm of no rows, too.
    count = len(used) + 1
    sizes = [part.slots.numel() for part in parts]
    renumbered = [
        part._replace(slots=of_part, grouping=None)
        for part, of_part in zip(parts, torch.split(numbers, sizes), strict=True)
    ]
    sums = sums_by_row(plan, renumbered, count, deterministic=deterministic)
    norm: Tensor = torch.linalg.vector_norm(sums, norm_type)
    return norm


def sums_by_row(
    plan: DevicePlan, parts: Sequence[GradientPart], count: int, *, deterministic: bool
) -> Tensor:
    """[count, D] float32 sums of the gradients of rows below `count`; without synchronisation.

    Rows of zeros take a step of SGD with rate -1 in place of the store's: what they are then is the
    sum of their gradients, in the order of an update.
    """
    device = parts[0].slots.device
    nothing = torch.empty(count, 0, device=device)
    values = torch.zeros(count, plan.dim, device=device)
    rows = RowArrays(values, nothing, nothing.to(torch.int32))
    hypers = torch.zeros(1, HYPER_FIELDS, device=device)
    hypers[0, 0] = -1.0
    rules = UpdateRules(SGD, clips=False, bounds=False, deterministic=deterministic)
    apply_gradients(rows, plan, parts, hypers, 0, rules)
    return values
