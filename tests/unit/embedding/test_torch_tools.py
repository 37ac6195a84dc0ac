"""torch.compile by inductor, torch.export, DataLoader workers, look-ups in flight together."""

import copy
import gc
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from penstock.config import Adagrad, FeatureConfig, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.embedding.store import TableRows
from penstock.errors import ConfigError
from penstock.types import Jagged, KeyedJagged

DIM, ROWS, RATE, EPS = 4, 30, 0.1, 1e-8


class Model(nn.Module):
    def __init__(self, pooling="mean", **fields):
        super().__init__()
        rule = Adagrad(learning_rate=RATE, eps=EPS)
        self.embeddings = EmbeddingCollection(
            [TableConfig(name="t", dim=DIM, optimizer=rule)],
            [
                FeatureConfig(name="f", table="t", pooling=pooling, **fields),
                FeatureConfig(name="g", table="t"),
            ],
            num_threads=1,
        )
        self.head = nn.Linear(2 * DIM, 1)

    def forward(self, keys):
        return self.head(self.embeddings(keys))


def trained(steps=3, **fields):
    torch.manual_seed(0)
    model = Model(**fields)
    for _ in range(steps):
        model(torch.randint(0, ROWS, (8, 2))).square().sum().backward()
        model.embeddings.apply_gradients()
    return model


def rows(model):
    return model.embeddings.find("t", torch.arange(ROWS))


