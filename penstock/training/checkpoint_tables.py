"""Tables of a checkpoint: rows in shards, and what admission and eviction remember."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import safetensors

from penstock.embedding import EmbeddingCollection, TableRows
from penstock.embedding.retention import RetentionState, retains
from penstock.embedding.store import Candidates, RowLayout
from penstock.training.checkpoint_files import (
    FileRecord,
    Manifest,
    TableRecord,
    read_tensors,
    write_tensors,
)

SHARD_BYTES = 1 << 27
"""Rows of a table are cut into files of at most this size; writing takes about twice as much
memory."""


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


def import_tables(path: Path, manifest: Manifest, collection: EmbeddingCollection) -> None:
    """Fills the empty tables of `collection` with those of the checkpoint `path`."""
    for table in manifest.tables:
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
    collection.step = manifest.collection_step
