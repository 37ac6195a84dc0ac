"""Whose a row is, and what a collection over ranks refuses."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed

from penstock import (
    SGD,
    CapacityError,
    CheckpointError,
    ConfigError,
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    Ranks,
    TableConfig,
    _core,
)
from penstock.embedding.collection import anchor_gradient, table_stores
from penstock.embedding.collection.table_state import check_part
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import limits_of, share_of
from penstock.embedding.sharded import routes
from penstock.embedding.sharded.bags import HostBags
from penstock.embedding.sharded.placement import ranks_of_whole_tables
from penstock.embedding.sharded.shard_map import (
    NUM_BUCKETS,
    Plan,
    ShardMap,
    bucket_of,
    table_word,
    table_words,
)
from penstock.embedding.store import PooledFeature, PooledGradient, PoolingPlan, TableRows

EDGES = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789])


def plain_bucket(name, key):
    """MurmurHash3's finalizer of plain integers; the top 12 bits."""
    mixed = (key ^ table_word(name)) % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed = (mixed ^ (mixed >> 33)) * factor % 2**64
    return (mixed ^ (mixed >> 33)) >> 52


def test_buckets_are_those_that_files_know():
    """Never change the numbers: rows are kept by bucket."""
    assert [plain_bucket("item", key) for key in EDGES.tolist()] == bucket_of(
        table_words(["item"]), EDGES
    ).tolist()
    assert bucket_of(table_words(["item"]), EDGES).tolist() == FROZEN["item"]
    assert bucket_of(table_words(["user"]), EDGES).tolist() == FROZEN["user"]


FROZEN = {"item": [472, 484, 3582, 1899, 2513, 1309], "user": [1167, 2906, 1385, 3875, 1594, 3917]}


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 4096])
def test_buckets_are_dealt_evenly(ranks):
    owners = np.bincount(ShardMap.even(ranks).owners, minlength=ranks)
    assert len(owners) == ranks
    assert owners.max() - owners.min() <= 1


def counted(shard_map):
    return np.bincount(shard_map.owners, minlength=shard_map.num_ranks).tolist()


@pytest.mark.parametrize("before", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 7, 8])
def test_another_number_of_ranks_moves_as_few_buckets_as_there_can_be(before, after):
    one = ShardMap.even(before)
    two = one.resized([1] * after)
    counts = counted(two)
    assert len(counts) == after and max(counts) - min(counts) <= 1
    plan = Plan.between(one, two)
    # A rank keeps what it holds, as far as an even share reaches; shares of 1 more go to those
    # that hold more.
    held = sorted((counted(one) + [0] * after)[:after], reverse=True)
    shares = [NUM_BUCKETS // after + (rank < NUM_BUCKETS % after) for rank in range(after)]
    kept = sum(map(min, held, shares))
    assert plan.num_moved == NUM_BUCKETS - kept
    assert two == one.resized([2] * after), "not the same each time"
    assert one.resized([1] * before) == one


def test_shares_go_by_weight_and_a_rank_may_have_none():
    one = ShardMap.even(3)
    two = one.resized([1, 0, 2, 5])
    assert counted(two) == [512, 0, 1024, 2560]
    three = two.resized([1, 1, 1])
    assert sorted(counted(three)) == [1365, 1365, 1366]
    assert Plan.between(two, three).num_moved == NUM_BUCKETS - 512 - 1024


def test_a_plan_says_which_bucket_goes_where():
    plan = Plan.between(ShardMap.even(3), ShardMap.even(2))
    assert list(plan.buckets) == [(0, 0), (1, 0), (1, 1), (2, 1)]
    every = sorted(bucket for some in plan.buckets.values() for bucket in some)
    assert every == list(range(NUM_BUCKETS))
    for (before, after), buckets in plan.buckets.items():
        for bucket in buckets:
            assert ShardMap.even(3).owners[bucket] == before
            assert ShardMap.even(2).owners[bucket] == after
    assert (plan.sources(0), plan.sources(1)) == ((0, 1), (1, 2))
    assert Plan.between(ShardMap.even(3), ShardMap.even(3)).num_moved == 0


def test_whole_tables_are_dealt_by_the_columns_that_are_read_of_them():
    def table(name, dim, placement="whole"):
        return TableConfig(name=name, dim=dim, placement=placement)

    tables = [table("a", 8), table("spread", 99, "spread"), table("b", 4), table("c", 16)]
    tables += [table("unread", 64), table("d", 4)]
    features = [FeatureConfig(name=name, table=name) for name in ("a", "b", "c", "d", "spread")]
    features.append(FeatureConfig(name="again", table="b"))
    # c has 16 columns, a 8, b 4 twice, d 4.
    assert ranks_of_whole_tables(tables, features, 2) == {
        "c": 0,
        "a": 1,
        "b": 1,
        "d": 0,
        "unread": 1,
    }
    assert set(ranks_of_whole_tables(tables, features, 1).values()) == {0}
    assert ranks_of_whole_tables(tables[1:2], features, 3) == {}


def test_neighbouring_keys_are_spread():
    """Chi squared of 4,096 buckets stays below 5 standard deviations (sqrt(2 * 4095) = 90)."""
    buckets = bucket_of(table_words(["t"]), torch.arange(1 << 18))
    counts = np.bincount(buckets.numpy(), minlength=NUM_BUCKETS)
    expected = (1 << 18) / NUM_BUCKETS
    assert abs(((counts - expected) ** 2 / expected).sum() - 4095) < 5 * 90
    assert (buckets != bucket_of(table_words(["s"]), torch.arange(1 << 18))).float().mean() > 0.99


PLAN = PoolingPlan(
    (
        PooledFeature(1, 0, "mean", 0),
        PooledFeature(0, 0, "sequence", 16, 4),
        PooledFeature(2, 0, "sum", 80),
    ),
    96,
)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("samples", "longest"), [(200, 4), (3000, 20), (40, 3000)])
def test_bags_have_the_bits_of_a_store(samples, longest, threads, weighted):
    """Also where a feature is more than one task, or a bag is."""
    rng = np.random.default_rng(threads)
    lengths = rng.integers(0, longest + 1, 3 * samples)
    lengths[:samples] %= 5  # those of a sequence
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    keys = torch.from_numpy(rng.integers(0, 90, int(offsets[-1])))
    weights = torch.randn(len(keys)) if weighted else None
    batch = KeyedJagged(("a", "b", "c"), keys, offsets, weights)
    store = HostStore([TableConfig(name="t", dim=16, optimizer=SGD(learning_rate=1.0))], seed=2)
    out, same = torch.empty(samples, 96), torch.full((samples, 96), 5.0)
    lookup = store.pooled_lookup(PLAN, batch, insert=True, out=out)
    rows = store.find(0, torch.arange(90)).values
    bags = HostBags(16, threads).numbered(PLAN, batch, keys, 90)
    for part in (batch.offsets, weights):
        if part is not None:
            # What is needed was copied.
            part.zero_()
    bags.pool(rows, same)
    assert torch.equal(same, out)
    grad = torch.randn(samples, 96)
    sums = bags.sums(grad)
    store.apply_gradients(PLAN, [PooledGradient(lookup, None, grad)], 0)
    assert torch.equal(rows - sums, store.find(0, torch.arange(90)).values)


