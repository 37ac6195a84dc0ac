"""Optimizer rules on a tile of rows [R, COLUMNS], one small function each, and rounding.

They are the rules of csrc/rows/optimizer_rules.h. With EXACT they also have its bits: sums of a row
run over 16 lanes in its order, divisions and roots are rounded to nearest; the kernel must then be
compiled without fused multiply-add. Columns beyond the dim hold 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.update import occurrences as kinds

SGD: tl.constexpr = tl.constexpr(kinds.SGD)
ADAGRAD: tl.constexpr = tl.constexpr(kinds.ADAGRAD)
ROW_WISE_ADAGRAD: tl.constexpr = tl.constexpr(kinds.ROW_WISE_ADAGRAD)
ADAM: tl.constexpr = tl.constexpr(kinds.ADAM)
MOMENTUM_SGD: tl.constexpr = tl.constexpr(kinds.MOMENTUM_SGD)
ROW_WISE_ADAM: tl.constexpr = tl.constexpr(kinds.ROW_WISE_ADAM)
FTRL: tl.constexpr = tl.constexpr(kinds.FTRL)
ADAMW: tl.constexpr = tl.constexpr(kinds.ADAMW)
LANES: tl.constexpr = tl.constexpr(16)
HYPER_FIELDS: tl.constexpr = tl.constexpr(kinds.HYPER_FIELDS)
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def divide(a, b, EXACT: tl.constexpr):
    """Quotient, rounded to nearest with EXACT."""
    return tl.div_rn(a, b) if EXACT else a / b


@triton.jit
def square_root(x, EXACT: tl.constexpr):
    """Root, rounded to nearest with EXACT."""
    return tl.sqrt_rn(x) if EXACT else tl.sqrt(x)


@triton.jit
def row_sum(x, EXACT: tl.constexpr):
    """[R, 1] sums of the rows of x [R, COLUMNS]."""
    if EXACT:
        R: tl.constexpr = x.shape[0]
        CHUNKS: tl.constexpr = x.shape[1] // LANES
        chunks = tl.reshape(x, (R, CHUNKS, LANES))
        number = tl.arange(0, CHUNKS)[None, :, None]
        lanes = tl.zeros((R, LANES), tl.float32)
        for c in tl.static_range(CHUNKS):
            # All other terms are 0, so that this sum has one chunk's bits in any order.
            lanes += tl.sum(tl.where(number == c, chunks, 0.0), 1)
        lanes = tl.sum(tl.reshape(lanes, (R, 2, 8)), 1)
        lanes = tl.sum(tl.reshape(lanes, (R, 2, 4)), 1)
        lanes = tl.sum(tl.reshape(lanes, (R, 2, 2)), 1)
        total = tl.sum(lanes, 1)
    else:
        total = tl.sum(x, 1)
    return total[:, None]


@triton.jit
def towards(old, new, one_minus_beta):
    """The moving mean, by way of 1 - beta: see csrc/rows/optimizer_rules.h."""
    return old + one_minus_beta * (new - old)


@triton.jit
def or_nan(new, squares):
    """`new`, but NaN where the state that divides the step is beyond float32; see the C++ rules."""
    return tl.where(squares <= _LARGEST, new, float("nan"))


@triton.jit
def clipped(grad, most, EXACT: tl.constexpr):
    """Scales rows of grad to an L2 norm of at most `most` [R, 1]; 0: any. NaN beyond float32."""
    norm = square_root(row_sum(grad * grad, EXACT), EXACT)
    is_over = (most > 0.0) & (norm > most)
    factor = or_nan(divide(most, tl.where(is_over, norm, 1.0), EXACT), norm)
    return tl.where(is_over, grad * factor, grad)


@triton.jit
def bounded(new, most):
    """Rows of `new` within [-most, most] [R, 1]; 0: any. NaN stays."""
    over = (most > 0.0) & (new > most)
    under = (most > 0.0) & (new < -most)
    return tl.where(over, most, tl.where(under, -most, new))


@triton.jit
def _hyper(hypers, table, FIELD: tl.constexpr):
    return tl.load(hypers + table * HYPER_FIELDS + FIELD)[:, None]


@triton.jit
def _load_state(state, slot, is_row, first, D: tl.constexpr, S: tl.constexpr, column):
    row = state + slot.to(tl.int64)[:, None] * S + first + column[None, :]
    return tl.load(row, mask=is_row[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _store_state(state, slot, is_row, first, D: tl.constexpr, S: tl.constexpr, column, new):
    row = state + slot.to(tl.int64)[:, None] * S + first + column[None, :]
    tl.store(row, new, mask=is_row[:, None] & (column < D)[None, :])


@triton.jit
def _load_scalar(place, is_row):
    """[R, 1] one float of state a row, which is about to be stored at the same place.

    All threads of a row load it and one stores it: none may store before all have loaded.
    """
    old = tl.load(place, mask=is_row[:, None], other=0.0)
    tl.debug_barrier()
    return old


@triton.jit
def sgd(w, grad, hypers, table):
    """New values."""
    return w - _hyper(hypers, table, 0) * (grad + _hyper(hypers, table, 1) * w)


@triton.jit
def momentum_sgd(w, grad, state, slot, is_row, column, hypers, table, D: tl.constexpr):
    """New values; state: momentum [D]."""
    g = grad + _hyper(hypers, table, 1) * w
    m = _hyper(hypers, table, 4) * _load_state(state, slot, is_row, 0, D, D, column) + g
    _store_state(state, slot, is_row, 0, D, D, column, m)
    return w - _hyper(hypers, table, 0) * m


@triton.jit
def adagrad(w, grad, state, slot, is_row, column, hypers, table,
            D: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """New values; state: sums of squares [D]."""
    g = grad + _hyper(hypers, table, 1) * w
    s = _load_state(state, slot, is_row, 0, D, D, column) + g * g
    _store_state(state, slot, is_row, 0, D, D, column, s)
    divisor = square_root(s, EXACT) + _hyper(hypers, table, 3)
    return or_nan(w - divide(_hyper(hypers, table, 0) * g, divisor, EXACT), s)


@triton.jit
def row_wise_adagrad(w, grad, state, slot, is_row, hypers, table,
                     D: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """New values; state: the sum of mean squares."""
    g = grad + _hyper(hypers, table, 1) * w
    mean = divide(row_sum(g * g, EXACT), D * 1.0, EXACT)
    place = state + slot.to(tl.int64)[:, None]
    s = _load_scalar(place, is_row) + mean
    tl.store(place, s, mask=is_row[:, None])
    divisor = square_root(s, EXACT) + _hyper(hypers, table, 3)
    return w - or_nan(divide(_hyper(hypers, table, 0), divisor, EXACT), s) * g


@triton.jit
def adam(w, grad, state, slot, is_row, column, hypers, table,
         D: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """New values; state: mean [D], variance [D]."""
    g = grad + _hyper(hypers, table, 1) * w
    m = _load_state(state, slot, is_row, 0, D, 2 * D, column)
    v = _load_state(state, slot, is_row, D, D, 2 * D, column)
    m = towards(m, g, _hyper(hypers, table, 5))
    v = towards(v, g * g, _hyper(hypers, table, 6))
    _store_state(state, slot, is_row, 0, D, 2 * D, column, m)
    _store_state(state, slot, is_row, D, D, 2 * D, column, v)
    divisor = square_root(v, EXACT) + _hyper(hypers, table, 3)
    return or_nan(w - divide(_hyper(hypers, table, 0) * m, divisor, EXACT), v)


@triton.jit
def adamw(w, grad, state, slot, is_row, column, hypers, table,
          D: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """New values; state: mean [D], variance [D]. Setting 1 is the share that a step takes off."""
    m = _load_state(state, slot, is_row, 0, D, 2 * D, column)
    v = _load_state(state, slot, is_row, D, D, 2 * D, column)
    m = towards(m, grad, _hyper(hypers, table, 5))
    v = towards(v, grad * grad, _hyper(hypers, table, 6))
    _store_state(state, slot, is_row, 0, D, 2 * D, column, m)
    _store_state(state, slot, is_row, D, D, 2 * D, column, v)
    divisor = square_root(v, EXACT) + _hyper(hypers, table, 3)
    kept = w - _hyper(hypers, table, 1) * w
    return or_nan(kept - divide(_hyper(hypers, table, 0) * m, divisor, EXACT), v)


@triton.jit
def row_wise_adam(w, grad, state, slot, is_row, column, hypers, table,
                  D: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """New values; state: mean [D], then one variance of the row."""
    g = grad + _hyper(hypers, table, 1) * w
    place = state + slot.to(tl.int64)[:, None] * (D + 1) + D
    v = _load_scalar(place, is_row)
    mean_square = divide(row_sum(g * g, EXACT), D * 1.0, EXACT)
    v = towards(v, mean_square, _hyper(hypers, table, 6))
    tl.store(place, v, mask=is_row[:, None])
    factor = divide(
        _hyper(hypers, table, 0), square_root(v, EXACT) + _hyper(hypers, table, 3), EXACT
    )
    m = _load_state(state, slot, is_row, 0, D, D + 1, column)
    m = towards(m, g, _hyper(hypers, table, 5))
    _store_state(state, slot, is_row, 0, D, D + 1, column, m)
    return w - or_nan(factor, v) * m


@triton.jit
def ftrl(w, grad, state, slot, is_row, column, hypers, table,
         D: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """New values; state: z [D], n [D]. The setting eps holds the rule's beta."""
    rate, l1 = _hyper(hypers, table, 0), _hyper(hypers, table, 7)
    z = _load_state(state, slot, is_row, 0, D, 2 * D, column)
    n = _load_state(state, slot, is_row, D, D, 2 * D, column)
    new_n = n + grad * grad
    root = square_root(new_n, EXACT)
    z = z + grad - divide(root - square_root(n, EXACT), rate, EXACT) * w
    _store_state(state, slot, is_row, 0, D, 2 * D, column, z)
    _store_state(state, slot, is_row, D, D, 2 * D, column, new_n)
    shrunk = tl.where(z > 0.0, z - l1, z + l1)
    divisor = divide(_hyper(hypers, table, 3) + root, rate, EXACT) + _hyper(hypers, table, 1)
    # So that a z of NaN is seen.
    return tl.where((z <= l1) & (z >= -l1), 0.0, or_nan(divide(-shrunk, divisor, EXACT), new_n))


