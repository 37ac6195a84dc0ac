"""Several runs side by side: their summaries, and the fields in which their jobs differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from penstock.data.output import free_path
from penstock.errors import ConfigError
from penstock.report.display import size_text
from penstock.report.folder import files_of_run
from penstock.report.plots import MISSING, can_draw, draw_comparison, is_drawn
from penstock.report.record import MetricPath, RunRecord, metric_at, metric_words
from penstock.training.checkpoint.job_difference import leaves

_HIGHER_IS_BETTER = {
    "loss": False,
    "auc": True,
    "teacher_auc": None,
    "share_of_teacher": True,
    "log_loss": False,
    "normalized_entropy": False,
    "calibration": None,
    "rmse": False,
    "mae": False,
    "bias": None,
}
_ABSENT = "-"


def compare_runs(
    paths: Sequence[Path], picture: Path | None, *, overwrite: bool = False
) -> Iterator[Table | str]:
    """Describes runs side by side and lays their curves over each other.

    Args:
      paths: at least two run folders.
      picture: PNG file to draw; None: none.
      overwrite: whether a file may be there that is no picture of Penstock's.

    Raises:
      ConfigError: fewer than two runs, one is no run folder, or the picture exists or
        cannot be written.
    """
    if len(paths) < 2:
        raise ConfigError("compare needs two runs or more; `penstock inspect RUN` shows one")
    if picture is not None:
        read = [file for path in paths for file in files_of_run(path)]
        free_path(picture, reads=read, overwrite=overwrite or is_drawn(picture))
    runs = {name: RunRecord.read(path) for name, path in _names(paths).items()}
    yield metrics_side_by_side(runs)
    yield job_differences(runs)
    if picture is not None:
        yield f"curves: {draw_comparison(runs, picture)}" if can_draw() else MISSING


def metrics_side_by_side(runs: Mapping[str, RunRecord]) -> Table:
    """Metrics of the last evaluation (or summary), one column a run; the best one is bold."""
    shown = _table("metric", runs)
    found = [_last_metrics(run) for run in runs.values()]
    tasks = dict.fromkeys(name for one in found for name in one.get("tasks", {}))
    for prefix in ((), *(("tasks", task) for task in tasks)):
        _add_metrics(shown, prefix, found)
    shown.add_section()
    for words, read in (
        ("steps", lambda run: f"{_last_step(run):,}"),
        ("samples", lambda run: f"{run.training[-1]['samples']:,}" if run.training else "0"),
        ("samples/s", lambda run: _of_summary(run, "samples_per_s", "{:,.0f}".format)),
        ("wall time", lambda run: _of_summary(run, "wall_s", "{:,.1f} s".format)),
        ("peak memory", lambda run: _of_summary(run, "peak_memory_bytes", size_text)),
        ("embedding rows", lambda run: _of_tables(run, "rows", "{:,.0f}".format)),
        ("embedding bytes", lambda run: _of_tables(run, "bytes", size_text)),
    ):
        shown.add_row(words, *map(read, runs.values()))
    if any(run.summary is None for run in runs.values()):
        shown.caption = "-: the run has not come to its end"
    return shown


def job_differences(runs: Mapping[str, RunRecord]) -> Table | str:
    """Fields of the jobs that are not the same in all runs, one column a run."""
    fields = [dict(leaves(run.job)) for run in runs.values()]
    every = dict.fromkeys(path for job in fields for path in job)
    shown = _table("field of the job", runs)
    for path in every:
        values = [json.dumps(job[path]) if path in job else _ABSENT for job in fields]
        if len(set(values)) > 1:
            shown.add_row(escape(path), *map(escape, values))
    return shown if shown.row_count else "the jobs are equal in every field"


def _add_metrics(table: Table, prefix: MetricPath, found: Sequence[Mapping[str, Any]]) -> None:
    """Adds the metrics below `prefix`: of the whole job, or of one of its labels."""
    of = f"{escape(prefix[-1])}: " if prefix else ""
    inner = [one if not prefix else one.get("tasks", {}).get(prefix[-1], {}) for one in found]
    recalls = dict.fromkeys(n for one in inner for n in one if n.startswith("recall_at_"))
    for metric, is_higher_better in (_HIGHER_IS_BETTER | dict.fromkeys(recalls, True)).items():
        values = [metric_at(one, (metric,)) for one in inner]
        _add_metric(table, of + metric_words(metric), values, is_higher_better)
    columns = dict.fromkeys(name for one in inner for name in one.get("grouped_auc", {}))
    for column in columns:
        values = [metric_at(one, ("grouped_auc", column, "auc")) for one in inner]
        _add_metric(table, f"{of}AUC grouped by {escape(column)}", values, True)


def _add_metric(
    table: Table, name: str, values: list[float | None], is_higher_better: bool | None
) -> None:
    known = [value for value in values if value is not None]
    if not known:
        return
    best = None if is_higher_better is None else (max if is_higher_better else min)(known)
    texts = [_ABSENT if value is None else f"{value:.6f}" for value in values]
    shown = [
        f"[bold]{text}[/bold]" if best is not None and value == best else text
        for text, value in zip(texts, values, strict=True)
    ]
    table.add_row(name, *shown)


def _last_metrics(run: RunRecord) -> Mapping[str, Any]:
    for found in (run.evaluations, run.training):
        if found:
            return found[-1]
    return {}


def _last_step(run: RunRecord) -> int:
    return max((line["step"] for line in (*run.training, *run.evaluations)), default=0)


def _of_summary(run: RunRecord, name: str, words: Callable[[float], str]) -> str:
    value = metric_at(run.summary or {}, (name,))
    return _ABSENT if value is None else words(value)


def _of_tables(run: RunRecord, quantity: str, words: Callable[[float], str]) -> str:
    tables = (run.summary or {}).get("tables", {})
    found = [metric_at(tables, (name, quantity)) for name in tables]
    return _ABSENT if not found or None in found else words(sum(one or 0.0 for one in found))


def _table(first: str, runs: Mapping[str, RunRecord]) -> Table:
    shown = Table(first, *map(escape, runs))
    for column in shown.columns[1:]:
        column.justify = "right"
        column.overflow = "fold"
    return shown


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """A name for each run: the folder's, or where two would be the same, the path as given."""
    last = [path.resolve().name for path in paths]
    names = [
        name if last.count(name) == 1 else str(path) for name, path in zip(last, paths, strict=True)
    ]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice} is given twice; name each run once")
    return dict(zip(names, paths, strict=True))
