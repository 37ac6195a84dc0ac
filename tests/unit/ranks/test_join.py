"""How a process becomes a rank: what a launcher says, and what is wrong with it."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from penstock.config import parse_job
from penstock.errors import ConfigError, FailedElsewhere, GroupError
from penstock.interruption import Interruption
from penstock.ranks import join
from penstock.ranks.environment import MEETING
from penstock.ranks.group import ALONE
from penstock.ranks.join import Place, joined, place_of
from penstock.ranks.launch import launch
from penstock.ranks.together import check_alike, from_first, together
from penstock.run import train
from tests.world.ranks import World


@pytest.fixture
def launched(monkeypatch):
    """Sets a launcher's variables; others than those given are not set."""

    def set_them(**variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", MEETING):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_them


def test_without_a_launcher_or_with_one_rank_a_process_is_alone():
    assert place_of({}) is None
    assert place_of({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert place_of({"LOCAL_RANK": "3"}) is None
    assert place_of({"WORLD_SIZE": "4", "RANK": "3"}) == Place(3, 4, None)
    assert place_of({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}) == Place(2, 4, 0)


def test_the_group_of_one_is_alone(launched):
    launched()
    with joined("cpu") as group:
        assert group is ALONE


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is not set.*unset RANK"),
        ({"WORLD_SIZE": "3"}, "WORLD_SIZE is 3, but RANK is not set.*from 0 to 2"),
        ({"WORLD_SIZE": "3", "RANK": "3"}, "RANK is 3 of WORLD_SIZE 3.*from 0 to 2"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is 0.*at least 1"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two'.*whole number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'.*whole number"),
        ({"WORLD_SIZE": "2", "RANK": "١"}, "RANK is '١'.*whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set.*--nproc"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"},
            "MASTER_PORT is not set.*free port",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
            "MASTER_PORT is 70000.*65535",
        ),
    ],
)
def test_a_wrong_environment_is_refused_by_the_variable(launched, variables, message):
    launched(**variables)
    with pytest.raises(ConfigError, match=message), joined("cpu"):
        pass


@pytest.mark.parametrize(
    ("device", "variables", "message"),
    [
        (
            "cuda:1",
            {"LOCAL_RANK": 0},
            "run.device is cuda:1, and there are 4 ranks.*to cuda",
        ),
        ("cuda", {}, "LOCAL_RANK is not set.*which GPU"),
        ("cuda", {"LOCAL_RANK": 2}, "LOCAL_RANK is 2, and this machine has 2 GPUs"),
    ],
)
def test_a_gpu_that_a_rank_cannot_take_is_refused(
    launched, monkeypatch, device, variables, message
):
    launched(RANK=2, WORLD_SIZE=4, **variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=message), joined(device):
        pass


def test_ranks_that_do_not_come_are_named(launched, monkeypatch, tmp_path):
    monkeypatch.setattr(join, "RENDEZVOUS_S", 0.2)
    launched(RANK=0, WORLD_SIZE=3, **{MEETING: tmp_path / "meeting"})
    message = r"rank 0 of 3 waited 0.2 s for rank 1, 2, which did"
    with pytest.raises(GroupError, match=message), joined("cpu"):
        pass


def test_a_port_that_is_taken_is_named(launched):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launched(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        message = f"MASTER_PORT {port}.*set MASTER_PORT to a free"
        with pytest.raises(ConfigError, match=message), joined("cpu"):
            pass


def test_a_first_rank_that_is_nowhere_is_named(launched, monkeypatch):
    monkeypatch.setattr(join, "RENDEZVOUS_S", 1.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched(RANK=1, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    message = f"rank 1 of 2 finds no rank 0 at .*MASTER_PORT {port}"
    with pytest.raises(GroupError, match=message), joined("cpu"):
        pass


SCRIPT = str(Path(__file__).with_name("meeting_ranks.py"))


def test_ranks_meet_without_a_port_and_leave_together(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ended = launch([sys.executable, SCRIPT], 2, Interruption())
    assert ended == (0, None)
    assert "WORLD_SIZE" not in os.environ


def over(size, act):
    return World(size).run(act)


def test_an_error_of_one_rank_is_an_error_of_all():
    def act(group):
        with pytest.raises((ConfigError, FailedElsewhere)) as raised, together(group, "begin"):
            if group.rank == 1:
                raise ConfigError("no such column")
        assert raised.value.is_known_to_all
        # They are at the same place still.
        return str(raised.value), group.gathered(torch.tensor(1)).sum().item()

    elsewhere = "1 of 3 ranks cannot begin, which say why", 3
    assert over(3, act) == [elsewhere, ("no such column", 3), elsewhere]


@pytest.mark.parametrize("rank", [0, 1])
def test_tasks_within_tasks_end_once(rank):
    def act(group):
        with (
            pytest.raises((ConfigError, FailedElsewhere)),
            together(group, "do all"),
            together(group, "do a part"),
        ):
            if group.rank == rank:
                raise ConfigError("wrong")
        return group.gathered(torch.tensor(1)).sum().item()

    assert over(2, act) == [2, 2]


def test_a_lost_rank_is_not_waited_for():
    def act(group):
        with together(group, "begin"):
            raise GroupError("rank 1 is gone")

    with pytest.raises(GroupError, match="rank 1 is gone"):
        over(2, act)


def test_what_the_first_says_all_hear():
    said = {"auc": 0.1 + 0.2, "rows": [1, None, "two"], "none": {}}
    assert over(3, lambda group: from_first(group, lambda: said if not group.rank else 1 / 0)) == [
        said,
        said,
        said,
    ]
    (nan,) = set(map(str, over(2, lambda group: from_first(group, lambda: float("nan")))))
    assert nan == "nan"
    assert from_first(ALONE, lambda: said) is said


def test_ranks_that_were_given_unlike_things_are_refused():
    def act(group):
        check_alike(group, "the job", "same")
        with pytest.raises(ConfigError, match="the job is another one on rank 2 than on rank 0"):
            check_alike(group, "the job", "other" if group.rank == 2 else "same")

    over(3, act)


def test_a_script_with_a_group_of_its_own_does_not_train_alone_in_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    job = parse_job({
        "data": {"source": {"format": "synthetic"}, "label": {"column": "click"}},
        "features": [{"columns": ["c0"]}],
        "model": {"kind": "dlrm"},
    })
    with pytest.raises(ConfigError, match=r"one of 2 ranks of torch\.distributed"):
        train(job, tmp_path / "run")
    assert not list(tmp_path.iterdir())
