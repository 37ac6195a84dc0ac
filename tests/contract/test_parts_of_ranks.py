"""Tables saved and loaded by several ranks: nothing is lost, and nobody waits for who failed."""

import os
from types import SimpleNamespace

import pytest
import torch

from penstock import SGD, CheckpointError, EmbeddingCollection, FeatureConfig, TableConfig
from penstock.embedding.collection.table_files import load_tables, save_tables
from penstock.embedding.collection.table_state import pack_tables, unpack_tables
from penstock.embedding.store import TableRows
from tests.world.ranks import World


class RanksOfExchange:
    """As `Ranks`, of a world."""

    def __init__(self, exchange):
        self.exchange, self.part = exchange, (exchange.rank, exchange.size)

    def agree(self, number):
        return self.total(number if self.exchange.rank == 0 else 0)

    def total(self, number):
        return int(self.exchange.combined("agreement", torch.tensor(number)))


class OfRank:
    """A collection with some keys of its own, and ranks."""

    def __init__(self, exchange, keys=(), seed=0):
        tables = [TableConfig(name="t", dim=4, optimizer=SGD(learning_rate=0.5))]
        features = [FeatureConfig(name="f", table="t", pooling="sum")]
        self.collection = EmbeddingCollection(tables, features, seed=seed)
        self.ranks = RanksOfExchange(exchange)
        if len(keys):
            keys = torch.tensor(keys)
            rows = TableRows(keys, keys[:, None] * torch.ones(4), torch.empty(len(keys), 0), None)
            self.collection.import_rows("t", rows)

    def __getattr__(self, name):
        return getattr(self.collection, name)

    def keys(self):
        return sorted(k for rows in self.export_table("t") for k in rows.keys.tolist())


def errors_of(size, of_rank):
    """What each rank's part of a World raised; None: nothing."""

    def caught(exchange):
        try:
            of_rank(exchange)
        except CheckpointError as error:
            return str(error)
        return None

    return World(size).run(caught)


def test_parts_are_beside_each_other_and_read_by_all(tmp_path):
    path = tmp_path / "tables"

    def of_rank(exchange):
        for keys in ([7], [exchange.rank, 10 + exchange.rank]):
            save_tables(path, OfRank(exchange, keys))

    World(3).run(of_rank)
    assert [each.name for each in tmp_path.iterdir()] == ["tables"]
    assert len(list(path.iterdir())) == 3
    read = OfRank(RanksOfOne())
    load_tables(path, read)
    assert read.keys() == [0, 1, 2, 10, 11, 12]


class RanksOfOne:
    rank, size = 0, 1

    def combined(self, _, number):
        return number


def test_parts_at_unlike_paths_are_not_lost_in_silence(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()

    def of_rank(exchange):
        save_tables(tmp_path / str(exchange.rank) / "tables", OfRank(exchange, [1]))

    zero, one = errors_of(2, of_rank)
    assert "rank 0 does not see part-00001-of-00002 beside its own" in zero
    assert "rank 1 does not see part-00000-of-00002 beside its own" in one
    assert not any(os.listdir(tmp_path / str(rank)) for rank in range(2))


@pytest.mark.parametrize("wrong", range(2))
def test_something_else_in_one_ranks_way_ends_all(tmp_path, wrong):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / str(wrong) / "tables").mkdir()

    def of_rank(exchange):
        save_tables(tmp_path / str(exchange.rank) / "tables", OfRank(exchange, [1]))

    said = errors_of(2, of_rank)
    assert "there already, and save_tables did not write it" in said[wrong]
    assert "1 other ranks cannot write" in said[1 - wrong]


@pytest.mark.parametrize("wrong", range(2))
def test_a_rank_that_cannot_write_ends_all(tmp_path, wrong, monkeypatch):
    path = tmp_path / "tables"
    World(2).run(lambda exchange: save_tables(path, OfRank(exchange, [exchange.rank])))

    def of_rank(exchange):
        mine = OfRank(exchange, [5 + exchange.rank])
        if exchange.rank == wrong:
            mine.export_table = no_space
        save_tables(path, mine)

    said = errors_of(2, of_rank)
    assert "No space left" in said[wrong]
    assert "1 other ranks cannot write" in said[1 - wrong]
    read = OfRank(RanksOfOne())
    load_tables(path, read)
    assert read.keys() == [0, 1]
    assert [each.name for each in tmp_path.iterdir()] == ["tables"]


def no_space(*_):
    raise OSError(28, "No space left on device")
    yield


