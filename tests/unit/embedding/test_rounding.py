"""Stochastic rounding: right in the mean, never further than the next number, bits for ever."""

import numpy as np
import pytest
import torch

from penstock.embedding.rules.rounding import DTYPES, column_keys, mix32, round_update

NARROW = ["bfloat16", "float16"]


def neighbours(values, dtype):
    """[n] float64: the numbers of the dtype next to each value, towards 0 and away from it."""
    kind = DTYPES[dtype]
    nearest = torch.from_numpy(values).to(kind)
    bits = nearest.view(torch.int16)
    too_far = nearest.double().abs() > torch.from_numpy(values).double().abs()
    low = (bits - too_far.to(torch.int16)).view(kind)
    high = (low.view(torch.int16) + 1).view(kind)
    return low.double().numpy(), high.double().numpy()


def random_floats(rng, count, smallest, largest):
    """Of all magnitudes in between, with random low bits, of both signs."""
    magnitudes = np.exp(rng.uniform(np.log(smallest), np.log(largest), count))
    return (magnitudes * rng.choice([-1, 1], count)).astype(np.float32)


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_goes_to_one_of_the_two_neighbours(dtype):
    rng = np.random.default_rng(0)
    # Subnormal numbers of half precision among them.
    values = random_floats(rng, 200_000, 1e-7, 6e4)
    low, high = neighbours(values, dtype)
    rounded = round_update(values[:, None], dtype, 3)[:, 0].double().numpy()
    assert ((rounded == low) | (rounded == high)).all()
    exact = low.astype(np.float32)
    again = round_update(exact[:, None], dtype, 3)[:, 0].double().numpy()
    assert (again == exact).all()


@pytest.mark.parametrize("span", [(1e-7, 5e-5), (1e-4, 1.0), (1.0, 6e4)])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["values", "steps", "columns"])
def test_rounding_is_right_in_the_mean(dtype, span, kind):
    rng = np.random.default_rng(1)
    count = 400_000
    if kind == "values":
        values = random_floats(rng, count, *span)
        rounded = round_update(values[:, None], dtype, 0)[:, 0]
    elif kind == "columns":
        values = np.repeat(random_floats(rng, count // 4000, *span), 4000)
        rounded = round_update(values.reshape(-1, 4000), dtype, 0).reshape(-1)
    else:
        values = np.repeat(random_floats(rng, count // 1000, *span), 1000)
        columns = values.reshape(-1, 1000)[:, :1]
        rounded = torch.cat([round_update(columns, dtype, step) for step in range(1000)], 1)
        rounded = rounded.reshape(-1)
    low, high = neighbours(values, dtype)
    up = (values - low) / (high - low)  # what the share of roundings away from 0 should be
    went_up = rounded.double().numpy() == high
    went_up &= values != low
    sigma = np.sqrt(np.sum(up * (1 - up)))
    assert abs(np.sum(went_up - up)) < 4 * sigma
    # Not only on the whole: where it should be rare or frequent, too.
    for least in np.arange(0, 1, 0.125):
        part = (up >= least) & (up < least + 0.125)
        sigma = np.sqrt(np.sum(up[part] * (1 - up[part])))
        assert abs(np.sum(went_up[part] - up[part])) < 4.5 * sigma + 1e-9, least


@pytest.mark.parametrize("dtype", NARROW)
def test_small_steps_add_up(dtype):
    """What a sum of steps a hundredth of the last place is worth, when each sum is stored."""
    rows = np.ones((2000, 1), dtype=np.float32) + np.arange(2000, dtype=np.float32)[:, None] / 2**6
    step = np.spacing(np.float32(1)) * 2 ** (16 if dtype == "bfloat16" else 13) / 100
    value = torch.from_numpy(rows).to(DTYPES[dtype]).float()
    first = value.double().mean()
    for number in range(300):
        value = round_update((value + step).numpy(), dtype, number).float()
    moved = float(value.double().mean() - first)
    # 300 steps of 2,000 rows, each rounded with a deviation of at most half the last place,
    # which is up to 32 for the largest rows.
    spread = np.sqrt(300 / 2000) * 0.5 * float(neighbours(rows[-1], dtype)[1][0] - rows[-1, 0])
    assert abs(moved - 300 * step) < 4 * max(spread, 100 * step)
    assert not torch.equal(value, value.to(DTYPES[dtype]) * 0 + first)


def test_what_is_no_ordinary_number():
    inf, nan = float("inf"), float("nan")
    values = np.array([[inf, -inf, nan, 0.0, -0.0, 1e38, -1e38, 1e-40]], dtype=np.float32)
    half = round_update(values, "float16", 0)[0].tolist()
    assert half[:2] == [inf, -inf]
    assert np.isnan(half[2])
    assert half[3:] == [0.0, 0.0, inf, -inf, 0.0]
    assert np.signbit(half[4])
    brain = round_update(values, "bfloat16", 0)[0].tolist()
    assert brain[:2] == [inf, -inf]
    assert np.isnan(brain[2])
    nans = np.array([[np.nan, -np.nan]], dtype=np.float32)
    for dtype, bits in (("bfloat16", 0x7FC0), ("float16", 0x7E00)):
        assert round_update(nans, dtype, 0).view(torch.int16).tolist() == [[bits, bits]]
    assert brain[5] == pytest.approx(1e38, rel=2**-7)
    assert 0.0 < brain[7] == pytest.approx(1e-40, rel=0.5)  # bfloat16 has fp32's exponents


def test_the_largest_half_is_left_for_infinity_in_the_mean():
    values = np.full((1, 4096), 65504 + 8, dtype=np.float32)  # a quarter of the way
    rounded = round_update(values, "float16", 0)[0]
    share = float((rounded == float("inf")).double().mean())
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4096)
    assert (rounded[rounded != float("inf")] == 65504).all()


def test_the_bits_are_for_ever():
    assert mix32(np.array([0, 1, 2**32 - 1], dtype=np.uint32)).tolist() == [
        0,
        1753845952,
        1734902346,
    ]
    assert column_keys(0, 3).tolist() == [905834791, 1347370148, 2989660012]
    assert column_keys(2**40, 1).tolist() == [3688561286]
    values = np.array([[0.1, -0.3, 1e-6], [0.1, 3.14159, 1e4]], dtype=np.float32)
    got = {dtype: round_update(values, dtype, 7).view(torch.int16).tolist() for dtype in NARROW}
    assert got["bfloat16"] == [[15821, -16742, 13702], [15821, 16457, 17948]]
    assert got["float16"] == [[11878, -19251, 17], [11878, 16968, 28898]]
