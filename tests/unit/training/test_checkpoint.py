import errno
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from penstock.config import (
    SGD,
    Adagrad,
    Adam,
    DenseOptimizer,
    FeatureConfig,
    Job,
    RowWiseAdagrad,
    Schedule,
    TableConfig,
)
from penstock.embedding import EmbeddingCollection
from penstock.embedding.collection import table_files
from penstock.errors import CheckpointError
from penstock.models import build_model
from penstock.position import Position
from penstock.training.checkpoint import checkpoint as checkpoint_module
from penstock.training.checkpoint.checkpoint import (
    Checkpoints,
    TrainState,
    load_tables_and_model,
    read_manifest,
    verify,
)
from penstock.training.metrics.binary import BinaryMetrics
from penstock.training.steps.dense import DenseTrainer
from penstock.types import Jagged, KeyedJagged

JOB = {
    "data": {
        "source": {"path": "day_*.parquet", "format": "parquet"},
        "label": {"column": "click"},
        "numeric": [{"columns": ["I*"]}],
    },
    "features": [{"columns": ["C*"]}],
    "model": {"kind": "dcn_v2", "cross_layers": 1, "deep": [8]},
    "training": {"optimizer": {"learning_rate": 0.01}},
}
TABLES = (
    TableConfig(name="a", dim=4, optimizer=RowWiseAdagrad(learning_rate=0.1)),
    TableConfig(name="b", dim=4, optimizer=Adam(learning_rate=0.01)),
    TableConfig(
        name="c", dim=3, dtype="bfloat16", optimizer=SGD(schedule=Schedule(warmup_steps=7))
    ),
    TableConfig(name="d", dim=3, dtype="float16", optimizer=Adagrad()),
    TableConfig(name="unused", dim=2),
)
FEATURES = tuple(
    FeatureConfig(name=f"C{place}", table=table) for place, table in enumerate("abcda")
)


def make_job(**changes):
    fields = json.loads(json.dumps(JOB))
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = fields
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return Job.model_validate(fields)


class Run:
    """A whole training run in small: what `penstock.run` does, on random batches."""

    def __init__(self, directory, job=None, keep_last=2, tables=TABLES, features=FEATURES):
        job = job or make_job()
        torch.manual_seed(job.training.seed)
        collection = EmbeddingCollection(tables, features, seed=3, num_threads=1)
        model = build_model(job.model, 2, collection.feature_shapes)
        self.trainer = DenseTrainer(model, job.training.optimizer)
        self.state = TrainState(
            0, Position(), collection, model, self.trainer.optimizer, BinaryMetrics()
        )
        self.checkpoints = Checkpoints(directory, keep_last, job, numeric=("I1", "I2"))

    def train(self, steps):
        state = self.state
        for _ in range(steps):
            generator = torch.Generator().manual_seed(state.step)
            keys = torch.randint(-30, 30, (16, 3), generator=generator)
            sparse = KeyedJagged.pack({
                feature.name: Jagged.from_dense(keys) for feature in state.collection.features
            })
            dense = torch.randn(16, 2, generator=generator)
            # The global generators take part, as dropout or a user's model would use them.
            dense += 0.1 * torch.randn(16, 2) + 0.1 * random.random() + 0.1 * np.random.rand()
            labels = (torch.rand(16, generator=generator) < 0.3).float()
            logits = state.model(dense, state.collection(sparse))
            state.metrics.update(logits, labels)
            torch.nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
            self.trainer.step(state.step, self.trainer.norm())
            state.collection.apply_gradients()
            state.step += 1
            state.position = Position(samples=16 * state.step, block_row=16 * state.step)
        return self

    def save(self):
        return self.checkpoints.save(self.state)

    def fingerprint(self):
        """Every bit of the state, comparable with ==."""
        state = self.state
        rows = {}
        for table in state.collection.tables:
            for part in state.collection.export_table(table.name):
                for key, value, row in zip(
                    part.keys.tolist(), part.values, part.state, strict=True
                ):
                    bits = value.view(torch.uint8).numpy()
                    rows[table.name, key] = (bits.tobytes(), row.numpy().tobytes())
        dense = {name: value.numpy().tobytes() for name, value in state.model.state_dict().items()}
        slots = state.optimizer.state_dict()["state"]
        slots = {(p, n): v.numpy().tobytes() for p, s in slots.items() for n, v in s.items()}
        metrics = {n: v.numpy().tobytes() for n, v in state.metrics.state_dict().items()}
        place = (state.step, state.position, state.collection.step)
        drawn = (torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.rand())
        return rows, dense, slots, metrics, place, drawn


