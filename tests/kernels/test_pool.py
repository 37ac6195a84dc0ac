import pytest
import torch

from penstock.kernels import pool, reference
from penstock.kernels.plan import MEAN, SQRT_N, SUM
from tests.kernels.lookup_cases import make_batch, make_lookup, make_plan, make_slots


def check(lookup, values, **options):
    size = lookup.batch.batch_size
    out = torch.full((size, lookup.plan.stride), float("nan"), device=values.device)
    expected = out.clone()
    slots = lookup.slots
    pool.pooled_forward(values, lookup.plan, lookup.batch, slots, out, **options)
    reference.pooled_forward(values, lookup.plan, lookup.batch, slots, expected)
    # float32 sums of a few dozen terms, multiplied and added in one rounding or two; weights of
    # either sign cancel in the sum and in its divisor, so that some terms are ten times the result.
    error = 1e-5 if lookup.batch.weights is None else 1e-4
    torch.testing.assert_close(out, expected, rtol=error, atol=error, equal_nan=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 63])
@pytest.mark.parametrize("dim", [1, 12, 16, 128])
def test_pooling_equals_its_twin(dim, size, weighted, device):
    lookup = make_lookup(dim, size, 10 * dim + size, device, weighted=weighted)
    check(lookup, torch.randn(90, dim, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_are_widened(dtype, device):
    lookup = make_lookup(24, 9, 1, device)
    check(lookup, torch.randn(90, 24, device=device).to(dtype))


@pytest.mark.parametrize("dim", [8, 3000])
def test_one_hot_batches_need_no_offsets(dim, device):
    lookup = make_lookup(dim, 5, 2, device, poolings=(SUM, MEAN, SQRT_N), one_hot=True)
    check(lookup, torch.randn(90, dim, device=device), one_hot=True)


def test_a_batch_of_no_samples_or_no_keys(device):
    check(make_lookup(8, 0, 3, device), torch.randn(90, 8, device=device))
    check(make_lookup(8, 7, 3, device, longest=0), torch.randn(90, 8, device=device))


def test_a_divisor_of_zero_gives_zeros(device):
    lookup = make_lookup(8, 4, 4, device, poolings=(MEAN, SQRT_N), weighted=True)
    lookup.batch.weights.zero_()
    out = torch.ones(4, lookup.plan.stride, device=device)
    values = torch.full((90, 8), torch.inf, device=device)
    pool.pooled_forward(values, lookup.plan, lookup.batch, lookup.slots, out)
    assert bool((out[:, 2:18] == 0).all())
    assert bool((out[:, :2] == 1).all()), "columns of others are left alone"


@pytest.mark.gpu
def test_arenas_beyond_31_bits_and_millions_of_keys(device):
    plan = make_plan(128, (SUM, MEAN), device)
    batch = make_batch(plan, 150_000, 6)
    num_rows = (1 << 31) // 128 * 8 // 5
    slots = make_slots(plan, batch, num_rows, 7)
    values = torch.empty(num_rows, 128, dtype=torch.bfloat16, device=device)
    used = slots[(slots >= 0) & (slots < num_rows)].long().unique()
    assert int(used.max()) * 128 > 2**31
    values[used] = torch.randn(len(used), 128, device=device).bfloat16()
    check(type(make_lookup(8, 1, 1, device))(plan, batch, slots), values)
