"""What is read of a source, and as what: splits, columns, transforms."""

from __future__ import annotations

import math
from datetime import date
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from penstock.config.base import MAY_CHANGE, Config, FiniteFloat, Fraction, Int64, PositiveInt
from penstock.config.labels import Label, LabelOrLabels, check_labels
from penstock.config.streams import Source
from penstock.config.tables import Pooling
from penstock.errors import ConfigError

TimeUnit: TypeAlias = Literal["s", "ms", "us", "ns"]


class FractionSplit(Config):
    """The last `evaluation` of the rows, in the order of reading, is held out."""

    by: Literal["fraction"] = "fraction"
    evaluation: Fraction = 0.2


class TimeSplit(Config):
    """Rows with an event time at or after `at` are held out; needs `event_time`."""

    by: Literal["time"] = "time"
    at: int | str
    """Milliseconds since 1970 UTC, or ISO 8601 (`2026-01-31T00:00:00Z`)."""

    @field_validator("at", mode="before")
    @classmethod
    def _moment_of_yaml(cls, at: Any) -> Any:
        # YAML reads ISO 8601 without quotation marks as a moment.
        return at.isoformat() if isinstance(at, date) else at


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


class Bucketize(Config):
    """Number of boundaries at or below a number: 0 below the first, then 1, 2, ...

    Must be the first transform, of a column of numbers, which may be a numeric input as well.
    """

    kind: Literal["bucketize"] = "bucketize"
    boundaries: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]
    """Ascending."""

    @model_validator(mode="after")
    def _ascending(self) -> Bucketize:
        for low, high in pairwise(self.boundaries):
            if low >= high:
                raise ValueError(f"boundaries must ascend, but {high:g} follows {low:g}")
        return self


class Log(Config):
    """sign(x) * log(1 + |x|)."""

    kind: Literal["log"] = "log"


class Clip(Config):
    """Limits a number to [low, high]; null: no limit on that side."""

    kind: Literal["clip"] = "clip"
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _low_is_low(self) -> Clip:
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        if not low <= high:
            raise ValueError(f"low {low:g} is not at or below high {high:g}; mend one of them")
        return self


class Scale(Config):
    """(x - offset) * factor."""

    kind: Literal["scale"] = "scale"
    offset: FiniteFloat = 0.0
    factor: FiniteFloat = 1.0


class FillNumber(Config):
    """A missing number (null or NaN) reads as `value`."""

    policy: Literal["fill"] = "fill"
    value: FiniteFloat = 0.0


class FailOnMissing(Config):
    """A missing number (null or NaN) stops the run with the file, row and column."""

    policy: Literal["fail"] = "fail"


class NumericColumns(Config):
    """Numeric inputs: the columns whose names match, in the order of the source."""

    columns: tuple[str, ...]
    """Names or globs (`I*`).

    A list column without `width` reads as its value where it holds one and as missing where it is
    empty; two values stop the run.
    """
    width: Annotated[int, Field(gt=0, le=1 << 16)] | None = None
    """Each row of a column is a vector, a list of this many numbers, each of which is an input. A
    null or empty list reads as that many missing numbers; one of another length is malformed. null:
    columns of lists of a fixed size (Arrow) have that width, others hold one number a row.
    """
    missing: Annotated[FillNumber | FailOnMissing, Field(discriminator="policy")] = Field(
        default_factory=FillNumber
    )
    transforms: tuple[Annotated[Log | Clip | Scale, Field(discriminator="kind")], ...] = ()
    """Applied in order, after `missing`."""


KeyTransform = Annotated[Hash | Hex | Bucketize, Field(discriminator="kind")]