def test_no_samples_and_no_rows():
    bags = HostBags(16, 2)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = KeyedJagged(("a", "b", "c"), nothing, torch.zeros(1, dtype=torch.int64))
    none = bags.numbered(PLAN, batch, nothing, 0)
    none.pool(torch.empty(0, 16), torch.empty(0, 96))
    assert none.sums(torch.empty(0, 96)).shape == (0, 16)
    assert (bags.numbered(PLAN, batch, nothing, 3).sums(torch.empty(0, 96)) == 0).all()


WRONG = {
    "offsets: must rise": {"offsets": np.array([0, 2, 1, 3])},
    "offsets: expected": {"samples": 2},
    "longer than its sequence": {"offsets": np.array([0, 5, 5, 5]), "numbers": 5},
    "numbers: beyond": {"rows": 2},
    "weights: expected": {"weights": np.ones(2, np.float32)},
    "rows: expected": {"dim": 8},
    "out: expected": {"out": 95},
    "bags: of other rows": {"core": 8},
}


@pytest.mark.parametrize("message", WRONG)
def test_the_core_refuses_bags_that_do_not_fit(message):
    given = WRONG[message]
    numbers = np.arange(given.get("numbers", 3), dtype=np.uint32)
    plan = _core.PoolingPlan([1, 0, 2], [0, 0, 0], [1, 3, 0], [0, 4, 0], [0, 16, 80], 96)
    batch_size = given.get("samples", 1)
    offsets = given.get("offsets", np.array([0, 1, 2, 3])).astype(np.int64)
    rows = np.zeros((6, given.get("dim", 16)), np.float32)
    count = given.get("rows", 6)
    with pytest.raises(ValueError, match=message):
        bags = _core.NumberedBags(
            plan, offsets, given.get("weights"), batch_size, numbers, count, 16
        )
        out = np.zeros((batch_size, given.get("out", 96)), np.float32)
        _core.BagSums(given.get("core", 16), 1).pool(bags, rows, out)


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def collection(**options):
    tables = [TableConfig(name="t", dim=4, optimizer=SGD(learning_rate=0.5))]
    return EmbeddingCollection(
        tables, [FeatureConfig(name="f", table="t", pooling="sum")], **options
    )


def step(embeddings, weights=None):
    keys = torch.arange(12).view(4, 3) % 5
    column = Jagged.from_dense(keys)
    batch = KeyedJagged.pack({"f": Jagged(column.values, column.offsets, weights)})
    embeddings(batch).square().sum().backward()
    embeddings.apply_gradients()


