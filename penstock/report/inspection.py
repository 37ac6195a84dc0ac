"""What a run or a checkpoint holds, as tables for the terminal and pictures in the run folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from penstock.config import parse_job
from penstock.embedding.durable_files import read_tensors
from penstock.embedding.retention import RetentionState
from penstock.errors import ConfigError, DataError
from penstock.report.display import counts_text, size_text, tables_table
from penstock.report.folder import RunFolder
from penstock.report.plots import MISSING, can_draw, draw_run
from penstock.report.record import RunRecord, is_metric
from penstock.report.skew_plots import draw_skew
from penstock.report.terminal_curves import curve_tables, skew_table
from penstock.survey.key_skew import key_skew
from penstock.training.checkpoint.files import Manifest, verify
from penstock.training.trained import read_newest


def inspect_path(path: Path, *, draw: bool = True) -> Iterator[Table | str]:
    """Describes the newest checkpoint of a run folder, or the checkpoint that `path` is.

    Args:
      path: a run folder, whose curves are shown too, or a checkpoint.
      draw: also draw the run's curves to PNG files, in `plots` of the run folder.

    Raises:
      CheckpointError: there is none, or a file does not match its checksum.
      ConfigError: the metrics cannot be read, or a picture cannot be written.
    """
    checkpoint, manifest, retention = read_newest(path, _read_checkpoint)
    yield f"checkpoint {checkpoint}"
    yield _overview(manifest)
    yield tables_table({
        table.name: {
            "rows": table.rows,
            "bytes": table.rows * table.row_bytes,
        }
        for table in manifest.tables
    })
    if retention is not None:
        yield retention
    yield _files(manifest)
    folder = RunFolder(path)
    if folder.summary_file.is_file():
        yield _metrics(folder.read_summary())
    is_run = folder.metrics_file.is_file()
    if is_run:
        yield from _curves(RunRecord.read(path), draw)
    yield from _key_skew(manifest, folder.plots if draw and is_run else None)
    size = sum(record.bytes for record in manifest.files.values())
    yield f"{len(manifest.files)} files, {size_text(size)}: all checksums verified"


def _read_checkpoint(checkpoint: Path) -> tuple[Path, Manifest, Table | None]:
    """All that is read of it, in one go: a process that trains may remove it."""
    manifest = verify(checkpoint)
    rules = any(table.retention for table in manifest.tables)
    return checkpoint, manifest, _retention(checkpoint, manifest) if rules else None


def _curves(record: RunRecord, draw: bool) -> Iterator[Table | str]:
    yield from curve_tables(record)
    if not draw:
        return
    if not can_draw():
        yield MISSING
        return
    for file in draw_run(record, RunFolder(record.path).plots):
        yield f"picture {file}"


def _key_skew(manifest: Manifest, folder: Path | None) -> Iterator[Table | str]:
    """Reads a sample of the job's data, if it is still there; draws into `folder`."""
    try:
        skew = key_skew(parse_job(manifest.job, "job of the checkpoint", is_record=True))
    except (ConfigError, DataError) as error:
        yield f"no key skew, which needs the job's data: {error}"
        return
    if not skew.tables:
        return
    yield skew_table(skew)
    if folder is not None and can_draw():
        yield f"picture {draw_skew(skew.tables, folder / 'skew.png', 'accesses')}"


def _overview(manifest: Manifest) -> Table:
    position = manifest.position
    shown = Table(show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    shown.add_row("job", str(manifest.job["name"]))
    shown.add_row("step", f"{manifest.step:,}")
    shown.add_row("samples", f"{position.samples:,}")
    shown.add_row(
        "position",
        f"epoch {position.epoch}, block {position.block}, {position.block_row:,} samples of it",
    )
    shown.add_row("rows", counts_text(position.counts._asdict()))
    shown.add_row("written", manifest.created)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    shown.add_row("versions", versions)
    return shown


def _retention(checkpoint: Path, manifest: Manifest) -> Table:
    """What tables with rules admitted, refused and evicted, and how long rows have been unused."""
    names = ("admitted", "refused", "evicted", "dropped")
    title = "admission and eviction"
    shown = Table("table", *names, "unused: median", "90 %", "longest", title=title)
    for column in shown.columns[1:]:
        column.justify = "right"
    for table in manifest.tables:
        if table.retention is None:
            continue
        numbers = RetentionState.from_tensors(read_tensors(checkpoint / table.retention)).numbers
        ages = ["-"] * 3
        if table.usage_dim and table.rows:
            last_use = [_read(checkpoint / shard, "usage")[:, 0] for shard in table.shards]
            unused = numbers["now"] - np.concatenate(last_use)
            ages = [f"{age:,.0f}" for age in np.quantile(unused, (0.5, 0.9, 1.0))]
        shown.add_row(table.name, *(f"{numbers[name]:,}" for name in names), *ages)
    return shown


def _read(path: Path, name: str) -> NDArray[np.int64]:
    with safetensors.safe_open(path, framework="np") as file:
        array: NDArray[np.int64] = file.get_tensor(name)
        return array


def _files(manifest: Manifest) -> Table:
    shown = Table("file", "bytes", "BLAKE2b")
    shown.columns[1].justify = "right"
    for name, record in manifest.files.items():
        shown.add_row(name, f"{record.bytes:,}", f"{record.blake2b[:16]}...")
    return shown


def _metrics(summary: Mapping[str, Any]) -> Table:
    shown = Table("metric", "value", title=f"measured on the {summary.get('measured_on')}")
    shown.columns[1].justify = "right"
    for task, found in {"": summary, **summary.get("tasks", {})}.items():
        for name, value in found.items():
            if is_metric(name) and math.isfinite(value):
                shown.add_row(f"{escape(task)}: {name}" if task else name, f"{value:.6f}")
    return shown
