"""What ranks do at one place: told to all, compared, summed; and items in step."""

import math

import pytest

from penstock.errors import (
    CheckpointError,
    CheckpointFailedElsewhere,
    ConfigError,
    DataError,
    FailedElsewhere,
    GroupError,
)
from penstock.interruption import Interruption
from penstock.ranks.in_step import in_step
from penstock.ranks.table_totals import _total
from penstock.ranks.together import check_alike, from_first, of_checkpoint, summed
from tests.world.ranks import World


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_the_first_rank_says_is_heard_by_all(size):
    said = World(size).run(lambda rank: from_first(rank, lambda: [rank.rank, "é", None]))
    assert said == [[0, "é", None]] * size
    assert all(math.isnan(one) for one in World(size).run(lambda rank: from_first(rank, _nan)))


def _nan():
    return math.nan


def test_what_the_first_rank_cannot_say_is_an_error_on_all():
    def act(rank):
        return from_first(rank, _refused)

    ended = World(3).ended(act)
    assert [type(one) for one in ended] == [DataError, FailedElsewhere, FailedElsewhere]


def _refused():
    raise DataError("refused")


@pytest.mark.parametrize("other", [1, 2, 3])
def test_ranks_that_were_given_unlike_things_are_named(other):
    ended = World(4).ended(lambda rank: check_alike(rank, "the job", "ab"[rank.rank == other]))
    assert all(isinstance(one, ConfigError) for one in ended)
    assert {str(one).split(":")[0] for one in ended} == {
        f"the job is another one on rank {other} than on rank 0"
    }
    assert World(4).run(lambda rank: check_alike(rank, "the job", "a")) == [None] * 4


def test_a_part_of_a_checkpoint_that_fails_ends_it_for_all():
    def act(rank):
        with of_checkpoint(rank, "write a checkpoint"):
            if rank.rank == 1:
                raise CheckpointError("full")

    ended = World(3).ended(act)
    kinds = [CheckpointFailedElsewhere, CheckpointError, CheckpointFailedElsewhere]
    assert [type(one) for one in ended] == kinds
    assert str(ended[0]).startswith("1 of 3 ranks cannot write a checkpoint")


@pytest.mark.parametrize("size", [1, 3])
def test_numbers_are_summed(size):
    found = World(size).run(lambda rank: summed(rank, 1 << 40 + rank.rank))
    assert found == [sum(1 << 40 + rank for rank in range(size))] * size


@pytest.mark.parametrize("longer", [0, 1, 2])
def test_ranks_with_unlike_numbers_of_items_are_an_error_on_all(longer):
    def act(rank):
        items = range(3 if rank.rank == longer else 2)
        return list(in_step(items, rank, Interruption()))

    for rank, one in enumerate(World(3).ended(act)):
        assert isinstance(one, GroupError)
        has = "another" if rank == longer else "no"
        assert str(one).startswith(f"rank {rank} has {has} batch, and others do not agree")


def test_a_rank_that_cannot_read_an_item_is_named_on_the_others():
    def act(rank):
        def items():
            yield 0
            if rank.rank == 1:
                raise DataError("torn")
            yield 1

        return list(in_step(items(), rank, Interruption()))

    first, second, third = World(3).ended(act)
    assert isinstance(second, DataError) and second.is_known_to_all
    for one in (first, third):
        assert isinstance(one, FailedElsewhere)
        assert str(one).startswith("rank 1 could not read its part of the data")


def test_sizes_of_tables_are_sums_and_shares_are_means():
    parts = [
        {"rows": 3, "evicted": 1, "evicted_age": 10.0, "budget_used": 0.25},
        {"rows": 5, "evicted": 3, "evicted_age": 2.0, "budget_used": 0.75},
    ]
    sums = {"rows": 8, "evicted": 4, "evicted_age": 4.0}
    assert _total(parts, is_whole=False) == {**sums, "budget_used": 0.5}
    assert _total(parts, is_whole=True) == {**sums, "budget_used": 1.0}
    none = [{"evicted": 0, "evicted_age": 0.0}] * 2
    assert _total(none, is_whole=False) == {"evicted": 0, "evicted_age": 0.0}
