"""A rank that has no sample is told of, once, and on all ranks alike."""

import pytest

from penstock.ranks.group import ALONE
from penstock.ranks.share import Share
from tests.world.ranks import World


def said(samples):
    def act(rank):
        share = Share(rank, "row groups")
        for number in samples[rank.rank]:
            share.add(number)
        return share.warning(), share.warning()

    return World(len(samples)).run(act)


def test_idle_ranks_are_named_once():
    words = (
        "2 of 3 ranks have had no sample so far (rank 0, 2): the data has too few row groups to "
        "fill the lanes of all; write more files, or smaller row groups, or start fewer ranks: 1"
    )
    assert said([[0, 0], [0, 7], []]) == [(words, None)] * 3


@pytest.mark.parametrize("samples", [[[5]], [[5], [0, 1]]])
def test_ranks_that_have_samples_are_not_told_of(samples):
    assert said(samples) == [(None, None)] * len(samples)


def test_one_process_asks_nobody():
    assert Share(ALONE, "row groups").warning() is None


def test_a_rank_that_had_samples_at_any_batch_is_not_idle():
    def act(rank):
        share = Share(rank, "row groups")
        for samples in (3 * rank.rank, 3 - 3 * rank.rank, 0):
            share.add(samples)
        return share.warning()

    assert World(2).run(act) == [None, None]
