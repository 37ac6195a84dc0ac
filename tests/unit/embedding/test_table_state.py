"""What a collection holds goes wherever torch users put a module's state."""

import copy
import errno
import os
import pickle
from dataclasses import dataclass

import pytest
import safetensors.torch
import torch

from penstock import (
    SGD,
    Adagrad,
    Adam,
    AdmitFrequent,
    CheckpointError,
    EmbeddingCollection,
    Eviction,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    TableConfig,
)
from tests.unit.training.test_checkpoint import Run

TABLES = [
    TableConfig(name="plain", dim=3, optimizer=Adam(learning_rate=0.1)),
    TableConfig(name="narrow", dim=4, optimizer=Adagrad(), dtype="bfloat16"),
    TableConfig(
        name="ruled",
        dim=2,
        optimizer=SGD(),
        admission=AdmitFrequent(min_count=7),
        eviction=Eviction(order="lfu"),
        max_bytes=4000,
    ),
    TableConfig(name="unused", dim=2),
]
FEATURES = [FeatureConfig(name=name, table=name) for name in ("plain", "narrow", "ruled")]


def batch(step, size=8):
    draw = torch.Generator().manual_seed(step)
    columns = {}
    for feature in FEATURES:
        keys = torch.randint(-(2**62), 2**62, (20,), generator=torch.Generator().manual_seed(9))
        places = torch.randint(0, 20, (size, 3), generator=draw)
        columns[feature.name] = Jagged.from_dense(keys[places])
    return KeyedJagged.pack(columns)


def train(embeddings, steps):
    embeddings.train()
    for step in range(*steps):
        embeddings(batch(step)).square().sum().backward()
        embeddings.apply_gradients()
    return embeddings


def trained(seed=7, steps=6):
    return train(EmbeddingCollection(TABLES, FEATURES, seed=seed), (0, steps))


def contents(embeddings):
    """All that the tables hold, with rows in the order of their keys."""
    found = {"step": embeddings.step, "seed": embeddings.seed}
    for table in embeddings.tables:
        for rows in embeddings.export_table(table.name):
            order = rows.keys.argsort()
            parts = [None if part is None else part[order].tolist() for part in rows]
            found[table.name] = parts
        found[f"{table.name} rules"] = {
            name: part.tolist()
            for name, part in embeddings.retention_state(table.name).tensors().items()
        }
        for counted in embeddings.export_candidates(table.name):
            found[f"{table.name} counted"] = dict(
                zip(*(part.tolist() for part in counted), strict=True)
            )
    return found


def assert_continues(one, other):
    """Equal now, and after the same further steps, bit for bit."""
    assert contents(one) == contents(other)
    train(one, (50, 53))
    train(other, (50, 53))
    assert contents(one) == contents(other)
    one.check_invariants()
    other.check_invariants()
    # Keys that nobody has trained read the same: the seed came along.
    for each in (one, other):
        each.eval()
    new = KeyedJagged.pack({f.name: Jagged.from_dense(torch.arange(5)) for f in FEATURES})
    assert torch.equal(one(new), other(new))


def by_state_dict(embeddings, tmp_path):
    twin = EmbeddingCollection(TABLES, FEATURES)
    assert not twin.load_state_dict(embeddings.state_dict()).missing_keys
    return twin


def by_torch_save(embeddings, tmp_path):
    torch.save(torch.nn.ModuleDict({"e": embeddings}).state_dict(), tmp_path / "m.pt")
    twin = EmbeddingCollection(TABLES, FEATURES)
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    torch.nn.ModuleDict({"e": twin}).load_state_dict(state)
    return twin


def by_torch_save_of_the_module(embeddings, tmp_path):
    torch.save(embeddings, tmp_path / "m.pt")
    return torch.load(tmp_path / "m.pt", weights_only=False)


def by_safetensors_file(embeddings, tmp_path):
    safetensors.torch.save_file(embeddings.state_dict(), tmp_path / "m.safetensors")
    twin = EmbeddingCollection(TABLES, FEATURES)
    twin.load_state_dict(safetensors.torch.load_file(tmp_path / "m.safetensors"))
    return twin


def by_safetensors_model(embeddings, tmp_path):
    safetensors.torch.save_model(embeddings, str(tmp_path / "m.safetensors"))
    twin = EmbeddingCollection(TABLES, FEATURES)
    safetensors.torch.load_model(twin, str(tmp_path / "m.safetensors"))
    return twin


def by_files(embeddings, tmp_path):
    embeddings.save_tables(tmp_path / "tables")
    twin = train(EmbeddingCollection(TABLES, FEATURES), (90, 92))
    twin.load_tables(tmp_path / "tables")
    return twin


