"""Two towers: items, their frequencies, the softmax over a batch, and recall, all against loops."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

from penstock.config import FeatureConfig, Label, TableConfig, TwoTowerConfig
from penstock.embedding import EmbeddingCollection
from penstock.errors import ConfigError
from penstock.models import TwoTower, build_model
from penstock.models.parts.frequency import FrequencySketch
from penstock.position import Position
from penstock.training.in_batch_softmax import InBatchSoftmax
from penstock.training.items import Catalogue, item_ids
from penstock.training.metrics.recall import Recall
from penstock.training.steps.step import look_up, model_inputs
from penstock.types import Batch, FeatureShape, Jagged, KeyedJagged

NAMES = ("tags", "user", "item")
ITEM = (0, 2)


def bags_of(lists):
    lengths = torch.tensor([0, *map(len, lists)])
    values = torch.tensor([key for one in lists for key in one], dtype=torch.int64)
    return Jagged(values, lengths.cumsum(0))


def pack(users, items, tags):
    return KeyedJagged.pack({
        "tags": bags_of(tags),
        "user": bags_of([[u] for u in users]),
        "item": bags_of([[i] for i in items]),
    })


def tags_of(item):
    return [[], [7], [7, 8], [8, 7], [7, 7]][item % 5]


def random_sparse(rows=60, users=9, items=25, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, items, (rows,), generator=generator).tolist()
    who = torch.randint(0, users, (rows,), generator=generator).tolist()
    return pack(who, drawn, [tags_of(item) for item in drawn]), drawn


def batch_of(sparse, labels=None, weights=None):
    size = sparse.batch_size
    return Batch(
        dense=torch.linspace(-1, 1, size).unsqueeze(1),
        sparse=sparse,
        labels=torch.ones(size) if labels is None else labels,
        weights=weights,
        event_time=None,
        teacher=None,
        start=Position(),
        end=Position(),
        origin="here",
    )


def make(**changes):
    torch.manual_seed(0)
    tables = [TableConfig(name=name, dim=dim) for name, dim in zip(NAMES, (2, 3, 4), strict=True)]
    features = [FeatureConfig(name=name, table=name) for name in NAMES]
    collection = EmbeddingCollection(tables, features, num_threads=1)
    config = TwoTowerConfig(items=["tags", "item"], user=(6,), item=(5,), dim=4, **changes)
    model = build_model(config, 1, collection.feature_shapes)
    assert isinstance(model, TwoTower)
    return model, collection


def test_equal_items_have_equal_ids_and_others_do_not():
    sparse, items = random_sparse(rows=400, items=40)
    ids = item_ids(sparse, ITEM).tolist()
    assert len(set(zip(ids, items, strict=True))) == len(set(ids)) == len(set(items))
    # One item in two users' rows, and tags in another order, left out, doubled, or moved.
    tags = [[1, 2], [1, 2], [2, 1], [1], [1, 2, 2], [], [5]]
    found = item_ids(pack([1, 2, 3, 4, 5, 6, 7], [5] * 7, tags), ITEM).tolist()
    assert found[0] == found[1]
    assert len(set(found)) == 6
    swapped = item_ids(pack([0, 0], [3, 4], [[4], [3]]), ITEM)
    assert swapped[0] != swapped[1]


def test_a_catalogue_holds_every_item_once():
    catalogue = Catalogue(NAMES, ITEM)
    seen = set()
    for seed in range(4):
        sparse, items = random_sparse(seed=seed)
        catalogue.add(sparse)
        seen |= set(items)
        assert len(catalogue.ids) == len(seen)
    packed = catalogue.packed(torch.arange(len(seen)))
    assert packed.features == NAMES
    assert torch.equal(item_ids(packed, ITEM), catalogue.ids)
    assert torch.equal(catalogue.ids, catalogue.ids.sort().values)
    assert packed["user"].values.numel() == 0
    ordered = packed["item"].values.tolist()
    assert sorted(ordered) == sorted(seen)
    offsets = packed["tags"].offsets.tolist()
    tags = packed["tags"].values.tolist()
    for place, item in enumerate(ordered):
        assert tags[offsets[place] : offsets[place + 1]] == tags_of(item)


def test_a_catalogue_keeps_the_weights_of_keys():
    catalogue = Catalogue(("tags", "item"), (0, 1))
    plain = KeyedJagged.pack({"tags": bags_of([[1]]), "item": bags_of([[9]])})
    tags = bags_of([[2, 3], [1]])._replace(weights=torch.tensor([0.5, 2.0, 7.0]))
    weighted = KeyedJagged.pack({"tags": tags, "item": bags_of([[8], [9]])})
    catalogue.add(plain)
    catalogue.add(weighted)
    packed = catalogue.packed(torch.arange(2))
    found = packed["tags"]
    assert dict(zip(found.values.tolist(), found.weights.tolist(), strict=True)) == {
        1: 1.0,  # the item was there before, without weights
        2: 0.5,
        3: 2.0,
    }


def test_too_many_items_are_sampled_whatever_the_order():
    def filled(order):
        catalogue = Catalogue(("item",), (0,), max_items=100)
        for part in order.split(50):
            catalogue.add(KeyedJagged.pack({"item": Jagged.from_dense(part)}))
        return catalogue

    one = filled(torch.arange(1000))
    other = filled(torch.randperm(1000))
    assert one.is_sampled and 30 <= len(one.ids) <= 100
    assert torch.equal(one.ids, other.ids)
    kept = one.packed(torch.arange(len(one.ids)))["item"].values
    assert torch.equal(item_ids(KeyedJagged.pack({"item": Jagged.from_dense(kept)}), (0,)), one.ids)


def test_frequencies_are_faded_counts():
    sketch, memory = FrequencySketch(1 << 12, 10), 10
    generator = torch.Generator().manual_seed(0)
    counts, total = Counter(), 0.0
    for _ in range(30):
        items = torch.randint(0, 40, (64,), generator=generator).clamp(max=20)
        found = sketch.observe(items * 1_000_003)
        for item in list(counts):
            counts[item] *= 1 - 1 / memory
        counts.update(items.tolist())
        total = total * (1 - 1 / memory) + 64
        expected = [math.log(counts[item] / total) for item in items.tolist()]
        assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert math.exp(found[items == 20][0]) == pytest.approx(0.5, abs=0.1)


def test_colliding_counters_only_add():
    small, large = FrequencySketch(16, 50), FrequencySketch(1 << 16, 50)
    items = torch.arange(64) * 977
    assert (small.observe(items) >= large.observe(items) - 1e-6).all()


def test_frequencies_are_state():
    one, other = FrequencySketch(64, 10), FrequencySketch(64, 10)
    items = torch.arange(20)
    one.observe(items)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.observe(items), other.observe(items))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_softmax_over_other_items(similarity, weighted):
    model, collection = make(similarity=similarity, temperature=0.3)
    sparse, items = random_sparse(rows=30, items=12)
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(30, generator=generator) < 0.7).float()
    weights = torch.rand(30, generator=generator) if weighted else None
    batch = batch_of(sparse, labels, weights)
    inputs = model_inputs(collection, batch, look_up(collection, batch))
    outcome = InBatchSoftmax(Label(column="x"))(model, inputs, batch)
    users, vectors = model.users(*inputs), model.items(inputs[1])
    counts = Counter(items)
    expected = total = 0.0
    for i in range(30):
        row = {
            j: (users[i] @ vectors[j]).item() / 0.3 - math.log(counts[items[j]] / 30)
            for j in range(30)
            if j == i or items[j] != items[i]
        }
        share = math.exp(row[i]) / sum(map(math.exp, row.values()))
        weight = float(labels[i]) * (1.0 if weights is None else float(weights[i]))
        expected -= weight * math.log(share)
        total += weight
    assert outcome.loss.item() == pytest.approx(expected / total, rel=1e-4)
    torch.testing.assert_close(outcome.outputs, model(*inputs))
    if similarity == "cosine":
        torch.testing.assert_close(users.norm(dim=1), torch.ones(30))


def test_a_batch_of_one_item_or_without_positives_has_no_loss():
    model, collection = make()
    one = batch_of(pack([1, 2], [3, 3], [[], []]))
    none = batch_of(random_sparse()[0], torch.zeros(60))
    for batch in (one, none):
        inputs = model_inputs(collection, batch, look_up(collection, batch))
        outcome = InBatchSoftmax(Label(column="x"))(model, inputs, batch)
        outcome.loss.backward()
        assert outcome.loss.item() == 0.0
        assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
        model.zero_grad()


@pytest.mark.parametrize("block", [7, 512])
def test_recall_is_that_of_a_full_sort(monkeypatch, block):
    monkeypatch.setattr("penstock.training.metrics.recall._BLOCK", block)
    monkeypatch.setattr("penstock.training.metrics.recall._ITEMS_AT_ONCE", 4)
    model, collection = make()
    model.eval(), collection.eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    catalogue = Catalogue.of([batch_of(random_sparse(seed=5)[0])], NAMES, ITEM)
    sparse, items = random_sparse(seed=6)
    catalogue.add(sparse)
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(60, generator=generator) < 0.7).float()
    weights = torch.rand(60, generator=generator)
    recall = Recall(catalogue, (1, 5, 100), model, collection)
    for rows in (slice(0, 25), slice(25, 60)):
        some = items[rows]
        who = sparse["user"].values[rows].tolist()
        batch = batch_of(pack(who, some, [tags_of(i) for i in some]), labels[rows], weights[rows])
        recall.update(batch, model_inputs(collection, batch, look_up(collection, batch)))
    found = recall.compute()
    names = catalogue.packed(torch.arange(len(catalogue.ids)))
    vectors = model.items(collection(names))
    ids = names["item"].values.tolist()
    assert found["recall_candidates"] == len(ids) == len(set(ids))
    hits = Counter()
    for rows in (slice(0, 25), slice(25, 60)):
        some = items[rows]
        batch = batch_of(
            pack(sparse["user"].values[rows].tolist(), some, [tags_of(i) for i in some])
        )
        users = model.users(*model_inputs(collection, batch, look_up(collection, batch)))
        for user, item, label, weight in zip(
            users, some, labels[rows].tolist(), weights[rows].tolist(), strict=True
        ):
            ranked = sorted(range(len(ids)), key=lambda place: -(user @ vectors[place]).item())  # noqa: B023
            rank = [ids[place] for place in ranked].index(item)
            for k in (1, 5, 100):
                hits[k] += label * weight * (rank < k)
    total = float((labels * weights).sum())
    for k in (1, 5, 100):
        assert found[f"recall_at_{k}"] == pytest.approx(hits[k] / total, rel=1e-5)
    assert found["recall_at_100"] == 1.0


def test_a_model_that_tells_nothing_apart_recalls_nothing():
    model, collection = make()
    model.eval(), collection.eval()
    for parameter in model.item.parameters():
        nn.init.zeros_(parameter)
    nn.init.normal_(model.item.out.bias)  # one vector for all items, up to rounding
    sparse, _ = random_sparse()
    batch = batch_of(sparse)
    recall = Recall(Catalogue.of([batch], NAMES, ITEM), (5,), model, collection)
    recall.update(batch, model_inputs(collection, batch, look_up(collection, batch)))
    assert recall.compute()["recall_at_5"] == 0.0
    empty = Recall(Catalogue(NAMES, ITEM), (5,), model, collection)
    assert math.isnan(empty.compute()["recall_at_5"])


@pytest.mark.parametrize(
    ("items", "num_numeric", "features", "message"),
    [
        (
            ["item", "tag"],
            0,
            [FeatureShape("user", 4), FeatureShape("item", 4)],
            "model.items: 'tag' matches no feature; there are user, item",
        ),
        (
            ["*"],
            0,
            [FeatureShape("user", 4), FeatureShape("item", 4)],
            "model.items: all features are the item's, and nothing is left for the user's tower; "
            "name those of the item alone",
        ),
        (
            ["item"],
            2,
            [FeatureShape("user", 4, 3), FeatureShape("item", 4)],
            "model two_tower reads one vector a feature, but 'user' is a sequence; give it another "
            "pooling, or use model kind din or hstu",
        ),
    ],
)
def test_towers_that_do_not_fit_are_refused(items, num_numeric, features, message):
    with pytest.raises(ConfigError) as caught:
        build_model(TwoTowerConfig(items=items), num_numeric, features)
    assert str(caught.value) == message
