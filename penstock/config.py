"""Everything that a user may write in a job, as frozen, validated data.

`Job` is the root. Unknown keys are refused with a suggestion (`parse_job`). Nothing here reads a file of data, opens a
device or imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from penstock.config_errors import explain
from penstock.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Config(BaseModel):
    """Base of all configuration: frozen, no unknown keys, errors as `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise explain(error, type(self), fields) from None

    # Without this mark pydantic would call __init__ for nested fields, and their errors would lose their path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


# --- embedding tables -------------------------------------------------------------------------------------------------


class Schedule(Config):
    """Learning-rate factor as a function of the step: linear warm-up from 0, then decay to `end_factor`."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Step s of the warm-up uses (s + 1) / warmup_steps of the rate."""
    decay: Literal["constant", "linear", "cosine", "exponential"] = "constant"
    decay_steps: PositiveInt | None = None
    """Steps of the decay, counted from the end of the warm-up; required unless `decay` is constant."""
    end_factor: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Factor reached after `decay_steps`, and kept."""

    def factor(self, step: int) -> float:
        """Factor of the learning rate at `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant" or self.decay_steps is None:
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / self.decay_steps)
        if self.decay == "linear":
            return 1.0 - (1.0 - self.end_factor) * done
        if self.decay == "cosine":
            return self.end_factor + (1.0 - self.end_factor) * 0.5 * (
                1.0 + math.cos(math.pi * done)
            )
        return float(self.end_factor**done)

    @model_validator(mode="after")
    def _decay_needs_steps(self) -> Schedule:
        if self.decay != "constant" and self.decay_steps is None:
            raise ValueError(f"decay {self.decay!r} needs decay_steps")
        return self


class SGD(Config):
    """w -= lr * (g + weight_decay * w)."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: PositiveFloat = 0.05
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient of the rows that a batch touches."""
    schedule: Schedule = Schedule()


class Adagrad(Config):
    """s += g * g; w -= lr * g / (sqrt(s) + eps), as torch.optim.Adagrad."""

    kind: Literal["adagrad"] = "adagrad"
    learning_rate: PositiveFloat = 0.02
    eps: PositiveFloat = 1e-8
    initial_accumulator: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient of the rows that a batch touches."""
    schedule: Schedule = Schedule()


class RowWiseAdagrad(Config):
    """One accumulator a row: s += mean(g * g); w -= lr * g / (sqrt(s) + eps)."""

    kind: Literal["row_wise_adagrad"] = "row_wise_adagrad"
    learning_rate: PositiveFloat = 0.02
    eps: PositiveFloat = 1e-8
    initial_accumulator: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient of the rows that a batch touches."""
    schedule: Schedule = Schedule()


class Adam(Config):
    """Lazy Adam, as torch.optim.SparseAdam: only touched rows decay; bias correction by the table's step."""

    kind: Literal["adam"] = "adam"
    learning_rate: PositiveFloat = 1e-3
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """L2 penalty, added to the gradient of the rows that a batch touches."""
    schedule: Schedule = Schedule()


Optimizer = Annotated[SGD | Adagrad | RowWiseAdagrad | Adam, Field(discriminator="kind")]


class Uniform(Config):
    """Uniform in [-bound, bound)."""

    kind: Literal["uniform"] = "uniform"
    bound: PositiveFloat = 0.05


class Normal(Config):
    """Bell-shaped with mean 0: the sum of twelve uniform numbers, so within 6 standard deviations."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.01


class Constant(Config):
    """The same value in every column."""

    kind: Literal["constant"] = "constant"
    value: Annotated[float, Field(allow_inf_nan=False)] = 0.0


Initializer = Annotated[Uniform | Normal | Constant, Field(discriminator="kind")]

EmbeddingDim = Annotated[int, Field(ge=1, le=4096)]


class TableConfig(Config):
    """One embedding table: rows by 64-bit key, unbounded. Many features may share it."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_.\-]+$")]
    dim: EmbeddingDim = 16
    """Columns of the value, without optimizer state."""
    optimizer: Optimizer = Field(default_factory=RowWiseAdagrad)
    initializer: Initializer = Field(default_factory=Uniform)
    """First value of a row: a pure function of (seed, table, key, column)."""


class FeatureConfig(Config):
    """One categorical input: which table it reads and how a sample's keys become one vector."""

    name: Annotated[str, Field(min_length=1)]
    table: str
    pooling: Literal["sum", "mean"] = "sum"
    """An empty bag pools to zeros."""


# --- data -------------------------------------------------------------------------------------------------------------


