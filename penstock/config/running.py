"""How a job is run: where, with what, how often it looks and saves. Nothing says what is learnt."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from penstock.config.base import Config, NonNegativeFloat, PositiveInt, Threads


class RunConfig(Config):
    """Where a job runs and with how much of the machine."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]{1,3})?)$")] = "cpu"
    """Where tables and model live: cpu, or a GPU, cuda or cuda:1. A checkpoint fits any."""
    threads: Threads | None = None
    """Threads of torch and of the host store, each; null: the cores this process may use."""
    reader_threads: Threads = 2
    """Threads that read and decode the data."""
    prefetch_batches: PositiveInt = 8
    """Batches assembled ahead of training; bounds the reader's memory."""


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


class EvaluationConfig(Config):
    """When the held-out part is measured, and by what."""

    every_steps: PositiveInt | None = None
    """null: at the end alone; with `training.early_stopping` or `checkpoint.keep_best` also at the
    end of each epoch.
    """
    batch_size: Annotated[int, Field(gt=0, le=1 << 24)] = 8192
    metrics: MetricsConfig = MetricsConfig()


class CheckpointConfig(Config):
    """When checkpoints are written and how many are kept."""

    every_steps: PositiveInt | None = None
    """null: at the end and on interruption alone."""
    keep_last: PositiveInt = 2
    keep_best: str | None = None
    """A metric of the evaluations (`auc`, `log_loss`, `tasks/click/auc`): an evaluation that is the
    best so far is followed by a checkpoint, which is kept besides the last ones until there is a
    better one. RUN/best names it.
    """
    best_mode: Literal["max", "min"] | None = None
    """Whether the largest or the smallest value of `keep_best` is the best; null: as is known of
    the usual metrics.
    """

    @model_validator(mode="after")
    def _best_is_known(self) -> CheckpointConfig:
        if self.keep_best is not None:
            mode_of(self.keep_best, self.best_mode, "best_mode")
        return self


_LARGE = re.compile(r"(.*/)?(auc|share_of_teacher|recall_at_\d+)")
_SMALL = re.compile(r"(.*/)?(loss|log_loss|normalized_entropy|rmse|mae)")


def mode_of(metric: str, mode: Literal["max", "min"] | None, field: str = "mode") -> str:
    """Which value of a metric of evaluations is the best: `max` or `min`.

    Raises:
      ValueError: it is not given as `field`, and the metric is none of the usual ones.
    """
    if mode is None and not (_LARGE.fullmatch(metric) or _SMALL.fullmatch(metric)):
        raise ValueError(
            f"whether a large or a small {metric!r} is better is not known; set {field} to max or "
            "min"
        )
    return mode or ("max" if _LARGE.fullmatch(metric) else "min")


class EarlyStopping(Config):
    """Training ends when evaluations do not get better any more."""

    patience: PositiveInt
    """After this many evaluations in a row that are no better than the best one."""
    metric: str | None = None
    """A metric of the evaluations, as `checkpoint.keep_best`; null: that one, else the AUC of a
    binary label, the RMSE of a number, the loss of several labels.
    """
    mode: Literal["max", "min"] | None = None
    """Whether a large or a small value is better; null: as is known of the usual metrics."""
    min_delta: NonNegativeFloat = 0.0
    """A value must be better by more than this to count."""

    @model_validator(mode="after")
    def _better_is_known(self) -> EarlyStopping:
        if self.metric is not None:
            mode_of(self.metric, self.mode)
        return self


class ReportConfig(Config):
    """What a run tells while it runs."""

    every_steps: PositiveInt = 100
    """Metrics of the steps since the last ones go to log, pictures and terminal."""
