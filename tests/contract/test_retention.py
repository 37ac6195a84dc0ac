"""Admission, eviction and budgets, in every store."""

import numpy as np
import pytest
import torch

from penstock.config import (
    SGD,
    Adagrad,
    AdmitAtRandom,
    AdmitFrequent,
    Constant,
    Eviction,
    TableConfig,
)
from penstock.embedding import retention
from penstock.embedding.dict_store import DictStore
from penstock.embedding.host_store import HostStore
from penstock.embedding.retention import Clock
from penstock.embedding.store import (
    CURSOR_START,
    Candidates,
    PooledFeature,
    PooledGradient,
    PoolingPlan,
    TableRows,
)
from penstock.errors import CapacityError, ConfigError
from penstock.types import Jagged, KeyedJagged
from tests.contract.stores import is_slow, open_store, skip_in_interpreter

__all__ = ["open_store"]

PLAN = PoolingPlan((PooledFeature(0, 0, "sum", 0),), 1)


def table(rows=None, optimizer=None, **fields):
    """One column, SGD; `rows`: the most it holds, by its budget."""
    rule = optimizer or SGD(learning_rate=1.0)
    initial = fields.pop("initializer", Constant(value=1.0))
    free = TableConfig(name="t", dim=1, optimizer=rule, initializer=initial)
    if rows is not None:
        ruled = free.model_copy(update=fields)
        words = retention.usage_dim(ruled)
        fields["max_bytes"] = rows * (4 + 4 * words + retention.overhead_bytes(ruled))
    return TableConfig(name="t", dim=1, optimizer=rule, initializer=initial, **fields)


def look_up(store, keys, *, insert=True):
    batch = KeyedJagged.pack({"f": Jagged.from_dense(torch.tensor(keys))})
    out = torch.empty(len(keys), 1)
    lookup = store.pooled_lookup(PLAN, batch, insert=insert, out=out)
    return out[:, 0].tolist(), lookup, batch


def train(store, keys, step, grad=0.25):
    store.advance(Clock(step, 1_700_000_000 + step))
    read, lookup, batch = look_up(store, keys)
    gradient = torch.full((len(keys), 1), grad)
    store.apply_gradients(PLAN, [PooledGradient(lookup, batch, gradient)], step)
    store.check_invariants()
    return read


def held(store):
    rows, _ = store.export_batch(0, CURSOR_START, 1000)
    return set(rows.keys.tolist())


def counted(store):
    counts, _ = store.export_candidates(0, CURSOR_START, 1000)
    return dict(zip(counts.keys.tolist(), counts.counts.tolist(), strict=True))


def numbers(store):
    return store.retention_state(0).numbers


def test_a_refused_key_reads_and_trains_the_default_row(open_store):
    store = open_store([table(admission=AdmitFrequent(min_count=3))])
    assert train(store, [7, 8], 0) == [1.0, 1.0]
    assert held(store) == set()
    # Both keys' gradients went to the default row: 1 - 2 * 0.25.
    assert store.retention_state(0).default_value.tolist() == [0.5]
    assert look_up(store, [99], insert=False)[0] == [0.5]
    assert store.find(0, torch.tensor([7])).values.tolist() == [[0.5]]
    assert numbers(store)["refused"] == 2
    # Three times with those before: a row of its own, with its initial value, at once.
    assert train(store, [7, 7, 9], 1) == [1.0, 1.0, 0.5]
    assert held(store) == {7}
    assert numbers(store)["admitted"] == 1
    assert store.num_candidates(0) == 2  # 8 and 9


def test_the_default_row_has_an_optimizer_state(open_store):
    rule = Adagrad(learning_rate=1.0, initial_accumulator=0.5)
    store = open_store([table(optimizer=rule, admission=AdmitFrequent(min_count=9))])
    train(store, [1], 0, grad=1.0)
    state = store.retention_state(0)
    assert state.default_state.tolist() == [1.5]
    # fp32 against its own formula
    torch.testing.assert_close(state.default_value, torch.tensor([1 - 1 / 1.5**0.5]))


