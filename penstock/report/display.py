"""What a run shows on the terminal: a live bar, or plain lines where stdout is not a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from penstock.data.source import RowCount
from penstock.events.event import Event
from penstock.report.record import by_task, metric_words
from penstock.report.terminal import Stream, console_of, ignored

_HEADLINE = {
    "loss": "loss",
    "log_loss": "loss",
    "normalized_entropy": "NE",
    "auc": "AUC",
    "rmse": "RMSE",
    "mae": "MAE",
}
_TOTAL_EVERY_S = 1.0
"""Adding up what is known of very many extents takes a while."""
_MOST_ON_THE_BAR = 3
"""Metrics: the line must fit into 80 columns."""
_WORDS = {
    "loss": "loss",
    "auc": "AUC",
    "teacher_auc": "teacher's AUC, the best reachable",
    "log_loss": "log loss",
    "normalized_entropy": "normalised entropy",
    "calibration": "calibration",
    "rmse": "root mean squared error",
    "mae": "mean absolute error",
    "bias": "mean prediction - mean label",
}
_OF_SLICES = {
    "rate": "label rate",
    "auc": "AUC",
    "log_loss": "log loss",
    "normalized_entropy": "NE",
    "calibration": "calibration",
    "rmse": "RMSE",
    "mae": "MAE",
    "bias": "bias",
}


class Display:
    """The sink of a run's events that people look at.

    Args:
      console: where to print.
      total_samples: gives the samples that the whole run will see, as far as they are known by
        then, so that an ETA can be shown. Asked once a second.
      folder: of the run.
    """

    def __init__(
        self, console: Console, total_samples: Callable[[], RowCount | None], folder: Path
    ) -> None:
        self._console = console
        self._total_samples = total_samples
        self._folder = folder
        self._next_total_s = -math.inf
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def take(self, event: Event) -> None:
        """Shows an event, if it is for people."""
        show = {
            "start": self._start,
            "pretrained": self._pretrained,
            "train": self._training,
            "evaluation": self._evaluation,
            "warning": self._warning,
            "stopped": self._stopped,
            "nothing_new": self._nothing_new,
            "profile": self._profile,
            "waiting": self._waiting,
            "stopped_early": self._stopped_early,
            "summary": self._summary,
        }.get(event.kind)
        if show is not None:
            show(event.step, event.values)

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows the bar, with what is done already."""
        if step:
            self._line(f"resumed at step {step:,} ({values['samples']:,} samples)")
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.fields[step]:,}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[share]:>5}"),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._progress.add_task(
            "training", total=None, completed=values["samples"], step=step, metrics="", share=""
        )
        self._progress.start()

    def advance(self, step: int, samples: int) -> None:
        """Moves the bar."""
        if self._progress is None:
            return
        now_s = time.monotonic()
        if now_s >= self._next_total_s:
            self._next_total_s = now_s + _TOTAL_EVERY_S
            total = self._total_samples()
            if total is not None:
                share = f"{'' if total.is_exact else '~'}{_percent(samples, total.rows)} %"
                self._progress.update(self._task, total=max(total.rows, samples), share=share)
        self._progress.update(self._task, completed=samples, step=step)

    def _pretrained(self, step: int, values: Mapping[str, Any]) -> None:
        kept = "" if values["kept"] == values["rows"] else f", {values['kept']:,} of them kept"
        self._line(f"table {values['table']}: {values['rows']:,} pretrained vectors{kept}")

    def _training(self, step: int, metrics: Mapping[str, Any]) -> None:
        samples = metrics["samples"]
        speed = f"{metrics['samples_per_s']:,.0f}"
        if self._progress is not None:
            shown = headline(metrics, _MOST_ON_THE_BAR)
            self._progress.update(
                self._task, completed=samples, step=step, metrics=f"{shown}  {speed}/s"
            )
            return
        shown = f"{headline(metrics)}  {speed}"
        eta, total = "unknown", self._total_samples()
        if total is not None:
            left_s = (total.rows - samples) / max(metrics["samples_per_s"], 1e-9)
            about = "" if total.is_exact else "about "
            eta = f"{about}{timedelta(seconds=round(max(left_s, 0.0)))}"
        self._line(f"step {step:,}  {samples:,} samples  {shown} samples/s  ETA {eta}")

    def _evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        teacher = (
            f"  (teacher {_number(metrics['teacher_auc'])})" if "teacher_auc" in metrics else ""
        )
        self._line(f"evaluation at step {step:,}: {headline(metrics)}{teacher}")

    def _warning(self, _: int, values: Mapping[str, Any]) -> None:
        self._line(f"warning: {values['text']}")

    def _stopped(self, step: int, values: Mapping[str, Any]) -> None:
        self.close()
        whole = values["is_whole"]
        kept = "the checkpoint is complete" if whole else "the last checkpoint is an earlier one"
        self._line(f"stopped after step {step:,}; {kept}. Continue:")
        self._line(f"  {values['command']}")

    def _profile(self, _: int, values: Mapping[str, Any]) -> None:
        self._console.print(stages_table(values))
        self._line(f"held back by {values['text']}")
        self._line(f"trace, for https://ui.perfetto.dev: {values['path']}")

    def _waiting(self, step: int, values: Mapping[str, Any]) -> None:
        self._line(f"waiting after step {step:,} for {values['text']}")

    def _stopped_early(self, step: int, values: Mapping[str, Any]) -> None:
        self._line(f"early stopping after step {step:,}: {values['text']}")

    def _nothing_new(self, step: int, values: Mapping[str, Any]) -> None:
        self.close()
        why = values["text"]
        self._line(f"nothing new to train: the run has finished at step {step:,}: {why}")

    def _summary(self, _: int, summary: Mapping[str, Any]) -> None:
        self.close()
        if len(summary["tables"]) > 1:
            self._console.print(tables_table(summary["tables"]))
            rules = rules_table(summary["tables"])
            if rules is not None:
                self._console.print(rules)
        for table in slices_tables(summary):
            self._console.print(table)
        self._console.print(summary_table(summary))
        self._line(f"run folder: {self._folder}")

    def _line(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


def say(console: Console | None, words: str) -> None:
    """Prints a line before there is a run to report; `console`: None: the standard output."""
    console = console or console_of(Stream(sys.stdout, ignored))
    console.print(words, soft_wrap=True, markup=False, highlight=False, emoji=False)


@contextmanager
def stages() -> Iterator[Callable[[str], Callable[[int, float | None], None]]]:
    """A progress bar on the standard error, if that is a terminal, for work in stages.

    Yields a function that begins a stage by its name; what it returns is called with the rows done
    so far and their share of all (None: unknown).
    """
    with Progress(
        TextColumn("reading {task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(compact=True),
        console=(console := console_of(Stream(sys.stderr, ignored))),
        disable=not console.is_terminal,
        transient=True,
    ) as progress:

        def begin(stage: str) -> Callable[[int, float | None], None]:
            task = progress.add_task(stage, total=None, rows=0)

            def advance(rows: int, share: float | None) -> None:
                total = None if share is None else 1.0
                progress.update(task, rows=rows, total=total, completed=share or 0.0)

            return advance

        yield begin


def stages_table(values: Mapping[str, Any]) -> Table:
    """What a step is made of, from an event `profile`."""
    step_s, has_device = values["step_s"], "device_busy" in values
    table = Table(title=f"{values['steps']:,} steps of {step_s * 1e3:,.2f} ms")
    table.add_column("stage")
    places = {"host_s": "host", "device_s": "GPU"} if has_device else {"host_s": "time"}
    for name in places.values():
        table.add_column(f"{name}, ms", justify="right")
        table.add_column("share", justify="right")
    for stage, spent in values["stages"].items():
        cells = [(f"{s * 1e3:,.3f}", f"{s / step_s:.0%}") for s in map(spent.get, places) if s]
        table.add_row(stage, *(cell for pair in cells for cell in pair))
    return table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The final table of a run."""
    table = Table(show_header=False, title=f"{summary['name']}: {summary['steps']:,} steps")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("measured on", summary["measured_on"])
    _add_metrics(table, summary)
    table.add_row("samples", f"{summary['samples']:,}")
    if summary["counts"]["applied"] != summary["counts"]["read"]:
        table.add_row("rows", counts_text(summary["counts"]))
    table.add_row("samples/s", f"{summary['samples_per_s']:,.0f}")
    table.add_row("time", _time_split(summary["seconds"]))
    rows = sum(item["rows"] for item in summary["tables"].values())
    size = sum(item["bytes"] for item in summary["tables"].values())
    table.add_row("embedding rows", f"{rows:,} in {len(summary['tables'])} tables")
    table.add_row("embedding bytes", size_text(size))
    if summary["quarantined_rows"]:
        table.add_row("quarantined rows", f"{summary['quarantined_rows']:,}")
    # Runs of before have no such number.
    if summary.get("rows_ahead_of_time"):
        table.add_row("rows ahead of their time", f"{summary['rows_ahead_of_time']:,}")
    return table


def tables_table(tables: Mapping[str, Mapping[str, Any]]) -> Table:
    """Rows and bytes of each embedding table."""
    shown = Table("table", "rows", "bytes")
    shown.columns[1].justify = shown.columns[2].justify = "right"
    for name, item in tables.items():
        shown.add_row(name, f"{item['rows']:,}", size_text(item["bytes"]))
    return shown


def rules_table(tables: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """What admission, eviction and budgets did; None: no table has any."""
    ruled = {name: item for name, item in tables.items() if "evicted" in item}
    if not ruled:
        return None
    names = ("table", "budget", "admitted", "refused", "evicted", "age", "counted")
    caption = "budget: share in use; age: mean time that evicted rows were unused"
    shown = Table(*names, title="admission and eviction", caption=caption)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, item in ruled.items():
        used = item["budget_used"]
        shown.add_row(
            name,
            "-" if _is_nan(used) else f"{used:.1%}",
            *(f"{item[key]:,}" for key in ("admitted", "refused", "evicted")),
            f"{item['evicted_age']:,.1f}" if item["evicted"] else "-",
            f"{item['candidates']:,}",
        )
    return shown


def counts_text(counts: Mapping[str, int]) -> str:
    """Rows read and what became of them, in all epochs."""
    parts = (f"{counts[name]:,} {name}" for name in ("applied", "filtered", "quarantined"))
    return f"{counts['read']:,} read: {', '.join(parts)}"


def size_text(count: float) -> str:
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


def _percent(part: int, whole: int) -> str:
    return f"{min(part / whole, 1.0):.0%}".rstrip("%") if whole else "100"


def _number(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def headline(metrics: Mapping[str, Any], most: int | None = None) -> str:
    """The few metrics that say how it goes, on one line; at most `most` of them."""
    parts = [
        f"{words} {_number(metrics[name])}"
        for name, words in _HEADLINE.items()
        if name in metrics and not _is_nan(metrics[name])
    ]
    parts += [
        f"{metric_words(name)} {_number(value)}"
        for name, value in metrics.items()
        if name.startswith("recall_at_")
    ]
    for task, found in metrics.get("tasks", {}).items():
        name = "auc" if "auc" in found else "rmse"
        parts.append(f"{task} {_HEADLINE[name]} {_number(found[name])}")
    return "  ".join(parts[:most])


def metrics_table(metrics: Mapping[str, Any], title: str = "") -> Table:
    """The metrics of one evaluation, by name."""
    table = Table(show_header=False, title=title)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for task, found in {"": metrics, **metrics.get("tasks", {})}.items():
        of = f"{escape(task)}: " if task else ""
        for name, value in found.items():
            if isinstance(value, int):
                table.add_row(of + name, f"{value:,}")
            elif isinstance(value, float) or value is None:
                table.add_row(of + name, _number(value, 6))
        for column, grouped in found.get("grouped_auc", {}).items():
            table.add_row(f"{of}AUC grouped by {escape(column)}", _grouped(grouped, 6))
    return table


def slices_tables(metrics: Mapping[str, Any]) -> Iterator[Table]:
    """One table for each column by which the metrics were sliced, and each label."""
    for task, of_task in by_task(metrics).items():
        for column, found in of_task.get("slices", {}).items():
            shown = {
                name: words
                for name, words in _OF_SLICES.items()
                if name in {"rate", *found["rest"]}
            }
            if "positives" not in found["rest"]:
                del shown["rate"]
            title = f"{escape(task)} by {escape(column)}" if task else escape(column)
            table = Table(title, "samples", *shown.values())
            for header in table.columns[1:]:
                header.justify = "right"
            for name, one in (*found["values"].items(), ("all others", found["rest"])):
                rated = {**one, "rate": _share(one.get("positives", 0), one["samples"])}
                numbers = (_number(rated[metric]) for metric in shown)
                table.add_row(escape(name), f"{one['samples']:,}", *numbers)
            yield table


def _add_metrics(table: Table, summary: Mapping[str, Any]) -> None:
    for task, found in {"": summary, **summary.get("tasks", {})}.items():
        of = f"{escape(task)}: " if task else ""
        for name, words in _WORDS.items():
            if name in found:
                table.add_row(of + words, _number(found[name]))
        if not _is_nan(found.get("share_of_teacher")):
            table.add_row("share of the way from 0.5", f"{found['share_of_teacher']:.1%}")
        for name, value in found.items():
            if name.startswith("recall_at_"):
                table.add_row(of + metric_words(name), _number(value))
        for column, grouped in found.get("grouped_auc", {}).items():
            table.add_row(f"{of}AUC grouped by {escape(column)}", _grouped(grouped))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _is_nan(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _grouped(grouped: Mapping[str, Any], digits: int = 4) -> str:
    return (
        f"{_number(grouped['auc'], digits)} ({grouped['groups']:,} groups, "
        f"{grouped['share']:.1%} of the samples)"
    )


def show(item: Table | str) -> None:
    """Prints a table or a line on the standard output."""
    console = console_of(sys.stdout)
    if isinstance(item, str):
        console.print(item, soft_wrap=True, markup=False, highlight=False, emoji=False)
    else:
        console.print(item)
