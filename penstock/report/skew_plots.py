"""Pictures of unknown data and of key skew as PNG files; needs matplotlib (`penstock[plots]`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from penstock.report.plots import COLORS, GREY, new_figure, save_figure
from penstock.survey.label_rate import LabelRate
from penstock.survey.sketches import ValueSummary

_MOST_COLORED = 8
_MOST_BARS = 30


def draw_skew(values: Mapping[str, ValueSummary], path: Path, what: str) -> Path:
    """Draws how accesses are spread over values: by rank, and the shares of the top.

    Args:
      values: by the name to show.
      path: the PNG file.
      what: the accesses are of, for the title.

    Raises:
      ConfigError: the file cannot be written.
    """
    figure, (by_rank, shares) = new_figure(2, 3.8)
    ranked = sorted(values.items(), key=lambda item: -item[1].distinct)
    for number, (name, one) in reversed(list(enumerate(ranked))):
        color = COLORS[number] if number < _MOST_COLORED else "#d9d9d9"
        label = f"{name} ({'' if one.is_exact else '~'}{one.distinct:,})"
        by_rank.plot(
            one.ranks,
            one.counts / max(one.accesses, 1),
            "." if one.ranks.size == 1 else "-",
            color=color,
            linewidth=1.3,
            label=label if number < _MOST_COLORED else None,
        )
    by_rank.set_xscale("log")
    by_rank.set_yscale("log")
    by_rank.set_xlabel("rank by frequency", fontsize=8)
    by_rank.set_title(f"share of {what} that go to the value of a rank", fontsize=9)
    handles, labels = by_rank.get_legend_handles_labels()
    by_rank.legend(handles[::-1], labels[::-1], frameon=False, fontsize=6, loc="lower left")

    shown = ranked[:_MOST_BARS]
    places = np.arange(len(shown))
    for shift, part, words, color in (
        (-0.2, 0, "top 1 %", COLORS[0]),
        (0.2, 1, "top 10 %", COLORS[1]),
    ):
        heights = [one.top_shares[part] for _, one in shown]
        shares.bar(places + shift, heights, width=0.4, color=color, label=words)
    shares.set_ylim(0, 1)
    shares.grid(visible=False, axis="x")
    shares.set_xticks(places, [name for name, _ in shown], rotation=90, fontsize=7)
    left_out = f"; {len(ranked) - _MOST_BARS} smaller ones not shown"
    shares.set_title(
        f"share of the most frequent values{left_out if len(ranked) > _MOST_BARS else ''}",
        fontsize=9,
    )
    shares.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def draw_label_rate(rate: LabelRate, name: str, path: Path) -> Path:
    """Draws the rate of positives over time or over the files, and how many rows each part has.

    Args:
      rate: by bucket.
      name: of the label.
      path: the PNG file.

    Raises:
      ConfigError: the file cannot be written.
    """
    figure, (axis,) = new_figure(1, 3.6, width=7.0)
    middles = (rate.edges[1:] + rate.edges[:-1]) / 2
    width = rate.edges[1] - rate.edges[0]
    has_rows = rate.rows > 0
    rates = rate.positives[has_rows] / rate.rows[has_rows]
    if rate.is_time:
        # matplotlib counts days.
        middles, width = middles / 86_400_000, width / 86_400_000
        axis.xaxis_date()
    counts = axis.twinx()
    counts.bar(middles, rate.rows, width=0.9 * width, color="#e3e3e3", zorder=0)
    counts.set_ylabel("rows", fontsize=8, color=GREY)
    counts.tick_params(labelsize=8, colors=GREY)
    counts.spines[["top"]].set_visible(False)
    axis.set_zorder(counts.get_zorder() + 1)
    axis.patch.set_visible(False)
    # One standard error of a rate of so many rows.
    error = np.sqrt(rates * (1 - rates) / rate.rows[has_rows])
    axis.errorbar(
        middles[has_rows], rates, yerr=1.96 * error, fmt="o-", color=COLORS[0], markersize=4
    )
    axis.axhline(rate.overall, color=COLORS[1], linestyle=":", linewidth=1)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("share of positives, 95 % interval", fontsize=8)
    axis.set_xlabel("time (UTC)" if rate.is_time else "row, in the order of the files", fontsize=8)
    if rate.is_time:
        axis.tick_params(axis="x", rotation=30)
    axis.set_title(f"label rate of {name}: {rate.overall:.4%} overall", fontsize=10)
    return save_figure(figure, path)