def test_probability_admits_its_share_whatever_the_key_and_tries_again(open_store):
    store = open_store([table(admission=AdmitAtRandom(probability=0.3))])
    n = 3_000 if is_slow(open_store) else 200_000
    keys = torch.arange(n) * 0x9E3779B97F4A7C
    store.advance(Clock(5))
    store.find_or_insert(0, keys)
    first = store.num_rows(0)
    sigma = (0.3 * 0.7 / n) ** 0.5
    assert abs(first / n - 0.3) < 3 * sigma
    # The draw of a step is made: again in the same step changes nothing; in the next one it does.
    store.find_or_insert(0, keys)
    assert store.num_rows(0) == first
    store.advance(Clock(6))
    store.find_or_insert(0, keys)
    sigma = (0.51 * 0.49 / n) ** 0.5
    assert abs(store.num_rows(0) / n - 0.51) < 3 * sigma


def test_counts_are_halved_and_forgotten(open_store):
    store = open_store([table(admission=AdmitFrequent(min_count=4, half_life_steps=10))])
    train(store, [1, 1, 1, 2], 0)
    train(store, [3], 10)  # 1: three becomes one; 2: one becomes none
    assert store.num_candidates(0) == 2
    train(store, [1, 1], 11)
    assert held(store) == set()
    train(store, [1], 12)
    assert held(store) == {1}


@pytest.mark.parametrize("halvings", [1, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 1 << 40])
def test_counts_are_halved_as_often_as_time_has_passed(halvings, open_store):
    """Also by more places than a machine word has."""
    store = open_store([table(admission=AdmitFrequent(min_count=65_000, half_life_steps=3))])
    counts = torch.tensor([1, 2, 40_000, 64_999])
    store.import_candidates(0, Candidates(torch.arange(4), counts))
    store.advance(Clock(3 * halvings + 2))
    left = {key: count >> halvings for key, count in enumerate(counts.tolist())}
    assert counted(store) == {key: count for key, count in left.items() if count}


@pytest.mark.parametrize("halvings", [1, 15, 31, 32, 33, 63, 64, 65, 1 << 20])
def test_uses_are_halved_as_often_as_time_has_passed(halvings, open_store):
    skip_in_interpreter(open_store, "an eviction for each")
    store = open_store([table(rows=8, eviction=Eviction(order="lfu", half_life=3))])
    store.advance(Clock(3 * halvings))
    rows = TableRows(
        torch.arange(8),
        torch.ones(8, 1),
        torch.empty(8, 0),
        # The first was used 2^32 - 1 times long ago, the others once, by now.
        torch.tensor([[0, 2**32 - 1]] + [[3 * halvings, 1]] * 7),
    )
    store.insert_or_assign(0, rows)
    train(store, [100], 3 * halvings)
    assert (0 in held(store)) is (2**32 - 1 >> halvings > 1)


def test_lru_evicts_exactly_the_rows_not_used_for_longest(open_store):
    store = open_store([table(rows=100, eviction=Eviction())])
    for step in range(10):
        train(store, list(range(10 * step, 10 * step + 10)), step)
    train(store, list(range(5)), 10)  # 0 to 4 are used again
    assert store.num_rows(0) == 100
    train(store, [1000, 1001], 11)
    # Two are needed, a 32nd of 100 more leaves: 5 of those last used at step 0 or, then, step 1.
    gone = set(range(100)) - held(store)
    assert gone == {5, 6, 7, 8, 9}
    assert numbers(store)["evicted"] == 5
    assert numbers(store)["evicted_age"] == 5 * 11


def test_an_evicted_key_begins_anew(open_store):
    store = open_store([table(rows=1, eviction=Eviction())])
    assert train(store, [1], 0) == [1.0]
    assert train(store, [1], 1) == [0.75]
    assert train(store, [2], 2) == [1.0]
    assert held(store) == {2}
    assert train(store, [1], 3) == [1.0]


def test_lfu_evicts_the_least_used_and_ages(open_store):
    store = open_store([table(rows=3, eviction=Eviction(order="lfu", half_life=100))])
    for step in range(8):
        train(store, [1, 2] if step < 3 else [1], step)
    train(store, [3], 9)
    train(store, [4], 10)
    assert held(store) == {1, 2, 4}  # 3: used once; 2: three times
    # After three half-lives the eight uses of 1 count as one, and 5, used twice since, stays.
    train(store, [5], 301)
    train(store, [5], 302)
    train(store, [6], 303)
    assert 5 in held(store)
    assert 1 in held(store)  # 8 >> 3 == 1 is more than the 3 >> 3 of key 2 and than none


def scored(store, table, scores, now):
    """Writes rows with scores, as used at a time."""
    keys = torch.tensor(list(scores))
    usage = torch.tensor([[now, score] for score in scores.values()])
    rows = TableRows(keys, torch.ones(len(keys), 1), torch.zeros(len(keys), 0), usage)
    store.insert_or_assign(table, rows)


