"""The job: what is learnt, and the root that joins data, tables, model, training and the run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError, field_validator, model_validator

from penstock.config.base import (
    MAY_CHANGE,
    Config,
    Int64,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
)
from penstock.config.data import CrossedFeature, DataConfig, FeatureColumns, KeyTransform
from penstock.config.explain import explain
from penstock.config.models import (
    CustomModel,
    DLRMConfig,
    ESMMConfig,
    Model,
    MultiTask,
    TwoTowerConfig,
)
from penstock.config.moved import bring_up_to_date
from penstock.config.running import (
    CheckpointConfig,
    EarlyStopping,
    EvaluationConfig,
    ReportConfig,
    RunConfig,
)
from penstock.config.schedule import Schedule, lasts_to_the_end
from penstock.config.sources import SyntheticSource
from penstock.config.streams import StreamsSource
from penstock.config.tables import (
    Admission,
    EmbeddingDim,
    Eviction,
    Initializer,
    Optimizer,
    Placement,
    RowWiseAdagrad,
    TableConfig,
    Uniform,
    ValueType,
)
from penstock.errors import ConfigError, JobNote


class DenseOptimizer(Config):
    """Optimizer of the model's dense parameters, from torch.optim."""

    kind: Literal["adam", "adamw", "sgd", "adagrad"] = "adam"
    learning_rate: Annotated[PositiveFloat, MAY_CHANGE] = 1e-3
    weight_decay: Annotated[NonNegativeFloat, MAY_CHANGE] = 0.0
    momentum: Probability = 0.0
    """SGD alone."""
    schedule: Annotated[Schedule, MAY_CHANGE] = Schedule()

    @model_validator(mode="after")
    def _momentum_is_of_sgd(self) -> DenseOptimizer:
        if self.momentum and self.kind != "sgd":
            raise ValueError(
                f"momentum {self.momentum} has no effect on {self.kind}; remove it or use kind sgd"
            )
        return self


class InitFrom(Config):
    """What a run begins with instead of initial values: rows and weights that another has learnt.

    Read when the run begins, never when it is resumed. Steps, position and schedules of the dense
    part begin at 0.
    """

    run: str
    """A run folder, one of its checkpoints, or RUN/best."""
    tables: tuple[str, ...] = ("*",)
    """Names or globs of the job's tables whose rows are taken, by name; `[]`: none."""
    dense: bool = True
    """Whether the model's weights and buffers are taken, by name."""
    optimizer_state: bool = False
    """Whether optimizer states of what is taken go on, too; of tables also the marks and counts of
    admission and eviction, their time and the number of steps, by which their schedules go. They
    must have the same rules then. Otherwise these begin anew.
    """
    unmatched: Literal["fail", "skip"] = "fail"
    """What becomes of tables and weights that the other run does not have, or not in this form:
    `fail` refuses them by name; `skip` lists them, and they begin with initial values.
    """


class PretrainedVectors(Config):
    """Vectors by key that a table begins with; read when the run begins, not when it is resumed."""

    table: str
    path: str
    """Parquet file, folder or glob."""
    key: str = "key"
    """Column of the keys: integers, or texts where `transforms` has `hash`."""
    vector: str = "vector"
    """Column of lists of floats, as many as the table's `dim`."""
    transforms: tuple[KeyTransform, ...] | None = None
    """Of the keys; null: those of the features that read the table."""


