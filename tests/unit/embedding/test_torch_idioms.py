"""What torch users do to any module, done to a collection: it works, or says why not."""

import copy

import pytest
import torch
from torch import distributed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from penstock import (
    SGD,
    Adam,
    AdmitFrequent,
    ConfigError,
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    TableConfig,
    average_tables,
)
from penstock.embedding.collection import graph_operator

FEATURES = [FeatureConfig(name="x", table="t"), FeatureConfig(name="y", table="u", pooling="mean")]


class Model(torch.nn.Module):
    def __init__(self, **rules):
        super().__init__()
        tables = [
            TableConfig(name="t", dim=2, optimizer=SGD(learning_rate=0.5), **rules),
            TableConfig(name="u", dim=3, optimizer=Adam(learning_rate=0.1)),
        ]
        self.embeddings = EmbeddingCollection(tables, FEATURES)
        self.head = torch.nn.Linear(5, 1)

    def forward(self, keys):
        bags = Jagged.from_dense(keys)
        return self.head(self.embeddings(KeyedJagged.pack({"x": bags, "y": bags})))


KEYS = torch.tensor([[1, 2], [2, -3], [2**62, 1]])


def packed():
    return KeyedJagged.pack(dict.fromkeys("xy", Jagged.from_dense(KEYS)))


def step(model, keys=KEYS):
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    model(keys).square().sum().backward()
    optimizer.step()
    model.embeddings.apply_gradients()


def made(steps=2, **rules):
    torch.manual_seed(0)
    model = Model(**rules)
    for _ in range(steps):
        step(model)
    return model


def rows(model, table="t"):
    found = {}
    for part in model.embeddings.export_table(table):
        found |= dict(zip(part.keys.tolist(), part.values.tolist(), strict=True))
    return found


def test_freezing_a_model_freezes_its_tables():
    model = made()
    before = rows(model), rows(model, "u")
    head = model.head.weight.clone()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    step(model)
    step(model, torch.tensor([[77, 78]]))
    assert (rows(model), rows(model, "u")) == before
    assert not torch.equal(model.head.weight, head)
    assert model.embeddings.num_missing == 4
    assert not model.embeddings(packed()).requires_grad
    model.requires_grad_(True)
    step(model)
    assert rows(model) != before[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_outputs_have_the_dtype_of_the_module_and_rows_keep_theirs(dtype):
    model, twin = made(), made()
    model.to(dtype)
    assert model(KEYS).dtype == dtype
    out = model.embeddings(packed())
    same = twin.embeddings(packed())
    assert torch.equal(out, same.to(dtype))
    grad = torch.full((3, 5), 0.25)  # exact in every dtype
    out.backward(grad.to(dtype))
    same.backward(grad)
    model.embeddings.apply_gradients()
    twin.embeddings.apply_gradients()
    assert rows(model) == rows(twin)
    model.eval()
    assert model(KEYS).dtype == dtype
    assert next(model.embeddings.export_table("t")).values.dtype == torch.float32


def test_on_the_meta_device_there_are_shapes_alone():
    model = made()
    before = rows(model)
    model.to("meta")
    out = model(KEYS)
    assert (out.shape, out.device.type) == ((3, 1), "meta")
    model.to_empty(device="cpu")
    assert model(KEYS).device.type == "cpu"
    assert rows(model) == before


def test_autocast_trains_rows_in_float32():
    model = made()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(KEYS)
    assert out.dtype == torch.bfloat16
    before = rows(model)
    out.float().square().mean().backward()
    model.embeddings.apply_gradients()
    assert rows(model) != before


@pytest.fixture
def one_rank(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_group_of_one_rank_trains_as_none(one_rank):
    model, twin = made(), made()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        wrapped(KEYS).square().sum().backward()
        model.embeddings.apply_gradients()
        twin(KEYS).square().sum().backward()
        twin.embeddings.apply_gradients()
    assert rows(model) == rows(twin)
    torch.testing.assert_close(model.head.weight.grad, twin.head.weight.grad)


def test_attached_in_a_group_of_one_rank(one_rank):
    wrapper = torch.nn.parallel.DistributedDataParallel
    model, twin = made(), made()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, twin)]
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        each.embeddings.attach(optimizer)
    with pytest.raises(ConfigError, match="stands for (the tables|those of the tables)"):
        wrapped = wrapper(model)
        wrapped(KEYS).square().sum().backward()
    model.zero_grad()
    wrapper._set_params_and_buffers_to_ignore_for_model(model, ["embeddings.anchor"])
    wrapped = wrapper(model)
    for _ in range(2):
        for each, optimizer in zip((wrapped, twin), optimizers, strict=True):
            optimizer.zero_grad()
            each(KEYS).square().sum().backward()
            optimizer.step()
    assert rows(model) == rows(twin)


