"""Column functions: keys from Arrow columns. No loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from penstock import _core
from penstock.config import Bucketize, Hash, Hex

KeyTransform: TypeAlias = Hash | Hex | Bucketize


class BadValue(Exception):
    """A value that a transform cannot read. Internal: `decode` turns it into a DataError."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        """Among the values given."""
        self.reason = reason


class Keys(NamedTuple):
    """The bags of one column: keys in the order of rows, and how many each row has."""

    values: NDArray[np.int64]
    """[N]"""
    lengths: NDArray[np.int64] | None
    """[n]; None: one key a row."""
    weights: NDArray[np.float32] | None = None
    """[N]; None: each is 1."""


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The column as one array; copies only if it is in pieces."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    combined = column.combine_chunks()
    # Some pyarrow versions give a chunked array back.
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def read_keys(
    column: pa.ChunkedArray | pa.Array, transforms: Sequence[KeyTransform], missing: int | None
) -> Keys:
    """Reads a column of keys or of lists of keys.

    Args:
      column: integers, booleans, strings, dictionary-encoded or lists of these. Of unsigned 64-bit
        integers the bits are kept.
      transforms: applied in order.
      missing: key that a null row reads as; None: an empty bag. A null within a list is left out
        or reads as `missing` likewise.

    Raises:
      BadValue: `index` counts the values that are not null (of lists: within the flattened lists).
    """
    array = one_array(column)
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        # Arrow has few functions on views.
        array = array.cast(pa.large_binary())
    if pa.types.is_dictionary(array.type):
        return _read_dictionary(array, transforms, missing)
    if is_list(array.type):
        return _read_lists(array, transforms, missing)
    if pa.types.is_floating(array.type):
        array = array.cast(pa.float64())
        # NaN is missing, as in numeric columns.
        array = pc.if_else(pc.is_nan(array), None, array)
    if array.null_count == 0:
        return Keys(_transform(array, transforms), None)
    if missing is not None and not transforms and array.type in {pa.int64(), pa.uint64()}:
        bits, data = array.buffers()
        low, high = array.offset, array.offset + len(array)
        given = np.frombuffer(data, dtype=np.int64)[low:high]
        return Keys(
            _core.fill_missing(given, np.frombuffer(bits, dtype=np.uint8), low, missing), None
        )
    present = array.is_valid().to_numpy(zero_copy_only=False)
    values = _transform(array.drop_null(), transforms)
    if missing is None:
        return Keys(values, present.astype(np.int64))
    filled = np.full(len(array), missing, dtype=np.int64)
    filled[present] = values
    return Keys(filled, None)


def split_texts(
    column: pa.ChunkedArray | pa.Array, separator: str, *, as_integers: bool
) -> pa.Array:
    """Texts as lists of what is between the separators, without what is empty.

    Args:
      column: [n] strings, bytes, or dictionary-encoded ones of these.
      separator: of one or more characters.
      as_integers: the parts are decimal numbers of 64 bits.

    Returns:
      [n] lists of strings, bytes or int64; null where there is no part.

    Raises:
      BadValue: a part is no integer; `index` counts rows.
    """
    array = one_array(column)
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), pa.large_list(pa.int64()))
    if pa.types.is_dictionary(array.type):
        # Every distinct text is split once.
        try:
            lists = split_texts(array.dictionary, separator, as_integers=as_integers)
        except BadValue:
            # The bad text may be one that no row has; decoded, its index is a row's.
            decoded = array.dictionary_decode()
            return split_texts(decoded, separator, as_integers=as_integers)
        return lists.take(array.indices)
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        array = array.cast(pa.large_binary())
    lists = pc.split_pattern(array, separator)
    parts = lists.flatten()
    is_part = pc.binary_length(parts).to_numpy(zero_copy_only=False) > 0
    row = np.repeat(np.arange(len(array)), list_lengths(lists))[is_part]
    parts = parts.filter(pa.array(is_part))
    if as_integers:
        parts = _decimal_integers(parts, row)
    counts = np.bincount(row, minlength=len(array))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return pa.LargeListArray.from_arrays(
        pa.array(offsets, pa.int64()), parts, mask=pa.array(counts == 0)
    )


def _decimal_integers(parts: pa.Array, row: NDArray[np.int64]) -> pa.Array:
    """[N] int64 of decimal texts; `row` [N] is what an error counts."""
    if pa.types.is_binary(parts.type) or pa.types.is_large_binary(parts.type):
        # What is no UTF-8 is no number either, and is found to be none.
        parts = parts.cast(pa.large_string(), safe=False)
    try:
        return parts.cast(pa.int64())
    except pa.ArrowInvalid:
        low, high = 0, len(parts)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            parts.slice(low, middle - low).cast(pa.int64())
            low = middle
        except pa.ArrowInvalid:
            high = middle
    raise BadValue(int(row[low]), f"{parts[low].as_py()!r} is no 64-bit integer")


class CrossPart(NamedTuple):
    """One column of a cross: what of it goes into the hash."""

    values: NDArray[np.int64]
    """[n] integers as they are, of texts their hash; 0 where null."""
    valid: NDArray[np.uint8] | None
    """Bits, from `first_bit` on, of the rows that are not null; None: all."""
    first_bit: int


def cross(
    columns: Sequence[pa.ChunkedArray | pa.Array], seed: int, buckets: int | None
) -> NDArray[np.int64]:
    """Keys of the combinations of values of several columns.

    Args:
      columns: [n] each; integers, booleans, strings or dictionary-encoded ones of these.
      seed: of the hash.
      buckets: folds the keys into [0, buckets).

    Returns:
      [n]
    """
    return cross_parts([cross_part(column) for column in columns], seed, buckets)


def cross_part(column: pa.ChunkedArray | pa.Array) -> CrossPart:
    """Reads one column of a cross."""
    array = one_array(column)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        array = array.cast(pa.large_binary())
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    bits = array.buffers()[0] if array.null_count else None
    first_bit = array.offset
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        zero = pa.scalar(0, pa.int64()).cast(array.type)
        keys = _integers(array.fill_null(zero)).view(np.int64)
    else:
        keys = _core.hash_strings(*_string_buffers(array))
    valid = None if bits is None else np.frombuffer(bits, dtype=np.uint8)
    return CrossPart(keys, valid, first_bit)


def cross_parts(parts: Sequence[CrossPart], seed: int, buckets: int | None) -> NDArray[np.int64]:
    """`cross` of columns that are read already."""
    hashes = np.full(len(parts[0].values), seed, dtype=np.uint64)
    for part in parts:
        _core.cross_keys(part.values, part.valid, part.first_bit, hashes)
    if buckets is not None:
        hashes %= np.uint64(buckets)
    return hashes.view(np.int64)


def truncate(keys: Keys, max_keys: int, keep: Literal["first", "last"]) -> Keys:
    """The first or last keys of bags that hold more than `max_keys`."""
    if keys.lengths is None or not (keys.lengths > max_keys).any():
        return keys
    kept = np.minimum(keys.lengths, max_keys)
    ends = np.cumsum(keys.lengths)
    first = ends - (keys.lengths if keep == "first" else kept)
    # Key i of a bag is `first[bag] + i`; `done` counts the keys kept of the bags before.
    done = np.cumsum(kept) - kept
    places = np.repeat(first - done, kept) + np.arange(kept.sum())
    weights = None if keys.weights is None else keys.weights[places]
    return Keys(keys.values[places], kept, weights)


def read_key_weights(
    column: pa.ChunkedArray | pa.Array, keys: pa.ChunkedArray | pa.Array, missing: int | None
) -> NDArray[np.float32]:
    """Reads the weights of the keys that `read_keys` gives.

    Args:
      column: numbers, or lists of as many numbers as there are keys; a null list is an empty one.
      keys: the column of the keys, of lists where `column` is.
      missing: as given to `read_keys`. A null that is left out takes its weight along; a null list
        that reads as this key has the weight 1.

    Returns:
      [N] finite

    Raises:
      BadValue: `index` is the row.
    """
    given, weights = one_array(keys), one_array(column)
    if pa.types.is_null(given.type) and pa.types.is_null(weights.type):
        # A file without any value does not say that its rows are lists; null lists they are.
        return np.ones(len(given) if missing is not None else 0, dtype=np.float32)
    rows = np.arange(len(given))
    absent = np.zeros(len(given), dtype=bool)
    if is_list(given.type):
        counts, lengths = list_lengths(given), list_lengths(weights)
        wrong = counts != lengths
        if wrong.any():
            row = int(wrong.argmax())
            raise BadValue(row, f"{lengths[row]} weights for {counts[row]} keys")
        absent = given.is_null().to_numpy(zero_copy_only=False)
        given, weights, rows = given.flatten(), weights.flatten(), np.repeat(rows, counts)
    numbers = weights.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):  # what is too large is found below
        found: NDArray[np.float32] = numbers.astype(np.float32)
    kept = np.ones(len(found), dtype=bool) if missing is not None else _has_key(given)
    bad = kept & ~np.isfinite(found)
    if bad.any():
        place = int(bad.argmax())
        shown = "missing" if np.isnan(numbers[place]) else f"{numbers[place]:g}, not finite"
        raise BadValue(int(rows[place]), f"the weight of a key is {shown}")
    found = found[kept]
    if missing is None or not absent.any():
        return found
    starts = np.searchsorted(rows, np.flatnonzero(absent))
    return np.insert(found, starts, np.float32(1))


def list_lengths(array: pa.Array) -> NDArray[np.int64]:
    """[n] values of each list; 0 where it is null."""
    lengths = pc.list_value_length(array)
    if lengths.null_count:
        lengths = lengths.fill_null(0)
    found: NDArray[np.int64] = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _has_key(array: pa.Array) -> NDArray[np.bool_]:
    """[n] whether `read_keys` finds a value there."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    is_null: NDArray[np.bool_] = array.is_null(nan_is_null=True).to_numpy(zero_copy_only=False)
    return ~is_null


