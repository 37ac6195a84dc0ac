"""Bags divided among the ranks that own their keys, and the parts of others put together."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.embedding.sharded.routes import Owners, arrived
from penstock.embedding.sharded.shard_map import bucket_of_mixed, mixed_of
from penstock.embedding.store import PoolingPlan
from penstock.types import KeyedJagged

_KEY, _WEIGHT = 8, 4
IS_WEIGHTED = 8
"""Added to the bytes of a length."""
_LENGTHS = {1: torch.uint8, 2: torch.uint16, 4: torch.int32}
_MOST_SAMPLED = 4096


class BagParts(NamedTuple):
    """Of a batch, features in the order of the plan."""

    own: KeyedJagged
    """Bags of the keys that are this rank's, of the features that it serves."""
    message: Tensor
    """[bytes] uint8: for each other rank, in order, the keys that it owns [n] int64, their weights
    [n] float32 if there are any, the lengths of their bags [F * B] (of 1, 2 or 4 bytes) of the
    features that it serves, and bytes up to a multiple of 8.
    """
    counts: Tensor
    """[ranks, F] int64 keys, on the CPU."""
    form: int
    """Bytes of a length; 8 more: with weights."""
    different: int
    """About how many of the keys differ within their tables."""
    scales: Tensor | None
    """[B, F] float32 factor of the sum of each bag; None: all 1."""


@lru_cache(maxsize=64)
def names_of(number: int) -> tuple[str, ...]:
    """Of so many features of parts, which nobody reads."""
    return tuple(map(str, range(number)))


def no_bags(plan: PoolingPlan, owners: Owners, rank: int) -> BagParts:
    """Of a batch without samples."""
    none, names = torch.zeros_like(owners.words[:0]), names_of(owners.served(plan).number(rank))
    own = KeyedJagged(names, none, torch.zeros_like(owners.words[:1]))
    counts = torch.zeros(owners.num_ranks, len(plan.features), dtype=torch.int64)
    return BagParts(own, none.to(torch.uint8), counts, 1, 0, None)


def message_bytes(keys: Tensor, bags: Tensor, forms: Tensor) -> Tensor:
    """Of messages of so many keys, bags and forms, each [n] int64."""
    of_key = _KEY + torch.where(forms >= IS_WEIGHTED, _WEIGHT, 0)
    return (keys * of_key + bags * (forms % IS_WEIGHTED) + 7) // 8 * 8


def joined(
    plan: PoolingPlan, message: Tensor, came: Tensor, rank: int
) -> tuple[KeyedJagged, list[int]]:
    """The bags of the other ranks as one batch, those of a feature in the order of ranks.

    Args:
      plan: of the features that this rank serves.
      message: [bytes] uint8, one message after the other.
      came: [ranks, F + 2] int64 on the CPU: keys of each feature, samples and form.
      rank: this one, of which there is no message.

    Returns:
      The batch, and the samples of each rank in it.
    """
    features, device = len(plan.features), message.device
    samples_of_all = came[:, -2].tolist()
    samples_of_all[rank] = 0
    came = torch.cat([came[:rank], came[rank + 1 :]])
    counts, samples, forms = came[:, :features], came[:, -2], came[:, -1]
    sizes = message_bytes(counts.sum(1), samples * features, forms).tolist()
    keys, weights, lengths = [], [], []
    numbers = zip(counts.sum(1).tolist(), samples.tolist(), forms.tolist(), strict=True)
    is_weighted = bool((forms >= IS_WEIGHTED).any())
    for part, (num_keys, size, form) in zip(torch.split(message, sizes), numbers, strict=True):
        end = num_keys * _KEY
        keys.append(part[:end].view(torch.int64))
        if form >= IS_WEIGHTED:
            begin, end = end, end + num_keys * _WEIGHT
            weights.append(part[begin:end].view(torch.float32))
        elif is_weighted:
            weights.append(torch.ones(num_keys, device=device))
        width = form % IS_WEIGHTED
        of_bags = part[end : end + width * features * size].view(_LENGTHS[width])
        lengths.append(of_bags.to(torch.int64).view(features, size))
    offsets = torch.zeros(features * sum(samples.tolist()) + 1, dtype=torch.int64, device=device)
    torch.cumsum(torch.cat(lengths, 1).flatten(), 0, out=offsets[1:])
    if len(keys) == 1:  # all there is
        values, factors = keys[0], weights[0] if weights else None
    else:
        block, order, _ = arrived(names_of(features), torch.cat(keys), counts)
        values, factors = block.values, torch.cat(weights)[order] if weights else None
    batch = KeyedJagged(names_of(features), values, offsets, factors, is_checked=True)
    return batch, samples_of_all


