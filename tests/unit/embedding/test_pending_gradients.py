"""Gradients between backward and the update: none is lost, none is applied twice."""

import pytest
import torch

from penstock.config import SGD, Adagrad, FeatureConfig, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.errors import CapacityError, ConfigError, PartialUpdateError
from penstock.types import Jagged, KeyedJagged

KEYS = torch.arange(4)
BATCH = KeyedJagged.pack({name: Jagged.from_dense(KEYS) for name in "fgh"})
TABLES = [
    TableConfig(name="a", dim=2, optimizer=SGD(learning_rate=1.0)),
    TableConfig(name="b", dim=3, optimizer=SGD(learning_rate=1.0)),
    TableConfig(name="c", dim=2, optimizer=Adagrad()),
]
FEATURES = [FeatureConfig(name=n, table=t) for n, t in zip("fgh", "abc", strict=True)]


def opened():
    return EmbeddingCollection(TABLES, FEATURES, seed=4, num_threads=1)


def values(embeddings):
    with torch.no_grad():
        return embeddings(BATCH)


def fail(monkeypatch, store, *, after):
    """Makes an update of one store raise, before or after it has taken the step."""

    def update(*arguments, **options):
        if after:
            store_class.apply_gradients(store, *arguments, **options)
            raise PartialUpdateError("some rows have taken the step")
        raise CapacityError("no memory")

    store_class = type(store)
    monkeypatch.setattr(store, "apply_gradients", update)


def test_an_error_before_the_first_row_keeps_the_gradients(monkeypatch):
    embeddings, other = opened(), opened()
    for each in (embeddings, other):
        each(BATCH).sum().backward()
    before = values(embeddings)
    fail(monkeypatch, embeddings._stores.groups[0].store, after=False)
    with pytest.raises(CapacityError, match="no memory") as caught:
        embeddings.apply_gradients()
    assert not isinstance(caught.value, PartialUpdateError)
    assert embeddings.step == 0
    assert torch.equal(values(embeddings), before)
    monkeypatch.undo()
    embeddings.apply_gradients()
    other.apply_gradients()
    assert embeddings.step == 1
    assert torch.equal(values(embeddings), values(other))
    assert not torch.equal(values(embeddings), before)


@pytest.mark.parametrize(("failing", "after"), [(1, False), (2, False), (0, True), (2, True)])
def test_an_error_after_it_says_so_and_applies_nothing_twice(monkeypatch, failing, after):
    embeddings = opened()
    embeddings(BATCH).sum().backward()
    before = values(embeddings)
    fail(monkeypatch, embeddings._stores.groups[failing].store, after=after)
    with pytest.raises(PartialUpdateError) as caught:
        embeddings.apply_gradients()
    if not after:
        stepped = ", ".join("abc"[:failing])
        assert f"step 0 is applied to the tables {stepped}, but not to others" in str(caught.value)
    assert embeddings.step == 1
    monkeypatch.undo()
    first = failing + after
    width = [2, 3, 2]
    moved = (values(embeddings) != before).all(0).split(width)
    assert [bool(part.all()) for part in moved] == [n < first for n in range(3)]
    once = values(embeddings)
    embeddings.apply_gradients()
    assert torch.equal(values(embeddings), once)


def test_what_one_store_refuses_no_store_takes(monkeypatch):
    embeddings = opened()
    out = embeddings(BATCH)
    out.sum().backward()
    before = values(embeddings)

    def refuse(*_):
        raise ConfigError("does not belong")

    monkeypatch.setattr(embeddings._stores.groups[2].store, "check_gradients", refuse)
    with pytest.raises(ConfigError, match="does not belong"):
        embeddings.apply_gradients()
    assert torch.equal(values(embeddings), before)
    assert embeddings.step == 0


