"""The best evaluation so far by one metric, and how many have passed since without a better one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from penstock.config import Job, mode_of
from penstock.errors import ConfigError

OF_CHECKPOINTS, OF_STOPPING = "checkpoint", "early_stopping"
"""What is decided by it, and its name in a checkpoint."""


class BestSoFar:
    """The best value of a metric among the evaluations of a run.

    Args:
      metric: path of the metric in an evaluation, as `auc` or `tasks/click/auc`.
      mode: which of two values is better: `max`, the larger one, or `min`.
      min_delta: by how much a value must be better to count.
    """

    def __init__(self, metric: str, mode: str, min_delta: float = 0.0) -> None:
        self.metric = metric
        self.mode = mode
        self.min_delta = min_delta
        self.value: float | None = None
        """None: no evaluation yet, or all undefined."""
        self.step = -1
        """Of the best one."""
        self.measured = -1
        """Step of the newest one."""
        self.misses = 0
        """Evaluations since that were no better."""

    def take(self, step: int, metrics: Mapping[str, Any]) -> bool:
        """Takes in an evaluation, once; returns whether it is the best so far.

        An undefined value (NaN) is no better than any.

        Raises:
          ConfigError: the evaluation has no such metric.
        """
        if step == self.measured:
            return False
        value = _value_at(metrics, self.metric)
        self.measured = step
        sign = 1.0 if self.mode == "max" else -1.0
        if value == value and (self.value is None or sign * (value - self.value) > self.min_delta):
            self.value, self.step, self.misses = value, step, 0
            return True
        self.misses += 1
        return False

    def no_better(self, patience: int) -> str | None:
        """In words, that so many evaluations in a row were no better; None: it is fewer."""
        if self.misses < patience:
            return None
        since = f"{self.metric} was never defined"
        if self.value is not None:
            since = f"{self.metric} was best at step {self.step:,} ({self.value:g})"
        return (
            f"{since}, and the {self.misses} evaluations since were no better "
            "(training.early_stopping)"
        )

    def state(self) -> dict[str, Any]:
        """As plain data."""
        names = ("metric", "mode", "value", "step", "measured", "misses")
        return {name: getattr(self, name) for name in names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`; that of another metric is passed over, and the search begins anew."""
        if (state["metric"], state["mode"]) == (self.metric, self.mode):
            self.value, self.step = state["value"], state["step"]
            self.measured, self.misses = state["measured"], state["misses"]


def best_of(job: Job) -> dict[str, BestSoFar]:
    """What a run of the job keeps track of, by name."""
    found: dict[str, BestSoFar] = {}
    kept, stopping = job.checkpoint, job.training.early_stopping
    if kept.keep_best is not None:
        found[OF_CHECKPOINTS] = BestSoFar(kept.keep_best, mode_of(kept.keep_best, kept.best_mode))
    if stopping is not None:
        metric = job.stopping_metric
        found[OF_STOPPING] = BestSoFar(metric, mode_of(metric, stopping.mode), stopping.min_delta)
    return found


def best_values(best: Mapping[str, BestSoFar]) -> dict[str, Any]:
    """What a summary says of the best evaluation: of checkpoints', else of stopping's."""
    found = best.get(OF_CHECKPOINTS) or best.get(OF_STOPPING)
    if found is None or found.value is None:
        return {}
    return {"best": {"metric": found.metric, "value": found.value, "step": found.step}}


def _value_at(metrics: Mapping[str, Any], path: str) -> float:
    found: Any = metrics
    for name in path.split("/"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, int | float):
        return float(found)
    raise ConfigError(
        f"the evaluation has no metric {path!r}; there are {', '.join(sorted(_names(metrics)))}"
    )


def _names(metrics: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _names(value, f"{before}{name}/")
        elif isinstance(value, int | float):
            yield f"{before}{name}"
