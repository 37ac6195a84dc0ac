"""Checkpoints that N ranks write and M ranks read, with ranks as threads."""

import errno
import json
import os
import shutil
import sys

import pytest
import torch

from penstock.config import (
    SGD,
    Adam,
    Eviction,
    FeatureConfig,
    TableConfig,
)
from penstock.embedding import EmbeddingCollection
from penstock.embedding.collection import table_files
from penstock.errors import CheckpointError, CheckpointFailedElsewhere
from penstock.position import Position
from penstock.ranks.group import ALONE
from penstock.training.checkpoint import checkpoint as checkpoint_module
from penstock.training.checkpoint import shares
from penstock.training.checkpoint.checkpoint import Checkpoints, TrainState, read_manifest, verify
from penstock.types import Jagged, KeyedJagged
from tests.unit.training.test_checkpoint import make_job
from tests.world.ranks import World, in_world
from tests.world.scheduler import current_task

TABLES = (
    TableConfig(name="user", dim=4, optimizer=Adam(learning_rate=0.05)),
    TableConfig(name="half", dim=3, dtype="bfloat16", optimizer=SGD(learning_rate=0.1)),
    TableConfig(name="old", dim=2, optimizer=SGD(), eviction=Eviction(ttl=3)),
    TableConfig(name="unused", dim=2),
)
FEATURES = tuple(FeatureConfig(name=name, table=name) for name in ("user", "half", "old"))


class Count:
    """Samples seen by all ranks: every rank has the metrics of all."""

    samples = 0

    def state_dict(self):
        return {"samples": torch.tensor([self.samples])}

    def load_state_dict(self, state):
        self.samples = int(state["samples"])


class Run:
    """What `penstock.run` does, on one rank."""

    def __init__(self, directory, group=ALONE, keep_last=2):
        self.group = group
        collection = EmbeddingCollection(
            TABLES, FEATURES, seed=3, num_threads=1, deterministic=True, group=group.tables
        )
        model = torch.nn.Linear(9, 1)
        optimizer = torch.optim.Adam(model.parameters())
        model.weight.grad = torch.ones(1, 9)
        model.bias.grad = torch.ones(1)
        self.state = TrainState(0, Position(), collection, model, optimizer, Count())
        self.checkpoints = Checkpoints(directory, keep_last, make_job(), group=group)

    def train(self, steps):
        state, mine = self.state, slice(self.group.rank, None, self.group.size)
        for _ in range(steps):
            generator = torch.Generator().manual_seed(state.step)
            keys = torch.randint(0, 25, (16, 3), generator=generator) + 5 * state.step
            weights = torch.randn(16, 9, generator=generator)
            batch = {feature.name: Jagged.from_dense(keys[mine]) for feature in FEATURES}
            (state.collection(KeyedJagged.pack(batch)) * weights[mine]).sum().backward()
            state.collection.apply_gradients()
            state.metrics.samples += len(keys)
            state.step += 1
            state.optimizer.step()
            state.position = Position(samples=16 * state.step)
        return self

    def save(self):
        return self.checkpoints.save(self.state)

    def restored(self, path):
        self.checkpoints.restore(path, self.state)
        return self


def rows_of(runs):
    """Every bit of the rows of all ranks, and what tables remember of them."""
    rows = {}
    for run in runs:
        for table in TABLES:
            for part in run.state.collection.export_table(table.name):
                content = [one for one in part[1:] if one is not None]
                for row, key in enumerate(part.keys.tolist()):
                    assert (table.name, key) not in rows, "a row on two ranks"
                    bits = [one[row].float().tolist() for one in content]
                    rows[table.name, key] = bits
    numbers = [run.state.collection.retention_state("old").numbers for run in runs]
    counted = {name: sum(one[name] for one in numbers) for name in ("admitted", "evicted")}
    alike = [{name: one[name] for name in ("now", "step", "swept")} for one in numbers]
    assert alike == [alike[0]] * len(runs)
    (samples,) = {run.state.metrics.samples for run in runs}
    states = [(one.state.step, one.state.position, one.state.collection.step) for one in runs]
    assert states == [states[0]] * len(runs)
    dense = [
        [one.tolist() for one in run.state.model.state_dict().values()]
        + [one["exp_avg"].tolist() for one in run.state.optimizer.state.values()]
        for run in runs
    ]
    assert dense == [dense[0]] * len(runs)
    return rows, counted, alike[0], samples, states[0], dense[0]


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    in_world(monkeypatch)
    torch.manual_seed(0)


