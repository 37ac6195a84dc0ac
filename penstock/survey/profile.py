"""Looks at data before there is a job: what each column holds, in one pass and bounded memory.

A `ColumnProfile` takes the chunks of one column; a `DataProfile` is what came of all of them.
Knows columns and values; what they are good for is decided in `penstock.survey.roles`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from penstock.config import Hash
from penstock.data.columns.checks import is_text
from penstock.data.columns.transforms import is_list, one_array, read_keys
from penstock.data.plan.counting import Progress
from penstock.data.source import Chunk, Extent, Source
from penstock.survey.sketches import Quantiles, ValueCounts, ValueSummary, affordable_values
from penstock.survey.text_kinds import TextKinds

ColumnKind: TypeAlias = Literal["integer", "float", "time", "text", "unread"]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_QUANTILE_SAMPLE = 1 << 15
_PLACES = 64
"""A sample is read from the beginnings of about so many extents."""
_NAMES_A_CHUNK = 32


@dataclass(frozen=True)
class NumberSummary:
    """How the numbers of a column are spread; infinite and missing ones are left out."""

    minimum: float
    maximum: float
    mean: float
    deviation: float
    """Standard deviation."""
    quantiles: tuple[float, ...]
    """At `QUANTILES`."""
    is_exact: bool
    """Whether the quantiles are of all numbers, not of a sample."""
    infinite: int
    descents: float
    """Share of the numbers that are smaller than the one before."""


@dataclass(frozen=True)
class ColumnSummary:
    """What is known of one column."""

    name: str
    type: str
    """As the file has it."""
    kind: ColumnKind
    """What its values are, of lists what is in them. Of text files, the narrowest reading."""
    rows: int
    missing: int
    """Rows without a value: null, NaN, and the empty list where no list holds two."""
    values: ValueSummary
    hottest: str
    """The most frequent value."""
    numbers: NumberSummary | None
    """Of integers, floats, and times in ms since 1970 UTC."""
    lengths: NumberSummary | None
    """Of lists that are not null."""
    null_texts: tuple[str, ...] = ()
    """Texts that stand for a missing number."""
    hex_digits: int | None = None
    """Width, if every value is a hexadecimal number of that many digits."""

    @property
    def longest(self) -> int:
        """Values of the longest list; 1 where there are no lists."""
        return 1 if self.lengths is None else int(self.lengths.maximum)


@dataclass(frozen=True)
class DataProfile:
    """What is known of the files of a source."""

    paths: tuple[str, ...]
    rows: int
    """Rows looked at."""
    is_whole: bool
    """Whether these are all rows."""
    columns: tuple[ColumnSummary, ...]
    counts: tuple[ValueCounts, ...]
    """Of each column."""
    max_values: int
    """Different values of a column up to which figures are exact."""

    def __getitem__(self, name: str) -> ColumnSummary:
        """The column of that name."""
        return next(column for column in self.columns if column.name == name)


def profile_source(
    source: Source,
    *,
    max_rows: int | None = None,
    as_text: Container[str] = (),
    progress: Progress = lambda rows, share: None,
    watch: Callable[[Chunk], None] = lambda chunk: None,
) -> DataProfile:
    """Reads a source once, all columns.

    Args:
      source: what to read.
      max_rows: look at no more rows than this, from the beginnings of extents that are spread
        evenly over the files; None: at all.
      as_text: columns that are text because the source has no types (CSV, TSV): say what they may
        be read as.
      progress: told after each chunk.
      watch: given each chunk before its rows are looked at.

    Raises:
      DataError: a file cannot be read.

    Effects: keeps the counts that `affordable_values` allows, 1 MiB a column, and one chunk.
    """
    names = source.schema.names
    most = affordable_values(len(names))
    columns = [ColumnProfile(name, source.schema.field(name).type, most) for name in names]
    rows = 0
    reach = Reach(source)
    for extent, chunk in spread_chunks(source, names, max_rows):
        watch(chunk)
        for column in columns:
            column.add(chunk.table.column(column.name))
        rows += chunk.table.num_rows
        progress(rows, reach.share(extent, chunk) if max_rows is None else rows / max_rows)
    return DataProfile(
        paths=tuple(source.paths),
        rows=rows,
        is_whole=max_rows is None or rows < max_rows,
        columns=tuple(column.summary(as_text=column.name in as_text) for column in columns),
        counts=tuple(column.counts for column in columns),
        max_values=most,
    )


def spread_chunks(
    source: Source, columns: Sequence[str], max_rows: int | None
) -> Iterator[tuple[Extent, Chunk]]:
    """Chunks of a source in order: all, or `max_rows` rows from the beginnings of extents.

    The extents are spread evenly over the files. Where they are too short, the sample has fewer
    rows.
    """
    extents = source.extents()
    if max_rows is None:
        for extent in extents:
            for chunk in source.read(extent, columns):
                yield extent, chunk
        return
    # Extents of columnar files have at least some 65,536 rows, unless files are small.
    places = min(len(extents), max(_PLACES, max_rows >> 15))
    chosen = np.linspace(0, len(extents) - 1, places).astype(int)
    left = max_rows
    for number, place in enumerate(chosen):
        quota = math.ceil(left / (places - number))
        for chunk in source.read(extents[place], columns):
            taken = min(quota, chunk.table.num_rows)
            yield extents[place], chunk._replace(table=chunk.table.slice(0, taken))
            quota -= taken
            left -= taken
            if not quota:
                break


class Reach:
    """How far reading has come, in the unit in which the extents of a source are measured."""

    def __init__(self, source: Source) -> None:
        self._before: dict[Extent, int] = {}
        total = 0
        for extent in source.extents():
            self._before[extent] = total
            total += extent.stop - extent.start
        # A stream or a compressed file ends nobody knows where.
        self._total = total if total < 2**62 else None

    def share(self, extent: Extent, chunk: Chunk) -> float | None:
        """Share of the source that is read after `chunk`."""
        if self._total is None or not chunk.table.num_rows:
            return None
        span = chunk.place.span(0, chunk.table.num_rows)
        return min(1.0, (self._before[extent] + span.stop - extent.start) / self._total)


class ColumnProfile:
    """Takes the chunks of one column."""

    def __init__(self, name: str, kind: pa.DataType, max_values: int) -> None:
        self.name = name
        self.type = kind
        self.counts = ValueCounts(max_values)
        inner = kind.value_type if is_list(kind) else kind
        self._kind = _kind_of(inner.value_type if pa.types.is_dictionary(inner) else inner)
        self._rows = self._missing = self._empty = 0
        self._numbers: NumberStatistics | None = NumberStatistics()
        self._lengths = NumberStatistics()
        self._texts = TextKinds()
        self._names: dict[int, str] = {}

    def add(self, column: pa.ChunkedArray) -> None:
        """Takes the next rows."""
        array = one_array(column)
        self._rows += len(array)
        self._missing += array.null_count
        array = array.drop_null()
        if is_list(array.type):
            lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
            self._lengths.add(lengths.astype(np.float64))
            self._empty += int((lengths == 0).sum())
            array = array.flatten().drop_null()
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode().drop_null()
        if self._kind == "text":
            self._add_texts(array)
        elif self._kind != "unread":
            self._add_numbers(array)

    def summary(self, *, as_text: bool = False) -> ColumnSummary:
        """What is known by now."""
        kind = self._kind
        null_texts: tuple[str, ...] = ()
        # Of text in a typed file, only times are read as what they say.
        if self._texts.kind is not None and (as_text or self._texts.kind == "time"):
            kind = self._texts.kind
        marked = self._texts.null_texts
        if as_text and kind != "text" and marked:
            null_texts = tuple(sorted(marked))
        else:
            self._add_null_texts()
        values = self.counts.summary()
        lengths = self._lengths.summary()
        is_scalar = lengths is None or lengths.maximum <= 1
        return ColumnSummary(
            name=self.name,
            type=str(self.type),
            kind=kind,
            rows=self._rows,
            missing=self._missing
            + (self._empty if is_scalar else 0)
            + (marked.total() if null_texts else 0),
            values=values,
            hottest=self._name(values.hottest, kind),
            numbers=None
            if self._numbers is None or kind in {"text", "unread"}
            else self._numbers.summary(),
            lengths=lengths,
            null_texts=null_texts,
            hex_digits=self._texts.hex_digits if kind == "text" else None,
        )

    def _add_texts(self, array: pa.Array) -> None:
        array = array.cast(pa.large_binary() if _is_binary(array.type) else pa.large_string())
        if pa.types.is_large_string(array.type):
            numbers = self._texts.read(array)
            if self._numbers is not None and numbers is not None:
                self._numbers.add(numbers)
            elif numbers is None:
                self._numbers = None
        # What may stand for null is counted in the end, when it is known whether it does.
        if self._texts.null_texts:
            array = array.filter(
                pc.invert(pc.is_in(array, pa.array([*self._texts.null_texts], array.type)))
            )
        hashes = read_keys(array, (Hash(),), None).values
        self.counts.add(hashes)
        self._remember(hashes, array)

    def _add_numbers(self, array: pa.Array) -> None:
        if self._kind == "time":
            array = array.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
        numbers = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        if self._kind == "float":
            is_missing = np.isnan(numbers)
            self._missing += int(is_missing.sum())
            # -0.0 and 0.0 are one value.
            numbers = numbers[~is_missing] + 0.0
            self.counts.add(numbers.view(np.int64))
        else:
            self.counts.add(read_keys(array, (), None).values)
        if self._numbers is not None:
            self._numbers.add(numbers)

    def _add_null_texts(self) -> None:
        """They are texts like others."""
        for text, count in self._texts.null_texts.items():
            key = read_keys(pa.array([text]), (Hash(),), None).values
            self.counts.add(key, np.array([count]))
            self._names[int(key[0])] = text
        self._texts.null_texts.clear()

    def _remember(self, hashes: NDArray[np.int64], array: pa.Array) -> None:
        """Keeps the texts of the most frequent values of a chunk.

        The most frequent one of all is among them in some chunk, unless it has less than 1 in
        `_NAMES_A_CHUNK` of the accesses and very bad luck.
        """
        keys, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        for place in np.argsort(-counts, kind="stable")[:_NAMES_A_CHUNK]:
            key = int(keys[place])
            if key not in self._names and len(self._names) < 1 << 14:
                text = array[int(first[place])].as_py()
                self._names[key] = text if isinstance(text, str) else repr(text)

    def _name(self, value: int | None, kind: ColumnKind) -> str:
        if value is None:
            return ""
        if self._kind == "text":
            return self._names.get(value, "(a text)")
        if self._kind == "float":
            return f"{np.int64(value).view(np.float64):g}"
        if kind == "time":
            return str(np.datetime64(value, "ms"))
        # Bits above the sign of unsigned numbers were kept as they are.
        return str(value % 2**64 if pa.types.is_uint64(self.type) else value)


class NumberStatistics:
    """Takes numbers; NaN must not be among them."""

    def __init__(self) -> None:
        self._quantiles = Quantiles(_QUANTILE_SAMPLE)
        self._count = self._infinite = self._descents = 0
        self._low, self._high = math.inf, -math.inf
        self._mean = self._spread = 0.0
        self._last = -math.inf

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Takes the next numbers [n]."""
        finite = np.isfinite(numbers)
        if not finite.all():
            self._infinite += int((~finite).sum())
            numbers = numbers[finite]
        if not numbers.size:
            return
        self._quantiles.add(numbers)
        self._low = min(self._low, float(numbers.min()))
        self._high = max(self._high, float(numbers.max()))
        self._descents += int((np.diff(numbers, prepend=self._last) < 0).sum())
        self._last = float(numbers[-1])
        # Chan's rule joins the means and sums of squares of two parts. Huge numbers overflow to
        # an infinite deviation, which is true of them.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(numbers.mean())
            apart, count = mean - self._mean, self._count + numbers.size
            self._spread += float(((numbers - mean) ** 2).sum())
            self._spread += apart * apart * self._count * numbers.size / count
            self._mean += apart * numbers.size / count
        self._count = count

    def summary(self) -> NumberSummary | None:
        """What is known by now; None: no number has come."""
        if not self._count and not self._infinite:
            return None
        count = max(self._count, 1)
        return NumberSummary(
            minimum=self._low,
            maximum=self._high,
            mean=self._mean,
            deviation=math.sqrt(self._spread / count) if self._spread >= 0 else math.inf,
            quantiles=tuple(self._quantiles.at(QUANTILES)) or (math.nan,) * len(QUANTILES),
            is_exact=self._quantiles.is_exact,
            infinite=self._infinite,
            descents=self._descents / count,
        )


def _kind_of(kind: pa.DataType) -> ColumnKind:
    types = pa.types
    if types.is_integer(kind) or types.is_boolean(kind):
        return "integer"
    if types.is_floating(kind) or types.is_decimal(kind):
        return "float"
    if types.is_timestamp(kind) or types.is_date(kind):
        return "time"
    return "text" if is_text(kind) else "unread"


def _is_binary(kind: pa.DataType) -> bool:
    return not (pa.types.is_string(kind) or pa.types.is_large_string(kind))
