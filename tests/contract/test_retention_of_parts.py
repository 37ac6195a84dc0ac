"""What admission and eviction remember, saved by some ranks and loaded by others."""

import numpy as np
import pytest
import torch

from penstock import EmbeddingCollection, FeatureConfig, KeyedJagged, TableConfig
from penstock.config import Adagrad, AdmitFrequent, Eviction
from penstock.embedding.collection import table_files, table_stores
from penstock.embedding.collection.table_files import import_tables
from penstock.embedding.collection.table_state import pack_tables, unpack_tables
from penstock.embedding.retention import NUMBERS
from penstock.embedding.sharded import store as sharded_store
from penstock.embedding.sharded.store import AlikeRanks
from penstock.training.checkpoint.shares import remembered, share_of_all, write_share
from tests.world.ranks import World

SINCE = NUMBERS.index("admitted")


class Group:
    """As a process group, of one thread."""

    def __init__(self, exchange):
        self.exchange = exchange

    def rank(self):
        return self.exchange.rank

    def size(self):
        return self.exchange.size


@pytest.fixture
def collection_of(monkeypatch):
    """Makes collections of a World's ranks; None: of one process."""
    for module in (table_stores, sharded_store):
        monkeypatch.setattr(module, "Collective", lambda group, _: group.exchange)

    def made(exchange, **fields):
        ranks = None if exchange is None else AlikeRanks(Group(exchange), "sum")
        rule = Adagrad(learning_rate=0.1)
        tables = [TableConfig(name="t", dim=4, optimizer=rule, **fields)]
        features = [FeatureConfig(name="f", table="t", pooling="sum")]
        return EmbeddingCollection(tables, features, deterministic=True, group=ranks, num_threads=1)

    return made


def learn(embeddings, rank=0, size=1):
    """Some steps on 40 keys, most of which are refused at first."""
    rng = np.random.default_rng(0)
    for _ in range(4):
        keys = torch.from_numpy(rng.integers(0, 40, 30))[rank::size].contiguous()
        batch = KeyedJagged(("f",), keys, torch.arange(len(keys) + 1))
        embeddings(batch).sum().backward()
        embeddings.apply_gradients()


def contents(collections):
    """Of a table over collections: rows, counts, default rows, and the sum of its counters."""
    rows, counts = {}, {}
    for each in collections:
        for part in each.export_table("t"):
            for key, value in zip(part.keys.tolist(), part.values.tolist(), strict=True):
                assert key not in rows
                rows[key] = value
        for part in each.export_candidates("t"):
            for key, count in zip(part.keys.tolist(), part.counts.tolist(), strict=True):
                assert key not in counts
                counts[key] = count
    states = [each.retention_state("t") for each in collections]
    defaults = {tuple(one.default_value.tolist() + one.default_state.tolist()) for one in states}
    numbers = np.array([list(one.numbers.values()) for one in states])
    times = {tuple(one) for one in numbers[:, : SINCE - 1].tolist()}
    return rows, counts, defaults, times, numbers[:, SINCE:].sum(0).tolist()


FIELDS = {"admission": AdmitFrequent(min_count=3), "eviction": Eviction(ttl=99)}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2), (2, 3), (3, 2)])
def test_any_number_of_ranks_takes_over_what_any_number_remembered(
    collection_of, tmp_path, before, after
):
    path = tmp_path / "tables"

    def save(exchange):
        made = collection_of(exchange, **FIELDS)
        learn(made, exchange.rank, exchange.size)
        made.save_tables(path)
        return made

    def load(exchange):
        made = collection_of(exchange, **FIELDS)
        made.load_tables(path)
        return made

    saved = contents(World(before).run(save))
    alone = collection_of(None, **FIELDS)
    learn(alone)
    assert saved == contents([alone])
    assert len(saved[0]) > 5
    assert len(saved[1]) > 5
    assert contents(World(after).run(load)) == saved