class FeatureColumns(Config):
    """Categorical inputs: each matching column becomes a feature of its name.

    List columns become bags of many keys, or sequences where `pooling` is that.
    """

    columns: tuple[str, ...]
    """Names or globs (`C*`)."""
    table: str | None = None
    """The table that all of them share; null: a table each, named like the column, of
    `table_defaults`.
    """
    pooling: Pooling = "sum"
    max_keys: PositiveInt | None = None
    """Of a longer list only this many keys are read; null: all. Required for the pooling
    `sequence`, as the number of its positions.
    """
    keep: Literal["first", "last"] = "first"
    """Which ones `max_keys` keeps."""
    weights: str | None = None
    """A column of numbers, one for each key: of lists as long as the keys', or of one number a row
    where there is one key a row. Each key's vector is multiplied by its weight; see `pooling`.
    """
    missing: Literal["empty"] | Int64 = "empty"
    """What a null reads as: an empty bag, or this key."""
    transforms: tuple[KeyTransform, ...] = ()
    """Applied in order; string columns need one, unless `separator` is given."""
    separator: Annotated[str, Field(min_length=1, max_length=16)] | None = None
    """The columns are texts of keys with this between them (`Action|Comedy`), and read as lists of
    them. Nothing between two separators is no key; a text without a key is missing. Without
    `transforms` the keys are decimal integers.
    """

    @property
    def buckets_numbers(self) -> bool:
        """Whether the columns are numbers that the first transform puts into buckets."""
        return bool(self.transforms) and isinstance(self.transforms[0], Bucketize)

    @model_validator(mode="after")
    def _bucketize_is_first(self) -> FeatureColumns:
        if any(isinstance(transform, Bucketize) for transform in self.transforms[1:]):
            raise ValueError("bucketize reads numbers: put it first, and once")
        return self

    @model_validator(mode="after")
    def _separated_keys_are_text(self) -> FeatureColumns:
        if self.separator is not None and self.buckets_numbers:
            raise ValueError("separator splits text, and bucketize reads numbers; remove one")
        return self

    @model_validator(mode="after")
    def _sequences_have_positions(self) -> FeatureColumns:
        if self.pooling == "sequence" and self.max_keys is None:
            raise ValueError("pooling 'sequence' needs max_keys, its number of positions")
        return self


class CrossedFeature(Config):
    """A feature whose key stands for the values of several columns together.

    The key is a 64-bit hash of the values in the order of `columns`: integers as they are, texts
    by their bytes. A null is a value like any other. Columns hold one value a row; they may be
    features of their own as well.
    """

    name: Annotated[str, Field(min_length=1)]
    columns: Annotated[tuple[str, ...], Field(min_length=2)]
    """Names of columns of integers or text, two or more."""
    table: str | None = None
    """null: a table of its own, named like the feature, of `table_defaults`."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    buckets: PositiveInt | None = None
    """Folds the key into [0, buckets)."""


class Negatives(Config):
    """Negative samples, for a log that holds positives alone.

    Each row is one sample of label 1, and gives `per_positive` samples of label 0 in which
    `columns` are those of other rows of its shuffle block, all else its own.
    """

    per_positive: PositiveInt
    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the item's columns, taken together from one other row: features (their weights and
    crosses with them follow), numeric columns. The first one names the item, by an integer or text
    a row: a negative never has the item of its own row.
    """
    user: str | Literal[False] | None = None
    """Column that names the user, by an integer or text a row; it need not be an input. A negative
    never has an item that the row's user has in a row of the block. A null is nobody.

    null: the feature of one key a row that is not the item's, if there is only one. false: the
    item of the row itself alone is spared.
    """
    candidates: Literal["popularity", "uniform"] = "popularity"
    """`popularity`: items as often as the block has them; `uniform`: each different item of the
    block as likely as any other.
    """

    @model_validator(mode="after")
    def _no_column_twice(self) -> Negatives:
        for name in self.columns:
            if self.columns.count(name) > 1:
                raise ValueError(f"columns names {name!r} twice; remove one")
        if self.user in self.columns:
            raise ValueError(f"user {self.user!r} is one of the item's columns; name another one")
        return self


class Shuffle(Config):
    """Rows are shuffled within blocks: a pure function of (seed, epoch, block)."""

    block_rows: Annotated[int, Field(ge=0, le=2**63 - 1)] = 65_536
    """0: no shuffling. `negatives` are drawn among the rows of a block (0: among 8,192)."""
    block_bytes: Annotated[int, Field(gt=0, le=2**63 - 1), MAY_CHANGE] = 1 << 30
    """Memory of a block's decoded rows. One that would be larger (many columns, long lists) has
    fewer rows: as many whole batches as fit, at least one.
    """


class MostMalformed(Config):
    """How many malformed rows may be left out; the run stops before the batch that has more."""

    rows: Annotated[int, Field(ge=0)] | None = None
    """In all epochs; null: any number."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of the rows read, once 1,000 have been; null: any."""

    @model_validator(mode="after")
    def _says_something(self) -> MostMalformed:
        if self.rows is None and self.share is None:
            raise ValueError("give `rows`, `share` or both; to allow any number leave it out")
        return self


LANES = 8
"""Where `data.lanes` is not set: lanes of data whose samples teach one by one."""


def check_lanes(ranks: int, lanes: int) -> None:
    """Refuses more ranks than there are lanes.

    Raises:
      ConfigError: there are.
    """
    if ranks > lanes:
        raise ConfigError(
            f"{ranks} ranks, but the data is divided into {lanes} lanes, of which each rank "
            f"reads some; start at most {lanes} ranks, or set data.lanes for a new run"
        )


