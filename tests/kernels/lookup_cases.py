"""Random look-ups: plans, batches, rows, for the tests of the kernels of look-ups and updates."""

from typing import NamedTuple

import torch

from penstock.kernels.plan import MEAN, SEQUENCE, SQRT_N, SUM, DevicePlan, FeatureOnDevice
from penstock.kernels.update.occurrences import (
    ADAGRAD,
    ADAM,
    ADAMW,
    FTRL,
    HYPER_FIELDS,
    LAMB,
    MOMENTUM_SGD,
    ROW_WISE_ADAGRAD,
    ROW_WISE_ADAM,
    SGD,
    RowArrays,
    UsageRules,
)
from penstock.types import KeyedJagged

NUM_TABLES = 3
MAX_KEYS = 6


class Lookup(NamedTuple):
    plan: DevicePlan
    batch: KeyedJagged
    slots: torch.Tensor


def make_plan(dim, poolings, device, others=1):
    """Features of one store among `others` features of another one."""
    features, column = [], 2
    for number, pooling in enumerate(poolings):
        most = MAX_KEYS if pooling == SEQUENCE else 0
        features.append(
            FeatureOnDevice(number + others, number % NUM_TABLES, pooling, column, most)
        )
        column += dim * max(1, most)
    return DevicePlan.make(
        features, num_packed=len(poolings) + others, stride=column + 3, dim=dim, device=device
    )


def make_batch(plan, size, seed, *, longest=MAX_KEYS, weighted=False, one_hot=False):
    generator = torch.Generator().manual_seed(seed)
    device = plan.table.device
    num_bags = len(plan.table_of_packed) * size
    lengths = torch.randint(0, longest + 1, (num_bags,), generator=generator)
    if one_hot:
        lengths = torch.ones(num_bags, dtype=torch.int64)
    offsets = torch.zeros(num_bags + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    num = int(offsets[-1])
    weights = torch.randn(num, generator=generator).to(device) if weighted else None
    keys = torch.randint(-(2**62), 2**62, (num,), generator=generator)
    names = tuple(f"f{n}" for n in range(len(plan.table_of_packed)))
    return KeyedJagged(names, keys.to(device), offsets.to(device), weights, is_one_hot=one_hot)


def make_slots(plan, batch, num_rows, seed, *, hot=0.3):
    """Slots of each table's own range; many keys share one, some have none."""
    generator = torch.Generator().manual_seed(seed)
    num = len(batch.values)
    table = plan.table_of_packed.cpu().long()
    feature = torch.repeat_interleave(
        torch.arange(len(table)), batch.offsets.cpu().diff().view(len(table), -1).sum(1)
    )
    per_table = num_rows // NUM_TABLES
    local = torch.randint(0, per_table, (num,), generator=generator)
    local[torch.rand(num, generator=generator) < hot] = 1
    slots = local + table[feature] * per_table
    slots[torch.rand(num, generator=generator) < 0.05] = -1
    # What another store's keys hold is anybody's guess.
    slots[table[feature] < 0] = 2**31 - 9
    return slots.int().to(batch.values.device)


def make_lookup(dim, size, seed, device, *, poolings=(SUM, MEAN, SQRT_N, SEQUENCE), num_rows=90,
                others=1, **how):  # fmt: skip
    plan = make_plan(dim, poolings, device, others)
    batch = make_batch(plan, size, seed, **how)
    return Lookup(plan, batch, make_slots(plan, batch, num_rows, seed + 1))


STATE_DIMS = {
    SGD: lambda dim: 0,
    ADAGRAD: lambda dim: dim,
    ROW_WISE_ADAGRAD: lambda dim: 1,
    ADAM: lambda dim: 2 * dim,
    MOMENTUM_SGD: lambda dim: dim,
    ROW_WISE_ADAM: lambda dim: dim + 1,
    FTRL: lambda dim: 2 * dim,
    LAMB: lambda dim: 2 * dim,
    ADAMW: lambda dim: 2 * dim,
}


def make_rows(rule, dim, num_rows, seed, device, *, dtype=torch.float32, words=0):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(num_rows, dim, generator=generator) * 0.1).to(dtype)
    state = torch.rand(num_rows, STATE_DIMS[rule](dim), generator=generator) * 0.1
    usage = torch.randint(-(2**31), 2**31, (num_rows, words), generator=generator).int()
    return RowArrays(values.to(device), state.to(device), usage.to(device))


def make_hypers(device, *, tables=NUM_TABLES, clip=0.0, decay=0.01, bound=0.0):
    """Rates differ by table."""
    hypers = torch.zeros(tables, HYPER_FIELDS)
    hypers[:, 0] = 0.1 + 0.05 * torch.arange(tables)
    hypers[:, 1] = decay
    hypers[:, 2] = clip
    hypers[:, 3:] = torch.tensor([1e-3, 0.9, 0.1, 0.01, 1e-3, 1.5, 2.5, bound])
    return hypers.to(device)


def make_usage_rules(device):
    now = torch.tensor([5_000_000_000, 4_000_000_000, 3_500_000_000])
    return UsageRules(now.to(device), torch.tensor([0, 7, 1 << 28]).to(device))
