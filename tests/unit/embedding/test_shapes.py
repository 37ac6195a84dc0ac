"""Forms of batches and of vectors, and layouts for the stores, against torch's own modules."""

import copy
import io

import pytest
import torch
from torch import nn

from penstock.config import SGD, FeatureConfig, HashStack, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.embedding.shapes.arrangement import Arrangement, StoreLayout
from penstock.embedding.shapes.hash_stack import Stacks
from penstock.embedding.store import TableRows
from penstock.errors import ConfigError, NonFiniteError
from penstock.types import Jagged, KeyedJagged

ROWS = 9


def tables(**dims):
    rule = SGD(learning_rate=1.0)
    return [TableConfig(name=name, dim=dim, optimizer=rule) for name, dim in dims.items()]


def collection(features, dims, **options):
    """With rows of all tables, and an nn.Embedding of each."""
    torch.manual_seed(1)
    ours = EmbeddingCollection(tables(**dims), features, num_threads=1, **options)
    theirs = {}
    for table in ours.tables:
        theirs[table.name] = nn.Embedding(ROWS, table.dim)
        weight = theirs[table.name].weight.detach()
        ours.import_rows(table.name, TableRows(torch.arange(ROWS), weight, torch.empty(ROWS, 0)))
    return ours, theirs


def assert_updated(ours, theirs):
    """One step of SGD of rate 1 was taken by both."""
    ours.apply_gradients()
    for name, module in theirs.items():
        grad = module.weight.grad
        wanted = module.weight.detach() - (0 if grad is None else grad)
        found = ours.find(name, torch.arange(ROWS)).values
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def backward(mine, theirs):
    grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)
    mine.backward(grad, retain_graph=True)
    theirs.backward(grad, retain_graph=True)


def jagged(*bags, weights=None):
    values = torch.tensor([key for bag in bags for key in bag], dtype=torch.int64)
    starts = torch.tensor([0, *(len(bag) for bag in bags)])[:-1].cumsum(0)
    return Jagged.from_starts(values, starts, weights)


PLAIN = [FeatureConfig(name="a", table="s"), FeatureConfig(name="b", table="t")]


def test_one_key_of_each_feature_is_a_tensor_of_two_dimensions():
    ours, theirs = collection(PLAIN, {"s": 3, "t": 3}, output="stacked")
    keys = torch.randint(0, ROWS, (5, 2))
    mine = ours(keys)
    wanted = torch.stack([theirs["s"](keys[:, 0]), theirs["t"](keys[:, 1])], 1)
    assert mine.shape == (5, 2, 3)
    backward(mine, wanted)
    assert_updated(ours, theirs)


def test_by_name_with_every_form_of_a_column():
    features = [
        FeatureConfig(name="one", table="s"),
        FeatureConfig(name="bag", table="t", pooling="mean"),
        FeatureConfig(name="ragged", table="s"),
        FeatureConfig(name="history", table="t", pooling="sequence", max_keys=6),
    ]
    ours, theirs = collection(features, {"s": 2, "t": 3}, output="by_feature")
    keys = {
        "one": torch.randint(0, ROWS, (2,)),
        "bag": torch.randint(0, ROWS, (2, 4)),
        "ragged": jagged([1, 1, 2], []),
        "history": torch.randint(0, ROWS, (2, 3, 2)),
        "unread": torch.zeros(7),
    }
    mine = ours(keys)
    assert list(mine) == ["one", "bag", "ragged", "history"]
    assert mine["history"].shape == (2, 3, 2, 3)
    wanted = {
        "one": theirs["s"](keys["one"]),
        "bag": theirs["t"](keys["bag"]).mean(1),
        "ragged": torch.stack([theirs["s"](torch.tensor([1, 1, 2])).sum(0), torch.zeros(2)]),
        "history": theirs["t"](keys["history"]),
    }
    for name, vectors in mine.items():
        backward(vectors, wanted[name])
    assert_updated(ours, theirs)
    fewer = ours({**keys, "history": torch.randint(0, ROWS, (2,))})["history"]
    assert fewer.shape == (2, 3)
    packed = KeyedJagged.pack({
        name: ours_of(column) for name, column in keys.items() if name != "unread"
    })
    assert ours(packed)["history"].shape == (2, 6, 3)