def by_state_and_files(embeddings, tmp_path):
    embeddings.tables_in_state = False
    state = embeddings.state_dict()
    assert state["_extra_state"].numel() < 2000
    twin = by_files(embeddings, tmp_path)
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize(
    "way",
    [
        by_state_dict,
        by_torch_save,
        by_torch_save_of_the_module,
        by_safetensors_file,
        by_safetensors_model,
        by_files,
        by_state_and_files,
        lambda embeddings, _: copy.deepcopy(embeddings),
        lambda embeddings, _: pickle.loads(pickle.dumps(embeddings)),
        lambda embeddings, _: torch.optim.swa_utils.AveragedModel(embeddings).module,
    ],
)
def test_everything_goes_along_and_training_continues_bit_for_bit(way, tmp_path):
    embeddings = trained()
    before = contents(embeddings)
    assert len(before["plain"][0]) == 20  # or this compares nothing
    assert before["ruled counted"]
    twin = way(embeddings, tmp_path)
    assert contents(embeddings) == before
    assert_continues(embeddings, twin)


def test_a_copy_stands_alone():
    embeddings = trained()
    twin = copy.deepcopy(embeddings)
    before = contents(twin)
    train(embeddings, (60, 62))
    assert contents(twin) == before
    assert contents(embeddings) != before


def test_a_model_is_copied_with_its_tables_once():
    embeddings = trained()
    model = torch.nn.ModuleDict({"user": embeddings, "item": embeddings})
    twin = copy.deepcopy(model)
    assert twin["user"] is twin["item"]
    assert twin["user"] is not embeddings


def test_settings_and_subclasses_are_copied():
    @dataclass(eq=False)
    class Named(EmbeddingCollection):
        name: str

        def __post_init__(self):
            EmbeddingCollection.__init__(
                self, TABLES, FEATURES, seed=3, num_threads=1, deterministic=True
            )
            self.eval()

    named = Named("a")
    named.row_clock.now_s, named.num_missing, named.tables_in_state = 5, 2, False
    twin = copy.deepcopy(named)
    assert type(twin) is Named
    assert (twin.name, twin.row_clock.now_s, twin.num_missing, twin.seed) == ("a", 5, 2, 3)
    assert (twin.training, twin.tables_in_state) == (False, False)
    assert twin._options == named._options


def test_the_best_epoch_comes_back_without_rows_made_since():
    embeddings = trained()
    best = embeddings.state_dict()
    before = contents(embeddings)
    embeddings(KeyedJagged.pack({f.name: Jagged.from_dense(torch.arange(9)) for f in FEATURES}))
    train(embeddings, (70, 73))
    embeddings(batch(1)).sum().backward()  # pending; of rows that will be gone
    embeddings.load_state_dict(best)
    assert contents(embeddings) == before
    embeddings.apply_gradients()
    after = contents(embeddings)
    assert after.pop("step") == before.pop("step") + 1
    assert after == before


def test_a_strict_load_without_tables_is_an_error():
    embeddings = trained()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*_extra_state"):
        EmbeddingCollection(TABLES, FEATURES).load_state_dict({})
    bare = EmbeddingCollection(TABLES, FEATURES)
    embeddings.tables_in_state = False
    with pytest.raises(CheckpointError, match="taken without its tables, at step 6"):
        bare.load_state_dict(embeddings.state_dict())


def altered(change):
    state = trained(steps=2).state_dict()
    return {"_extra_state": change(state["_extra_state"])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda packed: packed.float(), r"uint8 \[n\], got torch.float32 \[\d+\]: it was cast"),
        (lambda packed: packed[None], r"got torch.uint8 \[1, \d+\]"),
        (lambda packed: None, "got <class 'NoneType'>"),
        (lambda packed: packed[:-1], "does not match its checksum"),
        (lambda packed: packed[:3], "does not match its checksum"),
        (lambda packed: packed.clone().index_fill_(0, torch.tensor([700]), 1), "checksum"),
    ],
)
def test_a_state_that_was_changed_is_refused_and_changes_nothing(change, message):
    state = altered(change)
    embeddings = trained(steps=1)
    before = contents(embeddings)
    with pytest.raises(CheckpointError, match=message):
        embeddings.load_state_dict(state)
    assert contents(embeddings) == before