_IS_POSITIVE = Label(column="positive")
"""What is predicted where rows are positives and negatives are drawn; no column of the source."""


class DataConfig(Config):
    """What is read, and as what."""

    source: Source
    evaluation_source: Annotated[Source | None, MAY_CHANGE] = None
    """Held-out data of its own; excludes `split`."""
    split: Split | None = None
    """Part of `source` that is held out."""
    label: LabelOrLabels | None = None
    """One label, or a list of them for models that predict several; required unless all rows are
    positives: with `negatives`, or for the model two_tower.
    """
    negatives: Negatives | None = None
    """For logs of positives alone, in place of `label`."""
    weight: str | None = None
    """Column of sample weights (>= 0)."""
    event_time: str | None = None
    """Column of timestamps, dates, ISO 8601 text or integers (then `event_time_unit` since 1970
    UTC)."""
    event_time_unit: TimeUnit = "ms"
    """Unit of an integer `event_time`."""
    event_time_ahead_s: PositiveInt = 10 * 366 * 86_400
    """A row of the training part whose event time is later than this many seconds after 99 in 100
    of the rows read together with it is malformed, whatever `on_malformed_row` says: it is left
    out, counted and appended to quarantine.jsonl in the run.
    """
    event_time_jump_s: PositiveInt = 86_400
    """Seconds by which one batch may move the time of the rows ahead, where tables have eviction in
    seconds; a batch that is later is believed once 8 in a row are. See
    docs/admission_and_eviction.md.
    """
    most_malformed: Annotated[MostMalformed | None, MAY_CHANGE] = None
    """Of the training part, where malformed rows are left out. null: any number."""
    numeric: tuple[NumericColumns, ...] = ()
    shuffle: Shuffle = Shuffle()
    lanes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Parts into which the training data is divided, each with files (or pieces of files) and a
    shuffling of its own; a batch has samples of all. The samples of a batch, and their order, do
    not depend on how many processes train: as many as there are lanes at most. null: 8; where
    what a row teaches depends on others (`negatives`, batch_norm, dice, two_tower) 1, as each lane
    would be a batch, or a block, of its own.
    """
    policy: Literal["ordered", "elastic"] = "ordered"
    """Who reads what. `ordered`: each lane has its own pieces of files, so that no bit of a run
    depends on who reads how fast. `elastic`: lanes take pieces as they come to them and give to a
    batch what they have, so that a slow one has fewer rows; the order that came about is in
    ledger.db in the run, and is followed again where the run goes on from an earlier checkpoint.
    """
    replay: str | None = None
    """Run folder of another run of this data, whose order a new run with `elastic` follows: the
    same samples in each batch, with the same batch_size, block_rows, lanes and seed.
    """

    @property
    def labels(self) -> tuple[Label, ...]:
        """What is predicted, in the order of `Batch.labels`."""
        if self.label is None:
            return (_IS_POSITIVE,)
        return (self.label,) if isinstance(self.label, Label) else self.label

    @property
    def malformed_limits(self) -> tuple[int | None, float | None]:
        """`most_malformed` in rows, and as a share; None: any."""
        most = self.most_malformed
        return (None, None) if most is None else (most.rows, most.share)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns that labels are read from; none where all rows are positives."""
        return () if self.label is None else tuple(label.column for label in self.labels)

    @model_validator(mode="after")
    def _labels_have_names_of_their_own(self) -> DataConfig:
        check_labels(self.labels)
        return self

    @model_validator(mode="after")
    def _labels_from_one_place(self) -> DataConfig:
        if self.label is not None and self.negatives is not None:
            raise ValueError(
                "`negatives` takes every row as a positive, so there is no `label`; remove one of "
                "them"
            )
        return self

    @model_validator(mode="after")
    def _one_held_out_part(self) -> DataConfig:
        if self.split is not None and self.evaluation_source is not None:
            raise ValueError("give `split` or `evaluation_source`, not both")
        if isinstance(self.split, TimeSplit) and self.event_time is None:
            raise ValueError("split by time needs `event_time`, the column of the row's time")
        return self

    @model_validator(mode="after")
    def _order_of_reading(self) -> DataConfig:
        if self.policy == "elastic" and self.negatives is not None:
            raise ValueError(
                "negatives are drawn among the rows that a lane gives to a block, which policy "
                "elastic makes as few as they come; set policy: ordered"
            )
        if self.replay is not None and self.policy != "elastic":
            raise ValueError("`replay` is for policy elastic: ordered needs none; remove it")
        return self