def ours_of(column):
    return (
        column
        if isinstance(column, Jagged)
        else Jagged.from_dense(column.flatten(1) if column.dim() > 1 else column)
    )


def test_one_column_is_read_in_several_tables():
    features = [
        FeatureConfig(name="a@s", table="s", input="a"),
        FeatureConfig(name="b", table="s"),
        FeatureConfig(name="a@t", table="t", input="a", pooling="mean"),
        FeatureConfig(name="a@u", table="u", input="a", pooling="sequence", max_keys=3),
    ]
    ours, theirs = collection(features, {"s": 3, "t": 3, "u": 2})
    assert ours.inputs == ("a", "b")
    weights = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    a, b = jagged([1, 2], [3], weights=weights), jagged([4], [5, 5])
    mine = ours(KeyedJagged.pack({"a": a, "b": b}))
    twin = weights.detach().clone().requires_grad_()
    s, t, u = (theirs[name].weight for name in "stu")
    wanted = torch.stack([
        torch.cat([
            2 * s[1] * twin[0] / 2 + twin[1] * s[2], s[4],
            (twin[0] * t[1] + twin[1] * t[2]) / (twin[0] + twin[1]),
            twin[0] * u[1], twin[1] * u[2], torch.zeros(2),
        ]),
        torch.cat([twin[2] * s[3], 2 * s[5], t[3], twin[2] * u[3], torch.zeros(4)]),
    ])  # fmt: skip
    backward(mine, wanted)
    torch.testing.assert_close(weights.grad, twin.grad, rtol=1e-5, atol=1e-5)
    assert_updated(ours, theirs)
    assert ours.sequence_lengths(KeyedJagged.pack({"a": a, "b": b})).tolist() == [[2], [1]]


@pytest.mark.parametrize("pooling", ["sum", "mean", "sqrt_n", "max"])
def test_padding_is_no_key(pooling):
    features = [FeatureConfig(name="a", table="s", pooling=pooling, padding_key=0), PLAIN[1]]
    ours, _ = collection(features, {"s": 3, "t": 3})
    ours.erase("s", torch.tensor([0]))
    with_padding = {"a": jagged([0, 1, 0], [0], [2, 3, 0]), "b": jagged([0], [1], [2])}
    without = {**with_padding, "a": jagged([1], [], [2, 3])}
    assert torch.equal(ours(with_padding), ours(without))
    # Of its value in another feature it is a key.
    assert ours(with_padding)[0, 3:].abs().sum() > 0
    ours(with_padding).sum().backward()
    ours.apply_gradients()
    assert not ours.find("s", torch.tensor([0])).found.any()


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_weights_stay_with_the_keys_that_padding_leaves(pooling):
    features = [FeatureConfig(name="a", table="s", pooling=pooling, padding_key=0), PLAIN[1]]
    ours, _ = collection(features, {"s": 3, "t": 3})
    b = jagged([4], [5], weights=torch.tensor([0.5, 0.25]))

    def of(*bags, weights):
        return ours({"a": jagged(*bags, weights=torch.tensor(weights)), "b": b})

    padded = of([0, 1, 0, 2], [3, 0], weights=[9.0, 2.0, 7.0, 3.0, 5.0, 11.0])
    assert torch.equal(padded, of([1, 2], [3], weights=[2.0, 3.0, 5.0]))


SEQUENCE = {"table": "s", "pooling": "sequence", "max_keys": 4, "padding_key": 0}