@triton.jit
def lamb(w, grad, state, slot, is_row, column, hypers, table,
         D: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """New values; state: mean [D], variance [D]."""
    m = _load_state(state, slot, is_row, 0, D, 2 * D, column)
    v = _load_state(state, slot, is_row, D, D, 2 * D, column)
    m = towards(m, grad, _hyper(hypers, table, 5))
    v = towards(v, grad * grad, _hyper(hypers, table, 6))
    _store_state(state, slot, is_row, 0, D, 2 * D, column, m)
    _store_state(state, slot, is_row, D, D, 2 * D, column, v)
    divisor = square_root(_hyper(hypers, table, 9) * v, EXACT) + _hyper(hypers, table, 3)
    step = divide(_hyper(hypers, table, 8) * m, divisor, EXACT) + _hyper(hypers, table, 1) * w
    # Without an eps the columns beyond the dim would be 0 / 0.
    step = tl.where((column < D)[None, :], step, 0.0)
    norm = square_root(row_sum(w * w, EXACT), EXACT)
    step_norm = square_root(row_sum(step * step, EXACT), EXACT)
    is_scaled = (norm > 0.0) & (step_norm > 0.0)
    trust = tl.where(is_scaled, divide(norm, tl.where(is_scaled, step_norm, 1.0), EXACT), 1.0)
    return or_nan(w - _hyper(hypers, table, 0) * trust * step, v)


@triton.jit
def mix32(x):
    """Bijection of 32-bit words (lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def narrowed(value, column, step_seed, TYPE: tl.constexpr):
    """Stochastic rounding of float32 to bfloat16 or float16: bits of csrc/rows/narrow_lanes.h."""
    bits = value.to(tl.uint32, bitcast=True)
    golden = tl.full((1,), 0x9E3779B9, tl.uint32)
    key = mix32(step_seed.to(tl.uint32) + column.to(tl.uint32) * golden)
    random = mix32(bits ^ key[None, :])
    magnitude, sign = bits & 0x7FFFFFFF, (bits >> 16) & 0x8000
    if tl.bfloat16 == TYPE:
        rounded = (magnitude + (random >> 16)) >> 16
        rounded = tl.where(magnitude >= 0x7F800000, magnitude >> 16, rounded)
        nan = tl.full((1, 1), 0x7FC0, tl.uint32)
    else:
        normal = (magnitude - 0x38000000 + (random >> 19)) >> 13
        # In units of 2^-24, the last place of the result. What is subnormal in fp32 counts as 0.
        is_used = (magnitude < 0x38800000) & (magnitude >= 0x00800000)
        units = tl.where(is_used, magnitude, 0).to(tl.float32, bitcast=True) * 16777216.0
        whole = units.to(tl.int32)
        fraction = (units - whole.to(tl.float32)) * 16777216.0
        is_up = (random >> 8).to(tl.int32).to(tl.float32) < fraction
        small = (whole + is_up.to(tl.int32)).to(tl.uint32)
        rounded = tl.where(magnitude < 0x38800000, small, normal)
        rounded = tl.where(rounded < 0x7C00, rounded, 0x7C00)
        nan = tl.full((1, 1), 0x7E00, tl.uint32)
    rounded = tl.where(magnitude > 0x7F800000, nan, rounded | sign)
    return rounded.to(tl.uint16).to(TYPE, bitcast=True)


@triton.jit
def mark_used(usage, slot, is_row, table, now, half_life, WORDS: tl.constexpr):
    """Time of the last use, and their number, aged."""
    time = tl.load(now + table, mask=is_row, other=0)
    place = usage + slot.to(tl.int64) * WORDS
    if WORDS == 2:
        life = tl.load(half_life + table, mask=is_row, other=0)
        last = tl.load(place, mask=is_row, other=0).to(tl.int64) & 0xFFFFFFFF
        uses = tl.load(place + 1, mask=is_row, other=0).to(tl.int64) & 0xFFFFFFFF
        divisor = tl.maximum(life, 1)
        halvings = time // divisor - last // divisor
        aged = tl.where(halvings > 31, 0, uses >> tl.minimum(tl.maximum(halvings, 0), 31))
        uses = tl.where(life > 0, aged, uses)
        uses = tl.where((uses == 0xFFFFFFFF) | (life < 0), uses, uses + 1)
        tl.store(place + 1, uses.to(tl.int32), mask=is_row)
    tl.store(place, time.to(tl.int32), mask=is_row)


@triton.jit
def ruled(w, grad, state, slot, is_row, column, hypers, numbers,
          D: tl.constexpr, RULE: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """New values by the rule of the store."""
    if RULE == SGD:
        new = sgd(w, grad, hypers, numbers)
    elif RULE == MOMENTUM_SGD:
        new = momentum_sgd(w, grad, state, slot, is_row, column, hypers, numbers, D)
    elif RULE == ADAGRAD:
        new = adagrad(w, grad, state, slot, is_row, column, hypers, numbers, D, EXACT)
    elif RULE == ROW_WISE_ADAGRAD:
        new = row_wise_adagrad(w, grad, state, slot, is_row, hypers, numbers, D, EXACT)
    elif RULE == ADAM:
        new = adam(w, grad, state, slot, is_row, column, hypers, numbers, D, EXACT)
    elif RULE == ROW_WISE_ADAM:
        new = row_wise_adam(w, grad, state, slot, is_row, column, hypers, numbers, D, EXACT)
    elif RULE == ADAMW:
        new = adamw(w, grad, state, slot, is_row, column, hypers, numbers, D, EXACT)
    elif RULE == FTRL:
        new = ftrl(w, grad, state, slot, is_row, column, hypers, numbers, D, EXACT)
    else:
        new = lamb(w, grad, state, slot, is_row, column, hypers, numbers, D, EXACT)
    return new


@triton.jit
def step_rows(rows, slot, is_row, w, grad, table, numbers, step_seed, form: tl.constexpr):
    """One step of the rows of `slot` [R] whose values are w [R, COLUMNS], in place."""
    values, state, usage = rows
    hypers = numbers.hypers
    D: tl.constexpr = form.D
    EXACT: tl.constexpr = form.EXACT
    column = tl.arange(0, form.COLUMNS)
    # Where all tables have one setting, [1]: the compiler then keeps it in uniform registers.
    places = tl.zeros((1,), tl.int32) if form.ONE_HYPER else table
    if form.CLIPPED:
        grad = clipped(grad, _hyper(hypers, places, 2), EXACT)
    new = ruled(w, grad, state, slot, is_row, column, hypers, places, D, form.RULE, EXACT)
    if form.BOUNDED:
        new = bounded(new, _hyper(hypers, places, 10))
    TYPE: tl.constexpr = values.dtype.element_ty
    if tl.float32 != TYPE:
        new = narrowed(new, column, step_seed, TYPE)
    row = values + slot.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(row, new, mask=is_row[:, None] & (column < D)[None, :])
    if form.WORDS > 0:
        mark_used(usage, slot, is_row, table, numbers.now, numbers.half_life, form.WORDS)
