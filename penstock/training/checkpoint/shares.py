"""The tables of a checkpoint: each rank writes the rows that are its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from penstock.embedding import EmbeddingCollection
from penstock.embedding.collection.table_files import TableRecord, write_tables
from penstock.embedding.durable_files import FileRecord, sync_directory
from penstock.embedding.retention import NUMBERS, RetentionState, retains
from penstock.errors import CheckpointError
from penstock.ranks.group import Group


class Share(NamedTuple):
    """What was written of tables, by a rank or by all of them."""

    tables: tuple[TableRecord, ...]
    files: dict[str, FileRecord]


def remembered(collection: EmbeddingCollection, group: Group) -> dict[str, RetentionState]:
    """What tables remember, over the rows of all ranks; empty on all ranks but the first."""
    states = {
        table.name: collection.retention_state(table.name)
        for table in collection.tables
        if retains(table)
    }
    if group.size == 1 or not states:
        return states
    mine = torch.tensor([[one.numbers[name] for name in NUMBERS] for one in states.values()])
    every = group.gathered(mine)
    if group.rank:
        return {}
    for theirs in every[1:].tolist():
        for (name, state), numbers in zip(states.items(), theirs, strict=True):
            other = replace(state, numbers=dict(zip(NUMBERS, numbers, strict=True)))
            states[name] = state.joined(other)
    return states


def write_share(
    directory: Path,
    collection: EmbeddingCollection,
    group: Group,
    states: Mapping[str, RetentionState],
) -> Share:
    """Writes this rank's rows of every table; the disk has them when it returns.

    Args:
      directory: there already, and the same on all ranks.
      collection: whose tables.
      group: this rank is of.
      states: from `remembered`.
    """
    files: dict[str, FileRecord] = {}
    part = group.rank, group.size
    tables = tuple(write_tables(directory, collection, files, part, states))
    if group.size > 1:
        sync_directory(directory)
    return Share(tables, files)


def share_of_all(group: Group, mine: Share) -> Share:
    """What all ranks wrote, as one: of each table the shards in the order of ranks."""
    if group.size == 1:
        return mine
    said = {
        "tables": [asdict(table) for table in mine.tables],
        "files": {name: asdict(record) for name, record in mine.files.items()},
    }
    every = [json.loads(one) for one in group.gathered_bytes(json.dumps(said).encode())]
    files = {name: FileRecord(**record) for one in every for name, record in one["files"].items()}
    of_ranks = [[TableRecord.from_json(fields) for fields in one["tables"]] for one in every]
    return Share(tuple(map(_joined, zip(*of_ranks, strict=True))), files)


def check_in_one_place(directory: Path, files: Mapping[str, FileRecord]) -> None:
    """Refuses what other ranks wrote elsewhere: it would be lost.

    Raises:
      CheckpointError: names the first file that is not in `directory`.
    """
    for name, record in files.items():
        if not (directory / name).is_file() or (directory / name).stat().st_size != record.bytes:
            raise CheckpointError(
                f"{directory}: rank 0 does not see {name}, which another rank wrote there: the run "
                "folder must lie in a file system that all machines share"
            )


def _joined(records: Sequence[TableRecord]) -> TableRecord:
    return replace(
        records[0],
        rows=sum(one.rows for one in records),
        shards=tuple(shard for one in records for shard in one.shards),
        counts=tuple(shard for one in records for shard in one.counts),
        writers=tuple(rank for one in records for rank in one.writers),
    )
