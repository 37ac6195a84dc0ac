"""The index of a GPU store: every kernel against its plain-torch twin or a dictionary."""

import numpy as np
import pytest
import torch

from penstock.config import Constant, Normal, Uniform
from penstock.embedding.rules import initializer
from penstock.kernels.index import reference as reference_index

pytest.importorskip("triton")
from penstock.kernels.index.find import Misses
from penstock.kernels.index.index import Index, KeyBatch, prime_from
from penstock.kernels.index.rows import Count, Destination, Initial, Slots, make_rows, read_initial
from penstock.kernels.memory.arena import Arena
from penstock.kernels.update.occurrences import RowArrays

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
EDGES = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1])
SIZES = [0, 1, 63, 3000, *([1_500_000] if ON_GPU else [])]
KINDS = {"uniform": Uniform(bound=0.3), "normal": Normal(std=0.7), "constant": Constant(value=-2.5)}


def random_keys(count, span, seed=0):
    """With repeats and edges."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, max(1, span), (count,), generator=generator) * 0x5851F42D4C957F2D
    edges = torch.rand(count, generator=generator) < 0.01
    keys[edges] = EDGES[torch.randint(0, 5, (count,), generator=generator)][edges]
    return keys


def packed(parts, tables):
    """Keys of several features, one bag a feature."""
    offsets = torch.tensor([0, *np.cumsum([len(part) for part in parts])])
    numbers = torch.tensor(tables, dtype=torch.int32, device=DEVICE)
    return KeyBatch(torch.cat(parts).to(DEVICE), offsets.to(DEVICE), numbers, 1)


def tables_of(batch):
    return batch.tables.long().repeat_interleave(batch.offsets.diff())


class Inserter:
    """Inserts with payloads in the order of claims, as a store does with slots."""

    def __init__(self, tables=3):
        self.index = Index(DEVICE)
        self.allocated = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self.absent = torch.full((tables,), -1, dtype=torch.int32, device=DEVICE)
        self.size = 0

    def insert(self, batch):
        self.index.reserve(self.size + len(batch.keys))
        found, misses = self.index.find(batch, self.absent)
        claims = self.index.claim(batch, misses, found, self.allocated)
        self.index.settle(batch, misses, claims, claims.rank)
        self.size = int(self.allocated)
        return found, misses, claims

    def find(self, batch):
        return self.index.find(batch, self.absent)


@pytest.mark.parametrize("size", SIZES)
def test_each_key_gets_one_payload(size):
    inserter = Inserter()
    keys = random_keys(size, max(1, size // 2))
    batch = packed([keys, keys[: size // 3], keys], [2, 0, -1])
    inserter.insert(batch)
    tables, keys = tables_of(batch), batch.keys
    served = tables >= 0
    found, misses = inserter.find(batch)
    assert int(misses.number) == 0
    pairs = torch.stack([tables, keys], 1)[served]
    unique, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    assert int(inserter.allocated) == len(unique)
    payloads = found[served].long()
    # One payload a key, each once, and all of them.
    of_unique = torch.full((len(unique),), -1, device=DEVICE).scatter_(0, inverse, payloads)
    assert torch.equal(of_unique[inverse], payloads)
    assert torch.equal(of_unique.sort().values, torch.arange(len(unique), device=DEVICE))
    assert reference_index.is_consistent(inserter.index.entries, inserter.index.salt)


@pytest.mark.parametrize("size", SIZES)
def test_find_equals_its_twin(size):
    inserter = Inserter()
    inserter.insert(packed([random_keys(2 * size, 2 * size)], [1]))
    batch = packed([random_keys(size, 4 * size + 1, seed=1), EDGES], [1, 2])
    found, misses = inserter.find(batch)
    index = inserter.index
    expected, _ = reference_index.find(index.entries, index.salt, batch.keys, tables_of(batch))
    assert torch.equal(found.long(), expected)
    places = misses.places[: int(misses.number)].sort().values
    assert torch.equal(places, (expected < 0).nonzero()[:, 0])


def test_absent_keys_get_what_their_table_says():
    inserter = Inserter()
    inserter.absent[2] = 7
    batch = packed([EDGES, EDGES, EDGES], [2, 0, 1])
    inserter.insert(packed([EDGES], [1]))
    found, misses = inserter.find(batch)
    assert found[:10].tolist() == [7] * 5 + [-1] * 5
    assert (found[10:] >= 0).all()
    assert sorted(misses.places[: int(misses.number)].tolist()) == list(range(10))


def test_a_full_index_finds_inserts_and_erases():
    """At the highest load, so that probes cross buckets, and the last one too."""
    inserter = Inserter(1)
    index = inserter.index
    keys = (torch.arange(index.room()) * 0x9E3779B97F4A7C).to(DEVICE)
    capacity = index.capacity
    for part in keys.split(2000):
        inserter.insert(KeyBatch.of_table(part, 0))
    assert index.capacity == capacity
    assert reference_index.is_consistent(index.entries, index.salt)
    found, misses = inserter.find(KeyBatch.of_table(keys, 0))
    assert int(misses.number) == 0
    erased = torch.cat([keys[::3], keys[:300:3]])
    freed = index.erase(erased, torch.zeros_like(erased))
    assert torch.equal(freed[freed >= 0].sort().values, found[::3].long().sort().values)
    assert (freed[-100:] >= 0).sum() + (freed[:100] >= 0).sum() == 100
    assert reference_index.is_consistent(index.entries, index.salt)
    gone, misses = inserter.find(KeyBatch.of_table(keys, 0))
    assert int(misses.number) == len(keys[::3])
    assert torch.equal(gone[1::3], found[1::3])
    # Erased entries are taken again; what still takes room is known.
    assert 0 < index.num_erased == int((index.entries[:, 1] == 1).sum())
    erased = index.num_erased
    claimed = KeyBatch.of_table(keys[::3].contiguous(), 0)
    found, misses = inserter.find(claimed)
    index.settle(claimed, misses, claims := index.claim(claimed, misses, found, inserter.allocated),
                 claims.rank)  # fmt: skip
    assert int((index.entries[:, 1] == 1).sum()) < erased
    assert int(inserter.find(KeyBatch.of_table(keys, 0))[1].number) == 0


def test_erasing_and_inserting_for_ever_does_not_grow_it():
    inserter = Inserter(1)
    index = inserter.index
    for turn in range(12):
        keys = (torch.arange(3000) + 3000 * turn).to(DEVICE)
        index.reserve(3000)
        batch = KeyBatch.of_table(keys, 0)
        found, misses = inserter.find(batch)
        claims = index.claim(batch, misses, found, inserter.allocated)
        index.settle(batch, misses, claims, claims.rank)
        assert (index.erase(keys, torch.zeros_like(keys)) >= 0).all()
    # Once, for what is erased and takes room until the next rehash.
    assert index.capacity <= 6200
    assert len(index.places_of(torch.ones(1, dtype=torch.bool, device=DEVICE))) == 0


def test_keys_of_several_tables_are_erased_in_one_call():
    inserter = Inserter()
    keys = random_keys(400, 2**60)
    inserter.insert(packed([keys, keys, keys], [0, 1, 2]))
    index = inserter.index
    # In turn of table 2 and 0; the keys of table 1 are the same and stay.
    erased = keys[:100].to(DEVICE)
    tables = torch.arange(100, device=DEVICE) % 2 * 2
    assert (index.erase(erased, tables) >= 0).all()
    for table, gone in ((0, keys[:100:2]), (1, keys[:0]), (2, keys[1:100:2])):
        marked = torch.arange(3, device=DEVICE) == table
        left = index.at(index.places_of(marked))[0].cpu()
        assert set(left.tolist()) == set(keys.tolist()) - set(gone.tolist())


def test_the_number_of_buckets_is_prime():
    primes = [2, 3, 5, 7, 11, 13]
    assert [prime_from(number) for number in range(14)] == [
        min(prime for prime in [*primes, 17] if prime >= number) for number in range(14)
    ]
    assert prime_from(2**27) == 134_217_757
    assert prime_from(Index(DEVICE).num_buckets) == Index(DEVICE).num_buckets


def test_growth_keeps_every_key():
    inserter = Inserter()
    keys = random_keys(9_000, 2**60)
    for part in keys.split(4500):
        inserter.insert(packed([part], [1]))
    assert inserter.index.capacity > 9_000
    exported, payloads = inserter.index.at(
        inserter.index.places_of(torch.tensor([False, True], device=DEVICE))
    )
    order = exported.argsort()
    assert torch.equal(exported[order].cpu(), torch.unique(keys))
    assert torch.equal(payloads.sort().values.cpu(), torch.arange(len(exported)))
    assert reference_index.is_consistent(inserter.index.entries, inserter.index.salt)


def test_what_was_missed_may_be_there_by_now():
    inserter = Inserter(1)
    batch = KeyBatch.of_table(torch.arange(50, device=DEVICE), 0)
    found, _, _ = inserter.insert(batch)
    _, misses = inserter.find(KeyBatch.of_table(torch.arange(25, 80, device=DEVICE), 0))
    stale = Misses(torch.arange(50, device=DEVICE), torch.tensor([50], device=DEVICE))
    again = torch.full_like(found, -9)
    claims = inserter.index.claim(batch, stale, again, inserter.allocated)
    expected, _ = inserter.find(batch)
    assert torch.equal(again, expected)
    assert (claims.winner == -1).all()
    assert int(inserter.allocated) == 50
    assert int(misses.number) == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "state_dim", "usage_dim"), [(1, 0, 0), (5, 1, 1), (160, 160, 2)])
def test_new_rows_begin_as_the_initializer_says(dtype, dim, state_dim, usage_dim):
    names, kinds = list(KINDS), list(KINDS.values())
    seeds = [initializer.table_seed(11, name) for name in names]
    initial = Initial(
        torch.tensor([initializer.KINDS[type(kind)] for kind in kinds], dtype=torch.int32),
        torch.tensor([initializer.scale_of(kind) for kind in kinds]),
        torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64)),
        torch.tensor([0.5, 0.25, 0.125]),
        torch.tensor([3, 2**31 + 5, 7]),
    )
    initial = Initial(*(part.to(DEVICE) for part in initial))
    widths = [(dim, dtype), (state_dim, torch.float32), (usage_dim, torch.int32)]
    arenas = [Arena(width, kind, DEVICE, max_rows=5000, poison=True) for width, kind in widths]
    for arena in arenas:
        arena.reserve(1000)
    rows = RowArrays(*(arena.tensor for arena in arenas))
    inserter = Inserter()
    keys = torch.cat([random_keys(90, 60), EDGES])
    batch = packed([keys, keys, keys[:40]], [0, 1, 2])
    free = torch.tensor([900, 3, 77], device=DEVICE)
    rows_of_table = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    inserter.index.reserve(1000)
    found, misses = inserter.find(batch)
    claims = inserter.index.claim(batch, misses, found, inserter.allocated)
    message = torch.zeros(1, dtype=torch.int64, pin_memory=DEVICE.type == "cuda")
    count = Count(inserter.allocated, message, 2**31 - 1)
    to = Destination(Slots(free, 100), rows, rows_of_table, count)
    make_rows(inserter.index, batch, misses, claims, found, to, initial)
    again, misses = inserter.find(batch)
    assert int(misses.number) == 0
    assert torch.equal(again, found)
    tables = tables_of(batch)
    num = int(inserter.allocated)
    assert int(message) == (2**31 - 1) << 32 | num
    used = torch.cat([free, torch.arange(100, 97 + num, device=DEVICE)])
    assert torch.equal(found.unique().long(), used.sort().values)
    assert rows_of_table.tolist() == [len(batch.keys[tables == t].unique()) for t in range(3)]
    for table, kind in enumerate(kinds):
        theirs = batch.keys[tables == table]
        slots = found[tables == table].long()
        want = torch.from_numpy(
            initializer.initial_values(kind, 11, names[table], theirs.cpu().numpy(), dim)
        ).to(dtype)
        assert torch.equal(rows.values[slots].cpu(), want)
        assert torch.equal(read_initial(theirs, table, initial, rows.values).cpu(), want)
        read = read_initial(theirs, table, initial, torch.empty(0, dim, device=DEVICE))
        assert read.dtype == torch.float32
        assert (rows.state[slots] == 0.5 ** (table + 1)).all()
        now = int(initial.now[table])
        marks = rows.usage[slots].cpu().numpy().view(np.uint32)
        assert (marks[:, :1] == now).all()
        assert (marks[:, 1:] == 0).all()
    # No other row was touched.
    touched = torch.zeros(1000, dtype=torch.bool, device=DEVICE).index_fill_(0, used, True)
    assert rows.values[:1000][~touched].isnan().all()


def test_rows_of_an_arena_stay_while_it_grows():
    arena = Arena(3, torch.float32, DEVICE, max_rows=1 << 20, poison=True)
    arena.reserve(10)
    assert arena.rows >= 10
    first = arena.tensor[: arena.rows]
    assert first.isnan().all()
    first.copy_(torch.arange(first.numel(), device=DEVICE).view_as(first))
    before, address = arena.rows, arena.tensor.data_ptr()
    arena.reserve(before + 1)
    assert arena.rows > before
    assert arena.tensor.data_ptr() == address
    kept = torch.arange(3 * before, device=DEVICE).view(-1, 3).float()
    assert torch.equal(arena.tensor[:before], kept)
    assert arena.tensor[before : arena.rows].isnan().all()
    with pytest.raises(MemoryError):
        arena.reserve((1 << 20) + 1)


def test_an_arena_of_no_width_holds_any_rows():
    arena = Arena(0, torch.float32, DEVICE, max_rows=2**31 - 1)
    arena.reserve(2**30)
    assert arena.tensor.shape == (2**31 - 1, 0)
    assert arena.rows == 2**31 - 1
