"""Counting values in bounded memory: exact below the bound, within the stated error above."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.survey.sketches import Quantiles, ValueCounts

EDGES = [-(2**63), -1, 0, 1, 2**63 - 1]


def zipf(rows, exponent, span, seed=0):
    rng = np.random.default_rng(seed)
    weights = np.arange(1, span + 1) ** -exponent
    ranks = rng.choice(span, rows, p=weights / weights.sum())
    with np.errstate(over="ignore"):
        return ranks * np.int64(0x5851F42D4C957F2D) - np.int64(span)


def counted(values, max_values, chunk=10_000):
    counts = ValueCounts(max_values)
    for start in range(0, values.size, chunk):
        counts.add(values[start : start + chunk])
    return counts


def truth(values):
    """What the summary would be if everything were counted: slow and obvious."""
    _, counts = np.unique(values, return_counts=True)
    counts = np.sort(counts)[::-1]
    tops = [counts[: int(np.ceil(part * counts.size))].sum() / counts.sum() for part in (0.01, 0.1)]
    return counts, tops


@given(
    st.lists(st.lists(st.sampled_from([*EDGES, 2, 3, 5, 7, 11]), max_size=30), max_size=8),
)
def test_below_the_bound_everything_is_exact(parts):
    counts = ValueCounts(10)
    for part in parts:
        counts.add(np.array(part, dtype=np.int64))
    whole = [value for part in parts for value in part]
    found = counts.summary()
    assert found.is_exact and found.distinct_error == 0
    assert (found.accesses, found.distinct) == (len(whole), len(set(whole)))
    values, numbers = counts.sorted_values()
    assert dict(zip(values.tolist(), numbers.tolist(), strict=True)) == {
        value: whole.count(value) for value in set(whole)
    }
    if whole:
        assert found.hottest_share == max(map(whole.count, whole)) / len(whole)
        assert whole.count(found.hottest) == max(map(whole.count, whole))
        expected, tops = truth(np.array(whole))
        assert found.top_shares == pytest.approx(tops)
        assert found.singletons == (expected == 1).mean()
    else:
        assert found.hottest is None and found.ranks.size == 0


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2])
def test_above_the_bound_estimates_keep_their_word(exponent):
    values = zipf(400_000, exponent, 100_000)
    expected, tops = truth(values)
    found = counted(values, 8192).summary()
    assert not found.is_exact and found.accesses == values.size
    assert 0.005 < found.distinct_error < 0.05
    # Three standard errors; the stated ones are 1.96.
    assert found.distinct == pytest.approx(expected.size, rel=1.53 * found.distinct_error)
    kept = (1.96 / found.distinct_error) ** 2
    once = (expected == 1).mean()
    assert found.singletons == pytest.approx(once, abs=3 * np.sqrt(once * (1 - once) / kept) + 1e-9)
    # Of 4,000 sampled values with counts of one size; the frequent ones are counted.
    assert found.top_shares == pytest.approx(tops, abs=0.02)
    assert found.hottest_share == pytest.approx(expected[0] / values.size, rel=0.1, abs=1e-4)
    at = found.counts[np.searchsorted(found.ranks, 100)]
    assert at == pytest.approx(expected[100], rel=0.2, abs=3)


def test_the_hottest_value_is_found_among_many_others():
    rng = np.random.default_rng(0)
    values = rng.integers(-(2**63), 2**63 - 1, 200_000)
    values[rng.random(values.size) < 0.05] = 42
    found = counted(values, 4096).summary()
    assert found.hottest == 42
    # Misra and Gries: too low by at most 1 in 1,024 of the accesses, half of which is added.
    assert found.hottest_share == pytest.approx((values == 42).mean(), abs=1 / 1024)


def test_memory_is_bounded():
    counts = ValueCounts(1000)
    for start in range(0, 2_000_000, 50_000):
        counts.add(np.arange(start, start + 50_000))
        assert counts._sample.keys.size <= 1000 and counts._hot.keys.size <= 250
    assert counts.summary().distinct == pytest.approx(2_000_000, rel=0.15)


def test_the_result_does_not_depend_on_how_values_arrive():
    values = zipf(60_000, 1.1, 20_000)
    one, other = counted(values, 2000, chunk=999), counted(values, 2000, chunk=20_000)
    assert one.summary().distinct == other.summary().distinct
    assert one.summary().singletons == other.summary().singletons


def test_share_of_common_values():
    small = counted(np.arange(0, 5000, dtype=np.int64), 100_000)
    large = counted(np.arange(2500, 200_000, dtype=np.int64), 4096)
    assert small.share_within(large) == pytest.approx(0.5, abs=0.15)
    assert large.share_within(large) == 1.0
    assert small.share_within(ValueCounts(10)) == 0.0
    assert ValueCounts(10).share_within(small) == 0.0


@given(st.lists(st.floats(-1e6, 1e6), max_size=50), st.floats(0, 1))
def test_quantiles_of_few_numbers_are_exact(numbers, share):
    quantiles = Quantiles(64)
    for one in numbers:
        quantiles.add(np.array([one]))
    assert quantiles.is_exact
    if numbers:
        expected = np.quantile(numbers, share, method="inverted_cdf")
        assert quantiles.at([share]) == [expected]
    else:
        assert quantiles.at([share]) == []


def test_quantiles_of_many_numbers_are_near_in_rank():
    quantiles = Quantiles(4096)
    for start in range(0, 1_000_000, 30_000):
        # Ascending: a sample of the beginning would be far off.
        quantiles.add(np.arange(start, min(start + 30_000, 1_000_000), dtype=np.float64))
        assert quantiles._kept <= 2 * 4096
    assert not quantiles.is_exact
    found = quantiles.at([0.0, 0.01, 0.5, 0.99])
    # Three standard errors: sqrt(0.25 / 4096) is 0.8 %.
    assert np.array(found) / 1e6 == pytest.approx([0, 0.01, 0.5, 0.99], abs=0.024)
