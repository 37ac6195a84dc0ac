"""The job: how it is trained, and the root that joins data, tables, model and training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError, model_validator

from penstock.config.base import (
    Config,
    Int64,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Threads,
)
from penstock.config.data import CrossedFeature, DataConfig, FeatureColumns
from penstock.config.explain import explain
from penstock.config.models import CustomModel, DLRMConfig, Model, MultiTask, TwoTowerConfig
from penstock.config.tables import (
    Admission,
    EmbeddingDim,
    Eviction,
    Initializer,
    Optimizer,
    RowWiseAdagrad,
    Schedule,
    TableConfig,
    Uniform,
    ValueType,
)
from penstock.errors import ConfigError


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


class SliceConfig(Config):
    """Metrics of each of the most frequent values of a column, and of all other rows."""

    by: str
    """A column of integers or strings; it need not be a feature."""
    top: Annotated[int, Field(ge=1, le=100)] = 10
    """How many values get metrics of their own: the most frequent ones among the first 262,144
    held-out rows.
    """


class MetricsConfig(Config):
    """What an evaluation measures besides AUC, log loss, normalized entropy and calibration."""

    exact_auc: bool = False
    """Count every different score. Otherwise at most 2^20 are told apart, which is within 1e-4 of
    the exact AUC and exact below that number. Exact costs 20 bytes a different score.
    """
    grouped_auc: tuple[str, ...] = ()
    """Columns (user, session, query; integers or strings, features or not). For each, the mean
    over its values of the AUC among the rows of one value, weighted by their number (GAUC).
    """
    slices: tuple[SliceConfig, ...] = ()
    recall_at: tuple[PositiveInt, ...] = ()
    """Of the model two_tower: for each k, the share of the held-out positives whose item is among
    the k best of all items of the data, training part and held-out part.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns by which rows are grouped, each once."""
        return tuple(dict.fromkeys([*self.grouped_auc, *(one.by for one in self.slices)]))

    @model_validator(mode="after")
    def _no_column_twice(self) -> MetricsConfig:
        for field, names in (
            ("grouped_auc", list(self.grouped_auc)),
            ("slices", [one.by for one in self.slices]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{field} names column {name!r} twice; remove one")
        return self


class TrainingConfig(Config):
    """How the job is trained."""

    batch_size: Annotated[int, Field(gt=0, le=1 << 24)] = 1024
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    optimizer: DenseOptimizer = DenseOptimizer()
    clip_gradient_norm: PositiveFloat | None = None
    """Largest L2 norm of the dense gradients; null: no clipping."""
    evaluate_every_steps: PositiveInt | None = None
    """null: at the end alone."""
    evaluation_batch_size: Annotated[int, Field(gt=0, le=1 << 24)] = 8192
    metrics: MetricsConfig = MetricsConfig()
    log_every_steps: PositiveInt = 100
    checkpoint: CheckpointConfig = CheckpointConfig()
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")] = "cpu"
    """Where tables and model live: cpu, or a GPU, cuda or cuda:1. A checkpoint fits any."""
    threads: Threads | None = None
    """Threads of torch and of the host store, each; null: the cores this process may use."""
    seed: Int64 = 0
    deterministic: bool = False
    """Embedding updates have the same bits for any order of the samples of a batch, and on any
    device given equal gradients; slower. The number of threads never changes a bit of them. On a
    GPU torch's deterministic algorithms are used as well."""


class TableDefaults(Config):
    """Configuration of the tables that features imply."""

    dim: EmbeddingDim = 16
    dtype: ValueType = "float32"
    optimizer: Optimizer = Field(default_factory=RowWiseAdagrad)
    initializer: Initializer = Field(default_factory=Uniform)
    admission: Admission | None = None
    max_bytes: ByteSize | None = None
    """Of each table."""
    eviction: Eviction | None = None


class Job(Config):
    """The whole description of a run."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_.\-]+$")] = "job"
    data: DataConfig
    features: tuple[FeatureColumns, ...] = ()
    crosses: tuple[CrossedFeature, ...] = ()
    """Features from several columns; they come after the others, in this order."""
    tables: tuple[TableConfig, ...] = ()
    """Tables that need more than `table_defaults`; a feature refers to one by name."""
    table_defaults: TableDefaults = TableDefaults()
    model: Model = Field(default_factory=DLRMConfig)
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _labels_come_from_somewhere(self) -> Job:
        is_in_batch = isinstance(self.model, TwoTowerConfig)
        if self.data.label is None and self.data.negatives is None and not is_in_batch:
            raise ValueError(
                "data: give `label`, the column of what to predict, or, if every row is a "
                "positive, `negatives`"
            )
        return self

    @model_validator(mode="after")
    def _two_towers_learn_from_positives(self) -> Job:
        is_two_tower = isinstance(self.model, TwoTowerConfig)
        for label in self.data.labels if is_two_tower else ():
            if label.task != "binary" or label.missing != "fail":
                raise ValueError(
                    f"model two_tower learns from a binary label that no row lacks, and "
                    f"{label.title!r} is none; use at_least, or leave data.label out if every row "
                    "is a positive"
                )
        if self.training.metrics.recall_at and not is_two_tower:
            raise ValueError(
                "training.metrics.recall_at: only the model two_tower ranks all items; remove it"
            )
        return self

    @model_validator(mode="after")
    def _task_weights_are_of_labels(self) -> Job:
        if not isinstance(self.model, MultiTask | CustomModel):
            return self
        titles = [label.title for label in self.data.labels]
        for name in self.model.task_weights:
            if name not in titles:
                raise ValueError(
                    f"model.task_weights: no label {name!r}; there are {', '.join(titles)}"
                )
        return self

    @model_validator(mode="after")
    def _grouped_auc_needs_a_binary_label(self) -> Job:
        is_binary = any(label.task == "binary" for label in self.data.labels)
        if self.training.metrics.grouped_auc and not is_binary:
            raise ValueError(
                "training.metrics.grouped_auc: no label is binary, so there is no AUC; remove it"
            )
        return self


def parse_job(fields: Mapping[str, Any], origin: str = "job") -> Job:
    """Validates the fields of a job.

    Args:
      fields: what YAML or a program gave.
      origin: named in errors, for instance the file's path.

    Raises:
      ConfigError: one line for each wrong field: path, value, what is allowed, the nearest known
      key.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{origin}: expected a mapping of fields, got {type(fields).__name__}")
    try:
        return Job.model_validate(fields)
    except ValidationError as error:
        raise explain(error, Job, fields, origin) from None