def over(size, act):
    """What `act(group)` returns on each of so many ranks; one is alone."""
    if size == 1:
        return [act(ALONE)]
    return World(size).run(act)


def made(directory, group):
    run = Run(directory, group)
    with torch.no_grad():
        for parameter in run.state.model.parameters():
            parameter.fill_(0.5)
    return run


def trained(directory, size, steps, from_path=None):
    """Runs of all ranks after some steps, and the checkpoint that they wrote."""

    def act(group):
        run = made(directory, group)
        if from_path is not None:
            run.restored(from_path)
        return run.train(steps), run.save()

    ended = over(size, act)
    assert len({path for _, path in ended}) == 1
    return [run for run, _ in ended], ended[0][1]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_any_number_of_ranks_goes_on_from_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "SHARD_BYTES", 400)  # several shards a rank
    expected = rows_of(trained(tmp_path / "whole", 1, 12)[0])
    assert expected[1]["evicted"] > 0
    directory, path = tmp_path / "run", None
    legs = ((2, "spread"), (3, "whole"), (2, "spread"), (2, "whole"), (1, "whole"), (2, "spread"))
    for size, placement in legs:
        one, *others = TABLES
        placed = one.model_copy(update={"placement": placement}), *others
        monkeypatch.setattr(sys.modules[__name__], "TABLES", placed)
        runs, path = trained(directory, size, 2, path)
        manifest = verify(path)
        held = {record.name: record for record in manifest.tables}
        assert held["user"].rows == sum(len(run_rows(run, "user")) for run in runs)
        ranks = sorted({name[16:26] for name in held["user"].shards if "rank" in name})
        writers = range(size) if placement == "spread" else range(1)
        assert ranks == ([f"rank-{rank:05d}" for rank in writers] if size > 1 else [])
        assert list(held["user"].shards) == sorted(held["user"].shards)
        assert held["unused"].shards == ()
    assert rows_of(runs) == expected
    alone = made(tmp_path / "any", ALONE).restored(path)
    assert rows_of([alone]) == expected


@pytest.mark.parametrize(("before", "after"), [(4, 4), (4, 2), (2, 4), (3, 2), (2, 1)])
def test_a_rank_reads_the_shards_of_those_that_had_rows_of_it(tmp_path, monkeypatch, before, after):
    monkeypatch.setattr(table_files, "SHARD_BYTES", 400)
    runs, path = trained(tmp_path / "run", before, 4)
    expected, read = rows_of(runs), {}
    real = table_files.safetensors.safe_open
    wanted = {name for table in read_manifest(path).tables for name in table.shards}

    def opened(file, **options):
        if file.name in wanted:
            read.setdefault(getattr(current_task(), "owner", 0), set()).add(file.name)
        return real(file, **options)

    monkeypatch.setattr(table_files.safetensors, "safe_open", opened)
    runs = over(after, lambda group: made(tmp_path / "other", group).restored(path))
    assert rows_of(runs) == expected
    assert set().union(*read.values()) == wanted
    for rank, names_read in read.items():
        sources = {int(name.split("-rank-")[1][:5]) for name in names_read}
        # Ranks of so many have buckets side by side.
        overlapping = {
            other
            for other in range(before)
            if other * after < (rank + 1) * before and rank * before < (other + 1) * after
        }
        assert sources == overlapping


def run_rows(run, table):
    return [key for part in run.state.collection.export_table(table) for key in part.keys.tolist()]


def test_a_table_that_no_rank_has_rows_of_and_old_readers(tmp_path):
    _, path = trained(tmp_path / "run", 2, 2)
    content = json.loads((path / "manifest.json").read_text())
    assert set(content["files"]) == set(names(path)) - {"manifest.json", "manifest.b2sum"}
    (old,) = [table for table in content["tables"] if table["name"] == "old"]
    assert old["retention"] == "table-0002-old-rank-00000-retention.safetensors"
    loaded = EmbeddingCollection(TABLES, FEATURES, seed=3, num_threads=1)
    loaded.load_tables(path)
    found = {name: len(run_rows(_State(loaded), name)) for name in ("user", "half", "old")}
    assert found == {record.name: record.rows for record in read_manifest(path).tables[:3]}