def split_on_device(plan: PoolingPlan, batch: KeyedJagged, owners: Owners, rank: int) -> BagParts:
    """As the core's `split_bags`, in plain torch.

    Args:
      plan: not by key, of some features.
      batch: checked, of some samples.
      owners: of the tables.
      rank: this one.
    """
    device, ranks = batch.values.device, owners.num_ranks
    features, size = len(plan.features), batch.batch_size
    packed = [feature.packed_feature for feature in plan.features]
    chosen = batch if packed == list(range(len(batch.features))) else batch.select(packed)
    bag_lengths = chosen.offsets.diff()
    bags = features * size
    # Which bag each key is in.
    bag = torch.repeat_interleave(bag_lengths, output_size=chosen.values.numel())
    of_feature = torch.tensor([feature.table for feature in plan.features], device=device)
    tables = of_feature[bag // size]
    mixed = mixed_of(owners.words[tables], chosen.values)
    whole = owners.of_table[tables]
    owner = torch.where(whole < 0, owners.of_bucket[bucket_of_mixed(mixed)], whole)
    order = torch.argsort(owner, stable=True)
    lengths = torch.bincount(owner * bags + bag, minlength=ranks * bags).view(ranks, bags)
    counts = lengths.view(ranks, features, size).sum(2)
    rate = 1 << (max(chosen.values.numel() // _MOST_SAMPLED + 1, 1).bit_length() - 1)
    longest = bag_lengths.max()
    *flat, most = torch.cat([counts.flatten(), longest[None]]).tolist()
    counts = torch.tensor(flat).view(ranks, features)
    width = 1 if most < 1 << 8 else 2 if most < 1 << 16 else 4
    different = rate * int(torch.unique(mixed[(mixed & (rate - 1)) == 0]).numel())
    sizes = counts.sum(1).tolist()
    keys = torch.split(chosen.values[order], sizes)
    weights = None if chosen.weights is None else torch.split(chosen.weights[order], sizes)
    form = width + (0 if weights is None else IS_WEIGHTED)
    parts = []
    served = owners.served(plan).features
    for other in range(ranks):
        if other == rank:
            continue
        part = [keys[other].view(torch.uint8)]
        if weights is not None:
            part.append(weights[other].view(torch.uint8))
        of_bags = lengths[other].view(features, size)[list(served[other])]
        part.append(of_bags.flatten().to(_LENGTHS[width]).view(torch.uint8))
        used = sum(each.numel() for each in part)
        parts += [*part, torch.zeros(-used % 8, dtype=torch.uint8, device=device)]
    own_lengths = lengths[rank].view(features, size)[list(served[rank])].flatten()
    offsets = torch.zeros(len(own_lengths) + 1, dtype=torch.int64, device=device)
    torch.cumsum(own_lengths, 0, out=offsets[1:])
    own_weights = None if weights is None else weights[rank]
    names = names_of(len(served[rank]))
    own = KeyedJagged(names, keys[rank], offsets, own_weights, is_checked=True)
    none = torch.zeros(0, dtype=torch.uint8, device=device)
    scales = _scales(plan, bag_lengths, bag, chosen.weights)
    return BagParts(own, torch.cat([none, *parts]), counts, form, different, scales)


def _scales(
    plan: PoolingPlan, lengths: Tensor, bag: Tensor, weights: Tensor | None
) -> Tensor | None:
    """As `weighted_bag_scale` of csrc/rows/row_kernels.h."""
    poolings = [feature.pooling for feature in plan.features]
    if all(pooling == "sum" for pooling in poolings):
        return None

    def total(of_key: Tensor) -> Tensor:
        sums = torch.zeros(lengths.numel(), dtype=torch.float64, device=lengths.device)
        return sums.index_add_(0, bag, of_key).view(len(poolings), -1)

    ones = torch.ones(bag.numel(), dtype=torch.float64, device=lengths.device)
    factors = ones if weights is None else weights.double()
    divisors = {"mean": total(factors), "sqrt_n": total(factors.square()).sqrt()}
    one = torch.ones_like(divisors["mean"])
    each = [divisors.get(pooling, one)[number] for number, pooling in enumerate(poolings)]
    divisor = torch.stack(each, 1).float()
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(divisor.abs() < tiny, 0.0, 1.0 / divisor)
