"""Pictures of runs as PNG files; needs matplotlib (`penstock[plots]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.data.output import whole_file
from penstock.errors import ConfigError
from penstock.report.record import Curve, RunRecord, by_task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = (
    "no PNG files: matplotlib is not installed; install it with: pip install 'penstock[plots]'"
)
COLORS = ("#3b6fb6", "#d1622b", "#3f8f54", "#8a5aa8", "#b8973a", "#4aa3a8", "#c05a84", "#6b6b6b")
GREY = "#9a9a9a"
_MOST_TABLES = 8
_MOST_IN_A_ROW = 4
_Numbers: TypeAlias = NDArray[np.float64]
_NEAR = 1.96
"""Standard errors of a 95 % interval."""


CREATOR = "Penstock"
"""What a PNG file says that it was made with."""
_FIRST_BYTES = 4096


def is_drawn(path: Path) -> bool:
    """Whether a file is a PNG picture of ours, which another may take the place of."""
    try:
        with path.open("rb") as file:
            return b"tEXtSoftware\0" + CREATOR.encode() in file.read(_FIRST_BYTES)
    except OSError:
        return False


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def draw_run(record: RunRecord, folder: Path) -> list[Path]:
    """Draws training curves, calibration and tables of one run, as far as it has them.

    Args:
      record: the run.
      folder: where training.png, calibration.png and tables.png go; made if it is not there.

    Returns:
      The files written.

    Raises:
      ConfigError: a file cannot be written.
    """
    written = []
    if record.training and record.drawn_metrics():
        written.append(save_figure(_training(record), folder / "training.png"))
    if record.calibrations:
        written.append(save_figure(_calibrations(record), folder / "calibration.png"))
    if record.growth():
        written.append(save_figure(_tables(record.growth()), folder / "tables.png"))
    return written


def draw_comparison(runs: Mapping[str, RunRecord], path: Path) -> Path:
    """Lays the curves of several runs over each other.

    Args:
      runs: by the name to show.
      path: the PNG file.

    Raises:
      ConfigError: no run has metrics, or the file cannot be written.
    """
    metrics = {k: v for record in runs.values() for k, v in record.drawn_metrics().items()}
    if not metrics:
        raise ConfigError("none of the runs has logged a metric yet; there is nothing to draw")
    figure, axes = new_figure(len(metrics), 3.6, bottom=0.1 + 0.22 * ((len(runs) + 1) // 2))
    for axis, (metric, words) in zip(axes, metrics.items(), strict=True):
        for number, (name, record) in enumerate(runs.items()):
            color = COLORS[number % len(COLORS)]
            style = "-" if number < len(COLORS) else "--"
            _draw_curve(axis, record.training_curve(metric), color, style, label=name, alpha=0.4)
            held_out = record.evaluation_curve(metric)
            axis.plot(held_out.samples, held_out.values, style, color=color, linewidth=1.0)
            axis.plot(held_out.samples, held_out.values, "o", color=color, markersize=5)
        axis.set_title(words, fontsize=10)
        _fit_height(axis)
        _samples_axis(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False, fontsize=8)
    for handle in legend.get_lines():
        handle.set_alpha(1.0)  # the curves of training are pale
    figure.suptitle("lines: training, each batch before its update; dots: held-out part", size=9)
    return save_figure(figure, path)


def _training(record: RunRecord) -> Figure:
    metrics = record.drawn_metrics()
    figure, axes = new_figure(len(metrics), 3.0, bottom=0.25)
    for axis, (metric, words) in zip(axes, metrics.items(), strict=True):
        _draw_curve(axis, record.training_curve(metric), COLORS[0], label="training")
        held_out = record.evaluation_curve(metric)
        axis.plot(
            held_out.samples,
            held_out.values,
            "o-",
            color=COLORS[1],
            markersize=4,
            linewidth=1,
            label="held-out",
        )
        if held_out.values.size:
            axis.annotate(
                f"{held_out.values[-1]:.4f}",
                (held_out.samples[-1], held_out.values[-1]),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=COLORS[1],
                fontsize=8,
                annotation_clip=False,
            )
        axis.set_title(words, fontsize=10)
        _fit_height(axis)
        _samples_axis(axis)
    best = record.evaluation_curve(("teacher_auc",))
    if best.values.size and ("auc",) in metrics:
        axis, height = axes[list(metrics).index(("auc",))], float(best.values[-1])
        axis.axhline(height, color=GREY, linestyle=":", label="best reachable")
        low, high = axis.get_ylim()
        axis.set_ylim(low, max(high, height + 0.05 * (height - low)))
    # By name, once each: not every panel has all of them.
    named = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(), named.keys(), loc="lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _calibrations(record: RunRecord) -> Figure:
    found = record.calibrations
    columns = min(len(found), _MOST_IN_A_ROW)
    figure, axes = new_figure(len(found), 4.4, width=4.8 * columns)
    last = record.evaluations[-1]
    for axis, (task, buckets) in zip(axes, found.items(), strict=True):
        _calibration(axis, np.array(buckets).T)
        over_all = _text(by_task(last)[task].get("calibration"))
        what = task or "calibration of the held-out part"
        axis.set_title(f"{what}: {over_all} at step {last['step']:,}", fontsize=10)
    return figure


def _calibration(axis: Axes, buckets: _Numbers) -> None:
    predicted, observed, weight = buckets
    # As many samples as the weights come to; of weighted samples the interval is a rough one.
    low, high = _interval(observed, weight)
    axis.errorbar(
        predicted,
        observed,
        yerr=(np.clip(observed - low, 0, None), np.clip(high - observed, 0, None)),
        fmt="o",
        markersize=4,
        color=COLORS[0],
        ecolor="#a9c1e2",
        label="one bucket, 95 % interval",
    )
    is_wide = bool(predicted.max() > 30 * max(predicted.min(), 1e-12) and observed.any())
    edges = _limits(predicted, observed, is_wide)
    if is_wide:
        axis.set_xscale("log")
        axis.set_yscale("log")
        never = predicted[observed == 0]
        if never.size:
            # Zero has no place on a logarithmic axis.
            at_bottom = np.full(never.size, edges[0] * 1.15)
            axis.plot(never, at_bottom, "v", color=COLORS[1], markersize=5, label="no positive")
    axis.plot(edges, edges, color=GREY, linewidth=1, linestyle="--", label="perfect")
    axis.set_xlim(edges)
    axis.set_ylim(edges)
    axis.set_aspect("equal")
    axis.set_xlabel("mean prediction")
    axis.set_ylabel("observed rate")
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def _interval(observed: _Numbers, weight: _Numbers) -> tuple[_Numbers, _Numbers]:
    """Wilson's 95 % interval of a rate: lower and upper ends."""
    spread = _NEAR**2 / weight
    middle = (observed + spread / 2) / (1 + spread)
    half = _NEAR * np.sqrt(observed * (1 - observed) / weight + spread / (4 * weight))
    half = half / (1 + spread)
    return middle - half, middle + half


