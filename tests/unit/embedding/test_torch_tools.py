"""torch.compile by inductor, torch.export, DataLoader workers, look-ups in flight together."""

import copy
import gc
import io

import pytest
import torch
from torch import nn
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
