"""What a survey of unknown data found, and what a job will read, as tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import numpy as np
from rich.table import Table
from rich.text import Text

from penstock.data.plan.audit import Audit
from penstock.data.windows.planned import PlannedFiles
from penstock.report.display import size_text
from penstock.survey.label_rate import LabelRate
from penstock.survey.profile import QUANTILES, ColumnSummary, NumberSummary
from penstock.survey.sketches import ValueSummary
from penstock.survey.survey import Survey

_BAR = 30
_PLAN_ENDS = 30
_LONGEST_VALUE = 20
_SHOWN = (0.01, 0.5, 0.99)


def survey_tables(survey: Survey) -> Iterator[Table | str]:
    """Everything there is to say about the data, from the files down to the label."""
    yield _overview(survey)
    yield _columns(survey)
    yield from _marks(survey)
    # Codes have no mean.
    codes = survey.roles.named("categorical", "sequence", "id")
    numbers = [
        one
        for one in survey.profile.columns
        if one.kind in {"integer", "float"} and one.numbers is not None and one.name not in codes
    ]
    if numbers:
        yield _numbers(numbers)
    lists = [one for one in survey.profile.columns if one.longest > 1]
    if lists:
        yield _lengths(lists)
    yield _roles(survey)
    if survey.rate is not None:
        yield _rate(survey.rate, survey)


def plan_table(plan: Sequence[PlannedFiles]) -> Table:
    """What a job will read: windows, the first and last of many, and their sum."""
    shown = Table(title="what is read, in this order", show_footer=True)
    has_streams = any(one.stream for one in plan)
    if has_streams:
        shown.add_column("stream")
        shown.add_column("window", no_wrap=True)
    shown.add_column("source", footer="all")
    rows = [one.rows for one in plan]
    known = sum(one for one in rows if one is not None)
    totals = (
        ("files", f"{sum(one.files for one in plan):,}"),
        ("bytes", size_text(sum(one.bytes for one in plan))),
        ("extents", f"{sum(one.extents for one in plan):,}"),
        ("rows", f"{known:,}" if None not in rows else f"{known:,} and those of text"),
    )
    for name, total in totals:
        shown.add_column(name, justify="right", footer=total)
    for place, one in enumerate(plan):
        left_out = len(plan) - 2 * _PLAN_ENDS
        if left_out > 1 and _PLAN_ENDS <= place < len(plan) - _PLAN_ENDS:
            if place == _PLAN_ENDS:
                shown.add_row(*(["", f"{left_out:,} more"] if has_streams else []), "...")
            continue
        shown.add_row(
            *([one.stream, one.window] if has_streams else []),
            one.source or "no file",
            f"{one.files:,}",
            size_text(one.bytes),
            f"{one.extents:,}",
            "?" if one.rows is None else f"{one.rows:,}",
        )
    return shown


def audit_table(found: Audit) -> Table:
    """What became of the rows that a run has read."""
    shown = Table(title="what was read", show_header=False)
    shown.add_column(style="bold")
    shown.add_column(justify="right")
    for name, rows in found.counts._asdict().items():
        shown.add_row(name, f"{rows:,}")
    shown.add_section()
    shown.add_row("by the position", f"{found.said:,}")
    shown.add_row("in the files", f"{found.in_files:,}")
    shown.add_row("verdict", "right" if found.is_right else "wrong")
    return shown


def _overview(survey: Survey) -> Table:
    profile = survey.profile
    shown = Table(show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    first, more = profile.paths[0], len(profile.paths) - 1
    shown.add_row("files", Text(first + (f" and {more:,} more" if more else "")))
    shown.add_row("format", survey.source.format)
    shown.add_row("bytes", size_text(survey.bytes))
    sample = "" if profile.is_whole else ": a sample; all figures below are of it alone"
    shown.add_row("rows looked at", f"{profile.rows:,}{sample}")
    if survey.num_groups is not None:
        shown.add_row(survey.source.extents, f"{survey.num_groups:,}")
    shown.add_row("columns", f"{len(profile.columns):,}")
    if survey.malformed:
        text = f"{survey.malformed:,}, in no figure below; the first: {survey.malformed_example}"
        shown.add_row("malformed rows", Text(text))
    return shown


def _columns(survey: Survey) -> Table:
    headings = ("column", "type", "missing", "distinct", "top 1 %", "top 10 %", "hottest", "of all")
    shown = Table(*headings, "once", "role", title="columns")
    for place in shown.columns[2:6] + shown.columns[7:9]:
        place.justify = "right"
    for column, role in zip(survey.profile.columns, survey.roles.columns, strict=True):
        values = column.values
        missing = f"{column.missing / column.rows:.1%}" if column.missing else "-"
        name, kind = Text(column.name), Text(_type(column))
        if not values.accesses:
            shown.add_row(name, kind, missing, *[""] * 6, role.role)
            continue
        shares = [f"{about(values)}{share:.1%}" for share in values.top_shares]
        shown.add_row(
            name,
            kind,
            missing,
            distinct_text(values),
            *shares,
            Text(_short(column.hottest)),
            f"{values.hottest_share:.2%}",
            f"{about(values)}{values.singletons:.1%}",
            role.role,
        )
    shown.caption = (
        "top 1 %, top 10 %: share of the accesses that go to these most frequent of the different "
        "values; of all: share of the hottest one; once: share of the different values that came "
        "once"
    )
    return shown


def _marks(survey: Survey) -> Iterator[str]:
    estimated = [one.values for one in survey.profile.columns if not one.values.is_exact]
    if estimated:
        worst = max(values.distinct_error for values in estimated)
        yield (
            f"~ estimated: more than {survey.profile.max_values:,} different values; distinct "
            f"within {worst:.1%}, 19 times in 20"
        )


def _numbers(columns: list[ColumnSummary]) -> Table:
    shown = Table("column", "min", "1 %", "median", "99 %", "max", "mean", "std", title="numbers")
    for place in shown.columns[1:]:
        place.justify = "right"
    has_infinite = any(one.numbers is not None and one.numbers.infinite for one in columns)
    if has_infinite:
        shown.add_column("infinite", justify="right")
    for column in columns:
        numbers = column.numbers
        if numbers is None:
            continue
        low, median, high = _quantiles(numbers)
        figures = (numbers.minimum, low, median, high, numbers.maximum)
        cells = [f"{one:.6g}" for one in (*figures, numbers.mean, numbers.deviation)]
        shown.add_row(
            Text(column.name), *cells, *([f"{numbers.infinite:,}"] if has_infinite else [])
        )
    if any(one.numbers is not None and not one.numbers.is_exact for one in columns):
        shown.caption = "quantiles are those of a sample of 32,768; their ranks are within 0.6 %"
    return shown


def _lengths(columns: list[ColumnSummary]) -> Table:
    shown = Table(
        "column", "shortest", "1 %", "median", "99 %", "longest", "mean", title="lengths of lists"
    )
    for place in shown.columns[1:]:
        place.justify = "right"
    for column in columns:
        if column.lengths is not None:
            lengths = column.lengths
            low, median, high = _quantiles(lengths)
            figures = (lengths.minimum, low, median, high, lengths.maximum)
            cells = [f"{one:,.0f}" for one in figures]
            shown.add_row(Text(column.name), *cells, f"{lengths.mean:,.2f}")
    return shown


def _roles(survey: Survey) -> Table:
    shown = Table("column", "looks like", "because", title="what the columns are for")
    for role in survey.roles.columns:
        shown.add_row(Text(role.name), role.role, Text(role.reason))
    return shown


def _rate(rate: LabelRate, survey: Survey) -> Table:
    name = survey.roles.label
    over = f"over {survey.roles.event_time}" if rate.is_time else "over the rows of the files"
    shown = Table("from", "rows", "rate", "", title=f"label rate of {name}: {rate.overall:.4%}")
    shown.columns[1].justify = shown.columns[2].justify = "right"
    rates = rate.positives / np.maximum(rate.rows, 1)
    highest = max(float(rates.max()), 1e-12)
    for edge, rows, one in zip(rate.edges[:-1], rate.rows, rates, strict=True):
        begin = moment(edge) if rate.is_time else f"row {edge:,.0f}"
        if rows:
            bar = Text("█" * round(_BAR * float(one) / highest))
            shown.add_row(begin, f"{rows:,}", f"{one:.3%}", bar)
        else:
            shown.add_row(begin, "0", "", "")
    shown.caption = f"{over}, in parts of equal width"
    return shown


def distinct_text(values: ValueSummary) -> str:
    """How many different values; `~` where it is an estimate."""
    return f"{about(values)}{values.distinct:,}"


def about(values: ValueSummary) -> str:
    """`~` before an estimate."""
    return "" if values.is_exact else "~"


def moment(ms: float) -> str:
    """A time in ms since 1970 UTC, to the minute."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return f"{ms:.6g} ms"


def _quantiles(numbers: NumberSummary) -> tuple[float, float, float]:
    low, median, high = (numbers.quantiles[QUANTILES.index(share)] for share in _SHOWN)
    return low, median, high


def _type(column: ColumnSummary) -> str:
    """The file's type and, of text, what it reads as."""
    is_read = column.type == "string" and column.kind in {"integer", "float", "time"}
    # Arrow names the values of a list, too.
    return f"text: {column.kind}" if is_read else re.sub(r"<\w+: ", "<", column.type)


def _short(text: str) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
