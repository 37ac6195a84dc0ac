import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from penstock import _core
from penstock.config import Clip, Hash, Hex, Log, Scale
from penstock.data.columns.numbers import number_column, number_plan, read_numbers
from penstock.data.columns.transforms import BadValue, read_keys, truncate

INT64 = st.integers(-(2**63), 2**63 - 1)


def fill_numbers(array, plan):
    """[n] numbers of one column, and its first bad row."""
    out, column, row = _core.transform_numbers([number_column(array, plan, 0)], len(array))
    assert (column < 0) == (row < 0)
    return out[:, 0], row


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(
    ("data", "seed", "expected"),
    [
        # Vectors of the reference implementation (xxHash, XXH64).
        (b"", 0, 0xEF46DB3751D8E999),
        (b"a", 0, 0xD24EC4F1A98C6E5B),
        (b"abc", 0, 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0, 0xFBCEA83C8A378BF1),
    ],
)
def test_xxh64_known_vectors(data, seed, expected):
    assert _core.xxh64(data, seed) == expected
    offsets = np.array([0, len(data)], dtype=np.int64)
    hashed = _core.hash_strings(offsets, np.frombuffer(data, dtype=np.uint8), seed)
    assert hashed.tolist() == [signed(expected)]


def test_format_constants():
    # Keys of saved tables depend on these; a change of any is a new format.
    keys = read_keys(pa.array(["68fd1e64", "", "user-7"]), [Hash(seed=3)], None).values
    assert keys.tolist() == [signed(_core.xxh64(t, 3)) for t in (b"68fd1e64", b"", b"user-7")]
    integers = read_keys(pa.array([7, -7, 0]), [Hash()], None).values
    assert (
        integers.tolist() == read_keys(pa.array(["7", "-7", "0"]), [Hash()], None).values.tolist()
    )
    folded = read_keys(pa.array(["a"]), [Hash(buckets=1000)], None).values
    assert folded.tolist() == [0xD24EC4F1A98C6E5B % 1000]


def test_core_refuses_other_dtypes():
    with pytest.raises(TypeError):
        _core.hash_strings(np.zeros(1, np.int16), np.zeros(0, np.uint8))
    with pytest.raises(TypeError):
        _core.JaggedBlock([(np.zeros(1, np.int32), None, None)], [0], [1])
    with pytest.raises(TypeError):
        _core.JaggedBlock([(np.zeros(1, np.int64), None, np.zeros(1))], [0], [1])


@given(st.lists(INT64, max_size=20), st.integers(0, 5))
def test_hex_reads_what_was_written(values, head):
    texts = [f"{value % 2**64:x}" for value in values] + ["FF", "0" * 16]
    keys = read_keys(pa.array(texts)[min(head, len(texts)) :], [Hex()], None).values
    assert keys.tolist() == [*values, 255, 0][min(head, len(texts)) :]


@pytest.mark.parametrize("bad", ["", "xyz", "0x1", "12345678901234567", "é"])
def test_hex_names_the_first_bad_value(bad):
    with pytest.raises(BadValue) as error:
        read_keys(pa.array(["ff", None, bad, "zz"]), [Hex()], None)
    assert (error.value.index, error.value.reason) == (
        1,
        f"{bad!r} is not 1 to 16 hexadecimal digits",
    )


def test_integers_of_all_kinds_keep_their_bits():
    assert read_keys(pa.array([2**64 - 1, 5], pa.uint64()), [], None).values.tolist() == [-1, 5]
    assert read_keys(pa.array([True, False]), [], None).values.tolist() == [1, 0]
    assert read_keys(pa.array([-3, 4], pa.int8()), [], None).values.tolist() == [-3, 4]
    hashed = read_keys(pa.array([2**64 - 1], pa.uint64()), [Hash()], None).values
    assert hashed.tolist() == [signed(_core.xxh64(b"18446744073709551615"))]


def reference_keys(rows, transform, missing):
    """Plain loop over rows: lists of keys."""
    out = []
    for row in rows:
        if row is None:
            out.append([] if missing is None else [missing])
        elif isinstance(row, list):
            out.append([
                key for item in row for key in reference_keys([item], transform, missing)[0]
            ])
        else:
            out.append([transform(row)])
    return out


def unpack(keys, n):
    lengths = keys.lengths if keys.lengths is not None else np.ones(n, dtype=np.int64)
    ends = np.cumsum(lengths)
    return [
        keys.values[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)
    ]


TEXT = st.one_of(st.none(), st.text(max_size=5))
STRING_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]


