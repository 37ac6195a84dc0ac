"""Column functions: numbers and vectors from Arrow columns. No loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from penstock import _core
from penstock.config import Clip, Log, Scale
from penstock.data.columns.transforms import BadValue, is_list, list_lengths, one_array

_NUMBER_TYPES = {
    pa.int32(): np.int32,
    pa.int64(): np.int64,
    pa.float32(): np.float32,
    pa.float64(): np.float64,
}


def number_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column of numbers, or of lists of at most one number, as one array of numbers.

    Returns:
      [n] int32, int64, float32 or float64; null where the list is empty or null.

    Raises:
      BadValue: a list holds more than one value; `index` counts rows.
    """
    array = one_array(column)
    if is_list(array.type):
        array = _only_values(array)
    if array.type in _NUMBER_TYPES:
        return array
    # pyarrow refuses to round large integers unless told to.
    return pc.cast(array, pa.float64(), safe=False)


def find_ragged(column: pa.ChunkedArray | pa.Array, width: int) -> int:
    """The first row of a column of lists that is no vector of `width` numbers; -1: there is none.

    A null or empty list is a missing vector.
    """
    lengths = list_lengths(one_array(column))
    bad = (lengths != width) & (lengths != 0)
    return int(bad.argmax()) if bad.any() else -1


def vector_numbers(column: pa.ChunkedArray | pa.Array, width: int) -> pa.Array:
    """The numbers of a column of vectors, row after row.

    Returns:
      [n * width] int32, int64, float32 or float64; null where the list is null or empty.

    Raises:
      BadValue: a list has another length; `index` counts rows.
    """
    array = one_array(column)
    if pa.types.is_null(array.type):
        return pa.nulls(len(array) * width, pa.float64())
    row = find_ragged(array, width)
    if row >= 0:
        raise BadValue(row, f"{len(array[row])} numbers, but the column's vectors have {width}")
    lengths = list_lengths(array)
    values = number_array(array.flatten())
    if lengths.all():
        return values
    present = np.repeat(lengths > 0, width)
    return values.take(pa.array(np.cumsum(present) - 1, mask=~present))


def read_numbers(column: pa.ChunkedArray | pa.Array) -> NDArray[np.floating]:
    """Reads a column of numbers, or of lists of at most one number.

    Returns:
      [n] float32 or float64; nulls and empty lists are NaN. A view where there is nothing to
      convert.

    Raises:
      BadValue: as `number_array`.
    """
    array = number_array(column)
    if pa.types.is_integer(array.type):
        array = pc.cast(array, pa.float64(), safe=False)
    values: NDArray[np.floating] = array.to_numpy(zero_copy_only=False)
    return values


class NumberColumn(NamedTuple):
    """A column of numbers as `_core.transform_numbers` takes it."""

    values: NDArray[Any]
    """[n] int32, int64, float32 or float64."""
    valid: NDArray[np.uint8] | None
    """Bits, from `first_bit` on, of the rows that are not null; None: all."""
    first_bit: int
    plan: _core.NumberPlan
    position: int
    """Column of the output."""


def number_column(
    column: pa.ChunkedArray | pa.Array, plan: _core.NumberPlan, position: int
) -> NumberColumn:
    """A view of a column of numbers.

    Raises:
      BadValue: as `number_array`.
    """
    return _number_view(number_array(column), plan, position)


def vector_column(
    column: pa.ChunkedArray | pa.Array, plan: _core.NumberPlan, width: int
) -> NumberColumn:
    """A view of the numbers of a column of vectors, row after row, as one column.

    Raises:
      BadValue: as `vector_numbers`.
    """
    return _number_view(vector_numbers(column, width), plan, 0)


def _number_view(array: pa.Array, plan: _core.NumberPlan, position: int) -> NumberColumn:
    valid, data = array.buffers()
    low, high = array.offset, array.offset + len(array)
    values = np.frombuffer(data, dtype=_NUMBER_TYPES[array.type])[low:high]
    bits = None if array.null_count == 0 else np.frombuffer(valid, dtype=np.uint8)
    return NumberColumn(values, bits, low, plan, position)


def number_plan(fill: float | None, transforms: Sequence[Log | Clip | Scale]) -> _core.NumberPlan:
    """What is done to a column of numbers: a fill of missing ones, then `transforms` in order.

    In float64, so that a result does not depend on how a file stores its numbers.
    """
    steps = []
    for transform in transforms:
        if isinstance(transform, Log):
            steps.append((0, 0.0, 0.0))
        elif isinstance(transform, Clip):
            low = -np.inf if transform.low is None else transform.low
            steps.append((1, low, np.inf if transform.high is None else transform.high))
        else:
            steps.append((2, transform.offset, transform.factor))
    return _core.NumberPlan(fill, steps)


def _only_values(array: pa.Array) -> pa.Array:
    """The one value of each list, null where it is null or empty."""
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    many = lengths > 1
    if many.any():
        row = int(many.argmax())
        raise BadValue(row, f"{lengths[row]} values where at most one is expected")
    values = one_array(array.flatten())
    if lengths.all():
        return values
    where = np.cumsum(lengths) - 1
    return values.take(pa.array(where, mask=lengths == 0))