def test_inductor_trains_as_eagerly():
    """One graph, one size: other sizes and evaluation are compared with other backends."""
    torch._dynamo.reset()
    twin = trained()
    model = copy.deepcopy(twin)
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    for _ in range(2):
        keys = torch.randint(0, ROWS, (8, 2))
        for each, call in ((model, compiled), (twin, twin)):
            call(keys).square().sum().backward()
            each.embeddings.apply_gradients()
    for one, other in zip(rows(model), rows(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_eval_form_is_exported_with_batches_of_any_size():
    model = trained().eval()
    keys = torch.randint(0, ROWS, (8, 2))
    program = torch.export.export(model, (keys,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for size in (8, 3):
        keys = torch.randint(0, 2 * ROWS, (size, 2))
        assert torch.equal(loaded(keys), model(keys))
    # What was trained since is read, too: the tables are not in it.
    model.embeddings.assign("t", torch.arange(ROWS), torch.randn(ROWS, DIM))
    assert torch.equal(loaded(keys), model(keys))
    del model, program
    gc.collect()
    with pytest.raises(ConfigError, match="that is not in this process"):
        loaded(keys)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (trained, "call eval.. first"),
        (lambda: trained(pooling="max").eval(), "export of a collection with pooling max"),
        (lambda: trained(padding_key=0).eval(), "export of a collection with pooling max"),
    ],
)
def test_what_is_not_exported_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        torch.export.export(make(), (torch.zeros(8, 2, dtype=torch.int64),))


def test_an_export_that_a_compiler_traces_is_refused_too():
    with pytest.raises(Exception, match="torch.export of a collection that is to be trained"):
        torch.export.export(trained(), (torch.zeros(8, 2, dtype=torch.int64),), strict=True)


def test_numbers_of_graphs_are_of_no_other_process():
    """A graph that is loaded elsewhere must not find a collection by accident."""
    assert trained(steps=0).embeddings.number > 2**40


class Samples(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, n):
        return [n % ROWS] * (n % 4), n * 7 % ROWS


def packed(samples):
    bags, keys = zip(*samples, strict=True)
    starts = torch.tensor([0, *(len(bag) for bag in bags)])[:-1].cumsum(0)
    flat = torch.tensor([key for bag in bags for key in bag], dtype=torch.int64)
    return KeyedJagged.pack({
        "f": Jagged.from_starts(flat, starts),
        "g": Jagged.from_dense(torch.tensor(keys)),
    })


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_batches_may_be_packed_by_workers(pooling):
    """They fork while the parent's tables, and its threads, are in use."""
    results = []
    for workers in (0, 2):
        model = trained(pooling=pooling)
        loader = DataLoader(Samples(), 8, collate_fn=packed, num_workers=workers)
        for _ in range(2):
            for batch in loader:
                model(batch).square().sum().backward()
                model.embeddings.apply_gradients()
        results.append(rows(model))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_batch_looked_up_ahead_is_as_with_torch(pooling):
    """The look-up of a batch before the update of the one before, as a prefetch does it.

    It reads rows without that update, as nn.EmbeddingBag would; each update has its own gradient.
    """
    torch.manual_seed(1)
    weight = torch.randn(ROWS, DIM)
    bag = nn.EmbeddingBag.from_pretrained(weight.clone(), freeze=False, mode=pooling)
    optimizer = torch.optim.Adagrad(bag.parameters(), lr=RATE, eps=EPS)
    rule = Adagrad(learning_rate=RATE, eps=EPS)
    ours = EmbeddingCollection(
        [TableConfig(name="t", dim=DIM, optimizer=rule)],
        [FeatureConfig(name="f", table="t", pooling=pooling)],
    )
    ours.import_rows("t", TableRows(torch.arange(ROWS), weight, torch.zeros(ROWS, DIM)))
    # Longer and longer, so that those of max change their layout in flight.
    batches = [torch.randint(0, ROWS, (6, 1 + 2 * n)) for n in range(6)]
    ahead = bag(batches[0]), ours({"f": batches[0]})
    for n in range(len(batches)):
        (theirs, mine), ahead = ahead, None
        if n + 1 < len(batches):
            ahead = bag(batches[n + 1].clone()), ours({"f": batches[n + 1]})
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        optimizer.zero_grad()
        bag.weight.grad = torch.autograd.grad(theirs.square().sum(), bag.weight)[0]
        optimizer.step()
        mine.square().sum().backward()
        ours.apply_gradients()
    found = ours.find("t", torch.arange(ROWS)).values
    torch.testing.assert_close(found, bag.weight.detach(), rtol=1e-4, atol=1e-5)


def test_look_ups_in_flight_of_other_rows_are_as_one_after_the_other():
    model, twin = trained(), trained()
    batches = [torch.arange(4 * n, 4 * n + 4).view(2, 2) for n in range(6)]
    for keys in batches:
        twin(keys).square().sum().backward()
        twin.embeddings.apply_gradients()
    ahead = model(batches[0])
    for n in range(len(batches)):
        out, ahead = ahead, model(batches[n + 1]) if n + 1 < len(batches) else None
        out.square().sum().backward()
        model.embeddings.apply_gradients()
    for one, other in zip(rows(model), rows(twin), strict=True):
        assert torch.equal(one, other)


def test_packed_batches_are_exported_too():
    model = trained().eval()
    sparse = packed([([1, 2], 3), ([], 4), ([5], 6)])
    sizes = [{0: torch.export.Dim("keys")}, {0: torch.export.Dim("bags", min=5)}]
    program = torch.export.export(model, (sparse,), dynamic_shapes=(sizes,))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for each in (sparse, packed([([7], 8), ([], 9)])):
        assert torch.equal(loaded(each), model(each))
    with pytest.raises(Exception, match="tree spec"):
        loaded(KeyedJagged(("g", "f"), sparse.values, sparse.offsets))


def test_packed_batches_are_trees_of_tensors():
    sparse = replace(packed([([1, 2], 3), ([], 4)]), is_checked=True)
    moved = tree_map(lambda tensor: tensor + 1, sparse)
    assert (moved.features, moved.weights, moved.is_checked) == (("f", "g"), None, False)
    assert torch.equal(moved.values, sparse.values + 1)
    torch._dynamo.reset()
    model = trained()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(sparse), model(sparse))


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, keys):
        return self.model(keys)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model, keys: torch.jit.script(model), r"torch\.jit\.script of an Embedding"),
        (lambda model, keys: torch.jit.script(Holder(model)), r"torch\.jit\.script of an Emb"),
        (lambda model, keys: torch.jit.trace(model, (keys,)), "rows of this batch as constants"),
        (lambda model, keys: torch.func.vmap(model)(keys[:, None]), r"a transform of torch\.func"),
        (lambda model, keys: jacobian(model, keys), r"a transform of torch\.func"),
        (lambda model, keys: nn.parallel.replicate(model, [0, 1]), r"nn\.DataParallel of an Emb"),
    ],
)
def test_tools_that_cannot_look_through_tables_are_refused(use, message, training, monkeypatch):
    model = trained().train(training)
    # No GPU is needed for what `replicate` does to modules.
    replicating = nn.parallel.replicate.__globals__
    monkeypatch.setitem(replicating, "_broadcast_coalesced_reshape", copies)
    before = rows(model)
    with pytest.raises(ConfigError, match=message):
        use(model, torch.randint(0, ROWS, (8, 2)))
    assert all(torch.equal(*pair) for pair in zip(rows(model), before, strict=True))