def _limits(predicted: _Numbers, observed: _Numbers, is_log: bool) -> tuple[float, float]:
    seen = np.concatenate((predicted, observed))
    if is_log:
        seen = seen[seen > 0]
        return float(seen.min()) / 1.6, min(1.0, float(seen.max()) * 1.6)
    margin = 0.05 * float(seen.max())
    return max(0.0, float(seen.min()) - margin), min(1.0, float(seen.max()) + margin)


def _tables(growth: Mapping[str, Curve]) -> Figure:
    figure, (over_time, by_table) = new_figure(2, 3.8)
    names = list(growth)
    shown, others = names[:_MOST_TABLES], names[_MOST_TABLES:]
    for name in others:
        _draw_curve(over_time, growth[name], "#d9d9d9")
    for number, name in enumerate(shown):
        _draw_curve(over_time, growth[name], COLORS[number])
    over_time.set_title("rows of each table over the samples, colours as on the right", fontsize=9)
    _samples_axis(over_time)

    rows = [float(growth[name].values[-1]) for name in names]
    most = 30
    colors = [*COLORS[: len(shown)], *[GREY] * len(others)][:most]
    places = np.arange(len(names[:most]))
    by_table.bar(places, rows[:most], color=colors, width=0.8)
    by_table.grid(visible=False, axis="x")
    for axis in (over_time, by_table):
        if rows[0] > 30 * max(rows[-1], 1.0):
            axis.set_yscale("log")
            axis.set_ylim(bottom=0.8)
        else:
            axis.set_ylim(bottom=0)
    by_table.set_xticks(places, names[:most], rotation=90, fontsize=7)
    left_out = f"; {len(names) - most} smaller ones not shown" if len(names) > most else ""
    tenth = max(1, len(rows) // 10)
    largest = sum(rows[:tenth]) / max(sum(rows), 1.0)
    by_table.set_title(
        f"rows at the end: {largest:.0%} in the largest {tenth} of {len(rows)} tables{left_out}",
        fontsize=9,
    )
    return figure


def new_figure(
    panels: int, height: float, *, width: float | None = None, bottom: float = 0.0
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of panels of one height (inches); `bottom` is room for a legend below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, _MOST_IN_A_ROW)
    rows = -(-panels // columns)
    height = height * rows + bottom
    # Not pyplot, which keeps every figure in the process.
    figure = Figure(figsize=(width or 4.0 * columns, height), dpi=130)
    FigureCanvasAgg(figure)
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    layout = every[:panels]
    for axis in every[panels:]:
        axis.remove()
    for axis in layout:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, color="#ececec", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    below = bottom / height
    figure.set_layout_engine("constrained", rect=(0, below, 1, 1 - below))
    return figure, layout


def _draw_curve(
    axis: Axes,
    curve: Curve,
    color: str,
    style: str = "-",
    *,
    label: str | None = None,
    alpha: float = 1.0,
) -> None:
    marker = "." if curve.samples.size == 1 else None
    axis.plot(
        curve.samples,
        curve.values,
        style,
        color=color,
        linewidth=1.3,
        label=label,
        alpha=alpha,
        marker=marker,
    )


def _fit_height(axis: Axes) -> None:
    """Gives the height to what comes after the first tenth, not to the fall of the first steps."""
    points = np.concatenate([line.get_xydata() for line in axis.lines])
    late = points[points[:, 0] >= 0.1 * points[:, 0].max(initial=0.0), 1]
    if late.size:
        margin = 0.08 * float(late.max() - late.min()) or 0.01
        axis.set_ylim(float(late.min()) - margin, float(late.max()) + margin)


def _samples_axis(axis: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlabel("samples", fontsize=8)
    axis.set_xlim(left=0)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a picture, over an older one; makes its folder.

    Raises:
      ConfigError: it cannot be written, or the name ends with no format of pictures.
    """
    with whole_file(path, overwrite=True) as part:
        try:
            kind = path.suffix.removeprefix(".") or "png"
            mark = {"Software": CREATOR} if kind == "png" else None
            figure.savefig(part, format=kind, metadata=mark)
        except ValueError as error:
            raise ConfigError(f"{path}: cannot write the picture: {error}") from None
    return path
