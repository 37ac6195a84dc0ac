"""The norm of gradients summed by row, from the kernels that update rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.embedding.store import DefaultGradients
from penstock.kernels.plan import DevicePlan
from penstock.kernels.update.occurrences import (
    HYPER_FIELDS,
    SGD,
    GradientPart,
    RowArrays,
    UpdateRules,
)
from penstock.kernels.update.update import apply_gradients
from penstock.types import KeyedJagged

_BITS_OF_ONE = 62
"""Of a sum that is one share: any float32 of a row comes out of fixed point as it went in, if it is
a sum of shares of the row in fixed point itself.
"""


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


def without_defaults(part: GradientPart, num_defaults: int) -> GradientPart:
    """The same of rows alone, not of default rows: those are the first slots."""
    slots = part.slots.masked_fill(part.slots < num_defaults, -1)
    return part._replace(slots=slots, grouping=None)


def step_defaults(
    rows: RowArrays,
    plan: DevicePlan,
    slots: Tensor,
    defaults: DefaultGradients,
    hypers: Tensor,
    step: int,
    rules: UpdateRules,
    skip: Tensor | None = None,
) -> None:
    """One step for the default rows of tables; without synchronisation.

    Args:
      rows: of the store.
      plan: by key.
      slots: [T] int32 of default rows; -1: the table has none.
      defaults: what they take.
      hypers: of the step.
      step: see `apply_gradients`.
      rules: of the store.
      skip: see `apply_gradients`.
    """
    num_tables = len(slots)
    offsets = torch.arange(num_tables + 1, device=slots.device)
    names = tuple(str(number) for number in range(num_tables))
    batch = KeyedJagged(names, offsets[:-1], offsets, is_checked=True)
    touched = slots.masked_fill(~defaults.touched, -1)
    part = GradientPart(batch, touched, defaults.sums.contiguous())
    apply_gradients(rows, plan, [part], hypers, step, rules._replace(sum_bits=_BITS_OF_ONE), skip)