def test_holes_close_or_stay():
    features = [
        FeatureConfig(name="closed", **SEQUENCE),
        FeatureConfig(name="b", table="t"),
        FeatureConfig(name="kept", holes="keep", **SEQUENCE),
        FeatureConfig(name="wide", holes="keep", **{**SEQUENCE, "table": "w"}),
    ]
    ours, theirs = collection(features, {"s": 3, "t": 2, "w": 2}, output="by_feature")
    history = torch.tensor([[0, 0, 5, 7], [1, 0, 2, 0], [0, 0, 0, 0]])
    keys = {"closed": history, "b": torch.tensor([1, 2, 3]), "kept": history, "wide": history}
    mine = ours(keys)
    mask = (history != 0)[:, :, None]
    wanted = {
        "closed": theirs["s"](torch.tensor([[5, 7, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0]]))
        * torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])[:, :, None],
        "b": theirs["t"](keys["b"]),
        "kept": theirs["s"](history) * mask,
        "wide": theirs["w"](history) * mask,
    }
    for name, vectors in mine.items():
        backward(vectors, wanted[name])
    assert_updated(ours, theirs)
    flat = KeyedJagged.pack({name: ours_of(column) for name, column in keys.items()})
    assert ours.sequence_lengths(flat).tolist() == [[2, 4, 4], [2, 4, 4], [0, 4, 4]]
    with pytest.raises(
        ConfigError, match="'kept', sample 0 of the batch: 5 keys for a sequence of 4"
    ):
        ours({**keys, "kept": torch.zeros(3, 5, dtype=torch.int64)})


MIXED = [
    FeatureConfig(name="top", table="s", pooling="max"),
    FeatureConfig(name="b", table="t"),
    FeatureConfig(name="each", table="s", pooling="none"),
    FeatureConfig(name="other", table="t", pooling="max"),
    FeatureConfig(name="seq", table="s", pooling="sequence", max_keys=2),
]


def test_vectors_of_single_keys_beside_others():
    ours, theirs = collection(MIXED, {"s": 3, "t": 2}, output="by_feature")
    assert [shape.name for shape in ours.feature_shapes] == ["top", "b", "other", "seq"]
    for bags in (2, 3):
        batch = {
            "top": jagged([1, 2, 3], [], [4]),
            "b": jagged([1], [2], [3, 3]),
            "each": jagged([1] * bags, [2, 3], []),
            "other": jagged([5], [6, 7], [8] * 7),
            "seq": jagged([1, 2], [3], []),
        }
        mine = ours(batch)
        s, t = theirs["s"].weight, theirs["t"].weight
        each = mine["each"]
        assert each.offsets.tolist() == [0, bags, bags + 2, bags + 2]
        backward(each.values, s[batch["each"].values])
        backward(mine["top"], torch.stack([s[1:4].amax(0), torch.zeros(3), s[4]]))
        backward(mine["other"], torch.stack([t[5], t[6:8].amax(0), t[8]]))
        backward(mine["b"], torch.stack([t[1], t[2], 2 * t[3]]))
    assert_updated(ours, theirs)


def test_what_is_known_of_a_batch_is_not_said_of_what_is_made_of_it():
    """One key a bag: a GPU reads no offsets then."""
    top = [FeatureConfig(name="f", table="t", pooling="max")]
    arrangement = Arrangement(
        top, [3], lambda features, columns, width: StoreLayout((), width), Stacks(top, [None])
    )
    arrangement.arrange(KeyedJagged.pack({"f": jagged([1, 2, 3, 4], [])}))
    one = KeyedJagged(("f",), torch.tensor([1, 2, 3]), torch.arange(4), None, True, True)
    cut = arrangement.arrange(one).sparse
    assert cut.offsets.tolist() == [0, 2, 3, 3] and not cut.is_one_hot
    spread = Stacks([FeatureConfig(name="f", table="t")], [HashStack(rounds=2, size=9)]).spread(one)
    assert spread.offsets.tolist() == [0, 2, 4, 6] and not spread.is_one_hot


def test_a_batch_without_samples_trains_nothing():
    features = [one for one in MIXED if one.pooling != "none"]
    ours, theirs = collection(features, {"s": 3, "t": 2})
    mine = ours({name: torch.zeros(0, dtype=torch.int64) for name in ("top", "b", "other", "seq")})
    assert mine.shape == (0, 3 + 2 + 2 + 6)
    mine.sum().backward()
    assert_updated(ours, theirs)