def test_the_lowest_score_leaves_first_and_training_changes_none(open_store):
    """Beside a table by uses in the same store, whose numbers training counts up."""
    rules = [table(rows=4, eviction=Eviction(order=order)) for order in ("score", "lfu")]
    store = open_store([rules[0], rules[1].model_copy(update={"name": "u"})])
    for number in range(2):
        scored(store, number, {1: 5, 2: 2**32 - 1, 3: 1}, 0)
    for step in range(1, 4):
        train(store, [3, 3, 1], step)
    rows, _ = store.export_batch(0, CURSOR_START, 10)
    marks = dict(zip(rows.keys.tolist(), rows.usage.tolist(), strict=True))
    assert marks == {1: [3, 5], 2: [0, 2**32 - 1], 3: [3, 1]}
    # A new row has none: it is the next to leave, but for the batch at hand.
    train(store, [7], 4)
    train(store, [8], 5)
    assert held(store) == {1, 2, 3, 8}
    train(store, [9, 8], 6)
    assert held(store) == {1, 2, 8, 9}
    # Of equal scores the one that was not used for longest.
    train(store, [9], 7)
    train(store, [4], 8)
    assert held(store) == {1, 2, 9, 4}
    rows, _ = store.export_batch(1, CURSOR_START, 10)
    assert dict(zip(rows.keys.tolist(), rows.usage[:, 1].tolist(), strict=True))[1] == 5


@pytest.mark.parametrize("order", ["lru", "lfu", "score"])
def test_rows_of_the_batch_at_hand_stay(open_store, order):
    store = open_store([table(rows=4, eviction=Eviction(order=order))])
    for step, keys in enumerate([[1], [2], [3], [4]]):
        train(store, keys, step)
    assert held(store) == {1, 2, 3, 4}
    # 1 and 2 were used longest ago, and no row more often; but they are in the batch.
    train(store, [1, 2, 9], 4)
    assert held(store) == {1, 2, 4, 9}
    assert numbers(store)["evicted"] == 1


def test_of_rows_used_alike_those_of_the_lowest_hash_leave(open_store):
    store = open_store([table(rows=64, eviction=Eviction(order="lfu"))])
    keys = torch.arange(100, 164) * 0x9E3779B97F4A7C
    train(store, keys.tolist(), 0)
    train(store, [1, 2, 3], 1)
    order = np.argsort(retention.precedence(keys.numpy()))
    # Three are needed, and a 32nd of 64 leaves beyond.
    assert held(store) == {1, 2, 3, *keys[order[5:]].tolist()}


def test_numbers_of_uses_stay_at_their_largest(open_store):
    store = open_store([table(rows=3, eviction=Eviction(order="lfu"))])
    most = 2**32 - 1
    usage = torch.tensor([[0, most], [0, most - 1]])
    rows = TableRows(torch.tensor([1, 2]), torch.ones(2, 1), torch.zeros(2, 0), usage)
    store.insert_or_assign(0, rows)
    for step in range(3):
        train(store, [1, 2, 3] if step == 2 else [1, 2], step)
    held_rows, _ = store.export_batch(0, CURSOR_START, 10)
    uses = dict(zip(held_rows.keys.tolist(), held_rows.usage[:, 1].tolist(), strict=True))
    assert uses == {1: most, 2: most, 3: 1}
    train(store, [4], 3)
    assert held(store) == {1, 2, 4}


def key_of_precedence(word):
    """Inverse of `retention.precedence`."""
    for factor in (0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD):
        word ^= word >> 33
        word = word * pow(factor, -1, 2**64) % 2**64
    word ^= word >> 33
    return word - 2**64 if word >= 2**63 else word


def test_the_key_of_the_highest_hash_is_a_key_like_any_other(open_store):
    # Its hash has all 64 bits set: it is below no other.
    last = key_of_precedence(2**64 - 1)
    assert int(retention.precedence(np.array([last]))[0]) == 2**64 - 1
    for rules in ({"rows": 3}, {"rows": 3, "eviction": Eviction()}):
        store = open_store([table(**rules)])
        train(store, [last, 5], 0)
        assert held(store) == {last, 5}
    store = open_store([table(admission=AdmitFrequent(min_count=2))])
    train(store, [last], 0)
    train(store, [last], 1)
    assert held(store) == {last}