def test_ranks_that_load_unlike_tables_are_told(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for n, path in enumerate(paths):
        save_tables(path, OfRank(RanksOfOne(), [n]))

    def of_rank(exchange):
        mine = OfRank(exchange, [5])
        mine.take_over = None  # it is not called
        load_tables(paths[exchange.rank], mine)

    for rank, said in enumerate(errors_of(2, of_rank)):
        assert f"unlike tables to load, rank {rank} those of {paths[rank]}" in said


@pytest.mark.parametrize("wrong", range(2))
def test_a_rank_that_cannot_read_ends_all(tmp_path, wrong):
    path = tmp_path / "tables"
    save_tables(path, OfRank(RanksOfOne(), [1]))

    def of_rank(exchange):
        mine = OfRank(exchange, [5])
        mine.take_over = None
        load_tables(tmp_path / "gone" if exchange.rank == wrong else path, mine)

    said = errors_of(2, of_rank)
    assert "there is no such directory" in said[wrong]
    assert f"1 other ranks cannot read the tables of {path}" in said[1 - wrong]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"step": 3}, "is of step 3 and seed 0"), ({"seed": 4}, "is of step 0 and seed 4")],
)
def test_parts_of_unlike_steps_and_seeds_are_refused(tmp_path, fields, message):
    path = tmp_path / "tables"

    def of_rank(exchange):
        mine = OfRank(exchange, [exchange.rank])
        for name, value in fields.items():
            setattr(mine.collection, name, value if exchange.rank else 0)
        save_tables(path, mine)

    World(2).run(of_rank)
    with pytest.raises(CheckpointError, match=message):
        load_tables(path, OfRank(RanksOfOne()))


def test_parts_of_two_sizes_and_damaged_ones_are_refused(tmp_path):
    two, three = tmp_path / "two", tmp_path / "three"
    for size, path in ((2, two), (3, three)):
        World(size).run(lambda exchange, path=path: save_tables(path, OfRank(exchange, [1])))
    (three / "part-00001-of-00003").rename(two / "part-00001-of-00003")
    with pytest.raises(CheckpointError, match=r"part-0000|parts of other ranks"):
        load_tables(two, OfRank(RanksOfOne()))
    (two / "part-00001-of-00003").rename(three / "part-00001-of-00003")
    shard = next((three / "part-00002-of-00003").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="part-00002-of-00003"):
        load_tables(three, OfRank(RanksOfOne()))


def states_of(size, seeds, steps):
    """What each rank's collection packed, and one to load it into."""
    packed = []
    for rank in range(size):
        exchange = SimpleNamespace(rank=rank, size=size)
        mine = OfRank(exchange, [rank, 10 + rank], seed=seeds[rank])
        mine.collection.step = steps[rank]
        packed.append(pack_tables(mine))
    return packed


def test_states_go_back_to_all_ranks_together():
    packed = states_of(2, seeds=[0, 0], steps=[3, 3])

    def of_rank(exchange):
        mine = OfRank(exchange)
        unpack_tables(packed[exchange.rank], mine)
        return mine.keys()

    assert World(2).run(of_rank) == [[0, 10], [1, 11]]


@pytest.mark.parametrize(
    ("seeds", "steps", "said"),
    [([0, 1], [3, 3], "step 3 and seed 1, of 2"), ([0, 0], [3, 4], "step 4 and seed 0, of 2")],
)
def test_states_of_unlike_steps_and_seeds_are_refused_on_all_ranks(seeds, steps, said):
    packed = states_of(2, seeds, steps)
    kept = []

    def of_rank(exchange):
        mine = OfRank(exchange, [77])
        kept.append(mine)
        unpack_tables(packed[exchange.rank], mine)

    errors = errors_of(2, of_rank)
    assert "rank 0 a state of step 3 and seed 0, of 2 ranks" in errors[0]
    assert f"rank 1 a state of {said} ranks: give load_state_dict" in errors[1]
    assert [mine.keys() for mine in kept] == [[77], [77]]


def test_a_state_of_one_process_is_the_same_on_all_ranks():
    one, other = (pack_tables(OfRank(RanksOfOne(), keys)) for keys in ([1, 2], [1, 3]))

    def of_rank(exchange):
        unpack_tables([one, other][exchange.rank], OfRank(exchange))

    assert all("unlike tables to load" in said for said in errors_of(2, of_rank))


@pytest.mark.parametrize("wrong", range(2))
def test_a_state_that_one_rank_cannot_take_is_refused_on_all(wrong):
    packed = states_of(2, seeds=[0, 0], steps=[3, 3])
    packed[wrong] = packed[wrong][1:]
    kept = []

    def of_rank(exchange):
        mine = OfRank(exchange, [77])
        kept.append(mine)
        unpack_tables(packed[exchange.rank], mine)

    said = errors_of(2, of_rank)
    assert "does not match its checksum" in said[wrong]
    assert "1 other ranks cannot load their state of the tables" in said[1 - wrong]
    assert [mine.keys() for mine in kept] == [[77], [77]]
