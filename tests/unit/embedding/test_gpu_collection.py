"""`EmbeddingCollection(device="cuda")`: on a GPU, or in Triton's interpreter without one."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from penstock.config import Adagrad, FeatureConfig, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.errors import CapacityError, ConfigError
from penstock.kernels import device as device_module
from penstock.types import Jagged, KeyedJagged

ON_GPU = torch.cuda.is_available()
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
TABLES = [
    TableConfig(name="user", dim=4, optimizer=Adagrad(learning_rate=0.1)),
    TableConfig(name="item", dim=8, dtype="bfloat16", optimizer=Adagrad(learning_rate=0.1)),
]
FEATURES = [
    FeatureConfig(name="u", table="user"),
    FeatureConfig(name="seen", table="item", pooling="sequence", max_keys=3),
]
BAGS = KeyedJagged.pack({
    "u": Jagged.from_dense(torch.tensor([3, -5, 3])),
    "seen": Jagged(torch.tensor([1, 2, 2, 9]), torch.tensor([0, 3, 3, 4])),
})


def tables(embeddings):
    found = {}
    for table in TABLES:
        (rows,) = embeddings.export_table(table.name)
        assert rows.keys.device.type == "cpu"
        order = rows.keys.argsort()
        found[table.name] = (rows.keys[order], rows.values[order], rows.state[order])
    return found


@needs_triton
def test_the_same_bits_as_on_the_cpu():
    both = [
        EmbeddingCollection(TABLES, FEATURES, seed=3, deterministic=True, device=device)
        for device in ("cpu", "cuda")
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        outs = [embeddings(BAGS) for embeddings in both]
        assert outs[1].device.type == ("cuda" if ON_GPU else "cpu")
        assert torch.equal(outs[0], outs[1].cpu())
        lengths = [embeddings.sequence_lengths(BAGS) for embeddings in both]
        assert lengths[1].device == both[1].device
        assert torch.equal(lengths[0], lengths[1].cpu())
        grad = torch.randn(outs[0].shape, generator=generator)
        for out, embeddings in zip(outs, both, strict=True):
            out.backward(grad.to(out.device))
            embeddings.apply_gradients()
    left, right = (tables(embeddings) for embeddings in both)
    for table in left:
        assert all(map(torch.equal, left[table], right[table]))
    for one, other in (both, both[::-1]):
        copy = EmbeddingCollection(TABLES, FEATURES, seed=3, device=other.device)
        for table in TABLES:
            for rows in one.export_table(table.name):
                copy.import_rows(table.name, rows)
        again = tables(copy)
        assert all(map(torch.equal, again["item"], left["item"]))
    with torch.no_grad():
        missing = replace(BAGS, values=BAGS.values + 1000)
        reads = [embeddings(missing) for embeddings in both]
    assert torch.equal(reads[0], reads[1].cpu())
    assert both[0].num_missing == both[1].num_missing == 7


@needs_triton
def test_a_batch_is_checked_before_it_is_copied():
    embeddings = EmbeddingCollection(TABLES, FEATURES, device="cuda")
    there = embeddings.to_device(BAGS)
    assert there.is_checked
    assert not there.is_one_hot
    assert there.values.device == embeddings.device
    assert embeddings.to_device(there) is there
    with pytest.raises(ConfigError) as caught:
        embeddings.to_device(replace(BAGS, offsets=torch.tensor([0, 1, 2, 3, 6, 5, 7])))
    assert str(caught.value) == (
        "offsets of the batch must rise from 0 to the number of keys (7), got 0 to 7"
    )
    one_hot = EmbeddingCollection(TABLES[:1], FEATURES[:1], device="cuda")
    batch = KeyedJagged.pack({"u": Jagged.from_dense(torch.tensor([3, -5, 3]))})
    assert one_hot.to_device(batch).is_one_hot


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "device 'mps': embeddings live on cpu or cuda"),
        (
            "cuda:99",
            "device 'cuda:99': this machine has 1 GPUs, numbered from 0"
            if ON_GPU
            else f"device 'cuda:99': torch {torch.__version__} finds no CUDA GPU on this machine; "
            "set device to cpu, or install a driver and a torch for it",
        ),
    ],
)
@needs_triton
def test_a_device_that_is_not_there_is_named(monkeypatch, device, message):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError) as caught:
        EmbeddingCollection(TABLES, FEATURES, device=device)
    assert str(caught.value) == message


def test_without_triton_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(device_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        EmbeddingCollection(TABLES, FEATURES, device="cuda")
    assert str(caught.value) == (
        "device 'cuda' needs Triton, which is not installed; pip install 'penstock[gpu]', or set "
        "device to cpu"
    )


@needs_triton
def test_a_full_gpu_is_an_error_that_leaves_the_store_whole():
    from penstock.embedding.gpu_store import GpuStore

    store = GpuStore(TABLES[:1], device="cuda", max_bytes=10 * 2 * 4 * 4)
    store.find_or_insert(0, torch.arange(8))
    with pytest.raises(CapacityError) as caught:
        store.find_or_insert(0, torch.arange(100, 113).repeat(2))
    assert str(caught.value) == (
        f"store on {store.device} of 1 tables (user) cannot grow beyond 8 rows: no memory on "
        f"{store.device}; use a GPU with more memory, smaller tables or max_bytes with eviction"
    )
    assert store.num_rows(0) == 8
    store.check_invariants()
    # Two rows fit, however often their keys come.
    assert not store.find_or_insert(0, torch.tensor([100, 101]).repeat(20)).found.any()
    assert store.memory().free_slots == 0
    assert store.erase(0, torch.arange(4)) == 4
    store.find_or_insert(0, torch.arange(200, 204))
    assert store.num_rows(0) == 10
    store.check_invariants()


SHAPED = [
    FeatureConfig(name="top", table="user", pooling="max", padding_key=0),
    FeatureConfig(name="again", table="item", input="top"),
    FeatureConfig(
        name="kept",
        table="item",
        pooling="sequence",
        max_keys=3,
        padding_key=0,
        holes="keep",
    ),
    FeatureConfig(name="each", table="user", input="kept", pooling="none"),
]


@needs_triton
def test_shapes_have_the_same_bits_as_on_the_cpu():
    """Bags longer from batch to batch, whose gradients are applied together."""
    both = [
        EmbeddingCollection(
            TABLES, SHAPED, seed=3, deterministic=True, device=device, output="by_feature"
        )
        for device in ("cpu", "cuda")
    ]
    kept = torch.tensor([[0, 1, 2], [3, 0, 4]])
    for longest in (2, 5):
        top = Jagged.from_starts(
            torch.tensor([1, 0, 2, *[3, 4, 5] * longest]), torch.tensor([0, 3])
        )
        outs = [embeddings({"top": top, "kept": kept}) for embeddings in both]
        # A batch that is on the device already, too.
        there = KeyedJagged.pack({"top": top, "kept": Jagged.from_dense(kept)}).to(both[1].device)
        ahead = both[1].eval()(both[1].to_device(there))
        both[1].train()
        for name, one in outs[0].items():
            if name == "each":
                assert torch.equal(one.offsets, outs[1][name].offsets.cpu())
            own, other, again = (
                each.values if name == "each" else each
                for each in (one, outs[1][name], ahead[name])
            )
            assert torch.equal(own, other.cpu())
            assert torch.equal(other, again)
            own.square().sum().backward(retain_graph=True)
            other.square().sum().backward(retain_graph=True)
    for embeddings in both:
        embeddings.apply_gradients()
    left, right = (tables(embeddings) for embeddings in both)
    for table in left:
        assert all(map(torch.equal, left[table], right[table]))


@needs_triton
def test_columns_on_the_device_are_packed_there():
    device = EmbeddingCollection(TABLES, FEATURES, device="cuda").device
    columns = {
        name: Jagged(BAGS[name].values.to(device), BAGS[name].offsets.to(device))
        for name in BAGS.features
    }
    columns["u"] = columns["u"]._replace(weights=torch.ones(3, device=device))
    packed = KeyedJagged.pack(columns)
    assert packed.values.device == packed.weights.device == device
    assert torch.equal(packed.offsets.cpu(), BAGS.offsets)
    starts = Jagged.from_starts(columns["seen"].values, columns["seen"].offsets[:-1])
    assert torch.equal(starts.offsets, columns["seen"].offsets)