def test_rows_last_used_in_the_future_count_as_used_now(open_store):
    """A run's rows in another run, which is younger: no store may call them old."""
    store = open_store([table(rows=8, eviction=Eviction(ttl=100))])
    keys = torch.arange(4)
    ahead = torch.tensor([[1000], [2**32 - 1], [3], [2]])
    store.advance(Clock(3))
    rows = TableRows(keys, torch.ones(4, 1), torch.zeros(4, 0), ahead)
    assert store.insert_or_assign(0, rows) == 4
    exported, _ = store.export_batch(0, CURSOR_START, 10)
    assert exported.usage[exported.keys.argsort(), 0].tolist() == [3, 3, 3, 2]
    assert numbers(store)["ahead"] == 2
    store.advance(Clock(102))
    assert held(store) == {0, 1, 2, 3}
    store.advance(Clock(108))
    assert held(store) == set()
    assert numbers(store)["evicted_age"] == 3 * 105 + 106


def test_a_time_that_goes_back_makes_no_row_old(open_store):
    store = open_store([table(rows=4, eviction=Eviction(order="lfu", half_life=10, ttl=50))])
    for step in (90, 100):
        train(store, [1, 2], step)
    state = store.retention_state(0)
    state.numbers.update(now=5, swept=5, step=5)
    store.set_retention_state(0, state)
    assert numbers(store)["now"] == 5
    copy = open_store([store.tables[0]])
    copy.set_retention_state(0, state)
    copy.set_retention_state(0, copy.retention_state(0))
    assert numbers(copy) == numbers(store)
    # The clock of a store goes on from the last `advance`; that of another from what it was given.
    rows, _ = store.export_batch(0, CURSOR_START, 10)
    copy.insert_or_assign(0, rows)
    train(copy, [3, 4], 9)  # a sweep: the age of 1 and 2 is none, not 2^32 - 91
    assert held(copy) == {1, 2, 3, 4}
    assert numbers(copy)["now"] == 9
    assert numbers(store)["now"] == 5
    store.advance(Clock(101))
    assert numbers(store)["now"] == 101
    assert held(store) == {1, 2}


def test_rows_used_after_now_are_of_no_age(open_store):
    store = open_store([table(rows=2, eviction=Eviction())])
    state = store.retention_state(0)
    state.numbers.update(now=200)
    store.set_retention_state(0, state)
    usage = torch.tensor([[150], [160]])
    store.insert_or_assign(
        0, TableRows(torch.tensor([1, 2]), torch.ones(2, 1), torch.zeros(2, 0), usage)
    )
    state.numbers.update(now=5)
    store.set_retention_state(0, state)
    store.find_or_insert(0, torch.tensor([3]))
    assert held(store) == {2, 3}
    assert (numbers(store)["evicted"], numbers(store)["evicted_age"]) == (1, 0)


def test_uses_after_now_are_not_halved(open_store):
    store = open_store([table(rows=2, eviction=Eviction(order="lfu", half_life=10))])
    state = store.retention_state(0)
    state.numbers.update(now=200)
    store.set_retention_state(0, state)
    usage = torch.tensor([[150, 8], [160, 4]])
    rows = TableRows(torch.tensor([1, 2]), torch.ones(2, 1), torch.zeros(2, 0), usage)
    store.insert_or_assign(0, rows)
    state.numbers.update(now=5)
    store.set_retention_state(0, state)
    store.find_or_insert(0, torch.tensor([3]))
    assert held(store) == {1, 3}


@pytest.mark.parametrize(
    ("time", "uses", "wrong"),
    [
        (-1, 0, -1),
        (2**32, 0, 2**32),
        (0, -1, -1),
        (0, 2**32, 2**32),
        (-(2**63), 1, -(2**63)),
        (2**63 - 1, 1, 2**63 - 1),
    ],
)
def test_marks_of_use_that_no_table_has_are_refused(open_store, time, uses, wrong):
    store = open_store([table(rows=4, eviction=Eviction(order="lfu"))])
    usage = torch.tensor([[0, 1], [time, uses]])
    rows = TableRows(torch.tensor([1, 2]), torch.ones(2, 1), torch.zeros(2, 0), usage)
    with pytest.raises(ConfigError, match=f"usage: {wrong} is no time or number of uses"):
        store.insert_or_assign(0, rows)
    assert held(store) == set()


