"""Turns the table of a chunk into plain arrays, checking every value on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from penstock import _core
from penstock.config import FailOnMissing, Label, TimeUnit
from penstock.data.columns.block import Bags, Rows
from penstock.data.columns.checks import is_text
from penstock.data.columns.negatives import item_rows
from penstock.data.columns.numbers import (
    number_column,
    number_plan,
    read_numbers,
    vector_column,
    vector_numbers,
)
from penstock.data.columns.schema import Columns, FeatureColumn, NumericGroup
from penstock.data.columns.transforms import (
    BadValue,
    Keys,
    cross,
    is_list,
    one_array,
    read_key_weights,
    read_keys,
    split_texts,
    truncate,
)
from penstock.data.source import Chunk, Place, RowPlace
from penstock.errors import DataError

_AS_VECTOR = "; where each row is a vector, set its `width` in data.numeric"
_FARTHEST_S = 9.2e15
"""Within it, ms have 63 bits."""
TICKS_PER_S: Mapping[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


class _Numbers(NamedTuple):
    """A numeric column."""

    name: str
    group: NumericGroup
    plan: _core.NumberPlan
    position: int
    """Of its first number in a row of the result."""
    width: int


class Decoder:
    """Decodes chunks with the columns `columns.names`. Has no state, so threads may share it."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        # Columns of single numbers are joined side by side, vectors are put beside them.
        self._numeric: list[_Numbers] = []
        self._vectors: list[_Numbers] = []
        for group in columns.numeric:
            plan = _plan(group)
            for name, position, width in zip(
                group.names, group.positions, group.widths, strict=True
            ):
                found = _Numbers(name, group, plan, position, width or 1)
                (self._numeric if width is None else self._vectors).append(found)
        self._num_inputs = len(columns.numeric_inputs)
        self._positions = [one.position for one in self._numeric]

    def decode(self, chunk: Chunk) -> Rows:
        """Decodes a chunk.

        Raises:
          DataError: a value is not what the job says; names its file, row and column.
        """
        columns, table, place = self._columns, chunk.table, chunk.place
        keys = [self._read_keys(feature, table, place) for feature in columns.features]
        for one in columns.crosses:
            crossed = [table.column(name) for name in one.columns]
            keys.append(Keys(cross(crossed, one.seed, one.buckets), None))
        times = columns.event_time
        return Rows(
            self._read_dense(table, place),
            [Bags(bags.values, _offsets(bags.lengths), bags.weights) for bags in keys],
            self._read_labels(table, place),
            self._read_weights(table, place),
            None
            if times is None
            else read_times(table.column(times), times, place, columns.time_unit),
            None
            if columns.teacher is None
            else read_numbers(table.column(columns.teacher)).astype(np.float32),
            [plain_values(table.column(name)) for name in columns.groups],
            None if columns.negatives is None else item_rows(table, columns.negatives),
        )

    def nothing(self, schema: pa.Schema) -> Rows:
        """No rows, of a source of some columns."""
        table = schema.empty_table().select(list(self._columns.names))
        return self.decode(Chunk(table, RowPlace("", 0)))

    def _read_dense(self, table: pa.Table, place: Place) -> NDArray[np.float32]:
        """[n, numeric columns], filled and transformed."""
        columns = []
        for position, one in enumerate(self._numeric):
            try:
                at = one.position if not self._vectors else position
                columns.append(number_column(table.column(one.name), one.plan, at))
            except BadValue as bad:
                raise _not_one_number(bad, one.name, place, _AS_VECTOR) from None
        dense, number, row = _core.transform_numbers(columns, table.num_rows)
        if number >= 0:
            bad_one = self._numeric[number]
            given = float(read_numbers(table.column(bad_one.name))[row])
            raise _bad_number(given, bad_one, place.locate(row))
        if not self._vectors:
            return dense
        joined = np.empty((table.num_rows, self._num_inputs), dtype=np.float32)
        joined[:, self._positions] = dense
        for one in self._vectors:
            joined[:, one.position : one.position + one.width] = _read_vectors(one, table, place)
        return joined

    def _read_keys(self, feature: FeatureColumn, table: pa.Table, place: Place) -> Keys:
        config = feature.config
        column = table.column(feature.name)
        if config.separator is not None:
            try:
                column = split_texts(column, config.separator, as_integers=not config.transforms)
            except BadValue as bad:
                raise DataError(
                    f"{place.locate(bad.index)}, column {feature.name!r}: {bad.reason}; mend the "
                    "file or use the transform hash"
                ) from None
        try:
            missing = None if config.missing == "empty" else config.missing
            keys = read_keys(column, config.transforms, missing)
        except BadValue as bad:
            at = place.locate(_row_of_value(one_array(column), bad.index))
            raise DataError(
                f"{at}, column {feature.name!r}: {bad.reason}; mend the file or use the transform "
                "hash"
            ) from None
        if config.weights is not None:
            try:
                weights = read_key_weights(table.column(config.weights), column, missing)
            except BadValue as bad:
                raise DataError(
                    f"{place.locate(bad.index)}, column {config.weights!r}: {bad.reason} in "
                    f"{feature.name!r}; mend the file"
                ) from None
            keys = keys._replace(weights=weights)
        return keys if config.max_keys is None else truncate(keys, config.max_keys, config.keep)

    def _read_labels(self, table: pa.Table, place: Place) -> NDArray[np.float32]:
        """[n], or [n, L] where the job names several labels; NaN where one is missing."""
        labels = self._columns.labels
        if len(labels) == 1 and labels[0] is not None:
            return _read_label(labels[0], table, place)
        read = np.full(
            (table.num_rows, len(labels)), self._columns.without_column, dtype=np.float32
        )
        for position, label in enumerate(labels):
            if label is not None:
                read[:, position] = _read_label(label, table, place)
        return read[:, 0] if len(labels) == 1 else read

    def _read_weights(self, table: pa.Table, place: Place) -> NDArray[np.float32] | None:
        name = self._columns.weight
        if name is None:
            return None
        weights = _read_numbers(table, name, place).astype(np.float32)
        # Also true of NaN.
        bad = ~((weights >= 0) & np.isfinite(weights))
        if bad.any():
            row = int(bad.argmax())
            raise DataError(
                f"{place.locate(row)}, column {name!r}: weight {weights[row]:g} is not a finite "
                "number >= 0; mend the file"
            )
        return weights


