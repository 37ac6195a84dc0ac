"""What a run folder tells of its run: the job, the metrics by step, the summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import ConfigError
from penstock.job_file import parse_yaml
from penstock.report.folder import RunFolder, read_lines

CURVES = {"log_loss": "log loss", "normalized_entropy": "normalized entropy", "auc": "AUC"}
"""Metrics that are drawn over the samples, and their names in words."""


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
    """Lines of metrics.jsonl of windows of steps, oldest first."""
    evaluations: list[dict[str, Any]]
    """Lines of evaluations, oldest first."""
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
            lines = read_lines(folder.metrics_file)
            summary = None
            if folder.summary_file.is_file():
                summary = json.loads(folder.summary_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot read the run folder: {error}") from None
        return cls(
            path,
            job,
            [line for line in lines if line["kind"] == "train"],
            [line for line in lines if line["kind"] == "evaluation"],
            summary,
        )

    def training_curve(self, metric: str) -> Curve:
        """A metric of the windows of steps, each batch measured before its update."""
        return _curve([(line["samples"], line.get(metric)) for line in self.training])

    def evaluation_curve(self, metric: str) -> Curve:
        """A metric of the held-out part."""
        steps = [0, *(line["step"] for line in self.training)]
        samples = [0, *(line["samples"] for line in self.training)]
        # An evaluation knows its step; the log lines around it know samples by step.
        return _curve([
            (float(np.interp(line["step"], steps, samples)), line.get(metric))
            for line in self.evaluations
        ])

    def growth(self) -> dict[str, Curve]:
        """Rows of each table, the largest table first."""
        lines = [line for line in self.training if "tables" in line]
        names = dict.fromkeys(name for line in lines for name in line["tables"])
        curves = {
            name: _curve([(line["samples"], line["tables"][name]["rows"]) for line in lines])
            for name in names
        }
        ranked = sorted(curves.items(), key=lambda item: -item[1].values[-1])
        return dict(ranked)

    @property
    def calibration(self) -> list[list[float]]:
        """[buckets, 3] of the last evaluation: mean prediction, mean label, weight."""
        if not self.evaluations:
            return []
        buckets: list[list[float]] = self.evaluations[-1].get("calibration_buckets", [])
        return buckets


def _curve(points: list[tuple[float, float | None]]) -> Curve:
    known = [(samples, value) for samples, value in points if value is not None]
    table = np.array(known, dtype=np.float64).reshape(-1, 2)
    return Curve(table[:, 0], table[:, 1])