def is_list(kind: pa.DataType) -> bool:
    """Whether values are lists, of any layout that is read."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _read_dictionary(
    array: pa.DictionaryArray, transforms: Sequence[KeyTransform], missing: int | None
) -> Keys:
    if array.dictionary.null_count:
        return read_keys(array.dictionary_decode(), transforms, missing)
    try:
        # Every distinct value is transformed once.
        keys = _transform(array.dictionary, transforms)
    except BadValue:
        # The bad value may be one that no row has; decoded, its index is a row's as well.
        return read_keys(array.dictionary_decode(), transforms, missing)
    indices = read_keys(array.indices, (), None if missing is None else -1)
    values = np.append(keys, 0 if missing is None else missing)[indices.values]
    return Keys(values, indices.lengths)


def _read_lists(array: pa.Array, transforms: Sequence[KeyTransform], missing: int | None) -> Keys:
    counts = list_lengths(array)
    # flatten() skips null lists and honours slices.
    inner = read_keys(array.flatten(), transforms, missing)
    if inner.lengths is not None:
        ends = np.concatenate([[0], np.cumsum(inner.lengths)])
        bounds = np.concatenate([[0], np.cumsum(counts)])
        counts = np.diff(ends[bounds])
    if missing is None or array.null_count == 0:
        return Keys(inner.values, counts)
    absent = array.is_null().to_numpy(zero_copy_only=False)
    # A null list becomes a bag of the one key, inserted where its keys would be.
    starts = np.cumsum(counts) - counts
    values = np.insert(inner.values, starts[absent], missing)
    return Keys(values, counts + absent)


def _transform(array: pa.Array, transforms: Sequence[KeyTransform]) -> NDArray[np.int64]:
    """Keys of an array without nulls."""
    keys: NDArray[np.int64] | None = None
    for transform in transforms:
        if isinstance(transform, Bucketize):
            numbers = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            keys = np.searchsorted(transform.boundaries, numbers, side="right").astype(np.int64)
        elif isinstance(transform, Hex):
            keys, bad = _core.parse_hex(*_string_buffers(array))
            if bad >= 0:
                raise BadValue(bad, f"{array[bad].as_py()!r} is not 1 to 16 hexadecimal digits")
        elif keys is not None:
            keys = _core.hash_integers(keys, transform.seed, transform.buckets or 0)
        else:
            keys = _hash(array, transform)
    return keys if keys is not None else _integers(array).view(np.int64)


def _hash(array: pa.Array, transform: Hash) -> NDArray[np.int64]:
    seed, buckets = transform.seed, transform.buckets or 0
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        return _core.hash_integers(_integers(array), seed, buckets)
    return _core.hash_strings(*_string_buffers(array), seed, buckets)


def _integers(array: pa.Array) -> NDArray[np.int64]:
    """[n] contiguous int64; uint64 stays what it is."""
    if pa.types.is_boolean(array.type) or pa.types.is_null(array.type):
        array = array.cast(pa.int64())
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype != np.uint64:
        values = values.astype(np.int64, copy=False)
    return np.ascontiguousarray(values)


def _string_buffers(
    array: pa.Array,
) -> tuple[NDArray[np.int32] | NDArray[np.int64], NDArray[np.uint8]]:
    """Views of the offsets (of this slice) and bytes of a string or binary array."""
    if pa.types.is_null(array.type):
        array = array.cast(pa.string())
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offsets, data = array.buffers()
    if len(array) == 0 or offsets is None:
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.uint8)
    bytes_ = np.frombuffer(data, dtype=np.uint8) if data is not None else np.zeros(0, np.uint8)
    first, stop = array.offset, array.offset + len(array) + 1
    if wide:
        return np.frombuffer(offsets, dtype=np.int64)[first:stop], bytes_
    return np.frombuffer(offsets, dtype=np.int32)[first:stop], bytes_