@pytest.fixture(autouse=True)
def seeded():
    random.seed(1)
    np.random.seed(1)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "checkpoints").train(3)


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir())


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "adagrad"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, kind):
    optimizer = {
        "kind": kind,
        "learning_rate": 0.01,
        "momentum": 0.9 if kind == "sgd" else 0.0,
        "schedule": {"warmup_steps": 4, "decay": "cosine", "decay_steps": 9},
    }
    job = make_job(training__optimizer=optimizer)
    whole = Run(tmp_path / "checkpoints", job).train(5)
    path = whole.save()
    expected = whole.train(6).fingerprint()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = Run(tmp_path / "checkpoints", job)
    assert resumed.checkpoints.latest() == path
    resumed.checkpoints.restore(path, resumed.state)
    assert resumed.train(6).fingerprint() == expected


def test_saving_changes_nothing(tmp_path):
    first = Run(tmp_path / "first").train(3)
    before = first.fingerprint()[:-1]
    drawn = torch.get_rng_state()
    first.save()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert first.fingerprint()[:-1] == before


def test_many_shards_of_bounded_size_hold_every_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "SHARD_BYTES", 280)  # 10 rows of table a
    run = Run(tmp_path / "checkpoints").train(3)
    path = run.save()
    manifest = verify(path)
    table = manifest.tables[0]
    assert (table.name, table.dim, table.state_dim) == ("a", 4, 1)
    seen = []
    for shard in table.shards:
        assert re.fullmatch(r"table-0000-a-\d{5}\.safetensors", shard)
        with safe_open(path / shard, framework="pt") as file:
            assert file.get_tensor("keys").numel() <= 10
            seen += file.get_tensor("keys").tolist()
    assert len(seen) == table.rows == len(set(seen)) > 40
    assert manifest.tables[-1].shards == ()
    resumed = Run(tmp_path / "checkpoints")
    resumed.checkpoints.restore(path, resumed.state)
    assert resumed.fingerprint()[:-1] == run.fingerprint()[:-1]


def test_the_manifest_says_what_there_is(run):
    manifest = read_manifest(run.save())
    assert (manifest.step, manifest.collection_step) == (3, 3)
    assert manifest.position == Position(samples=48, block_row=48)
    assert manifest.versions["torch"] == torch.__version__
    assert Job.model_validate(manifest.job) == make_job()
    assert manifest.resolved["numeric"] == ["I1", "I2"]
    assert [table["name"] for table in manifest.resolved["tables"]] == [
        "a",
        "b",
        "c",
        "d",
        "unused",
    ]
    assert manifest.optimizer["kind"] == "Adam"
    assert [table.state_dim for table in manifest.tables] == [1, 8, 0, 3, 1]
    kinds = ["float32", "float32", "bfloat16", "float16", "float32"]
    assert [table.dtype for table in manifest.tables] == kinds
    assert [table.row_bytes for table in manifest.tables] == [20, 48, 6, 18, 12]


def test_only_the_last_n_stay(tmp_path):
    run = Run(tmp_path / "checkpoints", keep_last=3)
    for _ in range(5):
        run.train(1).save()
    assert names(tmp_path / "checkpoints") == [f"step-00000000{step}" for step in (3, 4, 5)]
    assert run.checkpoints.latest().name == "step-000000005"


