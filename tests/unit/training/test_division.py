"""How a step is divided, on ranks of a world: sums, order, and errors that all hear of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from penstock.errors import DivergedElsewhere, FailedElsewhere, NonFiniteError
from penstock.position import Position
from penstock.ranks.group import ALONE
from penstock.training.steps.division import Division
from penstock.training.steps.finite import Flag
from penstock.types import Batch, KeyedJagged
from tests.world.ranks import World

LANES = 5
SIZES = (3, 0, 1, 4, 2)
"""Samples of each lane."""
OBJECTIVE = SimpleNamespace(
    tasks=("one",),
    total_weights=lambda batch: torch.atleast_1d(
        batch.labels.new_tensor(float(batch.labels.shape[0]))
        if batch.weights is None
        else batch.weights.sum()
    ),
)


def batch_of(rank, ranks, sizes=SIZES, **columns):
    """What a rank has of a batch whose labels count its samples, lane by lane."""
    starts = np.cumsum([0, *sizes])
    labels = torch.cat([
        torch.zeros(0),
        *(
            torch.arange(starts[lane], starts[lane + 1], dtype=torch.float32)
            for lane in range(rank, len(sizes), ranks)
        ),
    ])
    return Batch(
        torch.zeros(len(labels), 0),
        KeyedJagged((), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)),
        labels,
        (labels + 1) / 8,
        None,
        None,
        Position(),
        Position(),
        "here",
        lane_sizes=tuple(sizes),
        **columns,
    )


class Weights(nn.Module):
    """Parameters, of which one is not always used."""

    def __init__(self, *, buffered=False):
        super().__init__()
        self.always = nn.Parameter(torch.zeros(33))
        self.seldom = nn.Parameter(torch.zeros(3))
        self.never = nn.Parameter(torch.zeros(1))
        if buffered:
            self.norm = nn.BatchNorm1d(1)


def ranks_of(size, act, sizes=SIZES, *, deterministic=True, buffered=False):
    """What `act(division, batch, model)` gives on each rank."""

    def of_rank(group):
        model = Weights(buffered=buffered)
        division = Division(model, group, lanes=LANES, deterministic=deterministic, seed=3)
        division.begin_step(0)
        return act(division, batch_of(group.rank, group.size, sizes), model)

    if size == 1:
        return [of_rank(ALONE)]
    return World(size, seed=size).run(of_rank)


def trained(division, batch, model):
    """Gradients that depend on the lane, as a backward pass leaves them."""
    losses = torch.zeros(division.slots, dtype=torch.float64)
    for part in division.parts(batch):
        division.begin_part(part, 0)
        labels = batch.labels[part.rows]
        model.always.grad = torch.cat([labels.sum()[None] * 0.1, torch.rand(32)])
        if 3 in labels:
            model.seldom.grad = torch.full((3,), 0.7)
        if hasattr(model, "norm"):
            model.norm.running_mean += labels.mean()
        losses[part.slot] += float(labels.double().sum()) / 3
        division.end_part(part)
    division.end_batch()
    drawn = torch.rand(()).item()  # at once: ranks of a world share torch's generator
    loss = division.loss(losses)
    division.sum_gradients(Flag(torch.device("cpu")))
    buffers = [one.tolist() for one in model.buffers()]
    grads = [None if one.grad is None else one.grad.tolist() for one in model.parameters()]
    return loss, grads[:3], buffers, drawn


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("buffered", [False, True])
def test_lane_by_lane_any_number_of_ranks_has_the_same_bits(ranks, buffered):
    (alone,) = ranks_of(1, trained, buffered=buffered)
    assert ranks_of(ranks, trained, buffered=buffered) == [alone] * ranks
    loss, (always, seldom, never), buffers, _ = alone
    assert loss == pytest.approx(45 / 3)
    assert always[0] == pytest.approx(4.5) and 0 < always[1] < 4
    assert seldom == pytest.approx([0.7] * 3) and never is None
    if buffered:
        # The mean over the four lanes that have samples of what each adds to what was there.
        means = [1.0, 3.0, 5.5, 8.5]
        assert buffers[0] == pytest.approx([sum(means) / 4])


def test_what_is_drawn_differs_by_lane_and_batch_and_step():
    def act(division, batch, model):
        drawn = []
        for step in range(2):
            division.begin_step(step)
            for number in range(2):
                for part in division.parts(batch):
                    division.begin_part(part, number)
                    drawn.append(torch.rand(()).item())
        return drawn

    drawn = sum(ranks_of(2, act), [])
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_at_once_sums_are_of_all_ranks(ranks):
    def act(division, batch, model):
        assert not division.by_lane and len(division.parts(batch)) <= 1
        return trained(division, batch, model)[:2]

    found = ranks_of(ranks, act, (2, 0, 0, 0, 3), deterministic=False)
    assert found == [found[0]] * ranks
    loss, (always, seldom, never) = found[0]
    assert loss == pytest.approx(10 / 3)
    assert always[0] == pytest.approx(1.0)
    assert seldom == pytest.approx([0.7] * 3) and never is None


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sizes", [SIZES, (0, 0, 0, 0, 7), (0, 1, 0, 0, 0)])
def test_totals_are_of_all_ranks_though_one_has_nothing(deterministic, sizes):
    wanted = sum((n + 1) / 8 for n in range(sum(sizes)))

    def act(division, batch, model):
        return division.totals(OBJECTIVE, [batch, batch]).tolist()

    for ranks in (1, 2, 4):
        for total in ranks_of(ranks, act, sizes, deterministic=deterministic):
            assert total == [[wanted], [wanted]]


def test_alone_and_whole_there_is_nothing_to_ask():
    division = Division(Weights())
    batch = batch_of(0, 1, (4,))
    assert division.totals(OBJECTIVE, [batch]) is None
    assert division.totals(OBJECTIVE, [batch, batch]).tolist() == [[1.25], [1.25]]
    division.end_batch()
    assert division.loss(torch.tensor([2.5], dtype=torch.float64)) == 2.5


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("kind", [ValueError, NonFiniteError])
def test_an_error_of_one_rank_ends_all(failing, kind):
    def act(division, batch, model):
        error = kind("mine") if division.group.rank == failing else None
        with pytest.raises((kind, FailedElsewhere, DivergedElsewhere)) as raised:
            division.end_batch(error)
        return type(raised.value), str(raised.value), getattr(raised.value, "is_known_to_all", None)

    found = ranks_of(3, act)
    mine = found.pop(failing)
    assert mine[:2] == (kind, "mine")
    if kind is NonFiniteError:
        # What was trained diverges: no rank saves it.
        words = f"the loss or a gradient of rank {failing} is not finite, which says why"
        theirs = (DivergedElsewhere, words, True)
        assert found == [theirs] * 2 and mine[2]
    else:
        words = f"rank {failing} could not train on its part of a batch, and says why"
        assert [one[:2] for one in found] == [(FailedElsewhere, words)] * 2


def test_something_not_finite_counts_more_than_another_error():
    def act(division, batch, model):
        error = [ValueError("mine"), NonFiniteError("theirs")][division.group.rank]
        with pytest.raises((NonFiniteError, DivergedElsewhere)):
            division.end_batch(error)
        return True

    assert ranks_of(2, act) == [True, True]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("raising", [None, 0, 2])
def test_a_flag_that_is_up_on_one_rank_is_up_on_all(raising, deterministic):
    def act(division, batch, model):
        flag = Flag(torch.device("cpu"))
        for part in division.parts(batch):
            division.begin_part(part, 0)
            model.always.grad = torch.ones(33)
            division.end_part(part)
        if division.group.rank == raising:
            flag.note(torch.tensor(torch.inf))
        division.sum_gradients(flag)
        # What was summed is not what the flag is made of.
        return float(flag.raised()), model.always.grad.isfinite().all().item()

    assert ranks_of(3, act, deterministic=deterministic) == [(float(raising is not None), True)] * 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_whole_batch_is_in_the_order_of_lanes(ranks):
    def act(division, batch, model):
        whole, outputs = division.whole(batch, batch.labels * 2)
        return whole.labels.tolist(), whole.weights.tolist(), outputs.tolist()

    labels = [float(n) for n in range(sum(SIZES))]
    wanted = labels, [(n + 1) / 8 for n in labels], [2 * n for n in labels]
    assert ranks_of(ranks, act) == [wanted] * ranks


def test_a_step_that_failed_leaves_no_gradients_behind():
    def act(division, batch, model):
        for part in division.parts(batch):
            division.begin_part(part, 0)
            model.always.grad = torch.full((33,), 100.0)
            division.end_part(part)
        division.begin_step(0)
        return trained(division, batch, model)

    assert ranks_of(2, act) == ranks_of(2, trained)


def test_event_times_are_of_all_ranks():
    def act(group):
        division = Division(Weights(), group, lanes=LANES)
        batch = batch_of(group.rank, group.size)
        times = None if batch.labels is None else batch.labels.to(torch.int64) + 1000
        columns = {name: getattr(batch, name) for name in batch.__slots__}
        found = division.event_times(Batch(**{**columns, "event_time": times}))
        return sorted(found.tolist())

    assert World(3).run(act) == [[1000 + n for n in range(sum(SIZES))]] * 3