def test_what_the_second_of_two_stores_refuses_the_first_does_not_take(monkeypatch):
    embeddings = EmbeddingCollection(TABLES[:2], FEATURES[:2], num_threads=1)
    batch = KeyedJagged.pack({name: Jagged.from_dense(KEYS) for name in "fg"})
    embeddings(batch).sum().backward()
    before = embeddings.find("a", KEYS).values

    def refuse(*_):
        raise ConfigError("does not belong")

    for verb in ("check_gradients", "apply_gradients"):
        monkeypatch.setattr(embeddings._stores.groups[1].store, verb, refuse)
    with pytest.raises(ConfigError, match="does not belong"):
        embeddings.apply_gradients()
    assert torch.equal(embeddings.find("a", KEYS).values, before)
    assert embeddings.step == 0


def test_the_step_moves_with_and_without_gradients():
    embeddings = opened()
    for step in range(3):
        assert embeddings.step == step
        if step == 1:
            embeddings(BATCH).sum().backward()
        embeddings.apply_gradients()
    assert embeddings.step == 3
    embeddings(BATCH).sum().backward()
    embeddings.discard_gradients()
    embeddings.apply_gradients()
    assert embeddings.step == 4


def test_missing_keys_add_up_over_stores_and_lookups():
    embeddings = opened()
    embeddings.import_rows("a", next(iter(trained().export_table("a"))))
    embeddings.eval()
    for turn in range(1, 4):
        embeddings(BATCH)
        # None of table a's, all of the tables of the two other stores.
        assert embeddings.num_missing == 8 * turn


def trained():
    embeddings = opened()
    embeddings(BATCH)
    return embeddings


@pytest.mark.parametrize("change", [lambda g: g.mul_(2), lambda g: g[1:].zero_(), torch.relu_])
def test_a_gradient_changed_in_place_is_refused(change):
    embeddings = opened()
    before = values(trained())
    grad = torch.ones(4, 7)
    embeddings(BATCH).backward(grad)
    change(grad)
    with pytest.raises(ConfigError, match="changed in place between backward and apply_gradients"):
        embeddings.apply_gradients()
    assert torch.equal(values(embeddings), before)
    embeddings.discard_gradients()
    embeddings.apply_gradients()
    assert embeddings.step == 1
    # Afterwards it may be changed: it has been read.
    embeddings(BATCH).backward(grad)
    embeddings.apply_gradients()
    grad.zero_()


def test_a_gradient_changed_in_place_is_not_added_to():
    embeddings = opened()
    out = embeddings(BATCH)
    grad = torch.ones(4, 7)
    out.backward(grad, retain_graph=True)
    grad.mul_(2)
    with pytest.raises(ConfigError, match="changed in place between backward and apply_gradients"):
        out.backward(torch.ones(4, 7))


def test_gradients_of_a_graph_that_was_kept_add_up():
    one, two = opened(), opened()
    out = one(BATCH)
    out.backward(torch.ones(4, 7), retain_graph=True)
    out.backward(torch.ones(4, 7))
    one.apply_gradients()
    two(BATCH).backward(torch.full((4, 7), 2.0))
    two.apply_gradients()
    assert torch.equal(values(one), values(two))


def test_the_gradient_of_an_applied_output_is_refused():
    embeddings = opened()
    out = embeddings(BATCH)
    out.backward(torch.ones(4, 7), retain_graph=True)
    embeddings.apply_gradients()
    once = values(embeddings)
    out.backward(torch.ones(4, 7))
    with pytest.raises(ConfigError, match="has been applied before; look the batch up again"):
        embeddings.apply_gradients()
    assert torch.equal(values(embeddings), once)


def test_buffers_may_be_filled_anew_between_micro_batches():
    results = []
    for reuses in (False, True):
        embeddings = opened()
        values_of, offsets_of = torch.zeros(64, dtype=torch.int64), torch.zeros(7).long()
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            lengths = torch.randint(0, 5, (6,), generator=generator)
            offsets = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
            keys = torch.randint(0, 9, (int(offsets[-1]),), generator=generator)
            if reuses:
                values_of[: len(keys)] = keys
                keys, offsets = values_of[: len(keys)], offsets_of.copy_(offsets)
            embeddings(KeyedJagged(tuple("fgh"), keys, offsets)).pow(2).sum().backward()
        embeddings.apply_gradients()
        results.append(values(embeddings))
    assert torch.equal(*results)