class FileSource(Config):
    """Fields common to all sources that are files."""

    path: str | tuple[str, ...]
    """Files, directories or globs (`day_*.parquet`), local or of any pyarrow file system (`s3://bucket/key`).

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
    """Type by column name or glob; a column without one: label and numeric columns float64, others string."""
    on_malformed_row: Literal["fail", "quarantine"] = "fail"
    """A row with the wrong number of fields or a value that is not of its type.

    `fail` stops with file:line; `quarantine` leaves the row out, counts it and appends it to quarantine.jsonl in the run.
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
    """64-bit hash (XXH64) of strings, or of the decimal text of integers; `buckets` folds it into [0, buckets)."""

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
    """Categorical inputs: each matching column becomes a feature of its name. List columns become bags of many keys."""

    columns: tuple[str, ...]
    """Names or globs (`C*`)."""
    table: str | None = None
    """The table that all of them share; null: a table each, named like the column, of `table_defaults`."""
    pooling: Literal["sum", "mean"] = "sum"
    missing: Literal["empty"] | Int64 = "empty"
    """What a null reads as: an empty bag, or this key."""
    transforms: tuple[Annotated[Hash | Hex, Field(discriminator="kind")], ...] = ()
    """Applied in order; string columns need one."""


class Label(Config):
    """What the model predicts: a column of 0 and 1, or of numbers with a threshold."""

    column: str
    at_least: float | None = None
    """The label is 1 where the column is at least this; null: the column must hold 0 and 1 alone."""


class Shuffle(Config):
    """Rows are shuffled within windows, in an order that is a pure function of (seed, epoch, window)."""

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
    """Column of timestamps, dates or integers (then milliseconds since 1970 UTC)."""
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


# --- model and training -----------------------------------------------------------------------------------------------


class DLRMConfig(Config):
    """Bottom MLP on numbers, pairwise dot products with the embeddings, top MLP (arXiv:1906.00091)."""

    kind: Literal["dlrm"] = "dlrm"
    bottom: tuple[PositiveInt, ...] = (64, 32)
    """Hidden widths of the bottom MLP; its output has the embedding dim."""
    top: tuple[PositiveInt, ...] = (128, 64)
    """Hidden widths of the top MLP; its output is one logit."""


class DCNConfig(Config):
    """DCN-v2: cross layers beside a deep MLP (arXiv:2008.13535)."""

    kind: Literal["dcn_v2"] = "dcn_v2"
    cross_layers: PositiveInt = 3
    low_rank: PositiveInt | None = None
    """Rank of the cross matrices; null: full."""
    deep: tuple[PositiveInt, ...] = (128, 64)


class CustomModel(Config):
    """A module of the user's: `factory(num_numeric=..., feature_dims=(...), **arguments)` returns it.

    Its `forward(dense [B, num_numeric], embeddings [B, sum of feature_dims])` returns logits [B].
    """

    kind: Literal["custom"] = "custom"
    factory: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]
    """`module:name` of a class or function on the Python path."""
    arguments: Mapping[str, Any] = {}


Model = Annotated[DLRMConfig | DCNConfig | CustomModel, Field(discriminator="kind")]


class DenseOptimizer(Config):
    """Optimizer of the model's dense parameters, from torch.optim."""

    kind: Literal["adam", "adamw", "sgd", "adagrad"] = "adam"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0
    momentum: Probability = 0.0
    """SGD alone."""
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self) -> DenseOptimizer:
        if self.momentum and self.kind != "sgd":
            raise ValueError(
                f"momentum {self.momentum} has no effect on {self.kind}; remove it or use kind sgd"
            )
        return self


class CheckpointConfig(Config):
    """When checkpoints are written and how many are kept."""

    every_steps: PositiveInt | None = None
    """null: at the end and on interruption alone."""
    keep_last: PositiveInt = 2


class TrainingConfig(Config):
    """How the job is trained."""

    batch_size: PositiveInt = 1024
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    optimizer: DenseOptimizer = DenseOptimizer()
    clip_gradient_norm: PositiveFloat | None = None
    """Largest L2 norm of the dense gradients; null: no clipping."""
    evaluate_every_steps: PositiveInt | None = None
    """null: at the end alone."""
    evaluation_batch_size: PositiveInt = 8192
    log_every_steps: PositiveInt = 100
    checkpoint: CheckpointConfig = CheckpointConfig()
    threads: PositiveInt | None = None
    """Threads of torch and of the host store, each; null: the cores this process may use."""
    seed: Int64 = 0


class TableDefaults(Config):
    """Configuration of the tables that features imply."""

    dim: EmbeddingDim = 16
    optimizer: Optimizer = Field(default_factory=RowWiseAdagrad)
    initializer: Initializer = Field(default_factory=Uniform)


class Job(Config):
    """The whole description of a run."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_.\-]+$")] = "job"
    data: DataConfig
    features: tuple[FeatureColumns, ...] = ()
    tables: tuple[TableConfig, ...] = ()
    """Tables that need more than `table_defaults`; a feature refers to one by name."""
    table_defaults: TableDefaults = TableDefaults()
    model: Model = Field(default_factory=DLRMConfig)
    training: TrainingConfig = TrainingConfig()


def parse_job(fields: Mapping[str, Any], origin: str = "job") -> Job:
    """Validates the fields of a job.

    Args:
      fields: what YAML or a program gave.
      origin: named in errors, for instance the file's path.

    Raises:
      ConfigError: one line for each wrong field: path, value, what is allowed, the nearest known key.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{origin}: expected a mapping of fields, got {type(fields).__name__}")
    try:
        return Job.model_validate(fields)
    except ValidationError as error:
        raise explain(error, Job, fields, origin) from None