def _plan(group: NumericGroup) -> _core.NumberPlan:
    missing = group.config.missing
    fill = None if isinstance(missing, FailOnMissing) else missing.value
    return number_plan(fill, group.config.transforms)


def _read_vectors(one: _Numbers, table: pa.Table, place: Place) -> NDArray[np.float32]:
    """[n, width], filled and transformed."""
    column = table.column(one.name)
    try:
        flat = vector_column(column, one.plan, one.width)
    except BadValue as bad:
        raise DataError(
            f"{place.locate(bad.index)}, column {one.name!r}: {bad.reason}; mend the file, or set "
            "the width of data.numeric"
        ) from None
    numbers, _, number = _core.transform_numbers([flat], table.num_rows * one.width)
    if number >= 0:
        given = vector_numbers(column, one.width)[number].as_py()
        given = float("nan") if given is None else float(given)
        raise _bad_number(given, one, place.locate(number // one.width))
    return numbers.reshape(table.num_rows, one.width)


def _bad_number(given: float, one: _Numbers, where: str) -> DataError:
    missing, at = one.group.config.missing, f"{where}, column {one.name!r}"
    if np.isnan(given) and isinstance(missing, FailOnMissing):
        return DataError(
            f"{at}: missing number; set `missing` of data.numeric to {{policy: fill}} or mend the "
            "file"
        )
    if np.isnan(given) and not isinstance(missing, FailOnMissing):
        given = missing.value
    return DataError(
        f"{at}: {given} is no finite float32 after transforms; add the transform clip before "
        "others or mend the file"
    )


_AS_IT_IS = number_plan(None, [])


def _read_label(label: Label, table: pa.Table, place: Place) -> NDArray[np.float32]:
    """[n]; NaN where the label is missing and may be."""
    if label.at_least is None:
        # The common case first: all are there and are what they should be.
        try:
            column = number_column(table.column(label.column), _AS_IT_IS, 0)
        except BadValue as bad:
            raise _not_one_number(bad, label.column, place) from None
        numbers, _, bad_row = _core.transform_numbers([column], table.num_rows)
        is_binary = label.task == "binary"
        if bad_row < 0 and not (is_binary and ((numbers != 0) & (numbers != 1)).any()):
            return numbers[:, 0]
    return _read_any_label(label, table, place)


def _read_any_label(label: Label, table: pa.Table, place: Place) -> NDArray[np.float32]:
    given = _read_numbers(table, label.column, place)
    with np.errstate(over="ignore"):  # what is too large is found below
        read = given.astype(np.float32)
    is_missing = np.isnan(given)
    if label.at_least is not None:
        read = np.where(is_missing, np.nan, given >= label.at_least).astype(np.float32)
    bad = ~np.isfinite(read)
    if label.task == "binary":
        bad = (read != 0) & (read != 1)
    if label.missing == "ignore":
        bad &= ~is_missing
    if not bad.any():
        return read
    row = int(bad.argmax())
    at = f"{place.locate(row)}, column {label.column!r}"
    if is_missing[row]:
        raise DataError(
            f"{at}: the label is missing; leave such rows out of the file, or set missing: "
            "ignore of the label"
        )
    if label.task == "regression":
        raise DataError(f"{at}: label {given[row]:g} is no finite float32; mend the file")
    raise DataError(
        f"{at}: label {given[row]:g} is not 0 or 1; set at_least of the label to make labels of "
        "numbers, or task regression to learn the number"
    )


def read_times(
    column: pa.ChunkedArray, name: str, place: Place, unit: TimeUnit = "ms"
) -> NDArray[np.int64]:
    """Times in ms since 1970 UTC, from timestamps, dates, integers (`unit`) or ISO 8601 text.

    Raises:
      DataError: a time is missing or cannot be read.
    """
    array = one_array(column)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count:
        row = int(array.is_null().to_numpy(zero_copy_only=False).argmax())
        raise DataError(
            f"{place.locate(row)}, column {name!r}: the event time is missing; leave such rows out "
            "of the file"
        )
    if is_text(array.type):
        array = _parse_times(array.cast(pa.string()), name, place)
    counted = pa.types.is_integer(array.type)
    is_timestamp = pa.types.is_timestamp(array.type)
    in_seconds = unit == "s" if counted else is_timestamp and array.type.unit == "s"
    try:
        if not counted:
            # What is finer than ms is rounded; what is coarser must not overflow.
            array = pc.cast(array, pa.timestamp("ms"), safe=in_seconds)
        times: NDArray[np.int64] = array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        raise _far_time(name, place) from None
    if counted and in_seconds:
        if np.abs(times.astype(np.float64)).max(initial=0) > _FARTHEST_S:
            raise _far_time(name, place)
        return times * 1000
    return times // (TICKS_PER_S[unit] // 1000) if counted and unit != "ms" else times


def _far_time(name: str, place: Place) -> DataError:
    return DataError(
        f"{place.span(0, 1).path}, column {name!r}: a time is more than 64 bits of ms from 1970; "
        "set data.event_time_unit or mend the file"
    )


def _parse_times(texts: pa.Array, name: str, place: Place) -> pa.Array:
    # Arrow reads a zone only if the type has one, and no zone only if it has none.
    for kind in (pa.timestamp("ms", tz="UTC"), pa.timestamp("ms")):
        try:
            return texts.cast(kind)
        except pa.ArrowInvalid:
            continue
    low, high = 0, len(texts)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            texts.slice(low, middle - low).cast(pa.timestamp("ms"))
            low = middle
        except pa.ArrowInvalid:
            high = middle
    raise DataError(
        f"{place.locate(low)}, column {name!r}: {texts[low].as_py()!r} is no ISO 8601 time, or "
        "only some times of the column have a zone"
    )


def _read_numbers(table: pa.Table, name: str, place: Place) -> NDArray[np.floating]:
    try:
        return read_numbers(table.column(name))
    except BadValue as bad:
        raise _not_one_number(bad, name, place) from None


def _not_one_number(bad: BadValue, name: str, place: Place, also: str = "") -> DataError:
    return DataError(
        f"{place.locate(bad.index)}, column {name!r}: {bad.reason}; mend the file, or list the "
        f"column under `features`{also}"
    )


def plain_values(column: pa.ChunkedArray) -> pa.Array:
    """Values to group rows by, in one of three types: int64, large_string, large_binary."""
    array = one_array(column)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return array.cast(pa.large_string())
    # Of unsigned 64-bit integers the bits are kept, as in keys.
    return array.cast(pa.large_binary() if is_text(kind) else pa.int64(), safe=False)


def _offsets(lengths: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
    if lengths is None:
        return None
    offsets = np.zeros(lengths.size + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _row_of_value(array: pa.Array, index: int) -> int:
    """Row of the `index`-th value that is not null (within lists, where it is a list column)."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_list(array.type):
        inner = _row_of_value(array.flatten(), index)
        return int(pc.list_parent_indices(array)[inner].as_py())
    return int(np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))[index])
