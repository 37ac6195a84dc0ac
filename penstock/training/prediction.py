"""Writes scores to a Parquet file, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from penstock.errors import ConfigError, DataError
from penstock.types import Batch


def write_scores(scored: Iterable[tuple[Batch, Tensor]], out: Path) -> int:
    """Writes one row a sample: row, score and, where the samples have one, label.

    Args:
      scored: batches in order of reading, each with its logits [B].
      out: Parquet file; it appears under its name when it is complete, over an older one.

    Returns:
      Number of rows written.

    Raises:
      ConfigError: the file cannot be written.
      DataError: there is no row.
    """
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = _write(scored, part)
        if not rows:
            raise DataError(f"{out}: not written, since the data has no row to score")
        part.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot write the scores: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return rows


def _write(scored: Iterable[tuple[Batch, Tensor]], path: Path) -> int:
    writer: pq.ParquetWriter | None = None
    rows = 0
    try:
        for batch, logits in scored:
            table = _table(batch, logits, rows)
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            rows += batch.batch_size
    finally:
        if writer is not None:
            writer.close()
    return rows


def _table(batch: Batch, logits: Tensor, first_row: int) -> pa.Table:
    columns = {
        "row": torch.arange(first_row, first_row + batch.batch_size).numpy(),
        "score": torch.sigmoid(logits).numpy(),
    }
    if not batch.labels.isnan().any():
        columns["label"] = batch.labels.numpy()
    return pa.table(columns)