@settings(max_examples=60)
@given(
    st.lists(TEXT, max_size=12),
    st.sampled_from(STRING_TYPES),
    st.sampled_from([None, -5]),
    st.integers(0, 4),
)
def test_string_columns_equal_a_plain_loop(rows, kind, missing, head):
    array = pa.array(rows, pa.string()).cast(kind)[head:]
    expected = reference_keys(rows[head:], lambda t: signed(_core.xxh64(t.encode(), 9)), missing)
    assert unpack(read_keys(array, [Hash(seed=9)], missing), len(array)) == expected


@settings(max_examples=60)
@given(
    st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), INT64), max_size=4)), max_size=10),
    st.sampled_from([pa.list_(pa.int64()), pa.large_list(pa.int64())]),
    st.sampled_from([None, 11]),
    st.integers(0, 4),
)
def test_list_columns_equal_a_plain_loop(rows, kind, missing, head):
    array = pa.array(rows, kind)[head:]
    expected = reference_keys(rows[head:], lambda key: key, missing)
    assert unpack(read_keys(array, [], missing), len(array)) == expected


@pytest.mark.parametrize("missing", [None, 4])
def test_lists_of_strings_and_fixed_lists(missing):
    rows = [["a", None], None, [], ["b"], ["c", "d"]]
    expected = reference_keys(rows, lambda t: signed(_core.xxh64(t.encode())), missing)
    for kind in (pa.list_(pa.string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))):
        array = pa.array(rows, pa.list_(pa.string())).cast(kind)
        assert unpack(read_keys(array, [Hash()], missing), 5) == expected
        assert unpack(read_keys(array[2:], [Hash()], missing), 3) == expected[2:]
    fixed = [[1, 2], None, [3, None]]
    array = pa.array(fixed, pa.list_(pa.int64(), 2))
    assert unpack(read_keys(array, [], missing), 3) == reference_keys(fixed, int, missing)


def test_dictionary_with_an_unused_bad_value_is_fine():
    array = pa.DictionaryArray.from_arrays(pa.array([0, None, 0]), pa.array(["ff", "zz"]))
    assert read_keys(array, [Hex()], 1).values.tolist() == [255, 1, 255]


def test_hash_after_hex_hashes_the_number():
    keys = read_keys(pa.array(["ff"]), [Hex(), Hash()], None).values
    assert keys.tolist() == [signed(_core.xxh64(b"255"))]


BAG = st.lists(INT64, max_size=3)


@given(st.data())
def test_jagged_block_equals_a_plain_loop(data):
    features = data.draw(st.integers(0, 3))
    weighted = data.draw(st.lists(st.booleans(), min_size=features, max_size=features))
    columns, starts, stops, bags = [], [], [], [[] for _ in range(features)]
    for _ in range(data.draw(st.integers(1, 3))):
        width = data.draw(st.integers(0, 5))
        start = data.draw(st.integers(0, width))
        stop = data.draw(st.integers(start, width))
        starts.append(start)
        stops.append(stop)
        for feature in range(features):
            one_each = data.draw(st.booleans())
            bag = st.tuples(INT64) if one_each else BAG
            chunk = data.draw(st.lists(bag, min_size=width, max_size=width))
            offsets = np.cumsum([0, *map(len, chunk)])
            values = np.array([key for keys in chunk for key in keys], dtype=np.int64)
            weights = data.draw(
                arrays(np.float32, len(values), elements=st.floats(-1, 1, width=32))
            )
            if not weighted[feature]:
                weights = None
            columns.append((values, None if one_each else offsets, weights))
            pairs = list(
                zip(values, np.ones(len(values)) if weights is None else weights, strict=True)
            )
            bags[feature] += [pairs[offsets[r] : offsets[r + 1]] for r in range(start, stop)]
    total = sum(stops) - sum(starts)
    rows = data.draw(st.lists(st.integers(0, total - 1), max_size=6)) if total else []
    first = data.draw(st.integers(0, total))
    in_order = data.draw(st.booleans())
    if in_order:
        rows = list(range(first, data.draw(st.integers(first, total))))
    others, of_others = None, []
    if data.draw(st.booleans()):
        of_others = data.draw(st.lists(st.booleans(), min_size=features, max_size=features))
        others = [data.draw(st.integers(0, total - 1)) for _ in rows]
    batch = data.draw(st.integers(1, 4))
    block = _core.JaggedBlock(columns, starts, stops)
    # A run of rows has places of its own kind.
    rows_at, others_at = (
        None if found is None else block.locate(np.array(found, dtype=np.int64))
        for found in (rows, others)
    )
    if in_order:
        rows_at = block.locate_run(first, len(rows))
    assert len(rows_at) == len(rows)
    values, offsets, begins, weights = block.cut(rows_at, batch, others_at, of_others)
    if offsets is None:
        assert begins is None
        assert all(len(pairs) == 1 for feature in bags for pairs in feature) or not columns
    taken = [others if others and of_others[f] else rows for f in range(features)]
    expected = [
        [bags[f][row] for f in range(features) for row in taken[f][at : at + batch]]
        for at in range(0, len(rows), batch)
    ]
    assert values.tolist() == [key for cut in expected for pairs in cut for key, _ in pairs]
    assert (weights is not None) == any(weighted)
    if weights is not None:
        assert weights.tolist() == [w for cut in expected for pairs in cut for _, w in pairs]
    if offsets is not None:
        want = [np.cumsum([0, *map(len, cut)]).tolist() for cut in expected]
        assert offsets.tolist() == [end for ends in want for end in ends]
        assert begins.tolist() == np.cumsum([0, *(ends[-1] for ends in want)]).tolist()


