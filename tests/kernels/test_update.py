import pytest
import torch

from penstock.kernels.plan import MEAN, SEQUENCE, SQRT_N, SUM
from penstock.kernels.update import occurrences as kinds
from penstock.kernels.update import reference as reference_update
from penstock.kernels.update import update
from penstock.kernels.update.group import group_keys
from penstock.kernels.update.occurrences import GradientPart, RowArrays, UpdateRules
from tests.kernels.lookup_cases import (
    Lookup,
    make_batch,
    make_hypers,
    make_lookup,
    make_plan,
    make_rows,
    make_slots,
    make_usage_rules,
)

RULES = {
    "sgd": kinds.SGD,
    "adagrad": kinds.ADAGRAD,
    "row_wise_adagrad": kinds.ROW_WISE_ADAGRAD,
    "adam": kinds.ADAM,
    "momentum_sgd": kinds.MOMENTUM_SGD,
    "row_wise_adam": kinds.ROW_WISE_ADAM,
    "ftrl": kinds.FTRL,
    "lamb": kinds.LAMB,
    "adamw": kinds.ADAMW,
}


def make_part(lookup, seed, grad_scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(lookup.batch.batch_size, lookup.plan.stride, generator=generator)
    return GradientPart(lookup.batch, lookup.slots, (grad_scale * grad).to(lookup.slots.device))


def on_twin(rows):
    return RowArrays(*(part.clone() for part in rows))


def rules_of(options):
    names = {"usage_rules": "usage"}
    return UpdateRules(**{names.get(name, name): value for name, value in options.items()})


def check(parts, plan, rows, hypers, **options):
    expected = on_twin(rows)
    step = options.pop("step", 3)
    twin_parts = [part._replace(slots=torch.where(part.slots > 2**30, -1, part.slots))
                  for part in parts]  # fmt: skip
    twin_options = {key: options[key] for key in ("rule", "usage_rules") if key in options}
    want = reference_update.apply_gradients(
        expected, plan, twin_parts, hypers, step=step, **twin_options
    )
    got = update.apply_gradients(rows, plan, parts, hypers, step, rules_of(options))
    assert int(got) == int(want)
    # float32 against float64: sums of up to thousands of terms, and roots of small numbers
    torch.testing.assert_close(rows.state, expected.state, rtol=2e-5, atol=2e-6)
    if rows.values.dtype == torch.float32:
        torch.testing.assert_close(rows.values, expected.values, rtol=2e-5, atol=2e-6)
    assert torch.equal(rows.usage, expected.usage)
    return expected


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_equals_its_twin(rule, deterministic, device):
    lookup = make_lookup(12, 17, 1, device)
    rows = make_rows(RULES[rule], 12, 90, 2, device)
    check([make_part(lookup, 3)], lookup.plan, rows, make_hypers(device), rule=RULES[rule],
          deterministic=deterministic)  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 63])
@pytest.mark.parametrize("dim", [1, 16, 128])
def test_sums_equal_their_twin(dim, size, weighted, device):
    lookup = make_lookup(dim, size, dim + size, device, weighted=weighted)
    rows = make_rows(kinds.SGD, dim, 90, 2, device)
    check([make_part(lookup, 3)], lookup.plan, rows, make_hypers(device), rule=kinds.SGD)


@pytest.mark.parametrize("deterministic", [False, True])
def test_one_row_may_have_all_keys(deterministic, device):
    plan = make_plan(8, (SUM,), device)
    batch = make_batch(plan, 80, 4)
    slots = make_slots(plan, batch, 90, 5, hot=1.0)
    rows = make_rows(kinds.ROW_WISE_ADAGRAD, 8, 90, 2, device)
    check([make_part(Lookup(plan, batch, slots), 6)], plan, rows, make_hypers(device, tables=1),
          rule=kinds.ROW_WISE_ADAGRAD, deterministic=deterministic)  # fmt: skip


