"""Writes scores as a Parquet file, batch by batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from penstock.errors import DataError
from penstock.training.evaluation import Scored
from penstock.training.objective import Objective
from penstock.training.tasks import output_of_task


def write_scores(
    scored: Iterable[Scored],
    objective: Objective,
    labels: Collection[str],
    path: Path,
) -> int:
    """Writes one row a sample: row, score and, where the data has it, label.

    Of a job of several labels: score_NAME and label_NAME of each. A missing label is null.

    Args:
      scored: batches in order of reading, each with what the model made of it.
      objective: what the outputs mean.
      labels: names of the labels that the data has.
      path: the Parquet file to write; half of it is there while it is being written, see
        `data.output.whole_file`.

    Returns:
      Number of rows written.

    Raises:
      DataError: there is no row.
      OSError: the file cannot be written.
    """
    writer: pq.ParquetWriter | None = None
    rows = 0
    try:
        for table in _tables(scored, objective, labels):
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            rows += table.num_rows
    finally:
        if writer is not None:
            writer.close()
    if not rows:
        raise DataError("the data has no row to score; nothing was written")
    return rows


def _tables(
    scored: Iterable[Scored], objective: Objective, labels: Collection[str]
) -> Iterator[pa.Table]:
    row = 0
    for batch, _, outputs in scored:
        columns = {"row": torch.arange(row, row + batch.batch_size).numpy()}
        scores = objective.scores(outputs)
        for number, (name, score) in enumerate(scores.items()):
            ending = f"_{name}" if len(scores) > 1 else ""
            columns[f"score{ending}"] = score.numpy()
            if name in labels:
                label = output_of_task(batch.labels, number).numpy()
                columns[f"label{ending}"] = pa.array(label, mask=np.isnan(label))
        yield pa.table(columns)
        row += batch.batch_size