def test_an_older_one_goes_only_after_the_new_one_is_complete(run, monkeypatch):
    directory = run.save().parent
    run.train(1)
    run.checkpoints._keep_last = 1
    seen = []
    rename = os.rename

    def watched(source, target):
        rename(source, target)
        seen.append(names(directory))

    monkeypatch.setattr(os, "rename", watched)
    run.save()
    assert seen[0] == ["step-000000003", "step-000000004"]
    assert names(directory) == ["step-000000004"]


def test_tables_and_model_load_without_the_rest(run):
    path = run.save()
    collection = EmbeddingCollection(TABLES, FEATURES, seed=3)
    model = build_model(make_job().model, 2, collection.feature_shapes)
    drawn = torch.get_rng_state()
    assert load_tables_and_model(path, collection, model).step == 3
    assert torch.equal(torch.get_rng_state(), drawn)
    keys = torch.arange(-40, 40)
    sparse = KeyedJagged.pack({f.name: Jagged.from_dense(keys) for f in FEATURES})
    dense = torch.randn(80, 2)
    with torch.no_grad():
        expected = run.state.model(dense, run.state.collection(sparse))
        assert torch.equal(model(dense, collection(sparse)), expected)
    other = EmbeddingCollection(TABLES, FEATURES[:-1])
    with pytest.raises(CheckpointError) as caught:
        load_tables_and_model(path, other, model)
    assert str(caught.value) == (
        f"checkpoint {path} has other tables or features:\n  feature C4: only in the checkpoint"
    )


