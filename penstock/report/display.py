"""What a run shows on the terminal: a live bar, or plain lines where stdout is not a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """Progress of one training run.

    Args:
      console: where to print.
      total_samples: samples that the whole run will see, so that an ETA can be shown.
    """

    def __init__(self, console: Console, total_samples: int) -> None:
        self._console = console
        self._total = total_samples
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def start(self, samples: int) -> None:
        """Shows the bar, with `samples` done already."""
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.fields[step]:,}"),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._progress.add_task(
            "training", total=self._total, completed=samples, step=0, metrics=""
        )
        self._progress.start()

    def advance(self, step: int, samples: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=samples, step=step)

    def training(self, step: int, samples: int, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of one window of steps."""
        shown = (
            f"loss {_number(metrics['log_loss'])}  NE {_number(metrics['normalized_entropy'])}  "
            f"AUC {_number(metrics['auc'])}  {metrics['samples_per_s']:,.0f}"
        )
        if self._progress is not None:
            # The line must fit into 80 columns.
            self._progress.update(self._task, completed=samples, step=step, metrics=f"{shown}/s")
            return
        left_s = (self._total - samples) / max(metrics["samples_per_s"], 1e-9)
        eta = timedelta(seconds=round(max(left_s, 0.0)))
        self.line(f"step {step:,}  {samples:,} samples  {shown} samples/s  ETA {eta}")

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of one evaluation."""
        teacher = (
            f"  (teacher {_number(metrics['teacher_auc'])})" if "teacher_auc" in metrics else ""
        )
        self.line(
            f"evaluation at step {step:,}: AUC {_number(metrics['auc'])}{teacher}  "
            f"loss {_number(metrics['log_loss'])}  NE {_number(metrics['normalized_entropy'])}"
        )

    def line(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def stop(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on the standard error while it is open, if that is a terminal.

    Gives a function that takes how much is done, and of how much.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The final table of a run."""
    table = Table(show_header=False, title=f"{summary['name']}: {summary['steps']:,} steps")
    table.add_column(style="bold")
    table.add_column(justify="right")
    measured = summary["measured_on"]
    table.add_row(f"AUC ({measured})", _number(summary["auc"]))
    if summary.get("teacher_auc") is not None:
        table.add_row("teacher's AUC, the best reachable", _number(summary["teacher_auc"]))
        table.add_row("share of the way from 0.5", f"{summary['share_of_teacher']:.1%}")
    for column, grouped in summary.get("grouped_auc", {}).items():
        table.add_row(f"AUC grouped by {escape(column)}", _grouped(grouped))
    table.add_row("log loss", _number(summary["log_loss"]))
    table.add_row("normalised entropy", _number(summary["normalized_entropy"]))
    table.add_row("calibration", _number(summary["calibration"]))
    table.add_row("samples", f"{summary['samples']:,}")
    table.add_row("samples/s", f"{summary['samples_per_s']:,.0f}")
    table.add_row("time", _time_split(summary["seconds"]))
    rows = sum(item["rows"] for item in summary["tables"].values())
    size = sum(item["bytes"] for item in summary["tables"].values())
    table.add_row("embedding rows", f"{rows:,} in {len(summary['tables'])} tables")
    table.add_row("embedding bytes", size_text(size))
    if summary["quarantined_rows"]:
        table.add_row("quarantined rows", f"{summary['quarantined_rows']:,}")
    return table


def tables_table(tables: Mapping[str, Mapping[str, int]]) -> Table:
    """Rows and bytes of each embedding table."""
    shown = Table("table", "rows", "bytes")
    shown.columns[1].justify = shown.columns[2].justify = "right"
    for name, item in tables.items():
        shown.add_row(name, f"{item['rows']:,}", size_text(item["bytes"]))
    return shown


def size_text(count: int) -> str:
    """A number of bytes in the unit that suits it, powers of 1024."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _time_split(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values()) or 1.0
    parts = ", ".join(f"{name} {part / total:.0%}" for name, part in seconds.items())
    return f"{total:.1f} s: {parts}"


def _number(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def metrics_table(metrics: Mapping[str, Any], title: str = "") -> Table:
    """The metrics of one evaluation, by name."""
    table = Table(show_header=False, title=title)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in metrics.items():
        if isinstance(value, int):
            table.add_row(name, f"{value:,}")
        elif isinstance(value, float) or value is None:
            table.add_row(name, _number(value, 6))
    for column, grouped in metrics.get("grouped_auc", {}).items():
        table.add_row(f"AUC grouped by {escape(column)}", _grouped(grouped, 6))
    return table


def slices_tables(slices: Mapping[str, Any]) -> Iterator[Table]:
    """One table for each column by which the metrics were sliced."""
    for column, found in slices.items():
        table = Table(
            escape(column), "samples", "label rate", "AUC", "log loss", "NE", "calibration"
        )
        for shown in table.columns[1:]:
            shown.justify = "right"
        for name, metrics in (*found["values"].items(), ("all others", found["rest"])):
            samples = metrics["samples"]
            table.add_row(
                escape(name),
                f"{samples:,}",
                _number(metrics["positives"] / samples if samples else None),
                *(
                    _number(metrics[metric])
                    for metric in ("auc", "log_loss", "normalized_entropy", "calibration")
                ),
            )
        yield table


def _grouped(grouped: Mapping[str, Any], digits: int = 4) -> str:
    return (
        f"{_number(grouped['auc'], digits)} ({grouped['groups']:,} groups, "
        f"{grouped['share']:.1%} of the samples)"
    )


def show(item: Table | str) -> None:
    """Prints a table or a line on the standard output."""
    console = Console()
    if isinstance(item, str):
        console.print(item, soft_wrap=True, markup=False, highlight=False)
    else:
        console.print(item)