def test_jagged_block_refuses_what_does_not_fit():
    keys = np.arange(3)
    block = _core.JaggedBlock([(keys, None, None)], [1], [3])
    for row in (-1, 2):
        with pytest.raises(IndexError, match="a row lies outside the block"):
            block.locate(np.array([row]))
    for run in ((-1, 1), (0, -1), (0, 3), (1, 2), (3, 0)):
        with pytest.raises(IndexError, match="a row lies outside the block"):
            block.locate_run(*run)
    one = block.locate(np.array([0]))
    with pytest.raises(ValueError, match="batch: must be positive"):
        block.cut(one, 0)
    for others, of_others in ((block.locate(np.array([0, 0])), [True]), (one, [])):
        with pytest.raises(ValueError, match="others: as many as places, and of_others as many as"):
            block.cut(one, 1, others, of_others)
    for parts, message in (
        ([], "parts: one for each part of the block"),
        ([np.zeros(2, np.float32)], "parts: too short, or of unlike types or shapes"),
        ([np.zeros(3, np.int8)], "parts: too short, or of unlike types or shapes"),
    ):
        with pytest.raises(ValueError, match=message):
            block.take(one, parts)
    several = _core.JaggedBlock([], [0, 0], [1, 1])
    for other in (np.zeros(1), np.zeros((1, 3), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(ValueError, match="parts: too short, or of unlike types or shapes"):
            several.take(several.locate_run(0, 2), [np.zeros(1, np.float32), other])
    for columns, starts, stops in (
        ([(keys, None, None)], [0], [4]),
        ([(keys, np.array([0, 1]), None)], [0], [2]),
        ([(keys, np.array([0, 9]), None)], [0], [1]),
        ([(keys, None, None)], [2], [1]),
    ):
        with pytest.raises(
            ValueError, match="shorter than its part|go beyond the values|starts beyond stops"
        ):
            _core.JaggedBlock(columns, starts, stops)
    with pytest.raises(ValueError, match="do not fit"):
        _core.JaggedBlock([(keys, None, None)], [], [])
    weights = np.ones(3, np.float32)
    for columns in (
        [(keys, None, weights[:2])],
        [(keys, None, weights), (keys, None, None)],
        [(keys, None, None), (keys, None, weights)],
    ):
        with pytest.raises(ValueError, match="weights do not fit the values"):
            _core.JaggedBlock(columns, [0] * len(columns), [3] * len(columns))


def test_count_newlines():
    assert _core.count_newlines(np.frombuffer(b"a\n\r\n\n\x0a b", np.uint8)) == 4
    assert _core.count_newlines(np.zeros(0, np.uint8)) == 0


def test_numbers():
    assert read_numbers(pa.array([1, None, -3])).tolist()[::2] == [1.0, -3.0]
    assert np.isnan(read_numbers(pa.array([1, None]))[1])
    assert read_numbers(pa.array([2**62 + 1])).tolist() == [float(2**62)]
    assert read_numbers(pa.array([True, False])).tolist() == [1.0, 0.0]


def by_numpy(values, fill, transforms):
    """What numbers become, in plain numpy."""
    given = np.where(np.isnan(values), fill, values) if fill is not None else values
    numbers = given.astype(np.float64)
    for transform in transforms:
        if isinstance(transform, Log):
            numbers = np.copysign(np.log1p(np.abs(numbers)), numbers)
        elif isinstance(transform, Clip):
            numbers = np.clip(numbers, transform.low, transform.high)
        else:
            with np.errstate(invalid="ignore"):
                numbers = (numbers - transform.offset) * transform.factor
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)


PLANS = [
    [],
    [Log()],
    [Clip(low=-2), Log()],
    [Clip(low=0, high=5), Scale(offset=1, factor=2)],
    [Scale(offset=0.1, factor=3.3), Log(), Log()],
]


@pytest.mark.parametrize("transforms", PLANS)
@pytest.mark.parametrize(
    "kind",
    [pa.int8(), pa.uint16(), pa.int32(), pa.int64(), pa.uint64(), pa.float32(), pa.float64()],
)
@pytest.mark.parametrize("blank", [0.0, 0.3])
def test_filled_and_transformed_numbers_equal_numpy(transforms, kind, blank):
    rng = np.random.default_rng(3)
    numbers = np.abs(rng.normal(0, 40, 1000)) if "u" in str(kind) else rng.normal(0, 40, 1000)
    column = pa.array(numbers).cast(kind, safe=False)
    column = pc.if_else(pa.array(rng.random(1000) >= blank), column, pa.scalar(None, kind))
    for array in (column, column[13:], column[509:511], column[:0]):
        for fill in (0.1, 3.0):
            out, bad = fill_numbers(array, number_plan(fill, transforms))
            assert bad == -1
            expected = by_numpy(read_numbers(array), fill, transforms)
            if Log() in transforms:
                # It is that of a float32 within 2 ulp, of which two in a row add up.
                np.testing.assert_array_max_ulp(out, expected, maxulp=4)
            else:
                np.testing.assert_array_equal(out, expected)


def test_the_first_number_that_is_missing_or_too_large():
    strict, filled = number_plan(None, []), number_plan(0.0, [])
    for number in (None, float("nan")):
        array = pa.array([1.0, 2.0, number, 1e300, number], pa.float64(), from_pandas=False)
        assert fill_numbers(array, strict)[1] == 2
        assert fill_numbers(array, filled)[1] == 3
    for number in (float("inf"), -float("inf"), 1e39):
        for transforms in ([], [Scale(factor=0.0)], [Log(), Scale(factor=1e300)]):
            array = pa.array([0.0, number, 0.0, 0.0, 0.0])
            expected = -1 if np.isfinite(by_numpy(array.to_numpy(), 0, transforms)).all() else 1
            assert fill_numbers(array, number_plan(0.0, transforms))[1] == expected
    assert fill_numbers(pa.array([1, None, None, None, None], pa.int64()), strict)[1] == 1
    assert fill_numbers(pa.nulls(5), strict)[1] == 0


def test_the_logarithm_is_within_two_units_of_the_last_place_of_a_float32():
    rng = np.random.default_rng(0)
    magnitudes = np.append(rng.uniform(-40, 80, 200_000), rng.uniform(-3, 3, 200_000))
    values = np.exp(magnitudes) * rng.choice([-1, 1], len(magnitudes))
    values = np.append(values, [0.0, -0.0, 1.0, 0.41421356, 0.4142136, 2**53, 3e38, 1e-38, 1e-17])
    out, bad = fill_numbers(pa.array(values), number_plan(None, [Log()]))
    assert bad == -1
    exact = np.copysign(np.log1p(np.abs(values)), values)
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    assert (np.abs(out.astype(np.float64) - exact) <= 2 * unit).all()
    assert (np.signbit(out) == np.signbit(values)).all()


def test_a_block_of_many_parts_has_places_of_64_bits():
    parts = 1 << 12
    columns = [(np.arange(1 << 21), None, None)] + [(np.array([-1]), None, None)] * (parts - 1)
    block = _core.JaggedBlock(
        columns, [(1 << 21) - 2] + [0] * (parts - 1), [1 << 21] + [1] * (parts - 1)
    )
    rows = np.array([1, parts, 0, 2])
    values, offsets, starts, weights = block.cut(block.locate(rows), 3)
    assert values.tolist() == [(1 << 21) - 1, -1, (1 << 21) - 2, -1]
    assert offsets is starts is weights is None


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 31, 1000, 70_000])
@pytest.mark.parametrize("seed", [[0], [2**64 - 1, 3, 7]])
def test_a_shuffle_sorts_the_bits_of_numpys_philox(n, seed):
    sequence = np.random.SeedSequence(seed)
    bits = np.random.Philox(sequence).random_raw(n)
    order = _core.shuffle(*map(int, sequence.generate_state(2, np.uint64)), n)
    np.testing.assert_array_equal(order, np.argsort(bits, kind="stable"))


