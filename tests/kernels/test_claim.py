"""Searching and claiming in one launch, against searching, claiming and settling one by one."""

import pytest
import torch

from penstock.kernels.index.claim import find_or_claim
from penstock.kernels.index.find import Misses
from penstock.kernels.index.index import Claims, Index, KeyBatch
from penstock.kernels.plan import MEAN, SUM
from tests.kernels.lookup_cases import make_batch, make_plan

ABSENT = [-1, 1000, -1]


@pytest.mark.parametrize("num_present", [0, 400])
@pytest.mark.parametrize("size", [0, 1, 63, pytest.param(200_000, marks=pytest.mark.gpu)])
def test_every_missing_key_claims_one_entry(size, num_present, device):
    plan = make_plan(8, (SUM, MEAN, SUM, SUM), device)
    batch = make_batch(plan, size, size + 1)
    batch.values.remainder_(max(20, size // 2))
    batch.values[: min(9, len(batch.values))] = -(2**63)
    num = len(batch.values)
    index = Index(device)
    index.reserve(num + 1000)
    allocated = torch.zeros(1, dtype=torch.int64, device=device)
    present = KeyBatch.of_table(torch.arange(num_present, device=device), 0)
    nobody = torch.full((3,), -1, dtype=torch.int32, device=device)
    found, misses = index.find(present, nobody)
    claims = index.claim(present, misses, found, allocated)
    index.settle(present, misses, claims, claims.rank)
    payloads = index.find(present, nobody)[0]
    # Some of those that were there leave erased entries behind.
    erased = present.keys[::7].contiguous()
    index.erase(erased, torch.zeros_like(erased))
    slots = torch.full((num,), 77, dtype=torch.int32, device=device)
    misses = Misses(
        torch.empty(num, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    claims = Claims(torch.empty(3, num, dtype=torch.int64, device=device))
    absent = torch.tensor(ABSENT, dtype=torch.int32, device=device)
    find_or_claim(index.view, plan, batch, absent, slots, misses, *claims, allocated)

    lengths = batch.offsets.diff().view(len(batch.features), -1).sum(1)
    tables = torch.repeat_interleave(plan.table_of_packed.long(), lengths)
    was_there = (tables == 0) & (batch.values >= 0) & (batch.values < num_present)
    was_there &= batch.values % 7 != 0
    is_missing = (tables >= 0) & ~was_there
    gone = misses.places[: int(misses.number)].sort().values
    assert torch.equal(gone, is_missing.nonzero()[:, 0])
    assert torch.equal(slots[was_there], payloads[batch.values[was_there]])
    expected = torch.tensor(ABSENT, device=device)[tables.clamp(min=0)]
    assert torch.equal(slots[is_missing].long(), expected[is_missing])
    assert bool((slots[tables < 0] == 77).all())

    # Equal keys agree on a winner among them, and winners have ranks of their own.
    pairs = torch.stack([tables, batch.values], 1)
    winner = claims.winner[is_missing]
    assert torch.equal(pairs[winner], pairs[is_missing])
    winners = winner.unique()
    num_new = len(torch.unique(pairs[is_missing], dim=0))
    assert len(winners) == num_new
    assert torch.equal(claims.winner[winners], winners)
    ranks = claims.rank[winners].sort().values
    assert torch.equal(ranks, torch.arange(num_present, num_present + num_new, device=device))
    assert int(allocated) == num_present + num_new

    of_batch = KeyBatch(batch.values, batch.offsets, plan.table_of_packed, batch.batch_size)
    index.settle(of_batch, misses, claims, claims.rank)
    found, misses = index.find(of_batch, absent)
    assert int(misses.number) == 0
    assert torch.equal(found[is_missing].long(), claims.rank[winner])
