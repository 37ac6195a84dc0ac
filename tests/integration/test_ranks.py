"""Tables over processes: a user's own DDP script, saving, loading on other numbers, a rank gone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from penstock import Adagrad, CheckpointError, EmbeddingCollection, FeatureConfig, TableConfig

SCRIPT = Path(__file__).with_name("ddp_script.py")
LIMIT_S = 240


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run_alone(out, *options):
    out.mkdir()
    command = [sys.executable, str(SCRIPT), str(out), *options]
    subprocess.run(command, check=True, env=environment(), timeout=LIMIT_S)
    return torch.load(out / "result.pt")


def run_ranks(size, out, *options):
    """Processes that a launcher would start; the exit status and output of each."""
    out.mkdir()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), *options],
            env=environment(
                RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT_S)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def tables_of(path):
    tables = [
        TableConfig(name=n, dim=8, optimizer=Adagrad(learning_rate=0.1)) for n in ("user", "item")
    ]
    features = [
        FeatureConfig(name="user", table="user", pooling="sum"),
        FeatureConfig(name="seen", table="item", pooling="mean"),
    ]
    collection = EmbeddingCollection(tables, features)
    collection.load_tables(path / "tables")
    return collection


def assert_close(one, other):
    """Float sums in another order, 30 steps: about as exact as torch's own comparison."""
    torch.testing.assert_close(other["losses"], one["losses"], rtol=1e-5, atol=1e-6)


def assert_same_tables(one, other):
    assert other.step == one.step
    for table in ("user", "item"):
        (rows,) = one.export_table(table)
        found = other.find(table, rows.keys)
        assert found.found.all()
        assert sum(len(part.keys) for part in other.export_table(table)) == len(rows.keys)
        torch.testing.assert_close(found.values, rows.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.state, rows.state, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, run_alone(out)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two ranks, by torchrun."""
    out = tmp_path_factory.mktemp("two") / "run"
    out.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(SCRIPT), str(out)]
    subprocess.run(command, check=True, env=environment(), timeout=LIMIT_S)
    return out


def test_a_ddp_script_learns_as_one_process_does(alone, two):
    assert_close(alone[1], torch.load(two / "result.pt"))
    parts = sorted(path.name for path in (two / "tables").iterdir())
    assert parts == ["part-00000-of-00002", "part-00001-of-00002"]
    assert_same_tables(tables_of(alone[0]), tables_of(two))


def test_three_ranks_go_on_from_two_attached_and_clipped(alone, two, tmp_path):
    options = "attached", "clipped"
    expected = run_alone(tmp_path / "one", *options, f"from={alone[0]}")
    ended = run_ranks(3, tmp_path / "three", *options, f"from={two}")
    assert [status for status, _ in ended] == [0, 0, 0], ended
    assert_close(expected, torch.load(tmp_path / "three" / "result.pt"))
    assert_same_tables(tables_of(tmp_path / "one"), tables_of(tmp_path / "three"))


def test_keys_that_are_refused_learn_as_in_one_process(alone, tmp_path):
    expected = run_alone(tmp_path / "one", "refusing")
    ended = run_ranks(2, tmp_path / "two", "refusing")
    assert [status for status, _ in ended] == [0, 0], ended
    assert_close(expected, torch.load(tmp_path / "two" / "result.pt"))
    assert not torch.allclose(expected["losses"], alone[1]["losses"], rtol=1e-3)


def test_a_rank_that_is_gone_ends_the_others_by_name(tmp_path):
    (survivor, error), (gone, _) = run_ranks(2, tmp_path / "out", "die")
    assert gone == 9
    assert survivor == 1
    assert "GroupError: rank 0 of 2 could not finish its look-up" in error


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_learn_as_one_process_does(alone, tmp_path):
    """Matrix products of a GPU round otherwise than those of a CPU."""
    options = "attached", "clipped"
    expected = run_alone(tmp_path / "one", *options, f"from={alone[0]}")
    ended = run_ranks(2, tmp_path / "two", *options, f"from={alone[0]}", "gpu")
    assert [status for status, _ in ended] == [0, 0], ended
    losses = torch.load(tmp_path / "two" / "result.pt", map_location="cpu")["losses"]
    torch.testing.assert_close(losses, expected["losses"], rtol=1e-3, atol=1e-4)


def test_missing_and_mixed_parts_are_refused(two, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "tables").symlink_to(two / "tables")
    tables_of(whole)
    broken = tmp_path / "broken" / "tables"
    broken.mkdir(parents=True)
    (broken / "part-00001-of-00002").symlink_to(two / "tables" / "part-00001-of-00002")
    with pytest.raises(CheckpointError, match="part-00000-of-00002 missing of 2 ranks"):
        tables_of(tmp_path / "broken")