def test_no_rank_has_the_keys_of_all_in_memory(collection_of, tmp_path, monkeypatch):
    """Rows and counts of other ranks are left where they are, whatever the table's limits."""
    monkeypatch.setattr(table_files, "SHARD_BYTES", 40 * 68)
    path, ranks = tmp_path / "tables", 4
    fields = {
        "admission": AdmitFrequent(min_count=2),
        "eviction": Eviction(order="lru"),
        "max_bytes": 5000 * 68,
    }
    alone = collection_of(None, **fields)
    for first in (0, 0, 750, 750, 1500):  # those that come twice get rows
        keys = torch.arange(first, first + 750)
        alone(KeyedJagged(("f",), keys, torch.arange(751))).sum().backward()
        alone.apply_gradients()
    alone.save_tables(path)
    rows, counts, *_ = contents([alone])
    assert (len(rows), len(counts)) == (1500, 750)
    joined, join = [], torch.cat

    def noted(tensors, *arguments, **named):
        made = join(tensors, *arguments, **named)
        joined.append(len(made))
        return made

    def load(exchange):
        made = collection_of(exchange, **fields)
        made.load_tables(path)
        return made

    # Around all ranks: each of them would put back what another one had put there.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", noted)
        made = World(ranks).run(load)
    assert torch.cat is join
    assert [len(found) for found in contents(made)[:2]] == [1500, 750]
    assert 2 * ranks <= len(joined)
    assert max(joined) < 1.5 * 1500 / ranks


def test_a_rank_for_which_nobody_wrote_a_row_begins_empty(collection_of, tmp_path):
    """Of two ranks one had all rows, more than a rank of four may have."""
    fields = {"eviction": Eviction(order="lru"), "max_bytes": 24 * 68}

    def save(exchange):
        made = collection_of(exchange, **fields)
        keys = torch.arange(100)
        first = keys[made.own_places("t", keys)] if exchange.rank == 0 else keys[:0]
        made(KeyedJagged(("f",), first[:20], torch.arange(len(first[:20]) + 1))).sum().backward()
        made.apply_gradients()
        states = remembered(made, exchange)
        return share_of_all(exchange, write_share(tmp_path, made, exchange, states)), made

    ended = World(2).run(save)
    rows = contents([made for _, made in ended])[0]
    (table,) = ended[0][0].tables
    assert table.rows == len(rows) > 5 and set(table.writers) == {0}

    def load(exchange):
        made = collection_of(exchange, **fields)
        import_tables(tmp_path, [table], made)
        return made

    made = World(4).run(load)
    shares = [len(contents([one])[0]) for one in made]
    assert shares[2:] == [0, 0] and min(shares[:2]) > 0
    assert contents(made)[0].items() <= rows.items()


def test_what_one_process_packed_is_counted_once(collection_of):
    alone = collection_of(None, **FIELDS)
    learn(alone)
    packed = pack_tables(alone)

    def load(exchange):
        made = collection_of(exchange, **FIELDS)
        unpack_tables(packed, made)
        return made

    assert contents(World(3).run(load)) == contents([alone])


def test_a_share_that_holds_fewer_rows_keeps_those_used_last(collection_of, tmp_path):
    """Of 20 rows, half of which are a rank's, more or less: no rank keeps more than its share."""
    path = tmp_path / "tables"
    fields = {"eviction": Eviction(order="lru"), "max_bytes": 24 * 68}
    alone = collection_of(None, **fields)
    for first in (0, 10):
        keys = torch.arange(first, first + 10)
        alone(KeyedJagged(("f",), keys, torch.arange(11))).sum().backward()
        alone.apply_gradients()
    alone.save_tables(path)
    assert len(contents([alone])[0]) == 20

    def load(exchange):
        made = collection_of(exchange, **fields | {"max_bytes": 24 * 34})
        made.load_tables(path)
        return made

    made = World(2).run(load)
    for each in made:
        kept = contents([each])[0]
        newer = len(each.own_places("t", torch.arange(10, 20)))
        assert 1 <= len(kept) <= 6
        assert len([key for key in kept if key >= 10]) == min(6, newer)
    evicted = NUMBERS.index("evicted") - SINCE
    rows, *_, numbers = contents(made)
    assert numbers[evicted] == 20 - len(rows)