@pytest.mark.parametrize("name", ["now", "step", "swept", "evicted"])
def test_numbers_that_no_table_has_are_refused(open_store, name):
    store = open_store([table(rows=4, eviction=Eviction())])
    state = store.retention_state(0)
    state.numbers[name] = -5
    with pytest.raises(ConfigError, match=f"retention state: {name} is -5"):
        store.set_retention_state(0, state)


def test_times_end_where_marks_of_use_do(open_store):
    store = open_store([table(rows=4, eviction=Eviction(ttl=1000, unit="seconds"))])
    last = 2**32 - 1
    store.advance(Clock(0, last - 500))
    store.find_or_insert(0, torch.tensor([1]))
    for seconds in (last + 10**6, 2**40, 2**62):
        store.advance(Clock(1, seconds))
        store.find_or_insert(0, torch.tensor([2]))
        assert numbers(store)["now"] == last
        assert held(store) == {1, 2}  # 500 seconds old, for ever
    state = store.retention_state(0)
    state.numbers["now"] = 2**50  # of a checkpoint whose times had the wrong unit
    store.set_retention_state(0, state)
    assert numbers(store)["now"] == last


def test_imported_counts_stay_within_their_limit_too(open_store):
    rule = table(admission=AdmitFrequent(min_count=5), max_bytes=8 * 32 * 4)
    store = open_store([rule])
    assert retention.limits_of(rule, 4).max_candidates == 4
    store.import_candidates(0, Candidates(torch.arange(4), torch.tensor([1, 2, 3, 4])))
    # Again: no others.
    store.import_candidates(0, Candidates(torch.arange(4), torch.tensor([4, 3, 2, 1])))
    assert store.num_candidates(0) == 4
    with pytest.raises(CapacityError, match="table 't' holds"):
        store.import_candidates(0, Candidates(torch.tensor([3, 9]), torch.tensor([2, 1])))
    assert counted(store) == {0: 4, 1: 3, 2: 2, 3: 2}
    store.check_invariants()


@pytest.mark.parametrize("count", [0, -1, 2**16, -(2**63)])
def test_counts_that_no_key_has_are_refused(count, open_store):
    store = open_store([table(admission=AdmitFrequent(min_count=5))])
    with pytest.raises(ConfigError, match="counts of keys must lie in 1 to 65535"):
        store.import_candidates(0, Candidates(torch.arange(2), torch.tensor([1, count])))
    assert store.num_candidates(0) == 0


@pytest.mark.parametrize(
    "counts", [torch.ones(3, dtype=torch.int64), torch.ones(2), torch.ones(2, 1, dtype=torch.int64)]
)
def test_counts_of_another_shape_or_type_are_refused(counts, open_store):
    store = open_store([table(admission=AdmitFrequent(min_count=5))])
    with pytest.raises(ConfigError, match=r"counts: expected torch.int64 of shape \[2\]"):
        store.import_candidates(0, Candidates(torch.arange(2), counts))
    assert store.num_candidates(0) == 0


def test_a_table_that_does_not_count_passes_over_counts(open_store):
    """As when a job is resumed without its `min_count`."""
    store = open_store([table(rows=4, eviction=Eviction())])
    store.import_candidates(0, Candidates(torch.tensor([1, 2]), torch.tensor([3, 4])))
    assert store.num_candidates(0) == 0
    for step in range(3):
        train(store, [1, 2, 3], step)
    assert held(store) == {1, 2, 3}


def test_more_new_keys_than_the_table_holds(open_store):
    store = open_store([table(rows=8, eviction=Eviction())])
    read = train(store, list(range(50)), 0)
    assert store.num_rows(0) == 8
    assert numbers(store)["refused"] == 42
    # Which ones come in is a matter of their hash, not of their order.
    other = open_store([table(rows=8, eviction=Eviction())])
    train(other, list(range(50))[::-1], 0)
    assert held(other) == held(store)
    assert read == [1.0] * 50


def test_without_eviction_a_full_table_refuses(open_store):
    store = open_store([table(rows=5)])
    train(store, [1, 2, 3, 4, 5], 0)
    train(store, [6, 6, 1], 1)
    assert held(store) == {1, 2, 3, 4, 5}
    assert numbers(store)["refused"] == 2
    rows = TableRows(torch.tensor([1, 77]), torch.ones(2, 1) * 9, torch.zeros(2, 0))
    with pytest.raises(
        CapacityError,
        match=r"table 't' holds 5 rows, all that its max_bytes of 140 takes; raise max_bytes",
    ):
        store.insert_or_assign(0, rows)
    assert store.find(0, torch.tensor([1])).values.item() == 9
    assert 77 not in held(store)


