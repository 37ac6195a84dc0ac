"""Tables in files: rows in shards, and what admission and eviction remember."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors

from penstock.config import ValueType
from penstock.embedding.collection import EmbeddingCollection
from penstock.embedding.durable_files import FileRecord, read_tensors, write_tensors
from penstock.embedding.retention import RetentionState, retains
from penstock.embedding.store import Candidates, RowLayout, TableRows

SHARD_BYTES = 1 << 27
"""Rows of a table are cut into files of at most this size; writing takes about twice as much
memory."""


@dataclass(frozen=True, slots=True)
class TableRecord:
    """What the manifest says of one table."""

    name: str
    dim: int
    state_dim: int
    """Columns of optimizer state."""
    rows: int
    shards: tuple[str, ...]
    """Names of its files, in order."""
    usage_dim: int = 0
    """Columns of marks of use."""
    retention: str | None = None
    """File of default row and counters, where the table has admission, eviction or a budget."""
    counts: tuple[str, ...] = ()
    """Files of counted keys without a row, in order."""
    dtype: ValueType = "float32"
    """Of the values."""

    @property
    def row_bytes(self) -> int:
        """Bytes of value, state and marks of use of one row."""
        value_bytes = 4 if self.dtype == "float32" else 2
        return value_bytes * self.dim + 4 * (self.state_dim + self.usage_dim)


def write_tables(
    directory: Path, collection: EmbeddingCollection, files: dict[str, FileRecord]
) -> Iterator[TableRecord]:
    """Writes the files of every table into `directory`, and into `files` what they are."""
    for number, table in enumerate(collection.tables):
        layout = RowLayout.of(table)
        row_bytes = 8 + layout.row_bytes + 4 * layout.usage_dim
        # The number keeps names apart that differ in case alone, or are cut off here.
        name = f"table-{number:04d}-{table.name[:100]}"
        shards: list[str] = []
        num_rows = 0
        for rows in collection.export_table(table.name, max(1, SHARD_BYTES // row_bytes)):
            shard = f"{name}-{len(shards):05d}.safetensors"
            tensors = {key: part for key, part in rows._asdict().items() if part is not None}
            files[shard] = write_tensors(directory / shard, tensors)
            shards.append(shard)
            num_rows += rows.keys.numel()
        record = TableRecord(
            table.name,
            layout.dim,
            layout.state_dim,
            num_rows,
            tuple(shards),
            layout.usage_dim,
            dtype=layout.value_type,
        )
        if retains(table):
            record = _write_retention(directory, name, record, collection, files)
        yield record


def _write_retention(
    directory: Path,
    name: str,
    record: TableRecord,
    collection: EmbeddingCollection,
    files: dict[str, FileRecord],
) -> TableRecord:
    file = f"{name}-retention.safetensors"
    state = collection.retention_state(record.name)
    files[file] = write_tensors(directory / file, state.tensors())
    counts: list[str] = []
    for candidates in collection.export_candidates(record.name, SHARD_BYTES // 16):
        shard = f"{name}-counts-{len(counts):05d}.safetensors"
        files[shard] = write_tensors(directory / shard, candidates._asdict())
        counts.append(shard)
    return replace(record, retention=file, counts=tuple(counts))


def import_tables(
    path: Path, records: Sequence[TableRecord], collection: EmbeddingCollection
) -> None:
    """Fills the empty tables of `collection` with those of the directory `path`."""
    for table in records:
        if table.retention is not None:
            state = RetentionState.from_tensors(read_tensors(path / table.retention))
            collection.set_retention_state(table.name, state)
        for shard in table.shards:
            # Memory-mapped: no more of a shard is in memory than what is being copied.
            with safetensors.safe_open(path / shard, framework="pt") as file:
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                collection.import_rows(table.name, TableRows(**parts))
        for shard in table.counts:
            collection.import_candidates(table.name, Candidates(**read_tensors(path / shard)))