def test_a_fill_of_keys_honours_slices_and_bits():
    column = pa.array([5, None, -7, None, 2**62] * 9)
    for low in range(10):
        keys = read_keys(column[low:], (), -3)
        assert keys.lengths is None
        assert keys.values.tolist() == [-3 if k is None else k for k in column[low:].to_pylist()]
    with pytest.raises(ValueError, match="valid: too few bits"):
        _core.fill_missing(np.zeros(9, np.int64), np.zeros(1, np.uint8), 0, 0)
    plan, whole = number_plan(0, []), np.zeros(2)
    for columns, message in (
        ([(whole, np.zeros(0, np.uint8), 0, plan, 0)], "valid: too few bits"),
        ([(np.zeros(3), None, 0, plan, 0)], "values: not as many as rows"),
        ([(whole, None, 0, plan, 1)], "position: not each once, from 0"),
        ([(whole, None, 0, plan, 0), (whole, None, 0, plan, 0)], "position: not each once"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.transform_numbers(columns, 2)
    with pytest.raises(TypeError, match="values: expected int32, int64, float32 or float64"):
        _core.transform_numbers([(np.zeros(2, np.int8), None, 0, plan, 0)], 2)


def test_of_several_bad_columns_the_first_in_order_is_named():
    rows = 1000
    late, early = np.zeros(rows), np.zeros(rows)
    late[900], early[3] = np.inf, np.inf
    plan = number_plan(0.0, [])
    columns = [
        (np.ones(rows), None, 0, plan, 1),
        (late, None, 0, plan, 2),
        (early, None, 0, plan, 0),
    ]
    out, column, row = _core.transform_numbers(columns, rows)
    assert (column, row) == (1, 900)
    assert out.shape == (rows, 3)
    assert (out[:, 1] == 1).all()


def test_whole_numbers_too_large_for_a_double_have_a_logarithm():
    values = np.array([2**53 - 1, 2**53, 2**53 + 2, 2**62, -(2**63), 0], dtype=np.int64)
    out, bad = fill_numbers(pa.array(values), number_plan(0.0, [Log()]))
    assert bad == -1
    np.testing.assert_array_max_ulp(
        out, by_numpy(values.astype(np.float64), 0.0, [Log()]), maxulp=2
    )


@given(st.data(), st.integers(0, 9), st.sampled_from([np.float32, np.int64]))
def test_rows_of_plain_arrays_are_taken_from_several_chunks(data, width, dtype):
    starts, stops, parts, expected = [], [], [], []
    for part in range(data.draw(st.integers(1, 3))):
        length = data.draw(st.integers(0, 30))
        rows = np.arange(length * max(width, 1)).astype(dtype) + 1000 * part
        rows = rows.reshape(length, width) if width else rows
        start = data.draw(st.integers(0, length))
        stop = data.draw(st.integers(start, length))
        starts.append(start)
        stops.append(stop)
        parts.append(rows)
        expected.append(rows[start:stop])
    joined = np.concatenate(expected)
    block = _core.JaggedBlock([], starts, stops)
    first = data.draw(st.integers(0, len(joined)))
    run = data.draw(st.integers(0, len(joined) - first))
    out = block.take(block.locate_run(first, run), parts)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, joined[first : first + run])
    if len(joined):
        order = np.array(
            data.draw(st.lists(st.integers(0, len(joined) - 1), max_size=50)), np.int64
        )
        out = block.take(block.locate(order), parts)
        np.testing.assert_array_equal(out, joined[order])


@given(st.lists(st.none() | st.lists(st.integers(0, 99), max_size=6)), st.integers(1, 4))
def test_truncated_bags_equal_a_plain_loop(bags, most):
    keys = read_keys(pa.array(bags, pa.list_(pa.int64())), (), None)
    plain = [bag or [] for bag in bags]
    for keep, expected in (
        ("first", [bag[:most] for bag in plain]),
        ("last", [bag[-most:] for bag in plain]),
    ):
        cut = truncate(keys, most, keep)
        assert cut.values.tolist() == [key for bag in expected for key in bag]
        lengths = np.ones(len(bags)) if cut.lengths is None else cut.lengths
        assert lengths.tolist() == [len(bag) for bag in expected]