def test_ttl_in_steps(open_store):
    store = open_store([table(eviction=Eviction(ttl=32))])
    train(store, [1, 2], 0)
    train(store, [2], 20)
    train(store, [3], 32)
    assert held(store) == {1, 2, 3}
    # Looked through every second step, a 16th of the ttl.
    train(store, [3], 33)
    assert held(store) == {1, 2, 3}
    train(store, [3], 34)
    assert held(store) == {2, 3}
    train(store, [3], 54)
    assert held(store) == {3}
    assert numbers(store)["evicted"] == 2


def test_ttl_in_seconds(open_store):
    store = open_store([table(eviction=Eviction(ttl=3600, unit="seconds"))])
    for step, seconds in enumerate([0, 1800, 3700, 9000]):
        store.advance(Clock(step, 1_700_000_000 + seconds))
        store.find_or_insert(0, torch.tensor([step]))
        assert step in held(store)
    assert held(store) == {3}


def test_time_never_goes_back(open_store):
    store = open_store([table(eviction=Eviction(ttl=1000, unit="seconds"))])
    store.advance(Clock(0, 1_700_009_000))
    store.find_or_insert(0, torch.tensor([1]))
    store.advance(Clock(1, 1_700_000_000))  # a batch of late events
    store.find_or_insert(0, torch.tensor([2]))
    assert numbers(store)["now"] == 1_700_009_000
    store.advance(Clock(2, 1_700_009_900))
    assert held(store) == {1, 2}


def test_candidates_stay_within_their_share_of_the_budget(open_store):
    rule = table(admission=AdmitFrequent(min_count=2), max_bytes=100 * 28)
    limits = retention.limits_of(rule, 4)
    assert limits.max_candidates == 100 * 28 // 8 // 32
    store, oracle = open_store([rule]), DictStore([rule])
    rng = np.random.default_rng(0)
    for step in range(20):
        keys = rng.integers(0, 500, 30).tolist()
        for one in (store, oracle):
            train(one, keys, step)
        assert store.num_candidates(0) <= limits.max_candidates
        assert store.num_rows(0) <= limits.max_rows
        # Full at every step, and halved at the next one.
        assert numbers(store) == numbers(oracle)
        assert (held(store), counted(store)) == (held(oracle), counted(oracle))
    # Counts were halved to make room, so that rows still come in.
    assert store.num_rows(0) > 5


def test_a_key_that_comes_more_often_than_can_be_counted_has_the_largest_count(open_store):
    """In a table without room: it wants a row and is counted on."""
    skip_in_interpreter(open_store, "a long batch")
    rule = table(admission=AdmitFrequent(min_count=2), max_bytes=10 * 8 * 32)
    size = retention.limits_of(rule, 4).max_rows
    store = open_store([rule])
    rows = TableRows(torch.arange(1000, 1000 + size), torch.ones(size, 1), torch.empty(size, 0))
    store.insert_or_assign(0, rows)
    train(store, [7, 8], 1)
    look_up(store, [7] * 70_000)
    store.check_invariants()
    assert counted(store) == {7: 65_535, 8: 1}