def test_layouts_go_with_copies_and_frozen_tables():
    features = [one for one in MIXED if one.pooling != "none"]
    ours, _ = collection(features, {"s": 3, "t": 2})
    batch = {
        "top": jagged([1] * 9, []),
        "b": jagged([1], []),
        "other": jagged([], [2, 3]),
        "seq": jagged([1], []),
    }
    before = ours(batch).detach()
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(ours), torch.load(saved, weights_only=False)):
        assert torch.equal(twin(batch), before)
    frozen = EmbeddingCollection(
        [table.model_copy(update={"trainable": table.name == "t"}) for table in ours.tables],
        features,
    )
    frozen.load_state_dict(ours.state_dict())
    with pytest.raises(NonFiniteError, match=r"feature 'top' of table 's' \(3\)"):
        grad = torch.zeros_like(before)
        grad[:, :3] = torch.nan
        frozen(batch).backward(grad)
        frozen.apply_gradients()
    frozen.discard_gradients()
    frozen(batch).sum().backward()
    frozen.apply_gradients()
    assert torch.equal(frozen(batch)[:, :3], before[:, :3])
    assert not torch.equal(frozen(batch)[:, 5:7], before[:, 5:7])


@pytest.mark.parametrize("is_weighted", [False, True])
def test_compiled_as_eagerly(is_weighted):
    features = [
        FeatureConfig(name="top", table="s", pooling="max", padding_key=0),
        FeatureConfig(name="kept", holes="keep", **SEQUENCE),
        FeatureConfig(name="again", table="t", input="top"),
    ]
    keys = {"top": jagged([1, 2, 0], [3, 0]), "kept": torch.tensor([[0, 1, 0, 2], [3, 0, 0, 0]])}
    results = []
    for is_compiled in (False, True):
        ours, _ = collection(features, {"s": 3, "t": 2}, output="by_feature")
        run = torch.compile(ours, backend="aot_eager") if is_compiled else ours
        weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
        top = keys["top"]._replace(weights=weights) if is_weighted else keys["top"]
        for _ in range(2):
            out = run({**keys, "top": top})
            loss = out["top"].square().sum() + out["kept"].sum() + out["again"].square().sum()
            loss.backward()
        ours.apply_gradients()
        rows = [ours.find(name, torch.arange(ROWS)).values for name in "st"]
        results.append([*rows, *out.values()] + ([weights.grad] if is_weighted else []))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: collection(PLAIN, {"s": 3, "t": 2}, output="stacked"), "tables differ in dim"),
        (lambda: collection(PLAIN, {"s": 3, "t": 3}, output="list"), "output 'list': one of conc"),
        (lambda: collection(MIXED, {"s": 3, "t": 2}), "'each' has pooling none"),
        (
            lambda: collection([FeatureConfig(name="h", **SEQUENCE)], {"s": 3}, output="stacked"),
            "'h' is a sequence",
        ),
        (
            lambda: collection(PLAIN, {"s": 3, "t": 3})[0](torch.zeros(4, 3, dtype=torch.int64)),
            r"of shape \[4, 3\]: expected \[B, 2\], one key of each of a, b",
        ),
        (
            lambda: collection(PLAIN, {"s": 3, "t": 3})[0]({"a": torch.zeros(1).long()}),
            "the batch has no b; it has a",
        ),
        (
            lambda: collection(PLAIN, {"s": 3, "t": 3})[0]({
                "a": torch.tensor(1),
                "b": torch.tensor([1]),
            }),
            "feature 'a' is a single number",
        ),
        (
            lambda: collection(PLAIN, {"s": 3, "t": 3})[0](torch.zeros(4, 2)),
            "the batch of torch.float32: keys are integers",
        ),
        (
            lambda: collection(MIXED, {"s": 3, "t": 2}, output="by_feature")[0].to("meta")({
                feature.name: torch.tensor([1]) for feature in MIXED
            }),
            "on the meta device the size of its vectors is not known",
        ),
    ],
)
def test_what_has_no_shape_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
