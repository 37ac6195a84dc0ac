import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import _core
from penstock.config import Clip, Hash, Hex, Log, Scale
from penstock.data.transforms import BadValue, read_keys, read_numbers, transform_numbers

INT64 = st.integers(-(2**63), 2**63 - 1)


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
        _core.JaggedWindow([(np.zeros(1, np.int32), None)], [0], [1])


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
def test_jagged_window_equals_a_plain_loop(data):
    features = data.draw(st.integers(0, 3))
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
            columns.append((values, None if one_each else offsets))
            bags[feature] += [list(keys) for keys in chunk[start:stop]]
    total = sum(stops) - sum(starts)
    rows = data.draw(st.lists(st.integers(0, total - 1), max_size=6)) if total else []
    window = _core.JaggedWindow(columns, starts, stops)
    values, offsets = window.select(np.array(rows, dtype=np.int64))
    expected = [feature[row] for feature in bags for row in rows]
    assert offsets.tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert values.tolist() == [key for keys in expected for key in keys]


def test_jagged_window_refuses_what_does_not_fit():
    keys = np.arange(3)
    window = _core.JaggedWindow([(keys, None)], [1], [3])
    for row in (-1, 2):
        with pytest.raises(IndexError, match="a row lies outside the window"):
            window.select(np.array([row]))
    for columns, starts, stops in (
        ([(keys, None)], [0], [4]),
        ([(keys, np.array([0, 1]))], [0], [2]),
        ([(keys, np.array([0, 9]))], [0], [1]),
        ([(keys, None)], [2], [1]),
    ):
        with pytest.raises(ValueError, match="a column is shorter than its part"):
            _core.JaggedWindow(columns, starts, stops)
    with pytest.raises(ValueError, match="do not fit"):
        _core.JaggedWindow([(keys, None)], [], [])


def test_count_newlines():
    assert _core.count_newlines(np.frombuffer(b"a\n\r\n\n\x0a b", np.uint8)) == 4
    assert _core.count_newlines(np.zeros(0, np.uint8)) == 0


def test_numbers():
    assert read_numbers(pa.array([1, None, -3])).tolist()[::2] == [1.0, -3.0]
    assert np.isnan(read_numbers(pa.array([1, None]))[1])
    assert read_numbers(pa.array([2**62 + 1])).tolist() == [float(2**62)]
    assert read_numbers(pa.array([True, False])).tolist() == [1.0, 0.0]
    values = np.array([-3.0, 0.0, 8.0])
    expected = np.sign(values) * np.log1p(np.abs(values))
    np.testing.assert_array_equal(transform_numbers(values.copy(), [Log()]), expected)
    clipped = transform_numbers(values.copy(), [Clip(low=0, high=5), Scale(offset=1, factor=2)])
    assert clipped.tolist() == [-2.0, -2.0, 8.0]