@pytest.mark.parametrize("room", [0, 3, 20])
def test_only_counted_keys_that_get_rows_make_place_for_others(room, open_store):
    """In a table that is full, or nearly, and does not evict."""
    rule = table(admission=AdmitFrequent(min_count=2), max_bytes=10 * 8 * 32)
    limits = retention.limits_of(rule, 4)
    assert limits.max_candidates == 10
    size = limits.max_rows - room
    rows = TableRows(torch.arange(1000, 1000 + size), torch.ones(size, 1), torch.empty(size, 0))
    store, oracle = open_store([rule]), DictStore([rule])
    for one in (store, oracle):
        one.insert_or_assign(0, rows)
        train(one, list(range(10)), 1)  # as many as are counted
        train(one, [*range(10), *range(100, 115)], 2)
    store.check_invariants()
    assert store.num_rows(0) == limits.max_rows - max(room - 10, 0)
    assert store.num_candidates(0) == 10
    assert (held(store), counted(store)) == (held(oracle), counted(oracle))
    assert numbers(store) == numbers(oracle)


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": 300, "eviction": Eviction(order="lfu", half_life=6, ttl=100)},
        {"rows": 300, "eviction": Eviction()},
        {"rows": 300, "eviction": Eviction(order="score")},
        {"admission": AdmitFrequent(min_count=3, half_life_steps=9), "eviction": Eviction(ttl=15)},
    ],
    ids=["lfu", "lru", "score", "count"],
)
def test_the_same_bits_for_any_threads_and_order_of_samples(fields):
    """Deterministic mode holds with evictions."""
    results = []
    for threads in (1, 2, 4):
        rng = np.random.default_rng(1)
        shuffle = np.random.default_rng(threads)
        store = HostStore(
            [table(optimizer=Adagrad(), **fields)], num_threads=threads, deterministic=True
        )
        for step in range(200):
            keys = (rng.zipf(1.2, 64) % 1000).astype(np.int64)
            grad = rng.standard_normal((64, 1)).astype(np.float32)
            if threads > 1:
                order = shuffle.permutation(64)
                keys, grad = keys[order], np.ascontiguousarray(grad[order])
            store.advance(Clock(step))
            _, lookup, batch = look_up(store, keys.tolist())
            part = PooledGradient(lookup, batch, torch.from_numpy(grad))
            store.apply_gradients(PLAN, [part], step)
        rows, _ = store.export_batch(0, CURSOR_START, 10_000)
        order = rows.keys.argsort()
        results.append([column[order] for column in rows] + [numbers(store)])
    assert len(results[0][0]) > 50
    assert results[0][-1]["evicted"] > 50
    for other in results[1:]:
        assert other[-1] == results[0][-1]
        assert all(torch.equal(a, b) for a, b in zip(results[0][:4], other[:4], strict=True))


def test_what_is_exported_goes_on_where_it_was(open_store):
    """Rows, marks of use, counts, default row and counters into a new store: the same future."""
    rule = table(
        rows=60,
        admission=AdmitFrequent(min_count=2, half_life_steps=7),
        eviction=Eviction(order="lfu", half_life=9, ttl=50),
    )
    rng = np.random.default_rng(3)
    store = open_store([rule])
    half = 12 if is_slow(open_store) else 40
    steps = [(rng.zipf(1.3, 30) % 200).tolist() for _ in range(2 * half)]
    for step in range(half):
        train(store, steps[step], step)
    copy = open_store([rule])
    copy.set_retention_state(0, store.retention_state(0))
    candidates, _ = store.export_candidates(0, CURSOR_START, 1000)
    rows, _ = store.export_batch(0, CURSOR_START, 1000)
    copy.insert_or_assign(0, rows)
    copy.import_candidates(0, candidates)
    assert len(candidates.keys)
    for step in range(half, 2 * half):
        assert train(store, steps[step], step) == train(copy, steps[step], step)
        assert held(store) == held(copy)
        assert numbers(store) == numbers(copy)


def test_a_budget_below_one_row_is_refused(open_store):
    with pytest.raises(
        ConfigError,
        match=r"table 't': max_bytes 27 holds no row: one takes 28 bytes; raise max_bytes",
    ):
        open_store([table(max_bytes=27)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"eviction": Eviction()}, "eviction needs `max_bytes` or a `ttl`"),
        ({"eviction": Eviction(order="lfu", ttl=5)}, "set `max_bytes`"),
    ],
)
def test_rules_that_have_no_effect_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        table(**fields)


def test_half_life_without_lfu_is_refused():
    with pytest.raises(ConfigError, match="set order to lfu, or remove it"):
        Eviction(half_life=5)


def test_an_evicted_row_in_the_middle_drops_its_gradient_alone(open_store):
    """Persia's parameter server applies the next key's gradient to its neighbour in this case."""
    store = open_store([table(rows=32, eviction=Eviction())])
    store.insert_or_assign(0, TableRows(torch.arange(3), torch.ones(3, 1), torch.zeros(3, 0)))
    store.advance(Clock(1))
    _, lookup, batch = look_up(store, [0, 1, 2])
    store.erase(0, torch.tensor([1]))
    gradient = torch.tensor([[0.5], [0.25], [0.125]])
    assert store.apply_gradients(PLAN, [PooledGradient(lookup, batch, gradient)], 1) == 2
    assert store.find(0, torch.tensor([0, 2])).values[:, 0].tolist() == [0.5, 0.875]
    assert held(store) == {0, 2}
    assert numbers(store)["dropped"] == 1