@pytest.mark.parametrize("tables", [1, 3])
@pytest.mark.parametrize("others", [0, 1])
def test_one_hot_batches_need_no_offsets(others, tables, device):
    lookup = make_lookup(
        16, 40, 2, device, poolings=(SUM, MEAN, SQRT_N), one_hot=True, others=others
    )
    part = make_part(lookup, 3)
    ahead = group_keys(lookup.plan, [part], needs_tables=tables > 1, num_slots=90, one_hot=True)
    rows = make_rows(kinds.ADAM, 16, 90, 2, device)
    hypers = make_hypers(device, tables=tables)
    check([part], lookup.plan, on_twin(rows), hypers, rule=kinds.ADAM)
    check([part._replace(grouping=ahead)], lookup.plan, rows, hypers, rule=kinds.ADAM)


@pytest.mark.parametrize("deterministic", [False, True])
def test_clipping(deterministic, device):
    lookup = make_lookup(20, 17, 1, device)
    rows = make_rows(kinds.SGD, 20, 90, 2, device)
    check([make_part(lookup, 3)], lookup.plan, rows, make_hypers(device, clip=0.2),
          rule=kinds.SGD, deterministic=deterministic)  # fmt: skip


@pytest.mark.parametrize("deterministic", [False, True])
def test_bounded_weights(deterministic, device):
    lookup = make_lookup(20, 17, 1, device)
    rows = make_rows(kinds.SGD, 20, 90, 2, device)
    rows.values[:] *= 4
    hypers = make_hypers(device, bound=0.3)
    hypers[1, 10] = 0.0  # one table without
    expected = check([make_part(lookup, 3)], lookup.plan, rows, hypers, rule=kinds.SGD,
                     deterministic=deterministic)  # fmt: skip
    of_bound = (expected.values.abs() == hypers[0, 10]).sum()
    assert of_bound > 20 and (expected.values.abs() > 0.3).sum() > 20


@pytest.mark.parametrize("deterministic", [False, True])
def test_several_lookups_are_one_step(deterministic, device):
    plan = make_plan(8, (SUM, SEQUENCE), device)
    parts = []
    for size in (5, 0, 9):
        batch = make_batch(plan, size, size)
        parts.append(make_part(Lookup(plan, batch, make_slots(plan, batch, 90, size)), size))
    rows = make_rows(kinds.ADAM, 8, 90, 2, device)
    check(parts, plan, rows, make_hypers(device), rule=kinds.ADAM, deterministic=deterministic)


def test_no_keys_change_nothing(device):
    lookup = make_lookup(8, 7, 3, device, longest=0)
    rows = make_rows(kinds.SGD, 8, 90, 2, device)
    before = on_twin(rows)
    done = update.apply_gradients(
        rows, lookup.plan, [make_part(lookup, 1)], make_hypers(device), 0, UpdateRules(kinds.SGD)
    )
    assert int(done) == 0
    assert torch.equal(rows.values, before.values)