class _State:
    def __init__(self, collection):
        self.state = type("", (), {"collection": collection})


@pytest.mark.parametrize(
    ("failing", "place"), [(0, "write_tensors"), (1, "write_tensors"), (0, "_commit")]
)
def test_a_full_disk_on_one_rank_is_an_error_on_all_and_costs_nothing(
    tmp_path, monkeypatch, failing, place
):
    directory = tmp_path / "run"
    runs, path = trained(directory, 2, 2)
    before = {name: (path / name).read_bytes() for name in names(path)}

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = table_files.write_tensors

    def write(file, tensors):
        return full() if f"user-rank-{failing:05d}" in file.name else real(file, tensors)

    with monkeypatch.context() as patch:
        if place == "_commit":
            patch.setattr(Checkpoints, "_commit", full)
        else:
            patch.setattr(table_files, "write_tensors", write)

        def act(run):
            run.train(1)
            with pytest.raises(CheckpointError) as raised:
                run.save()
            assert raised.value.is_known_to_all
            return raised.value

        errors = again(runs, act)
    assert "No space left on device" in str(errors[failing])
    assert isinstance(errors[1 - failing], CheckpointFailedElsewhere)
    assert names(directory) == [path.name]
    assert {name: (path / name).read_bytes() for name in names(path)} == before
    assert len(set(again(runs, Run.save))) == 1
    assert names(directory) == [path.name, "step-000000003"]


def again(runs, act):
    """Once more the same ranks, whose world is whole."""
    return runs[0].group.world.run(lambda rank: act(runs[rank.rank]))


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_is_found_by_one_rank_and_refused_by_all(tmp_path, rank):
    directory = tmp_path / "run"
    runs, first = trained(directory, 2, 1)
    _, path = trained(directory, 2, 1, first)
    (shard,) = path.glob(f"table-0000-user-rank-{rank:05d}-00000.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)

    def act(group):
        run = made(directory, group)
        with pytest.raises(CheckpointError) as raised:
            run.restored(path)
        assert not run_rows(run, "user")
        return str(raised.value)

    errors = over(2, act)
    assert sum(shard.name in error for error in errors) == 1
    assert sum("1 of 2 ranks cannot read" in error for error in errors) == 1
    assert any(f"{first.name} is whole" in error for error in errors)


def test_each_file_is_verified_by_one_rank(tmp_path, monkeypatch):
    _, path = trained(tmp_path / "run", 3, 2)
    read = []
    real = checkpoint_module.verify
    files = read_manifest(path).files

    def digest(file):
        read.append(os.path.basename(file.name))
        return files[read[-1]].blake2b

    monkeypatch.setattr("penstock.embedding.durable_files._digest", digest)
    for rank in range(3):
        real(path, (rank, 3))
    assert sorted(read) == sorted(files)


def test_parts_elsewhere_are_refused(tmp_path, monkeypatch):
    real = shares.write_share

    def write(directory, collection, group, states):
        share = real(directory, collection, group, states)
        if group.rank:
            for name in share.files:
                shutil.move(directory / name, tmp_path)
        return share

    monkeypatch.setattr(checkpoint_module, "write_share", write)
    with pytest.raises(CheckpointError, match="all machines share"):
        trained(tmp_path / "run", 2, 1)
    assert names(tmp_path / "run") == []


def test_too_many_checkpoints_are_removed_once(tmp_path):
    runs, _ = trained(tmp_path / "run", 2, 1)
    for _ in range(3):
        again(runs, lambda run: run.train(1).save())
    assert names(tmp_path / "run") == ["step-000000003", "step-000000004"]


def test_one_process_writes_names_as_before(tmp_path):
    _, path = trained(tmp_path / "run", 1, 1)
    assert [name for name in names(path) if name.startswith("table")] == [
        "table-0000-user-00000.safetensors",
        "table-0001-half-00000.safetensors",
        "table-0002-old-00000.safetensors",
        "table-0002-old-retention.safetensors",
    ]
