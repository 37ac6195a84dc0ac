"""Gradients of a collection that is not attached: reached by clipping, unseen by optimizers."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from penstock import (
    SGD,
    ConfigError,
    EmbeddingCollection,
    FeatureConfig,
    TableConfig,
)
from penstock.embedding.collection import attachment, pending

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


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        (lambda grad: grad.norm(2).item(), lambda norm: norm),
        (lambda grad: grad.detach().data.norm(2).item(), lambda norm: norm),
        (lambda grad: grad.data.norm(), lambda norm: norm),
        (lambda grad: grad.norm(p=float("inf")), None),
        (lambda grad: torch.linalg.vector_norm(grad), lambda norm: norm),
        (lambda grad: grad.detach().cpu().numpy(), lambda norm: [norm]),
        (np.asarray, lambda norm: [norm]),
        (lambda grad: grad.tolist(), lambda norm: [norm]),
        (copy.deepcopy, lambda norm: [norm]),
        (lambda grad: pickle.loads(pickle.dumps(grad)), lambda norm: [norm]),
        (lambda grad: grad.clone(), lambda norm: [norm]),
    ],
)
def test_gradients_may_be_logged(read, wanted, attached):
    """As trainers read those of all parameters."""
    model = Model()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    if attached:
        model.embeddings.attach(optimizer)
    backward(model)
    norm = norm_of(model)
    found = torch.as_tensor(read(model.embeddings.anchor.grad))
    if wanted is None:
        norm, wanted = float(model.embeddings.gradient_norm(float("inf"))), float
    torch.testing.assert_close(found, torch.tensor(wanted(norm)), rtol=1e-6, atol=0)
    assert type(found) is torch.Tensor
    found.mul_(2)
    assert norm_of(model) > 0
    assert model.embeddings.anchor.grad is not None


class TestForgottenUpdates:
    """A model's embeddings were replaced, and its loop was not."""

    @pytest.mark.parametrize("takes_closure", [False, True])
    def test_an_optimizer_that_was_to_train_them_is_named(self, takes_closure):
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

        def closure():
            optimizer.zero_grad()
            backward(model)

        if not takes_closure:
            closure()
        optimizer.step(closure if takes_closure else None)
        with pytest.raises(ConfigError, match=r"Adam was given.*attach\(optimizer\)"):
            closure()
        # Either remedy.
        model.embeddings.apply_gradients()
        closure()
        optimizer.step()
        model.embeddings.apply_gradients()
        model.embeddings.attach(optimizer)
        for _ in range(2):
            closure()
            optimizer.step()
        assert model.embeddings.step == 4

    def test_several_passes_before_one_update_are_none(self):
        model = Model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        dense = torch.optim.Adam(model.head.parameters(), lr=0.1)
        for _ in range(2):
            backward(model)
            backward(model)
            dense.step()  # which has nothing to do with the tables
            backward(model)
            optimizer.step()
            model.embeddings.apply_gradients()
        assert model.embeddings.step == 2

    def test_where_no_update_ever_comes(self, monkeypatch):
        monkeypatch.setattr(attachment, "_MANY_PENDING", 3)
        monkeypatch.setattr(pending, "_MOST_PENDING", 5)
        model = Model()
        for _ in range(3):
            backward(model)
        with pytest.warns(UserWarning, match="none was ever applied: call apply_gradients"):
            backward(model)
        backward(model)
        with pytest.raises(ConfigError, match="5 look-ups wait for an update"):
            backward(model)
        model.embeddings.apply_gradients()
        for _ in range(5):
            backward(model)


@pytest.mark.parametrize("attached", [False, True])
def test_a_gradient_of_the_anchor_without_those_of_tables_means_nothing(attached):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if attached:
        model.embeddings.attach(optimizer)
    before = model.rows()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert model.embeddings.anchor.tolist() == [0.0]
    assert model.embeddings.anchor not in optimizer.state
    assert torch.equal(model.rows(), before)


@pytest.mark.parametrize("attached", [False, True])
def test_distributed_checkpoints(tmp_path, attached):
    """torch.distributed.checkpoint, which begins the states of optimizers by an empty step."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def made():
        model = Model()
        model.embeddings.tables_in_state = False
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if attached:
            model.embeddings.attach(optimizer)
        return model, optimizer

    def train(model, optimizer):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        if not attached:
            model.embeddings.apply_gradients()

    def states(pair):
        return {"model": get_model_state_dict(pair[0]), "opt": get_optimizer_state_dict(*pair)}

    try:
        trained, loaded = made(), made()
        for _ in range(11):  # the step has more digits than that of a new model
            train(*trained)
        dcp.save(states(trained), checkpoint_id=tmp_path / "saved")
        trained[0].embeddings.save_tables(tmp_path / "tables")
        loaded[0].embeddings.load_tables(tmp_path / "tables")
        state = states(loaded)
        dcp.load(state, checkpoint_id=tmp_path / "saved")
        set_model_state_dict(loaded[0], state["model"])
        loosely = StateDictOptions(strict=False)
        set_optimizer_state_dict(*loaded, state["opt"], options=loosely)
        for pair in (trained, loaded):
            train(*pair)
        assert torch.equal(loaded[0].rows(), trained[0].rows())
        assert torch.equal(loaded[0].head.weight, trained[0].head.weight)
        whole = ZeroRedundancyOptimizer(loaded[0].parameters(), torch.optim.SGD, lr=0.1)
        groups = [len(group["params"]) for group in whole.param_groups]
        loaded[0].embeddings.detach_optimizer()
        with pytest.raises(ConfigError, match="ZeroRedundancyOptimizer gives each rank"):
            loaded[0].embeddings.attach(whole)
        assert [len(group["params"]) for group in whole.param_groups] == groups
        backward(loaded[0])
        whole.step()
        loaded[0].embeddings.apply_gradients()
    finally:
        distributed.destroy_process_group()