class TrainingConfig(Config):
    """What is learnt from the data, step by step."""

    batch_size: Annotated[int, Field(gt=0, le=1 << 24), MAY_CHANGE] = 1024
    accumulate_batches: Annotated[int, Field(gt=0, le=1 << 16), MAY_CHANGE] = 1
    """Batches of a step: their gradients of dense weights and rows are summed, weighted by their
    samples, and one update follows, as of one batch of them all. Fewer at the end of an epoch.
    """
    epochs: Annotated[PositiveInt, MAY_CHANGE] = 1
    max_steps: Annotated[PositiveInt | None, MAY_CHANGE] = None
    optimizer: DenseOptimizer = DenseOptimizer()
    clip_gradient_norm: Annotated[PositiveFloat | None, MAY_CHANGE] = None
    """Largest L2 norm of the dense gradients; null: no clipping."""
    clip_with_tables: Annotated[bool, MAY_CHANGE] = False
    """Whether it is the norm of dense and embedding gradients together, which then are scaled
    alike; of a row that is the sum of its gradients. Takes about as long as an update of the tables
    more.
    """
    init_from: InitFrom | None = None
    """null: all begins with initial values. A text is the run: `init_from: RUN`."""
    pretrained: tuple[PretrainedVectors, ...] = ()
    """Vectors by key that tables begin with; after `init_from`, whose rows of these keys keep their
    optimizer states.
    """
    early_stopping: Annotated[EarlyStopping | None, MAY_CHANGE] = None
    """null: training goes on to the end of the data, or to `max_steps`."""
    autocast: Annotated[Literal["bfloat16"] | None, MAY_CHANGE] = None
    """Computes the dense part in two bytes a number where that is safe (torch.autocast), in
    evaluation and prediction too. Weights, gradients, losses and tables keep their types. null:
    float32.
    """
    seed: Int64 = 0
    deterministic: bool = False
    """Embedding updates have the same bits for any order of the samples of a batch, and on any
    device given equal gradients; and the whole run has the same bits on any number of ranks. Each
    lane (`data.lanes`) is computed by itself, and torch uses one thread unless `run.threads` is
    set: slower. On a GPU torch's deterministic algorithms are used as well."""

    @field_validator("init_from", mode="before")
    @classmethod
    def _run_alone(cls, given: Any) -> Any:
        return {"run": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _tables_are_clipped_by_a_norm(self) -> TrainingConfig:
        if self.clip_with_tables and self.clip_gradient_norm is None:
            raise ValueError("clip_with_tables has no effect without clip_gradient_norm: set it")
        return self


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
    trainable: bool = True
    placement: Placement = "spread"


class Job(Config):
    """The whole description of a run."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_.\-]+$"), MAY_CHANGE] = "job"
    data: DataConfig
    features: tuple[FeatureColumns, ...] = ()
    crosses: tuple[CrossedFeature, ...] = ()
    """Features from several columns; they come after the others, in this order."""
    # Compared as the tables that they come to.
    tables: Annotated[tuple[TableConfig, ...], MAY_CHANGE] = ()
    """Tables that need more than `table_defaults`; a feature refers to one by name."""
    table_defaults: Annotated[TableDefaults, MAY_CHANGE] = TableDefaults()
    model: Model = Field(default_factory=DLRMConfig)
    training: TrainingConfig = TrainingConfig()
    run: Annotated[RunConfig, MAY_CHANGE] = RunConfig()
    evaluation: Annotated[EvaluationConfig, MAY_CHANGE] = EvaluationConfig()
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    report: Annotated[ReportConfig, MAY_CHANGE] = ReportConfig()

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
    def _what_has_no_end_is_read_once(self) -> Job:
        source = self.data.source
        if not isinstance(source, StreamsSource) or not source.grows:
            return self
        if self.data.split is not None:
            raise ValueError(
                "data.split: nobody knows what part of streams without an end (`end: now`) is held "
                "out; name data.evaluation_source, or give the streams an end"
            )
        if self.training.epochs > 1:
            raise ValueError(
                f"training.epochs {self.training.epochs}: streams without an end (`end: now`) are "
                "read once; set 1, or give them an end"
            )
        if self.training.max_steps is None and lasts_to_the_end(self):
            raise ValueError(
                "a schedule decays to the end of the run, but streams without an end (`end: now`) "
                "have none; set its decay_steps, or training.max_steps"
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
        if self.evaluation.metrics.recall_at and not is_two_tower:
            raise ValueError(
                "evaluation.metrics.recall_at: only the model two_tower ranks all items; remove it"
            )
        return self

    @model_validator(mode="after")
    def _esmm_learns_a_chain_on_all_rows(self) -> Job:
        if not isinstance(self.model, ESMMConfig):
            return self
        if len(self.data.labels) < 2:
            raise ValueError(
                "model esmm learns labels that happen one after the other, for instance a click "
                "and a purchase; give data.label a list of at least 2"
            )
        for label in self.data.labels:
            if label.task != "binary" or label.missing != "fail":
                raise ValueError(
                    f"model esmm learns binary labels that no row lacks, and {label.title!r} is "
                    "none; write 0 where what comes before did not happen"
                )
        return self

    @property
    def stopping_metric(self) -> str:
        """What `training.early_stopping` goes by."""
        stopping, labels = self.training.early_stopping, self.data.labels
        if stopping is not None and stopping.metric is not None:
            return stopping.metric
        if self.checkpoint.keep_best is not None:
            return self.checkpoint.keep_best
        if len(labels) > 1:
            return "loss"
        return "auc" if labels[0].task == "binary" else "rmse"

    @property
    def evaluates_epochs(self) -> bool:
        """Whether the held-out part is measured at the end of each epoch."""
        is_wanted = self.training.early_stopping or self.checkpoint.keep_best
        return is_wanted is not None and self.evaluation.every_steps is None

    @model_validator(mode="after")
    def _best_is_measured(self) -> Job:
        wanted = {
            "checkpoint.keep_best": self.checkpoint.keep_best,
            "training.early_stopping": (
                None if self.training.early_stopping is None else self.stopping_metric
            ),
        }
        for field, metric in wanted.items():
            if metric is None:
                continue
            if self.data.split is None and self.data.evaluation_source is None:
                raise ValueError(
                    f"{field} goes by evaluations, and nothing is held out; set data.split or "
                    "data.evaluation_source"
                )
            found = list(self._measured())
            if not any(metric == one or metric.startswith(f"{one}/") for one in found):
                raise ValueError(
                    f"{field}: evaluations of this job have no metric {metric!r}; they have "
                    f"{', '.join(found)}"
                )
        return self

    def _measured(self) -> Iterator[str]:
        """Metrics of the job's evaluations, those of slices by their column alone."""
        metrics, several = self.evaluation.metrics, len(self.data.labels) > 1
        if several:
            yield "loss"
        for label in self.data.labels:
            before = f"tasks/{label.title}/" if several else ""
            is_binary = label.task == "binary"
            usual = ("auc", "log_loss", "normalized_entropy", "calibration")
            for name in usual if is_binary else ("rmse", "mae", "bias"):
                yield before + name
            yield from (
                f"{before}grouped_auc/{one}/auc" for one in metrics.grouped_auc if is_binary
            )
            yield from (f"{before}slices/{one.by}" for one in metrics.slices)
        yield from (f"recall_at_{k}" for k in metrics.recall_at)
        if isinstance(self.data.source, SyntheticSource) and not several:
            yield from ("teacher_auc", "share_of_teacher")

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
        if self.evaluation.metrics.grouped_auc and not is_binary:
            raise ValueError(
                "evaluation.metrics.grouped_auc: no label is binary, so there is no AUC; remove it"
            )
        return self


def parse_job(fields: Mapping[str, Any], origin: str = "job", *, is_record: bool = False) -> Job:
    """Validates the fields of a job.

    Args:
      fields: what YAML or a program gave.
      origin: named in errors, for instance the file's path.
      is_record: they are what a run wrote of its own job, which nobody is asked to change.

    Raises:
      ConfigError: one line for each wrong field: path, value, what is allowed, the nearest known
      key.

    Warns:
      JobNote: a field is given where it lay before; it is read all the same. Not of a record.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{origin}: expected a mapping of fields, got {type(fields).__name__}")
    try:
        fields, moved = bring_up_to_date(fields)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    for note in () if is_record else moved:
        warnings.warn(f"{origin}: {note}", JobNote, stacklevel=2)
    try:
        return Job.model_validate(fields)
    except ValidationError as error:
        raise explain(error, Job, fields, origin) from None
