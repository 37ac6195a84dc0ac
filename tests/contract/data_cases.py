"""Small files of every format with the same rows, and what the source contract suite asks of "
"them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import csv, ipc, orc

from penstock.config import Job, parse_job
from penstock.data import Dataset
from penstock.position import Position
from penstock.types import Batch

NUMERIC, FEATURES = 3, 4
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda text: text,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda text: pa.Codec("zstd").compress(text, asbytes=True),
}
"""By the ending of the file's name."""


def make_table(rows: int, seed: int = 0) -> pa.Table:
    """label, weight, time, I1..I3 (with nulls), C1..C4 (with nulls; C4 of wild 64-bit keys)."""
    rng = np.random.default_rng(seed)
    columns = {
        "label": pa.array(rng.integers(0, 2, rows)),
        "weight": pa.array(rng.integers(1, 5, rows) / 2),
        "time": pa.array(1_700_000_000_000 + np.arange(rows) * 1000),
    }
    for number in range(1, NUMERIC + 1):
        columns[f"I{number}"] = pa.array(rng.integers(-3, 1000, rows), mask=rng.random(rows) < 0.2)
    for number in range(1, FEATURES):
        columns[f"C{number}"] = pa.array(rng.integers(0, 50, rows), mask=rng.random(rows) < 0.2)
    columns["C4"] = pa.array(rng.integers(-(2**63), 2**63 - 1, rows))
    return pa.table(columns)


def write_case(kind: str, table: pa.Table, path: Path) -> dict[str, object]:
    """Writes the rows and returns the `source` of a job."""
    if kind == "parquet":
        half = table.num_rows // 2
        pq.write_table(table[:half], path / "part-0.parquet", row_group_size=max(1, half // 3))
        pq.write_table(table[half:], path / "part-1.parquet", row_group_size=max(1, half // 2))
        return {"format": "parquet", "path": str(path / "part-*.parquet")}
    if kind == "orc":
        half = table.num_rows // 2
        for number, rows in enumerate((table[:half], table[half:])):
            orc.write_table(rows, path / f"part-{number}.orc", stripe_size=1024, batch_size=64)
        return {"format": "orc", "path": str(path / "part-*.orc")}
    if kind.startswith("arrow"):
        half = table.num_rows // 2
        new = ipc.new_stream if kind == "arrow stream" else ipc.new_file
        for number, rows in enumerate((table[:half], table[half:])):
            with new(path / f"part-{number}.arrow", rows.schema) as out:
                out.write_table(rows, max_chunksize=60)
        return {"format": "arrow", "path": str(path / "part-*.arrow")}
    if kind.startswith("users"):
        for number, first in enumerate(range(0, table.num_rows, 110)):
            pq.write_table(table[first : first + 110], path / f"{number}.parquet")
        factory = "UncountedRows" if kind == "users uncounted" else "CountedRows"
        return {
            "format": "python",
            "factory": f"tests.contract.users_rows:{factory}",
            "arguments": {"folder": str(path)},
        }
    kind, _, ending = kind.partition(".")
    is_quoted, kind = kind.startswith("quoted "), kind.removeprefix("quoted ")
    file = path / f"rows.{kind}{'.' if ending else ''}{ending}"
    source: dict[str, object] = {"format": kind, "path": str(file)}
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()
    else:
        if is_quoted:
            # A value that looks like rows, in quotes; of every third row.
            fake = [f'see "{n}"\n1,2,3\r\n\n' if n % 3 == 0 else "" for n in range(table.num_rows)]
            table = table.append_column("title", pa.array(fake))
            source["quoted_line_breaks"] = True
        out = io.BytesIO()
        options = csv.WriteOptions(
            delimiter="\t" if kind == "tsv" else ",",
            include_header=kind == "csv",
            quoting_style="needed" if is_quoted else "none",
        )
        csv.write_csv(table, out, options)
        text = out.getvalue()
        source["types"] = {"C*": "int64"}
        if kind == "tsv":
            source["columns"] = ["label", "weight", "time", "I{1..3}", "C{1..4}"]
    file.write_bytes(COMPRESSIONS[ending](text))
    return source


def make_job(source: dict[str, object], **data: object) -> Job:
    """A job over `make_table`'s columns; `data` replaces fields of `data`."""
    return parse_job({
        "data": {
            "source": source,
            "label": {"column": "label"},
            "weight": "weight",
            "event_time": "time",
            "numeric": [{"columns": ["I*"], "transforms": [{"kind": "log"}]}],
            "split": {"by": "fraction", "evaluation": 0.2},
            "shuffle": {"block_rows": 100},
            **data,
        },
        "features": [{"columns": ["C*"]}],
    })


def synthetic_job(rows: int, **data: object) -> Job:
    return parse_job({
        "data": {
            "source": {"format": "synthetic", "rows": rows},
            "label": {"column": "click"},
            "event_time": "event_time",
            "numeric": [{"columns": ["n*"]}],
            "split": {"by": "fraction", "evaluation": 0.2},
            "shuffle": {"block_rows": 100},
            **data,
        },
        "features": [{"columns": ["c*"]}],
    })


def read_all(dataset: Dataset, part: str = "train", **options: object) -> list[Batch]:
    with dataset.batches(part, **{"batch_size": 32, **options}) as batches:
        return list(batches)


def assert_same_batches(got: list[Batch], expected: list[Batch]) -> None:
    """Bit for bit, positions and origins included."""
    assert [batch.start for batch in got] == [batch.start for batch in expected]
    for one, other in zip(got, expected, strict=True):
        assert (one.end, str(one.origin)) == (other.end, str(other.origin))
        assert one.sparse.features == other.sparse.features
        for a, b in zip(tensors(one), tensors(other), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def tensors(batch: Batch) -> list[torch.Tensor | None]:
    return [
        batch.dense,
        batch.sparse.values,
        batch.sparse.offsets,
        batch.labels,
        batch.weights,
        batch.event_time,
        batch.teacher,
    ]


def assert_resumes_everywhere(dataset: Dataset, part: str = "train", **options: object) -> None:
    """Restores at every batch and compares the rest with the uninterrupted run."""
    whole = read_all(dataset, part, **options)
    assert whole, "a test of nothing"
    for before, after in zip(whole, whole[1:], strict=False):
        assert before.end == after.start
    for index, batch in enumerate(whole):
        # A checkpoint stores the position as plain numbers.
        start = Position.from_dict(batch.end.to_dict())
        assert_same_batches(read_all(dataset, part, start=start, **options), whole[index + 1 :])


def rows_of(batches: list[Batch]) -> list[tuple[object, ...]]:
    """Every sample as (label, dense, bags), for comparisons that forget the batching."""
    out = []
    for batch in batches:
        bags = [batch.sparse[name] for name in batch.sparse.features]
        for row in range(batch.batch_size):
            keys = tuple(
                tuple(bag.values[bag.offsets[row] : bag.offsets[row + 1]].tolist()) for bag in bags
            )
            out.append((batch.labels[row].item(), tuple(batch.dense[row].tolist()), keys))
    return out
