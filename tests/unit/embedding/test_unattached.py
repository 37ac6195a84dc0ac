"""Gradients of a collection that is not attached: reached by clipping, unseen by optimizers."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from penstock import (
    SGD,
    ConfigError,
    EmbeddingCollection,
    FeatureConfig,
    TableConfig,
)

KEYS = torch.arange(6).view(3, 2)


class Model(nn.Module):
    def __init__(self, group=None):
        super().__init__()
        torch.manual_seed(0)
        tables = [TableConfig(name="t", dim=4, optimizer=SGD(learning_rate=1.0))]
        features = [FeatureConfig(name="x", table="t")]
        self.embeddings = EmbeddingCollection(tables, features, group=group)
        self.head = nn.Linear(4, 1)

    def forward(self, keys):
        return self.head(self.embeddings({"x": keys}))[:, 0]

    def rows(self):
        return self.embeddings.find("t", KEYS.flatten()).values


def backward(model, scale=1.0):
    (model(KEYS).square().sum() * scale).backward()


def norm_of(model):
    return float(model.embeddings.gradient_norm())


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_by_torch_moves_rows_by_no_more(foreach):
    model = Model()
    for _ in range(2):  # the second shows a gradient of its own
        backward(model, 1000)
        before = model.rows()
        nn.utils.clip_grad_norm_(model.embeddings.parameters(), 1.0, foreach=foreach)
        model.embeddings.apply_gradients()
        assert float((model.rows() - before).norm()) == pytest.approx(1.0, rel=1e-4)
        assert model.embeddings.anchor.grad is None


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_by_value_is_refused(foreach):
    model = Model()
    backward(model)
    with pytest.raises(ConfigError, match="stands for the tables"):
        nn.utils.clip_grad_value_(model.parameters(), 0.1, foreach=foreach)


def test_a_step_that_does_not_clip_computes_no_norm(monkeypatch):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    monkeypatch.setattr(EmbeddingCollection, "gradient_norm", None)
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        model.embeddings.apply_gradients()


@pytest.mark.parametrize("takes_closure", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.SparseAdam])
def test_an_optimizer_that_holds_the_anchor_does_not_see_it(kind, takes_closure):
    model = Model()
    held = model.embeddings if kind is torch.optim.SparseAdam else model
    optimizer = kind(held.parameters(), lr=0.1)
    if takes_closure:
        optimizer.step(lambda: backward(model))
    else:
        backward(model)
        optimizer.step()
    assert model.embeddings.anchor.tolist() == [0.0]
    assert model.embeddings.anchor not in optimizer.state
    # Clipped after that step, too.
    nn.utils.clip_grad_norm_(model.embeddings.parameters(), 0.01)
    assert norm_of(model) == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_raises_leaves_it_to_be_clipped():
    class Broken(torch.optim.SGD):
        is_broken = False

        def step(self):
            if self.is_broken:
                raise RuntimeError("broken")

    model = Model()
    optimizer = Broken(model.parameters(), lr=0.1)
    optimizer.step()
    optimizer.is_broken = True
    for _ in range(2):
        backward(model, 1000)
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step()
        nn.utils.clip_grad_norm_(model.embeddings.parameters(), 0.01)
        assert norm_of(model) == pytest.approx(0.01, rel=1e-3)
        model.embeddings.discard_gradients()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad_of_the_dense_part_drops_nothing(set_to_none):
    model = Model()
    backward(model)
    before = norm_of(model)
    model.zero_grad(set_to_none=set_to_none)
    assert norm_of(model) == before > 0
    backward(model)
    nn.utils.clip_grad_norm_(model.embeddings.parameters(), 0.01)
    assert norm_of(model) == pytest.approx(0.01, rel=1e-3)
    model.embeddings.discard_gradients()
    assert model.embeddings.anchor.grad is None


@pytest.mark.parametrize(
    "view",
    [lambda grad: grad, lambda grad: grad.data, torch.Tensor.detach, lambda grad: grad.view(-1)],
)
def test_who_scales_a_view_scales_the_tables(view):
    model = Model()
    backward(model)
    before = norm_of(model)
    view(model.embeddings.anchor.grad).mul_(0.5)
    assert norm_of(model) == pytest.approx(before / 2)
    assert float(view(model.embeddings.anchor.grad)) == pytest.approx(before / 2)


def test_a_stale_gradient_scales_nothing():
    model = Model()
    backward(model)
    stale = model.embeddings.anchor.grad
    model.embeddings.apply_gradients()
    backward(model)
    before = norm_of(model)
    stale.mul_(0.0)
    assert float(stale) == 0
    assert norm_of(model) == before


def test_copies_and_conversions():
    model = Model()
    backward(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.embeddings.anchor.grad is None
        assert norm_of(twin) == 0
    model.double()
    assert model.embeddings.anchor.grad.dtype == torch.float64
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert 0 < norm_of(model) <= 0.01


def test_a_gradient_that_is_replaced_is_refused():
    model = Model()
    backward(model)
    model.embeddings.anchor.grad = torch.ones(1)
    with pytest.raises(ConfigError, match=r"replaced by a Tensor.*penstock\.clip_grad_norm_"):
        model.embeddings.apply_gradients()
    model.embeddings.anchor.grad = None
    model.embeddings.apply_gradients()


def test_a_penalty_on_all_parameters_is_no_gradient_of_tables():
    model = Model()
    backward(model)
    before = norm_of(model)
    sum(each.square().sum() for each in model.parameters()).backward()
    assert norm_of(model) == before
    nn.utils.clip_grad_norm_(model.embeddings.parameters(), 0.01)
    model.embeddings.apply_gradients()


def test_a_compiled_graph_shows_them():
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        backward(compiled)
    nn.utils.clip_grad_norm_(model.embeddings.parameters(), 0.01)
    assert norm_of(model) == pytest.approx(0.01, rel=1e-3)
    model.embeddings.apply_gradients()


@pytest.mark.parametrize(
    "options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}]
)
def test_under_distributed_data_parallel(tmp_path, options):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, twin = Model(distributed.group.WORLD), Model()
        wrapped = DistributedDataParallel(model, **options)
        for _ in range(2):
            for each in (wrapped, twin):
                each.zero_grad()
                backward(each)
                backward(each)
                nn.utils.clip_grad_norm_(each.parameters(), 0.01)
            model.embeddings.apply_gradients()
            twin.embeddings.apply_gradients()
            torch.testing.assert_close(model.rows(), twin.rows(), rtol=1e-5, atol=1e-6)
    finally:
        distributed.destroy_process_group()