def jacobian(model, keys):
    def loss(weight):
        return torch.func.functional_call(model, {"head.weight": weight}, (keys,))

    return torch.func.jacrev(loss)(model.head.weight)


def copies(tensors, devices, detach=False):
    return [list(tensors) for _ in devices]


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_others_are_no_gradients_of_tables(compiled, attached):
    """As torch.autograd.grad leaves `grad` of embeddings alone, and backward(inputs=) too."""
    torch._dynamo.reset()
    model, keys = trained(), torch.randint(0, ROWS, (8, 2))
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    if attached:
        model.embeddings.attach(optimizer)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    head = list(model.head.parameters())
    loss = call(keys).square().sum()
    with pytest.raises(ConfigError, match="leave the anchor out of its inputs"):
        torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    torch.autograd.grad(call(keys).square().sum(), head)
    call(keys).square().sum().backward(inputs=head)
    assert float(model.embeddings.gradient_norm()) == 0
    call(keys).square().sum().backward(inputs=list(model.parameters()))
    assert float(model.embeddings.gradient_norm()) > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_of_weights_alone(compiled):
    torch._dynamo.reset()
    model = trained()
    call = torch.compile(model, backend="aot_eager") if compiled else model
    weights = torch.ones(16, requires_grad=True)
    sparse = KeyedJagged(("f", "g"), torch.randint(0, ROWS, (16,)), torch.arange(17), weights)
    wanted = torch.autograd.grad(call(sparse).square().sum(), weights)[0]
    assert float(model.embeddings.gradient_norm()) == 0
    call(sparse).square().sum().backward()
    torch.testing.assert_close(weights.grad, wanted)
    assert float(model.embeddings.gradient_norm()) > 0
    (first,) = torch.autograd.grad(model(sparse).square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_penalty_on_gradients_of_vectors_reaches_the_tables():
    """Twice through what comes behind the tables, whose vectors are linear in them."""
    torch.manual_seed(0)
    model = trained()
    weight = rows(model).values.clone().requires_grad_()
    keys = torch.arange(16).view(8, 2)
    grads = []
    for vectors in (model.embeddings(keys), weight[keys].flatten(1)):
        loss = (model.head(vectors) ** 3).sum()
        (grad,) = torch.autograd.grad(loss, vectors, create_graph=True)
        (loss + grad.square().sum()).backward()
        grads.append(model.embeddings.gradient_norm())
    torch.testing.assert_close(grads[0], weight.grad.norm())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([[1, 2]], r"a batch that is a list: expected a KeyedJagged"),
        (np.zeros((2, 2), np.int64), r"a batch that is a ndarray"),
        (None, r"a batch that is a NoneType"),
        ({"f": np.zeros(2, np.int64), "g": torch.zeros(2)}, r"feature 'f' is a ndarray"),
        ({"f": [1, 2], "g": torch.zeros(2)}, r"feature 'f' is a list"),
    ],
)
def test_what_is_no_batch_is_refused(batch, message):
    with pytest.raises(ConfigError, match=message):
        trained(steps=0)(batch)


def test_batches_are_loaded_as_plain_data():
    sparse = packed([([1, 2], 3), ([], 4)])
    saved = io.BytesIO()
    torch.save([sparse, sparse["f"]], saved)
    saved.seek(0)
    loaded, jagged = torch.load(saved, weights_only=True)
    assert loaded.features == sparse.features
    assert torch.equal(loaded.offsets, sparse.offsets)
    assert torch.equal(jagged.values, sparse["f"].values)