def test_nothing_at_first(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", 2, make_job())
    assert checkpoints.latest() is None
    with pytest.raises(CheckpointError) as caught:
        read_manifest(tmp_path / "none" / "step-000000001")
    assert str(caught.value) == (
        f"no checkpoint at {tmp_path}/none/step-000000001: there is no such directory"
    )


def test_torn_directories_are_ignored_and_those_of_dead_writers_removed(run, caplog):
    path = run.save()
    directory = path.parent
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    dead_pid = int(dead.stdout)
    for suffix in (dead_pid, os.getpid(), os.getppid()):
        shutil.copytree(path, directory / f"step-000000009.tmp-{suffix}")
    (directory / "step-000000008").mkdir()
    (directory / "step-000000007").mkdir()
    (directory / "step-000000007" / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert run.checkpoints.latest() == path
    assert caplog.messages == [
        f"{directory}/step-00000000{step} is not a complete checkpoint: no readable manifest.json"
        for step in (8, 7)
    ]
    shutil.rmtree(directory / "step-000000008")
    shutil.rmtree(directory / "step-000000007")
    run.train(1).save()
    assert names(directory) == [
        "step-000000003",
        "step-000000004",
        f"step-000000009.tmp-{os.getppid()}",
    ]


def test_a_checkpoint_of_the_same_step_is_replaced(run):
    path = run.save()
    (path / "manifest.json").write_text("damaged")
    assert run.save() == path
    assert verify(path).step == 3
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("new_one_is_there", [True, False])
def test_a_replacement_that_was_cut_short_loses_nothing(run, new_one_is_there):
    path = run.save()
    replaced = path.with_name(path.name + ".replaced")
    shutil.copytree(path, replaced)
    if not new_one_is_there:
        shutil.rmtree(path)
    latest = run.checkpoints.latest()
    assert latest == (path if new_one_is_there else replaced)
    assert verify(latest).step == 3
    run.train(1).save()
    assert names(path.parent) == ["step-000000003", "step-000000004"]


def test_later_checkpoints_go_when_a_run_goes_on_from_an_earlier_one(tmp_path):
    directory = tmp_path / "checkpoints"
    run = Run(directory, keep_last=5)
    for _ in range(4):
        run.train(1).save()
    again = Run(directory, keep_last=5)
    again.checkpoints.restore(directory / "step-000000001", again.state)
    assert again.checkpoints.latest().name == "step-000000004"
    again.train(2).save()
    assert names(directory) == ["step-000000001", "step-000000003"]
    again.train(1).save()
    assert names(directory) == ["step-000000001", "step-000000003", "step-000000004"]


def test_a_new_run_does_not_write_among_anothers_checkpoints(run):
    path = run.save()
    with pytest.raises(CheckpointError) as caught:
        Run(path.parent).train(1).save()
    assert str(caught.value) == (
        f"{path.parent} already holds step-000000003, which this run was not resumed from; "
        "resume it, or train in a new run folder"
    )
    assert names(path.parent) == ["step-000000003"]


def refused(path, tmp_path):
    """The message with which a checkpoint is refused; checks that nothing has changed by then."""
    victim = Run(tmp_path / "checkpoints")
    before = victim.fingerprint()[:-1]
    drawn = torch.get_rng_state()
    with pytest.raises(CheckpointError) as caught:
        victim.checkpoints.restore(path, victim.state)
    assert victim.fingerprint()[:-1] == before
    assert torch.equal(torch.get_rng_state(), drawn)
    return str(caught.value)


def test_every_flipped_byte_and_every_cut_is_refused_by_name(run, tmp_path):
    path = run.save()
    generator = random.Random(5)
    for name in names(path):
        content = (path / name).read_bytes()
        size = len(content)
        places = {0, 7, 8, size // 2, size - 1, *generator.choices(range(size), k=4)}
        for place in sorted(places & set(range(size))):
            flipped = bytearray(content)
            flipped[place] ^= 1 << generator.randrange(8)
            (path / name).write_bytes(flipped)
            with pytest.raises(CheckpointError, match=re.escape(name)):
                verify(path)
        for length in {0, 1, size // 2, size - 1}:
            (path / name).write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=re.escape(name)):
                verify(path)
        (path / name).write_bytes(content + b"\0")
        with pytest.raises(CheckpointError, match=re.escape(name)):
            verify(path)
        (path / name).unlink()
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} is missing"):
            verify(path)
        (path / name).write_bytes(content)
    verify(path)


def test_damage_is_refused_before_anything_changes_and_an_older_one_is_named(run, tmp_path):
    older = run.save()
    path = run.train(1).save()
    shard = path / "table-0001-b-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 4
    shard.write_bytes(content)
    assert refused(path, tmp_path) == (
        f"checkpoint {path}: table-0001-b-00000.safetensors does not match its checksum in "
        "manifest.json; the file is damaged; "
        "step-000000003 is whole: move step-000000004 away to resume from it"
    )
    (older / "dense.safetensors").unlink()
    shard.write_bytes(content[:-3])
    assert refused(path, tmp_path) == (
        f"checkpoint {path}: table-0001-b-00000.safetensors has {len(content) - 3} bytes, "
        f"the manifest says {len(content)}; "
        f"there is no other whole checkpoint in {path.parent}"
    )


def test_missing_extra_and_foreign_files_are_refused(run, tmp_path):
    path = run.save()
    alone = f"there is no other whole checkpoint in {path.parent}"
    shard = path / "table-0001-b-00000.safetensors"
    extra = path / "table-0001-b-00001.safetensors"
    shutil.copy(shard, extra)
    assert refused(path, tmp_path) == (
        f"checkpoint {path}: {extra.name} is not in the manifest; move it elsewhere; {alone}"
    )
    shard.rename(extra)
    assert refused(path, tmp_path) == f"checkpoint {path}: {shard.name} is missing; {alone}"
    extra.rename(shard)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["step"] += 1
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert refused(path, tmp_path) == (
        f"checkpoint {path}: manifest.json does not match its checksum in manifest.b2sum; "
        f"one of the two is damaged; {alone}"
    )
    manifest["version"] = 4
    raw = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(raw)
    (path / "manifest.b2sum").write_bytes(checkpoint_module.seal(raw))
    assert refused(path, tmp_path) == (
        f"checkpoint {path}: manifest.json has format 'penstock checkpoint' version 4; "
        f"this Penstock reads 'penstock checkpoint' up to version 3; {alone}"
    )


def test_b2sum_itself_accepts_the_checksums(run):
    if shutil.which("b2sum") is None:
        pytest.skip("no b2sum on this machine")
    path = run.save()
    lines = [f"{r.blake2b}  {name}\n" for name, r in read_manifest(path).files.items()]
    for arguments, text in ((["manifest.b2sum"], None), (["-"], "".join(lines))):
        command = ["b2sum", "--quiet", "-l", "256", "-c", *arguments]
        subprocess.run(command, cwd=path, input=text, text=True, check=True)


def test_a_checkpoint_of_another_job_is_refused_with_the_fields(run, tmp_path):
    path = run.save()
    job = make_job(
        model__deep=[16],
        training__seed=5,
        training__optimizer__kind="sgd",
        data__source__path="elsewhere",
        data__shuffle={"block_rows": 0},
    )
    tables = (
        TABLES[0].model_copy(update={"dim": 8}),
        TABLES[1].model_copy(update={"optimizer": RowWiseAdagrad()}),
        *TABLES[2:4],
        TableConfig(name="fresh"),
    )
    features = (
        FEATURES[1],
        FEATURES[0],
        FEATURES[2].model_copy(update={"pooling": "mean"}),
        FEATURES[3],
        FeatureConfig(name="C9", table="fresh"),
    )
    other = Run(tmp_path / "checkpoints", job, tables=tables, features=features)
    before = other.fingerprint()[:-1]
    with pytest.raises(CheckpointError) as caught:
        other.checkpoints.restore(path, other.state)
    assert str(caught.value) == (
        f"checkpoint {path} is of another job:\n"
        "  data.shuffle.block_rows: 65536 in the checkpoint, 0 in the job\n"
        "  model.deep: [8] in the checkpoint, [16] in the job\n"
        '  training.optimizer.kind: "adam" in the checkpoint, "sgd" in the job\n'
        "  training.seed: 0 in the checkpoint, 5 in the job\n"
        "  feature C4: only in the checkpoint\n"
        "  feature C9: only in the job\n"
        '  feature C2.pooling: "sum" in the checkpoint, "mean" in the job\n'
        '  order of the features: ["C0", "C1", "C2", "C3"] in the checkpoint, '
        '["C1", "C0", "C2", "C3"] in the job\n'
        "  table unused: only in the checkpoint\n"
        "  table fresh: only in the job\n"
        "  table a.dim: 4 in the checkpoint, 8 in the job\n"
        '  table b.optimizer.kind: "adam" in the checkpoint, "row_wise_adagrad" in the job\n'
        "  table b.optimizer.beta1: 0.9 in the checkpoint, absent in the job\n"
        "  table b.optimizer.beta2: 0.999 in the checkpoint, absent in the job\n"
        "  table b.optimizer.initial_accumulator: absent in the checkpoint, 0.0 in the job\n"
        "resume with the job that wrote it, or train this one in a new run folder"
    )
    assert other.fingerprint()[:-1] == before


@pytest.mark.parametrize(
    "change",
    [
        {"name": "renamed"},
        {"data__source__path": ["moved/day_1.parquet", "moved/day_2.parquet"]},
        {"data__evaluation_source": {"format": "parquet", "path": "held_out"}},
        {"run__prefetch_batches": 3},
        {"training__epochs": 9, "training__max_steps": 10**6},
        {"training__batch_size": 77, "run__threads": 1},
        {"training__optimizer": {"learning_rate": 0.5, "schedule": {"warmup_steps": 3}}},
        {"training__clip_gradient_norm": 2.0, "report__every_steps": 1},
        {"checkpoint": {"every_steps": 5, "keep_last": 9}},
    ],
)
def test_a_resumed_run_may_change_how_long_how_fast_and_where(run, tmp_path, change):
    path = run.save()
    tables = [
        table.model_copy(
            update={"optimizer": table.optimizer.model_copy(update={"learning_rate": 0.123})}
        )
        for table in TABLES
    ]
    resumed = Run(tmp_path / "checkpoints", make_job(**change), tables=tables)
    resumed.checkpoints.restore(path, resumed.state)
    assert resumed.state.step == 3


def test_a_resumed_run_has_the_learning_rate_of_its_job(run, tmp_path):
    path = run.save()
    resumed = Run(tmp_path / "checkpoints", make_job(training__optimizer={"weight_decay": 0.25}))
    resumed.checkpoints.restore(path, resumed.state)
    assert resumed.state.optimizer.param_groups[0]["weight_decay"] == 0.25
    assert resumed.state.optimizer.state_dict()["state"][0]["step"] == 3


def test_a_long_difference_is_cut_off(run, tmp_path):
    path = run.save()
    features = [FeatureConfig(name=f"other{n}", table="a") for n in range(30)]
    other = Run(tmp_path / "checkpoints", features=features)
    with pytest.raises(CheckpointError) as caught:
        other.checkpoints.restore(path, other.state)
    lines = str(caught.value).splitlines()
    assert len(lines) == 23
    assert lines[-2] == "  and 15 more"


def test_another_model_behind_the_same_job_is_refused(run, tmp_path):
    path = run.save()
    other = Run(tmp_path / "checkpoints")
    other.state.model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    other.state.model[0].register_buffer("seen", torch.zeros(2, dtype=torch.int64))
    with pytest.raises(CheckpointError) as caught:
        other.checkpoints.restore(path, other.state)
    head, *lines = str(caught.value).splitlines()
    assert head == f"checkpoint {path}: the model is not the one of the checkpoint:"
    assert "  0.seen: absent in the checkpoint, int64 [2] in the model" in lines
    assert "  head.logit.bias: float32 [1] in the checkpoint, absent in the model" in lines


def test_used_tables_are_refused(run, tmp_path):
    path = run.save()
    used = Run(tmp_path / "checkpoints").train(1)
    with pytest.raises(CheckpointError) as caught:
        used.checkpoints.restore(path, used.state)
    rows = sum(table.rows for table in used.state.collection.table_stats())
    assert str(caught.value) == (
        f"checkpoint {path}: the tables already hold {rows} rows; "
        "restore into an EmbeddingCollection that has not been used"
    )


def test_tied_and_transposed_parameters_survive(tmp_path):
    def make():
        run = Run(tmp_path / "checkpoints")
        layer = torch.nn.Linear(3, 3)
        layer.register_buffer("turned", torch.randn(2, 3).t())
        run.state.model = torch.nn.ModuleDict({"first": layer, "second": layer})
        trainer = DenseTrainer(run.state.model, DenseOptimizer())
        run.state.optimizer = trainer.optimizer
        return run

    run = make()
    path = run.save()
    again = make()
    again.checkpoints.restore(path, again.state)
    for name, tensor in run.state.model.state_dict().items():
        assert torch.equal(again.state.model.state_dict()[name], tensor)


def test_a_model_without_parameters_has_no_optimizer(tmp_path):
    run = Run(tmp_path / "checkpoints")
    run.state.model, run.state.optimizer = torch.nn.Identity(), None
    path = run.save()
    again = Run(tmp_path / "checkpoints")
    again.state.model, again.state.optimizer = torch.nn.Identity(), None
    again.checkpoints.restore(path, again.state)
    assert read_manifest(path).optimizer is None


class FaultyDisk:
    """Lets calls that write through until number `first`; that one, or all from it on, fail."""

    CALLS = ("open", "write", "fsync", "mkdir", "rename")

    def __init__(self, monkeypatch, first, *, stays_full, code=errno.ENOSPC):
        self.first, self.stays_full, self.code = first, stays_full, code
        self.count = 0
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, real):
        def call(*arguments, **options):
            # Opening to read, which removing a tree does, and taking back a rename need no space.
            if name == "open" and not arguments[1] & os.O_CREAT:
                return real(*arguments, **options)
            self.count += 1
            late = self.count > self.first and self.stays_full and name != "rename"
            if self.count == self.first or late:
                if name == "write" and len(arguments[1]) > 1:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("stays_full", [False, True])
@pytest.mark.parametrize("same_step", [False, True])
def test_a_full_disk_at_any_call_leaves_the_last_good_checkpoint(
    run, tmp_path, monkeypatch, stays_full, same_step
):
    good = run.save()
    content = {name: (good / name).read_bytes() for name in names(good)}
    if not same_step:
        run.train(1)
    path = good.parent / f"step-{run.state.step:09d}"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1234))
    needed = checkpoint_module._needed_bytes(run.state)
    call = 0
    while True:
        call += 1
        with monkeypatch.context() as patch:
            FaultyDisk(patch, call, stays_full=stays_full)
            try:
                run.save()
            except CheckpointError as error:
                message = str(error)
            else:
                break
        if "is complete, but an older one" in message:
            break  # only what it replaces is left to remove
        assert message == (
            f"cannot write checkpoint {path}: No space left on device; it needs about "
            f"{needed:,} bytes, 1,234 bytes are free on its file system; "
            "free some space and resume; the last complete checkpoint, step-000000003, stays"
        )
        assert names(good.parent) == [good.name]
        assert {name: (good / name).read_bytes() for name in names(good)} == content
    files = len(content)
    # Each file is opened, written and synced; then two directories, mkdir, rename.
    assert call > 3 * files + 4
    again = Run(tmp_path / "checkpoints")
    again.checkpoints.restore(again.checkpoints.latest(), again.state)
    run.save()
    assert [verify(path).step for path in sorted(good.parent.iterdir())][-1] == run.state.step