@pytest.mark.parametrize("words", [1, 2])
def test_marks_of_use(words, device):
    lookup = make_lookup(8, 30, 3, device)
    rows = make_rows(kinds.SGD, 8, 90, 2, device, words=words)
    check([make_part(lookup, 3)], lookup.plan, rows, make_hypers(device, tables=1),
          rule=kinds.SGD, usage_rules=make_usage_rules(device))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_are_rounded_stochastically(dtype, device):
    lookup = make_lookup(16, 30, 3, device)
    rows = make_rows(kinds.SGD, 16, 90, 2, device, dtype=dtype)
    expected = check([make_part(lookup, 3)], lookup.plan, rows, make_hypers(device),
                     rule=kinds.SGD, step=5)  # fmt: skip
    # The random bits are those of the float32 result: where its last bit differs, so may they.
    differ = rows.values != expected.values
    assert float(differ.float().mean()) < 0.2
    torch.testing.assert_close(rows.values, expected.values, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_special_numbers_are_rounded_as_the_twin_does(dtype, device):
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-40, 6e-8, 3e-5, 6.1e-5,
               65519.0, 65520.0, 3.4e38, -70000.0, 1.0, -1.00390625]  # fmt: skip
    values = torch.tensor([special] * 3, device=device)
    rows = RowArrays(
        torch.zeros(3, 16, dtype=dtype, device=device),
        torch.zeros(3, 0, device=device),
        torch.zeros(3, 0, dtype=torch.int32, device=device),
    )
    plan = make_plan(16, (SUM,), device, others=0)
    batch = make_batch(plan, 3, 1, one_hot=True)
    slots = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    grad = torch.zeros(3, plan.stride, device=device)
    grad[:, 2:18] = values
    hypers = make_hypers(device, tables=1, decay=0.0)
    hypers[:, 0] = -1.0
    update.apply_gradients(
        rows, plan, [GradientPart(batch, slots, grad)], hypers, 7, UpdateRules(kinds.SGD)
    )
    expected = reference_update.narrowed(0.0 + values, dtype, 7)
    assert torch.equal(rows.values.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_order_of_sums_is_fixed(deterministic, device):
    lookup = make_lookup(16, 40, 8, device)
    results = []
    for _ in range(3):
        rows = make_rows(kinds.ROW_WISE_ADAGRAD, 16, 90, 2, device)
        update.apply_gradients(
            rows, lookup.plan, [make_part(lookup, 3)], make_hypers(device),
            0, UpdateRules(kinds.ROW_WISE_ADAGRAD, deterministic=deterministic),
        )  # fmt: skip
        results.append(rows)
    for rows in results[1:]:
        assert torch.equal(rows.values, results[0].values)
        assert torch.equal(rows.state, results[0].state)


def test_a_gradient_that_is_not_finite_shows_in_its_row_alone(device):
    plan = make_plan(8, (SUM,), device, others=0)
    batch = make_batch(plan, 4, 1, one_hot=True)
    slots = torch.tensor([3, 5, 3, 6], dtype=torch.int32, device=device)
    rows = make_rows(kinds.SGD, 8, 9, 2, device)
    grad = torch.ones(4, plan.stride, device=device)
    grad[2, 4] = torch.inf
    update.apply_gradients(
        rows, plan, [GradientPart(batch, slots, grad)], make_hypers(device, tables=1),
        0, UpdateRules(kinds.SGD, deterministic=True),
    )  # fmt: skip
    assert bool(rows.values[3].isnan().all())
    assert bool(rows.values[5:].isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_millions_of_keys_and_arenas_beyond_31_bits(deterministic, device):
    plan = make_plan(64, (SUM, MEAN), device)
    batch = make_batch(plan, 200_000, 6)
    num_rows = (1 << 31) // 64 * 8 // 5
    slots = make_slots(plan, batch, num_rows, 7, hot=0.1)
    values = torch.empty(num_rows, 64, device=device)
    used = slots[(slots >= 0) & (slots < num_rows)].long().unique()
    assert int(used.max()) * 64 > 2**31
    assert len(batch.values) > 1 << 20
    values[used] = torch.randn(len(used), 64, device=device)
    state = torch.rand(num_rows, 1, device=device)
    part = make_part(Lookup(plan, batch, slots), 3)
    none = torch.zeros(num_rows, 0, dtype=torch.int32, device=device)
    twin = RowArrays(values[used].clone(), state[used].clone(), none[used])
    renumbered = torch.searchsorted(used, slots.long().clamp(0, num_rows - 1)).int()
    kept = (slots >= 0) & (slots < num_rows)
    twin_part = part._replace(slots=torch.where(kept, renumbered, -1))
    options = {"rule": kinds.ROW_WISE_ADAGRAD, "step": 3}
    hypers = make_hypers(device)
    want = reference_update.apply_gradients(twin, plan, [twin_part], hypers, **options)
    rows = RowArrays(values, state, none)
    rules = UpdateRules(kinds.ROW_WISE_ADAGRAD, deterministic=deterministic)
    got = update.apply_gradients(rows, plan, [part], hypers, 3, rules)
    assert int(got) == int(want)
    # 3e5 terms of one row, float32 sums in another order
    torch.testing.assert_close(state[used], twin.state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values[used], twin.values, rtol=1e-4, atol=1e-4)