OTHERS = {
    "dim was 3, is 5": [TABLES[0].model_copy(update={"dim": 5}), *TABLES[1:]],
    "optimizer was 'adam', is 'lamb'": [
        TableConfig(name="plain", dim=3, optimizer={"kind": "lamb"}),
        *TABLES[1:],
    ],
    "table 'unused': only in what was saved": TABLES[:3],
    "table 'more': only in the collection": [*TABLES, TableConfig(name="more")],
    "usage_dim was 2, is 0, retains was True, is False": [
        *TABLES[:2],
        TableConfig(name="ruled", dim=2, optimizer=SGD()),
        TABLES[3],
    ],
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_tables_are_refused_by_name(message, tmp_path):
    embeddings = trained(steps=1)
    embeddings.save_tables(tmp_path / "tables")
    other = EmbeddingCollection(OTHERS[message], FEATURES)
    for load in (
        lambda: other.load_state_dict(embeddings.state_dict()),
        lambda: other.load_tables(tmp_path / "tables"),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert message in str(caught.value)
        assert sum(stats.rows for stats in other.table_stats()) == 0


def test_tables_of_another_order_are_found_by_name():
    embeddings = trained()
    turned = EmbeddingCollection(TABLES[::-1], FEATURES)
    turned.load_state_dict(embeddings.state_dict())
    assert contents(turned) == contents(embeddings)


def test_files_are_replaced_whole_and_nothing_else_is(tmp_path, monkeypatch):
    monkeypatch.setattr("penstock.embedding.collection.table_files.SHARD_BYTES", 300)
    path = tmp_path / "tables"
    trained(steps=2).save_tables(path)
    embeddings = trained(steps=5)
    embeddings.save_tables(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tables"]
    assert len(list(path.glob("table-0000-*"))) > 1
    twin = EmbeddingCollection(TABLES, FEATURES)
    twin.load_tables(path)
    assert contents(twin) == contents(embeddings)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match="is there already, and save_tables did not write it"):
        embeddings.save_tables(mine)
    assert (mine / "thesis.tex").read_text() == "years"


def test_a_failed_save_leaves_the_tables_before(tmp_path, monkeypatch):
    path = tmp_path / "tables"
    first = trained(steps=2)
    first.save_tables(path)

    def fail(*_):
        raise OSError(28, "No space left on device", "x")

    for where in ("write_durably", "sync_directory"):
        with monkeypatch.context() as patch:
            patch.setattr(f"penstock.embedding.collection.table_files.{where}", fail)
            with pytest.raises(CheckpointError, match="No space left on device"):
                trained(steps=4).save_tables(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["tables"]
        twin = EmbeddingCollection(TABLES, FEATURES)
        twin.load_tables(path)
        assert contents(twin) == contents(first)


def test_a_rename_that_fails_and_a_writer_that_dies_between_two_lose_nothing(tmp_path, monkeypatch):
    path = tmp_path / "tables"
    first, second = trained(steps=2), trained(steps=4)
    first.save_tables(path)
    rename = os.rename

    def fail(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            second.save_tables(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tables"]
    twin = EmbeddingCollection(TABLES, FEATURES)
    twin.load_tables(path)
    assert contents(twin) == contents(first)
    path.rename(tmp_path / "tables.replaced")
    twin.load_tables(path)
    assert contents(twin) == contents(first)
    second.save_tables(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tables"]
    twin.load_tables(path)
    assert contents(twin) == contents(second)


def test_a_damaged_file_is_named_and_changes_nothing(tmp_path):
    path = tmp_path / "tables"
    trained().save_tables(path)
    (shard,) = path.glob("table-0000-plain-00000.*")
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    embeddings = trained(steps=1)
    before = contents(embeddings)
    with pytest.raises(CheckpointError, match=r"table-0000-plain-00000.* does not match"):
        embeddings.load_tables(path)
    assert contents(embeddings) == before
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        embeddings.load_tables(tmp_path / "elsewhere")


def test_the_tables_of_a_runs_checkpoint_are_read_too(tmp_path):
    run = Run(tmp_path / "checkpoints").train(3)
    source = run.state.collection
    twin = EmbeddingCollection(source.tables, source.features, seed=99)
    twin.load_tables(run.save())
    assert twin.seed == 0  # the job's
    assert {**contents(twin), "seed": source.seed} == contents(source)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EFBIG, "File too large"), ": File too large; they need about"),
        (OSError("no more"), ": no more; they need about"),
        (OSError(errno.ENOSPC, "No space", "a/t"), ": No space: a/t; they need about"),
    ],
)
def test_a_failed_write_of_tables_names_what_is_known(tmp_path, monkeypatch, error, said):
    def fail(*_):
        raise error

    embeddings = trained(steps=1)
    monkeypatch.setattr("penstock.embedding.collection.table_files._commit", fail)
    with pytest.raises(CheckpointError) as caught:
        embeddings.save_tables(tmp_path / "tables")
    assert said in str(caught.value)
    assert "None" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
