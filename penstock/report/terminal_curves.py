"""Curves, calibration and table growth of a run, small enough for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from rich.table import Table
from rich.text import Text

from penstock.report.record import Curve, RunRecord
from penstock.survey.key_skew import KeySkew

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 30
_MOST_TABLES = 12


def sparkline(curve: Curve, width: int = _WIDTH, *, skip_start: bool = False) -> str:
    """Draws a curve as one line of blocks, each the mean of an equal share of the points.

    The lowest is ▁ and the highest █; a curve that never changes is a line of ▁.

    Args:
      curve: what to draw.
      width: the most blocks.
      skip_start: what comes before a tenth of the samples does not decide what is low and high.
    """
    if not curve.values.size:
        return ""
    parts = np.array_split(curve.values, min(width, curve.values.size))
    means = np.array([part.mean() for part in parts])
    ends = np.array([part[-1] for part in np.array_split(curve.samples, means.size)])
    late = means[ends >= 0.1 * ends[-1]] if skip_start else means
    low, high = float(late.min()), float(late.max())
    heights = (means - low) / (high - low) if high > low else np.zeros_like(means)
    heights = heights.clip(0, 1)
    return "".join(_BLOCKS[int(height * (len(_BLOCKS) - 1) + 0.5)] for height in heights)


def curve_tables(record: RunRecord) -> Iterator[Table]:
    """Training curves, calibration and growth of the tables, as far as the run has them."""
    if record.training:
        yield _curves(record)
    for task, buckets in record.calibrations.items():
        yield _calibration(task, buckets)
    growth = record.growth()
    if growth:
        yield _growth(growth)


def skew_table(skew: KeySkew) -> Table:
    """How the accesses of each table are spread over its keys; the table with most keys first."""
    shown = Table(
        "table",
        "accesses",
        "keys",
        "top 1 %",
        "top 10 %",
        "hottest key",
        "of all",
        "once",
        "log frequency by log rank",
        title="key skew",
    )
    for column in shown.columns[1:5] + shown.columns[6:8]:
        column.justify = "right"
    for name, one in sorted(skew.tables.items(), key=lambda item: -item[1].distinct):
        about = "" if one.is_exact else "~"
        curve = Curve(np.log(one.ranks), np.log(one.counts))
        shown.add_row(
            Text(name),
            f"{one.accesses:,}",
            f"{about}{one.distinct:,}",
            *(f"{about}{share:.1%}" for share in one.top_shares),
            "" if one.hottest is None else str(one.hottest),
            f"{one.hottest_share:.2%}",
            f"{about}{one.singletons:.1%}",
            Text(sparkline(curve, _WIDTH // 2)),
        )
    sample = "all" if skew.is_whole else "of a sample of"
    shown.caption = (
        f"{sample} {skew.rows:,} rows of the job's data, read just now, held-out rows among them. "
        "top 1 %, top 10 %: share of the accesses that go to these most frequent of the keys; "
        "once: share of the keys that came once"
    )
    return shown


def _curves(record: RunRecord) -> Table:
    shown = Table("metric", "part", "over the samples", "first", "last", title="training curves")
    for column in shown.columns[3:]:
        column.justify = "right"
    for metric, words in record.drawn_metrics().items():
        for part, curve in (
            ("training", record.training_curve(metric)),
            ("held-out", record.evaluation_curve(metric)),
        ):
            if curve.values.size:
                ends = (f"{curve.values[0]:.4f}", f"{curve.values[-1]:.4f}")
                shown.add_row(Text(words), part, Text(sparkline(curve, skip_start=True)), *ends)
    return shown


def _calibration(task: str, buckets: list[list[float]]) -> Table:
    title = Text("calibration, held-out" + (f": {task}" if task else ""))
    shown = Table("prediction", "observed", "observed / prediction", "weight", title=title)
    for column in (shown.columns[0], shown.columns[1], shown.columns[3]):
        column.justify = "right"
    for predicted, observed, weight in buckets:
        ratio = observed / predicted if predicted else (math.inf if observed else 1.0)
        shown.add_row(f"{predicted:.4f}", f"{observed:.4f}", _deviation(ratio), f"{weight:,.0f}")
    return shown


def _deviation(ratio: float) -> Text:
    """`0.80   ◀◀|    `: one mark for each tenth (at most 8) off 1, to the left if below."""
    marks = 0 if math.isnan(ratio) else round(min(8.0, abs(ratio - 1) * 10))
    bar = f"{'◀' * marks:>8}|{'':8}" if ratio < 1 else f"{'':8}|{'▶' * marks:<8}"
    return Text(f"{ratio:5.2f} {bar}")


def _growth(growth: dict[str, Curve]) -> Table:
    shown = Table("table", "growth", "rows", "new per 1,000 samples", title="tables")
    shown.columns[2].justify = shown.columns[3].justify = "right"
    for name, curve in list(growth.items())[:_MOST_TABLES]:
        shown.add_row(
            Text(name), Text(sparkline(curve)), f"{curve.values[-1]:,.0f}", _lately(curve)
        )
    if len(growth) > _MOST_TABLES:
        rest = list(growth.values())[_MOST_TABLES:]
        rows = sum(curve.values[-1] for curve in rest)
        shown.add_row(f"{len(rest)} smaller ones", "", f"{rows:,.0f}", "")
    return shown


def _lately(curve: Curve) -> str:
    """New rows per 1,000 samples over the last tenth of the points."""
    first = min(curve.values.size - 2, int(curve.values.size * 0.9) - 1)
    if first < 0:
        return ""
    samples = curve.samples[-1] - curve.samples[first]
    return f"{(curve.values[-1] - curve.values[first]) * 1000 / samples:,.1f}" if samples else ""
