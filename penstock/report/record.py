"""What a run folder tells of its run: the job, the metrics by step, the summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError
from penstock.events.registry import METRICS, Quantity, Unit, field_named
from penstock.job_file import parse_yaml
from penstock.report.folder import RunFolder
from penstock.report.json_lines import read_events

MetricPath: TypeAlias = tuple[str, ...]
"""Names from the outside in: `("auc",)`, of a job of several labels `("tasks", label, "auc")`."""

_DRAWN = {
    "loss": "loss",
    "log_loss": "log loss",
    "normalized_entropy": "normalized entropy",
    "auc": "AUC",
    "rmse": "RMSE",
    "mae": "MAE",
}
_DRAWN_OF_EACH_TASK = ("log_loss", "auc", "rmse")


@dataclass(frozen=True)
class Curve:
    """One quantity over the run. Points whose value is undefined are left out."""

    samples: NDArray[np.float64]
    """[n] samples trained on so far, ascending."""
    values: NDArray[np.float64]
    """[n]"""


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it; the run may have been interrupted, or be running."""

    path: Path
    job: Mapping[str, Any]
    """Fields of job.yaml."""
    training: list[dict[str, Any]]
    """Values of events `train`, each with its step, oldest first."""
    evaluations: list[dict[str, Any]]
    """Values of events `evaluation`, likewise."""
    summary: Mapping[str, Any] | None
    """None: the run has not come to its end."""

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Reads a run folder.

        Raises:
          ConfigError: it is none, or a file in it cannot be read.
        """
        folder = RunFolder(path)
        if not folder.job_file.is_file() or not folder.metrics_file.is_file():
            raise ConfigError(
                f"{path}: no run folder (it has no job.yaml and metrics.jsonl); name the folder "
                "that `penstock train` wrote"
            )
        try:
            job = parse_yaml(folder.job_file.read_text(encoding="utf-8"), str(folder.job_file))
            events = read_events(folder.metrics_file)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot read the run folder: {error}") from None
        if any(event.kind == "train" and "samples" not in event.values for event in events):
            raise ConfigError(
                f"{folder.metrics_file}: an event of kind 'train' has no samples; the file was "
                "changed or is damaged"
            )
        training, evaluations = (
            [{"step": event.step, **event.values} for event in events if event.kind == kind]
            for kind in ("train", "evaluation")
        )
        summary = folder.read_summary() if folder.summary_file.is_file() else None
        return cls(path, job, training, evaluations, summary)

    def drawn_metrics(self) -> dict[MetricPath, str]:
        """What is drawn over the samples: metrics that the run has, and their names in words."""
        lines = [*self.training, *self.evaluations]
        tasks = dict.fromkeys(name for line in lines for name in line.get("tasks", ()))
        candidates: dict[MetricPath, str] = {(name,): words for name, words in _DRAWN.items()}
        recalls = (name for line in self.evaluations for name in line if _is_recall(name))
        candidates |= {(name,): metric_words(name) for name in recalls}
        for task in tasks:
            for name in _DRAWN_OF_EACH_TASK:
                candidates["tasks", task, name] = f"{task}: {_DRAWN[name]}"
        return {
            path: words
            for path, words in candidates.items()
            if any(metric_at(line, path) is not None for line in lines)
        }

    def training_curve(self, metric: MetricPath) -> Curve:
        """A metric of the windows of steps, each batch measured before its update."""
        return _curve([(line["samples"], metric_at(line, metric)) for line in self.training])

    def evaluation_curve(self, metric: MetricPath) -> Curve:
        """A metric of the held-out part."""
        steps = [0, *(line["step"] for line in self.training)]
        samples = [0, *(line["samples"] for line in self.training)]
        # An evaluation knows its step; the log lines around it know samples by step.
        return _curve([
            (float(np.interp(line["step"], steps, samples)), metric_at(line, metric))
            for line in self.evaluations
        ])

    def growth(self) -> dict[str, Curve]:
        """Rows of each table, the largest table first."""
        lines = [line for line in self.training if "tables" in line]
        names = dict.fromkeys(name for line in lines for name in line["tables"])
        curves = {
            name: _curve([
                (line["samples"], metric_at(line, ("tables", name, "rows"))) for line in lines
            ])
            for name in names
        }
        known = [(name, curve) for name, curve in curves.items() if curve.values.size]
        ranked = sorted(known, key=lambda item: -item[1].values[-1])
        return dict(ranked)

    @property
    def calibrations(self) -> dict[str, list[list[float]]]:
        """[buckets, 3] of the last evaluation: mean prediction, mean label, weight.

        By label of a job of several; of a job of one label under the name "".
        """
        if not self.evaluations:
            return {}
        last = self.evaluations[-1]
        found = {name: one.get("calibration_buckets") for name, one in by_task(last).items()}
        return {name: buckets for name, buckets in found.items() if buckets}


def by_task(metrics: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The metrics of each label of a job of several; of a job of one label under the name ""."""
    tasks: Mapping[str, Mapping[str, Any]] = metrics.get("tasks", {"": metrics})
    return tasks


def metric_at(metrics: Mapping[str, Any], path: MetricPath) -> float | None:
    """The number at a path; None where there is none, or it is not finite."""
    found: Any = metrics
    for name in path:
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    is_number = isinstance(found, int | float) and math.isfinite(found)
    return float(found) if is_number else None


def is_metric(name: str) -> bool:
    """Whether a field of a summary is a measured quality, and not a count or a time."""
    found = field_named(METRICS, name)
    field = None if found is None else found[1]
    return isinstance(field, Quantity) and field.unit is not Unit.ITEMS


def metric_words(name: str) -> str:
    """The name of a metric for people: `recall_at_10` is `recall@10`."""
    return name.replace("recall_at_", "recall@") if _is_recall(name) else name


def _is_recall(name: str) -> bool:
    return name.startswith("recall_at_")


def _curve(points: list[tuple[float, float | None]]) -> Curve:
    known = [(samples, value) for samples, value in points if value is not None]
    table = np.array(known, dtype=np.float64).reshape(-1, 2)
    return Curve(table[:, 0], table[:, 1])
