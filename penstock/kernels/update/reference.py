"""What the kernels of updates compute, in plain torch: rules, rounding, marks of use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.plan import DevicePlan
from penstock.kernels.reference import describe
from penstock.kernels.update import occurrences as kinds
from penstock.kernels.update.occurrences import GradientPart, RowArrays, UsageRules

_WORD = 0xFFFFFFFF


def apply_gradients(
    rows: RowArrays,
    plan: DevicePlan,
    parts: Sequence[GradientPart],
    hypers: Tensor,
    *,
    rule: int,
    step: int,
    usage_rules: UsageRules | None = None,
) -> Tensor:
    """Twin of `update.apply_gradients`; sums and rules in float64.

    Args:
      rows: changed in place.
      plan: of all parts.
      parts: look-ups with their gradients.
      hypers: [T, HYPER_FIELDS] float32, or [1, HYPER_FIELDS].
      rule: number of the optimizer.
      step: number of the update; it decides how narrow values are rounded.
      usage_rules: where rows have marks of use.

    Returns:
      [] int64, rows updated.
    """
    slots, shares, tables = [], [], []
    for batch, part_slots, grad, _, own in parts:
        feature, source, factor = describe(own or plan, batch)
        used = (feature >= 0) & (part_slots >= 0)
        columns = torch.arange(plan.dim, device=grad.device)
        share = grad.reshape(-1)[source[used, None] + columns].double()
        shares.append(share * factor[used, None].double())
        slots.append(part_slots[used].long())
        tables.append(plan.table.long()[feature[used]])
    unique, inverse = torch.unique(torch.cat(slots), return_inverse=True)
    table = torch.zeros_like(unique).index_copy_(0, inverse, torch.cat(tables))
    total = torch.zeros(len(unique), plan.dim, dtype=torch.float64, device=unique.device)
    total.index_add_(0, inverse, torch.cat(shares))
    hyper = hypers.double()[table if len(hypers) > 1 else table * 0][:, :, None].unbind(1)
    total = clipped(total, hyper[2])
    value, state = rows.values[unique].double(), rows.state[unique].double()
    stepped(rule, value, state, total, hyper)
    bound = torch.where(hyper[10] > 0, hyper[10], torch.inf)
    value = torch.minimum(torch.maximum(value, -bound), bound)
    new = value.float()
    rows.values[unique] = (
        new if rows.values.dtype == torch.float32 else narrowed(new, rows.values.dtype, step)
    )
    rows.state[unique] = state.float()
    if usage_rules is not None:
        mark_used(rows.usage, unique, table, usage_rules)
    return torch.tensor(len(unique), device=unique.device)


def clipped(grad: Tensor, most: Tensor) -> Tensor:
    """Scales rows of `grad` [n, D] to an L2 norm of at most `most` [n, 1]; 0: any."""
    norm = grad.norm(dim=1, keepdim=True)
    return torch.where((most > 0) & (norm > most), grad * (most / norm), grad)


def stepped(rule: int, w: Tensor, s: Tensor, g: Tensor, hyper: Sequence[Tensor]) -> None:
    """One step of rows in place: value `w` [n, D], state `s` [n, S], gradient `g` [n, D].

    Source: penstock/embedding/rules/optimizer.py, here for many rows.
    """
    rate, decay, _, eps, momentum, away1, away2, l1, inverse1, inverse2, _ = hyper
    dim = w.shape[1]
    first, second = s[:, :dim], s[:, dim:]
    if rule == kinds.FTRL:
        root = (second + g * g).sqrt()
        first += g - (root - second.sqrt()) / rate * w
        second += g * g
        next_value = -(first - first.sign() * l1) / ((eps + root) / rate + decay)
        w.copy_(torch.where(first.abs() > l1, next_value, 0.0))
        return
    if rule not in {kinds.LAMB, kinds.ADAMW}:
        g = g + decay * w
    squares = g * g
    if rule == kinds.SGD:
        w -= rate * g
    elif rule == kinds.MOMENTUM_SGD:
        s.copy_(momentum * s + g)
        w -= rate * s
    elif rule in {kinds.ADAGRAD, kinds.ROW_WISE_ADAGRAD}:
        s += squares if rule == kinds.ADAGRAD else squares.mean(dim=1, keepdim=True)
        w -= rate * g / (s.sqrt() + eps)
    else:
        if rule == kinds.ROW_WISE_ADAM:
            squares = squares.mean(dim=1, keepdim=True)
        first += away1 * (g - first)
        second += away2 * (squares - second)
        if rule != kinds.LAMB:
            if rule == kinds.ADAMW:
                w -= decay * w
            w -= rate * first / (second.sqrt() + eps)
            return
        change = inverse1 * first / ((inverse2 * second).sqrt() + eps) + decay * w
        norm, change_norm = w.norm(dim=1, keepdim=True), change.norm(dim=1, keepdim=True)
        trust = torch.where((norm > 0) & (change_norm > 0), norm / change_norm, 1.0)
        w -= rate * trust * change


def narrowed(values: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    """Rounds the new `values` [n, D] float32 of update `step`, stochastically.

    Source: csrc/rows/narrow_lanes.h; words of 32 bits are kept in int64 here.
    """
    bits = values.contiguous().view(torch.int32).long() & _WORD
    column = torch.arange(values.shape[1], device=values.device)
    keys = mix32((step_seed(step) + column * 0x9E3779B9) & _WORD)
    random = mix32(bits ^ keys)
    magnitude, sign = bits & 0x7FFFFFFF, bits >> 16 & 0x8000
    if dtype == torch.bfloat16:
        rounded = (magnitude + (random >> 16)) >> 16
        rounded = torch.where(magnitude >= 0x7F800000, magnitude >> 16, rounded)
        nan = 0x7FC0
    else:
        normal = (magnitude - (112 << 23) + (random >> 19)) >> 13
        used = (magnitude < 0x38800000) & (magnitude >= 0x00800000)
        units = torch.where(used, magnitude, 0).int().view(torch.float32).double() * 2.0**24
        whole = units.long()
        small = whole + ((random >> 8).double() < (units - whole) * 2.0**24)
        rounded = torch.where(magnitude < 0x38800000, small, normal).clamp(max=0x7C00)
        nan = 0x7E00
    rounded = torch.where(magnitude > 0x7F800000, nan, rounded | sign)
    signed = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded)
    return signed.short().view(dtype)


def mix32(x: Tensor) -> Tensor:
    """lowbias32 of words kept in int64."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def step_seed(step: int) -> int:
    """What makes the random bits of an update differ; 32 bits. FORMAT: never change."""
    mask = 2**64 - 1
    x = (step + 0x9E3779B97F4A7C15) & mask
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & mask
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & mask
    return (x ^ x >> 33) >> 32


def mark_used(usage: Tensor, slots: Tensor, table: Tensor, rules: UsageRules) -> None:
    """Sets time and number of uses of rows.

    Args:
      usage: [slots, 1 or 2] int32, changed in place.
      slots: [U] int64, distinct.
      table: [U] int64 of each.
      rules: the time and half-life of each table.
    """
    now, half_life = rules.now[table], rules.half_life[table]
    if usage.shape[1] == 2:
        marks = usage[slots].long() & _WORD
        halvings = now // half_life.clamp(min=1) - marks[:, 0] // half_life.clamp(min=1)
        aged = torch.where(halvings > 31, 0, marks[:, 1] >> halvings.clamp(0, 31))
        uses = torch.where(half_life > 0, aged, marks[:, 1])
        usage[slots, 1] = _signed(torch.where((uses == _WORD) | (half_life < 0), uses, uses + 1))
    usage[slots, 0] = _signed(now & _WORD)


def _signed(words: Tensor) -> Tensor:
    return torch.where(words > 0x7FFFFFFF, words - 2**32, words).int()