def test_a_group_of_several_ranks_may_not_train(one_rank, monkeypatch):
    model = made()
    before = rows(model)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="training in a process group of 2 ranks"):
        model(KEYS)
    model.eval()
    assert model(KEYS).shape == (3, 1)
    assert rows(model) == before


def test_a_copy_with_averaged_parameters_and_other_tables_is_refused():
    model = made()
    averaged = AveragedModel(model)
    averaged(KEYS)  # a plain copy until it is averaged
    step(model)
    averaged.update_parameters(model)
    with pytest.raises(ConfigError, match=r"call penstock\.average_tables"):
        averaged(KEYS)
    average_tables(averaged, model, 1.0)
    assert torch.equal(averaged(KEYS), model(KEYS))
    # A copy that trains itself is not taken for an average.
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embeddings.anchor.add_(1)
    twin.embeddings.apply_gradients()
    twin(KEYS)
    copy.deepcopy(model).double().float().requires_grad_(False).share_memory()(KEYS)
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict())
    loaded(KEYS)


@pytest.mark.parametrize("rules", [{}, {"admission": AdmitFrequent(min_count=2)}])
def test_tables_are_averaged_row_by_row(rules):
    model = made(**rules)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)
    average_tables(averaged, model, 0.25)
    expected = {key: torch.tensor(row) for key, row in rows(model).items()}
    for n in range(4):
        step(model, torch.tensor([[1, 2], [n, n]]))  # rows that are new to the average, too
        averaged.update_parameters(model)
        before = averaged.module.embeddings
        new = {key: torch.tensor(row) for key, row in rows(model).items()}
        for key in new.keys() - expected.keys():
            expected[key] = before.find("t", torch.tensor([key])).values[0]
        average_tables(averaged, model, 0.25)
        for key, row in new.items():
            expected[key] = expected[key] + 0.25 * (row - expected[key])
    found = rows(averaged.module)
    assert found.keys() == expected.keys()
    for key, row in found.items():
        torch.testing.assert_close(torch.tensor(row), expected[key], rtol=0, atol=1e-6)  # 5 lerps
    assert averaged.module.embeddings.step == model.embeddings.step
    torch.testing.assert_close(averaged(KEYS).shape, model(KEYS).shape)


def test_unlike_models_are_not_averaged():
    with pytest.raises(ConfigError, match="has other tables than the model"):
        average_tables(made(), torch.nn.Linear(1, 1), 0.5)
    with pytest.raises(ConfigError, match=r"weight 1\.5 of new rows; expected 0 to 1"):
        average_tables(made(), made(), 1.5)


def test_rows_are_found_and_erased_by_key():
    model = made()
    embeddings, there = model.embeddings, rows(model)
    found = embeddings.find("t", torch.tensor([1, 99], dtype=torch.int32))
    assert found.found.tolist() == [True, False]
    assert found.values[0].tolist() == there[1]
    assert embeddings.erase("t", torch.tensor([1, 1, 99])) == 1
    assert rows(model).keys() == there.keys() - {1}
    with pytest.raises(ConfigError, match="no table 'v'"):
        embeddings.find("v", torch.tensor([1]))
    with pytest.raises(ConfigError, match=r"keys of torch\.float32"):
        embeddings.erase("t", torch.tensor([1.0]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_and_predicts_as_it_is(backend):
    torch._dynamo.reset()
    twin = made(steps=0)
    model = copy.deepcopy(twin)  # which the graph must not take for the other
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for keys in (KEYS, KEYS + 1, KEYS[:2]):  # new keys, and a batch of another size
        for each, call in ((model, compiled), (twin, twin)):
            call(keys).square().sum().backward()
            each.embeddings.apply_gradients()
    assert rows(model) == rows(twin)
    assert rows(model, "u") == rows(twin, "u")
    torch.testing.assert_close(model.head.weight.grad, twin.head.weight.grad)
    model.eval()
    twin.eval()
    new = torch.tensor([[1, 12345]])
    assert torch.equal(compiled(new), twin(new))
    assert model.embeddings.num_missing == twin.embeddings.num_missing == 2
    assert not graph_operator._LOOKUPS  # each went with its backward pass
