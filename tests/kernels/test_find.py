import pytest
import torch

from penstock.kernels.index.find import Misses, find_slots
from penstock.kernels.index.index import Index, KeyBatch
from penstock.kernels.plan import MEAN, SUM
from tests.kernels.lookup_cases import NUM_TABLES, make_batch, make_plan


@pytest.mark.parametrize("size", [0, 1, 63])
def test_keys_of_all_features_are_found_in_their_tables(size, device):
    plan = make_plan(8, (SUM, MEAN, SUM, SUM), device)
    batch = make_batch(plan, size, size + 1)
    batch.values.remainder_(50)
    num = len(batch.values)
    per_table = [torch.arange(0, 50, table + 2, device=device) for table in range(NUM_TABLES)]
    index = Index(device)
    index.reserve(150)
    payload_of, first = {}, 0
    for table, keys in enumerate(per_table):
        of_table = KeyBatch.of_table(keys, table)
        count = torch.tensor([len(keys)], device=device)
        misses = Misses(torch.arange(len(keys), device=device), count)
        found = torch.empty(len(keys), dtype=torch.int32, device=device)
        claims = index.claim(of_table, misses, found, count * 0)
        index.settle(of_table, misses, claims, torch.arange(len(keys), device=device) + first)
        payload_of |= {(table, key): first + n for n, key in enumerate(keys.tolist())}
        first += len(keys)
    slots = torch.full((num,), 77, dtype=torch.int32, device=device)
    missing = torch.full((num,), -1, dtype=torch.int64, device=device)
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    absent = torch.tensor([-1, 1000, -1], dtype=torch.int32, device=device)
    find_slots(index.view, plan, batch, absent, slots, Misses(missing, counter))
    lengths = batch.offsets.diff().view(len(batch.features), -1).sum(1)
    tables = torch.repeat_interleave(plan.table_of_packed.long(), lengths).tolist()
    expected, gone = [], []
    for place, (table, key) in enumerate(zip(tables, batch.values.tolist(), strict=True)):
        if table >= 0 and (table, key) not in payload_of:
            gone.append(place)
        instead = 77 if table < 0 else [-1, 1000, -1][table]
        expected.append(payload_of.get((table, key), instead))
    assert slots.tolist() == expected
    assert sorted(missing[: int(counter)].tolist()) == gone