def test_a_disk_that_fails_at_the_first_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path / "deep" / "checkpoints").train(1)
    with monkeypatch.context() as patch:
        FaultyDisk(patch, 1, stays_full=True, code=errno.EROFS)
        with pytest.raises(CheckpointError) as caught:
            run.save()
    assert re.fullmatch(
        rf"cannot write checkpoint {tmp_path}/deep/checkpoints/step-000000001: "
        r"Read-only file system; it needs about [\d,]+ bytes, [\d,]+ bytes are free on its file "
        r"system; free some space and train anew; there is no checkpoint to resume from",
        str(caught.value),
    )
    assert verify(run.save()).step == 1


def test_needed_bytes_are_those_written(run):
    written = sum(record.bytes for record in read_manifest(run.save()).files.values())
    assert 0.2 * written < checkpoint_module._needed_bytes(run.state) < written


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_save_leaves_nothing_behind(run, monkeypatch, error):
    good = run.save()
    run.train(1)

    def interrupted(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "random_state", interrupted)
        with pytest.raises(error):
            run.save()
    assert names(good.parent) == [good.name]
    assert run.save().name == "step-000000004"


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 96 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(place)]
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    run = Run(small_disk / "checkpoints", keep_last=9).train(1)
    saved = 0
    with pytest.raises(CheckpointError, match="No space left on device; it needs about"):
        for _ in range(20):
            run.save()
            saved = run.state.step
            run.train(1)
    assert saved >= 1
    assert run.checkpoints.latest().name == f"step-{saved:09d}"
    assert len(names(small_disk / "checkpoints")) == saved
    shutil.rmtree(small_disk / "checkpoints" / "step-000000001")
    if saved > 1:
        resumed = Run(small_disk / "checkpoints", keep_last=1)
        resumed.checkpoints.restore(resumed.checkpoints.latest(), resumed.state)
        assert verify(resumed.train(1).save()).step == saved + 1


KILLED = """
import random, sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from test_checkpoint import Run
run = Run(sys.argv[1])
random.seed(1), np.random.seed(1)
while True:
    run.train(1).save()
    print(run.state.step, flush=True)
"""


def test_a_killed_writer_never_leaves_a_torn_checkpoint(tmp_path):
    generator = random.Random(0)
    directory = tmp_path / "checkpoints"
    command = [sys.executable, "-c", KILLED, str(directory), str(Path(__file__).parent)]
    for _ in range(2):
        shutil.rmtree(directory, ignore_errors=True)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            for _ in range(generator.randrange(1, 4)):
                process.stdout.readline()
            time.sleep(generator.random() * 0.05)
            process.kill()
        resumed = Run(directory)
        latest = resumed.checkpoints.latest()
        resumed.checkpoints.restore(latest, resumed.state)
        whole = Run(tmp_path / "whole")
        random.seed(1), np.random.seed(1)
        whole.train(resumed.state.step)
        assert resumed.fingerprint()[0] == whole.fingerprint()[0]