def test_a_group_of_one_rank_is_as_none(group, tmp_path):
    one, other = collection(), collection(group=group)
    factors = [torch.linspace(0, 2, 12, requires_grad=True) for _ in range(2)]
    for embeddings, weights in zip((one, other), factors, strict=True):
        step(embeddings)
        step(embeddings, weights)
    assert torch.equal(factors[0].grad, factors[1].grad)
    keys = torch.tensor([*range(6), -1])
    for a, b in zip(one.find("t", keys), other.find("t", keys), strict=True):
        assert torch.equal(a, b)
    again = collection(group=Ranks(group, "sum"))
    again.load_state_dict(other.state_dict())
    other.save_tables(tmp_path / "tables")
    third = collection()
    third.load_tables(tmp_path / "tables")
    for made in (again, third):
        assert torch.equal(made.find("t", keys).values, one.find("t", keys).values)
        assert made.step == 2
    other.save_tables(tmp_path / "tables")  # in the place of the former


def test_what_a_collection_is_made_of_is_compared_once(group, monkeypatch):
    compared = []
    monkeypatch.setattr(Ranks, "check_alike", lambda _, made: compared.append(made))
    one = collection(group=Ranks(group, "sum"), seed=7, deterministic=True)
    assert {
        "seed": "7",
        "deterministic": "true",
        "reduction of gradients": '"sum"',
    }.items() <= compared[0].items()
    one.load_state_dict(one.state_dict())
    assert len(compared) == 1
    collection(group=one.ranks, output="by_feature")
    assert compared[1]["output"] == '"by_feature"'
    assert compared[1]["table 't': optimizer learning_rate"] == "0.5"
    assert compared[1]["feature 'f': pooling"] == '"sum"'


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_scaler_skips_the_step_for_another_ranks_gradients(group, monkeypatch, elsewhere):
    embeddings = collection(group=group)
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    embeddings.attach(optimizer)
    monkeypatch.setattr(anchor_gradient, "on_any_rank", lambda _, is_so: is_so or elsewhere)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(embeddings({"f": torch.arange(3)}).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert embeddings.step == (0 if elsewhere else 1)
    assert scaler.get_scale() == (2.0 if elsewhere else 4.0)


def test_copies_of_a_collection_over_ranks_are_refused(group):
    embeddings = collection(group=group)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="not copied or pickled"):
            copied(embeddings)


def test_a_state_goes_back_to_its_rank_alone():
    with pytest.raises(CheckpointError, match=r"rank 1 of 3, and this is rank 0 of 1"):
        check_part((1, 3), collection())
    check_part((0, 1), collection())


def test_each_rank_holds_its_share_of_a_budget(monkeypatch):
    budget = TableConfig(name="t", dim=8, optimizer=SGD(), max_bytes=1000)
    features = [FeatureConfig(name="f", table="t", pooling="sum")]
    exchange = SimpleNamespace(rank=1, size=3)
    monkeypatch.setattr(table_stores, "Collective", lambda *_: exchange)
    ranks = SimpleNamespace(part=(1, 3), group=None, reduction="sum")
    options = {"num_threads": 1, "device": torch.device("cpu"), "deterministic": True}
    made = table_stores.TableStores([budget], features, ranks=ranks, **options)
    (held,) = made.groups[0].store.tables
    assert dict(held) == dict(budget) | {"max_bytes": 333, "whole_bytes": 1000, "num_ranks": 3}
    # 8 values and 24 bytes of index a row: 17 rows in all.
    assert limits_of(held, 32).max_rows == 5
    assert share_of(budget, 1) == budget
    keys = torch.arange(6)
    rows = TableRows(keys, torch.zeros(6, 8), torch.zeros(6, 0))
    # What is wrong is told of the budget that the job has, and of the share.
    with pytest.raises(CapacityError, match=r"holds 5 rows, .* 1000 \(333 on each of 3 ranks\)"):
        made.groups[0].store.local.insert_or_assign(0, rows)
    small = budget.model_copy(update={"max_bytes": 150})
    with pytest.raises(ConfigError, match=r"max_bytes 150 \(50 on each of 3 ranks\) holds no row"):
        table_stores.TableStores([small], features, ranks=ranks, **options)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 5000])
def test_keys_are_grouped_on_the_host_as_by_sorting(count, once):
    """Few keys, so that many come again, of one group or of several; the edges of int64 too."""
    rng = np.random.default_rng(count)
    keys = torch.from_numpy(rng.choice([*range(50), 2**63 - 1, -(2**63)], count).astype(np.int64))
    group = torch.from_numpy(rng.integers(0, 6, count))
    found, counts, numbers = routes._on_host(keys, group, 8, once=once)
    others, same_counts, same_numbers = routes._on_device(keys, group, 8, once=once)
    assert torch.equal(counts, same_counts)
    assert torch.equal(found[numbers], keys)
    assert torch.equal(torch.repeat_interleave(torch.arange(8), counts)[numbers], group)
    assert len(found) == len(others)
    if not once:
        assert torch.equal(found, others)
        assert torch.equal(numbers, same_numbers)


def test_groups_that_are_not_there_are_refused():
    keys = np.arange(3)
    for groups in (np.array([0, 1, 2]), np.array([0, -1, 0]), np.arange(2)):
        with pytest.raises(ValueError, match="groups: "):
            _core.grouped_keys(keys, groups, 2, True)
