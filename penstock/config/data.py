"""What is read, and as what: sources, splits, columns, transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from penstock.config.base import Config, Fraction, Int64, PositiveInt
from penstock.config.tables import Pooling

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns"]


class FileSource(Config):
    """Fields common to all sources that are files."""

    path: str | tuple[str, ...]
    """Files, directories or globs (`day_*.parquet`), local or of any pyarrow file system
    (`s3://bucket/key`).

    Files are read in the order given; those of one directory or glob in order of name.
    """


class ParquetSource(FileSource):
    """Parquet files of one schema."""

    format: Literal["parquet"] = "parquet"


class TextSource(FileSource):
    """CSV or TSV files, plain or gzip (`.gz`), without line breaks inside a value."""

    format: Literal["csv", "tsv"] = "csv"
    columns: tuple[str, ...] | None = None
    """Names of the columns of files without a header; null: the first line is the header.

    A name may stand for several: `I{1..13}` is I1, I2, ... I13.
    """
    types: Mapping[str, Literal["string", "int64", "float32", "float64"]] = {}
    """Type by column name or glob; a column without one: label, weight and numeric columns float64,
    event time int64, others string.
    """
    on_malformed_row: Literal["fail", "quarantine"] = "fail"
    """A row with the wrong number of fields or a value that is not of its type.

    `fail` stops with file:line; `quarantine` leaves the row out, counts it and appends it to
    quarantine.jsonl in the run.
    """


class SyntheticSource(Config):
    """Click log made by a known teacher, so that the best reachable AUC is known.

    Columns: click, event_time, n0..., c0..., teacher. Row r is a pure function of (seed, r).
    """

    format: Literal["synthetic"] = "synthetic"
    rows: PositiveInt = 400_000
    num_categorical: PositiveInt = 8
    num_numeric: Annotated[int, Field(ge=0)] = 4
    keys_per_feature: PositiveInt = 100_000
    exponent: Annotated[float, Field(gt=0, le=4)] = 1.2
    """Power-law exponent of the keys: the r-th most frequent key has weight r ** -exponent."""
    seed: Int64 = 0


Source = Annotated[ParquetSource | TextSource | SyntheticSource, Field(discriminator="format")]


class FractionSplit(Config):
    """The last `evaluation` of the rows, in the order of reading, is held out."""

    by: Literal["fraction"] = "fraction"
    evaluation: Fraction = 0.2


class TimeSplit(Config):
    """Rows with an event time at or after `at` are held out; needs `event_time`."""

    by: Literal["time"] = "time"
    at: int | str
    """Milliseconds since 1970 UTC, or ISO 8601 (`2026-01-31T00:00:00Z`)."""


class FileSplit(Config):
    """Files whose path matches the glob `evaluation` are held out."""

    by: Literal["file"] = "file"
    evaluation: str


Split = Annotated[FractionSplit | TimeSplit | FileSplit, Field(discriminator="by")]


class Hash(Config):
    """64-bit hash (XXH64) of strings, or of the decimal text of integers.

    `buckets` folds it into [0, buckets).
    """

    kind: Literal["hash"] = "hash"
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    buckets: PositiveInt | None = None


class Hex(Config):
    """Reads hexadecimal text of up to 16 digits as the key itself."""

    kind: Literal["hex"] = "hex"


class Log(Config):
    """sign(x) * log(1 + |x|)."""

    kind: Literal["log"] = "log"


class Clip(Config):
    """Limits a number to [low, high]; null: no limit on that side."""

    kind: Literal["clip"] = "clip"
    low: float | None = None
    high: float | None = None


class Scale(Config):
    """(x - offset) * factor."""

    kind: Literal["scale"] = "scale"
    offset: float = 0.0
    factor: float = 1.0


class FillNumber(Config):
    """A missing number (null or NaN) reads as `value`."""

    policy: Literal["fill"] = "fill"
    value: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class FailOnMissing(Config):
    """A missing number (null or NaN) stops the run with the file, row and column."""

    policy: Literal["fail"] = "fail"


class NumericColumns(Config):
    """Numeric inputs: the columns whose names match, in the order of the source."""

    columns: tuple[str, ...]
    """Names or globs (`I*`)."""
    missing: Annotated[FillNumber | FailOnMissing, Field(discriminator="policy")] = Field(
        default_factory=FillNumber
    )
    transforms: tuple[Annotated[Log | Clip | Scale, Field(discriminator="kind")], ...] = ()
    """Applied in order, after `missing`."""


class FeatureColumns(Config):
    """Categorical inputs: each matching column becomes a feature of its name.

    List columns become bags of many keys.
    """

    columns: tuple[str, ...]
    """Names or globs (`C*`)."""
    table: str | None = None
    """The table that all of them share; null: a table each, named like the column, of
    `table_defaults`.
    """
    pooling: Pooling = "sum"
    missing: Literal["empty"] | Int64 = "empty"
    """What a null reads as: an empty bag, or this key."""
    transforms: tuple[Annotated[Hash | Hex, Field(discriminator="kind")], ...] = ()
    """Applied in order; string columns need one."""


class Label(Config):
    """What the model predicts: a column of 0 and 1, or of numbers with a threshold."""

    column: str
    at_least: float | None = None
    """The label is 1 where the column is at least this; null: the column must hold 0 and 1
    alone.
    """


class Shuffle(Config):
    """Rows are shuffled within windows: a pure function of (seed, epoch, window)."""

    window_rows: Annotated[int, Field(ge=0)] = 65_536
    """0: no shuffling."""


class DataConfig(Config):
    """What is read, and as what."""

    source: Source
    evaluation_source: Source | None = None
    """Held-out data of its own; excludes `split`."""
    split: Split | None = None
    """Part of `source` that is held out."""
    label: Label
    weight: str | None = None
    """Column of sample weights (>= 0)."""
    event_time: str | None = None
    """Column of timestamps, dates, ISO 8601 text or integers (then `event_time_unit` since 1970
    UTC)."""
    event_time_unit: TimeUnit = "ms"
    """Unit of an integer `event_time`."""
    numeric: tuple[NumericColumns, ...] = ()
    shuffle: Shuffle = Shuffle()
    prefetch_batches: PositiveInt = 8
    """Batches assembled ahead of training; bounds the reader's memory."""
    reader_threads: PositiveInt = 2

    @model_validator(mode="after")
    def _one_held_out_part(self) -> DataConfig:
        if self.split is not None and self.evaluation_source is not None:
            raise ValueError("give `split` or `evaluation_source`, not both")
        if isinstance(self.split, TimeSplit) and self.event_time is None:
            raise ValueError("split by time needs `event_time`, the column of the row's time")
        return self
