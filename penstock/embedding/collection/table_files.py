"""Tables in files: rows in shards, and what admission and eviction remember.

A checkpoint has them among its files; a collection alone writes a directory of them, with a
manifest of its own (docs/checkpoint_format.md).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from penstock.config import HashStack, ValueType
from penstock.embedding.collection.table_state import (
    FORMAT,
    VERSION,
    TableKind,
    check_kinds,
    describe_stack,
)
from penstock.embedding.durable_files import (
    MANIFEST,
    SEAL,
    FileRecord,
    read_sealed,
    read_tensors,
    seal,
    sync_directory,
    verify_files,
    write_durably,
    write_tensors,
)
from penstock.embedding.retention import RetentionState, limits_of, retains, share_of
from penstock.embedding.sharded.all_ranks import all_do, check_one_for_all
from penstock.embedding.sharded.store import Ranks
from penstock.embedding.store import Candidates, RowLayout, TableRows
from penstock.errors import CheckpointError

if TYPE_CHECKING:
    from penstock.embedding.collection.collection import EmbeddingCollection

# FORMAT: never change these; see docs/checkpoint_format.md.
_OF_A_RUN = "penstock checkpoint"
# The tables are the same in both; what differs is the position in the input.
_READ = {(FORMAT, VERSION), (_OF_A_RUN, 1), (_OF_A_RUN, 2), (_OF_A_RUN, 3)}
_UNFINISHED = ".tmp-"
_PART = "part-{:05d}-of-{:05d}"
_ANY_PART = re.compile(r"part-(\d{5})-of-(\d{5})")
_REPLACED = ".replaced"

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
    writers: tuple[int, ...] = ()
    """Of each of `shards` the rank that wrote it; empty: any may have any row."""
    num_writers: int = 1
    """Ranks over which the rows were spread then, evenly by bucket."""

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TableRecord:
        """Of a manifest; KeyError or TypeError where it is none."""
        names = "counts", "writers"
        lists = {name: tuple(fields.get(name, ())) for name in names}
        return cls(**{**fields, **lists, "shards": tuple(fields["shards"])})

    def with_rows_of(self, collection: EmbeddingCollection) -> TableRecord:
        """Without the shards that have no row of those that live in `collection`."""
        if not self.writers:
            return self
        sources = collection.sources(self.name, self.num_writers)
        pairs = zip(self.shards, self.writers, strict=True)
        shards = tuple(shard for shard, writer in pairs if writer in sources)
        return replace(self, shards=shards, writers=())

    @property
    def row_bytes(self) -> int:
        """Bytes of value, state and marks of use of one row."""
        value_bytes = 4 if self.dtype == "float32" else 2
        return value_bytes * self.dim + 4 * (self.state_dim + self.usage_dim)


def write_tables(
    directory: Path,
    collection: EmbeddingCollection,
    files: dict[str, FileRecord],
    part: tuple[int, int] = (0, 1),
    states: Mapping[str, RetentionState] | None = None,
) -> Iterator[TableRecord]:
    """Writes the files of every table into `directory`, and into `files` what they are.

    Args:
      directory: where they go.
      collection: whose tables, or this rank's rows of them.
      files: gets the records of the files.
      part: this rank and how many write into one directory: names of files carry it.
      states: what tables remember, by name; of others nothing is written. None: their own.
    """
    of_rank = "" if part[1] == 1 else f"-rank-{part[0]:05d}"
    for number, table in enumerate(collection.tables):
        layout = RowLayout.of(table)
        row_bytes = 8 + layout.row_bytes + 4 * layout.usage_dim
        # The number keeps names apart that differ in case alone, or are cut off here.
        name = f"table-{number:04d}-{table.name[:100]}{of_rank}"
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
        if part[1] > 1 and table.placement == "spread":
            record = replace(record, writers=(part[0],) * len(shards), num_writers=part[1])
        if retains(table):
            state = (
                collection.retention_state(table.name) if states is None else states.get(table.name)
            )
            if state is not None:
                file = f"{name}-retention.safetensors"
                files[file] = write_tensors(directory / file, state.tensors())
                record = replace(record, retention=file)
            counts = _write_counts(directory, name, table.name, collection, files)
            record = replace(record, counts=counts)
        yield record


def _write_counts(
    directory: Path,
    name: str,
    table: str,
    collection: EmbeddingCollection,
    files: dict[str, FileRecord],
) -> tuple[str, ...]:
    counts: list[str] = []
    for candidates in collection.export_candidates(table, SHARD_BYTES // 16):
        shard = f"{name}-counts-{len(counts):05d}.safetensors"
        files[shard] = write_tensors(directory / shard, candidates._asdict())
        counts.append(shard)
    return tuple(counts)


def import_tables(
    path: Path,
    records: Sequence[TableRecord],
    collection: EmbeddingCollection,
    part: int = 0,
) -> None:
    """Fills the tables of `collection` with those of the directory `path`.

    A table that holds less than it did, because its budget is smaller or counts more than it did
    when the files were written, lets go of the rows that come first in the order of its eviction.

    Args:
      path: of the files.
      records: of the tables.
      collection: empty, or filled with the parts before.
      part: number of a part that a rank wrote, among those of all.
    """
    for table in (record.with_rows_of(collection) for record in records):
        leaving: list[Tensor] | None = None
        counted: Candidates | None = None
        if table.retention is not None:
            leaving, counted = _import_retention(path, table, collection, part)
        for number, shard in enumerate(table.shards):
            # Memory-mapped: no more of a shard is in memory than what is being copied.
            with safetensors.safe_open(path / shard, framework="pt") as file:
                rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if leaving is not None:
                stays = torch.ones(len(rows["keys"]), dtype=torch.bool)
                stays[leaving[number]] = False
                rows = {name: column[stays] for name, column in rows.items()}
            collection.import_rows(table.name, TableRows(**rows))
        if counted is not None:
            collection.import_candidates(table.name, counted)


def _import_retention(
    path: Path, table: TableRecord, collection: EmbeddingCollection, part: int
) -> tuple[list[Tensor] | None, Candidates | None]:
    """Sets what a table remembers; which rows of each file leave, and the counts that stay."""
    assert table.retention is not None
    rank, num_ranks = (0, 1) if collection.ranks is None else collection.ranks.part
    config = next(one for one in collection.tables if one.name == table.name)
    limits = limits_of(share_of(config, num_ranks), RowLayout.of(config).row_bytes)
    state = RetentionState.from_tensors(read_tensors(path / table.retention))
    state = state.of_rank(part, rank, num_ranks)
    if part:
        state = state.joined(collection.retention_state(table.name))
    leaving = None
    if table.shards and table.rows > limits.max_rows and config.eviction is not None:
        places, (keys, usage) = _own(path, table.shards, table.name, collection, "usage")
        goes = torch.split(state.let_go(config, limits, keys, usage), [len(own) for own in places])
        leaving = [own[gone] for own, gone in zip(places, goes, strict=True)]
    counted = None
    if table.counts:
        counted = Candidates(*_own(path, table.counts, table.name, collection, "counts")[1])
        stay = ~state.let_counts_go(limits, counted.keys)
        counted = Candidates(*(column[stay] for column in counted))
    collection.set_retention_state(table.name, state)
    return leaving, counted


def set_row_clock(collection: EmbeddingCollection, state: Mapping[str, Any] | None) -> None:
    """Sets the clock of tables that were read; None: to the latest time that they know."""
    if state is not None:
        collection.row_clock.set_state(state)
        return
    times = [
        collection.retention_state(table.name).numbers["now"]
        for table in collection.tables
        if table.eviction is not None and table.eviction.unit == "seconds"
    ]
    if any(times):
        collection.row_clock.now_s = max(times)


def _own(
    path: Path, files: Sequence[str], table: str, collection: EmbeddingCollection, column: str
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """What is this rank's in the files, at least one, of a table: one file at a time is read.

    Returns:
      Its places in each file; its keys and their `column`, of all files.
    """
    places, keys, columns = [], [], []
    for name in files:
        with safetensors.safe_open(path / name, framework="pt") as file:
            of_file = file.get_tensor("keys")
            own = collection.own_places(table, of_file)
            places.append(own)
            keys.append(of_file[own])
            columns.append(file.get_tensor(column)[own])
    return places, (torch.cat(keys), torch.cat(columns))


def save_tables(path: str | os.PathLike[str], collection: EmbeddingCollection) -> None:
    """See `EmbeddingCollection.save_tables`."""
    final = Path(path).absolute()
    ranks = collection.ranks
    told = f"write their tables to {final}", "what was there before stays"
    with all_do(ranks, *told):
        if os.path.lexists(final) and not _is_of_tables(final):
            raise CheckpointError(
                f"{final} is there already, and save_tables did not write it; give another path"
            )
    token = os.getpid() if ranks is None else ranks.agree(secrets.randbits(60))
    temporary = final.with_name(f"{final.name}{_UNFINISHED}{token}")
    mine = temporary if ranks is None else temporary / _PART.format(*ranks.part)
    try:
        try:
            with all_do(ranks, *told):
                os.makedirs(mine)
                _write(mine, collection)
            with all_do(ranks, *told):
                if ranks is not None:
                    _check_in_one_place(temporary, final, ranks)
            with all_do(ranks, *told):
                if ranks is None or ranks.part[0] == 0:
                    _commit(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        needed = sum(8 * table.rows + table.bytes for table in collection.table_stats())
        # A write that fails, as on a full disk, names no file; a call with a path does.
        named = f": {error.filename}" if error.filename else ""
        raise CheckpointError(
            f"cannot write the tables to {final}: {error.strerror or error}{named}; they need "
            f"about {needed:,} bytes; what was there before stays"
        ) from error


def _check_in_one_place(temporary: Path, final: Path, ranks: Ranks) -> None:
    """Refuses parts that are not beside each other: those elsewhere would be lost."""
    rank, size = ranks.part
    parts = [_PART.format(other, size) for other in range(size)]
    missing = [part for part in parts if not (temporary / part / SEAL).exists()]
    if missing:
        raise CheckpointError(
            f"rank {rank} does not see {', '.join(missing)} beside its own part of {final}: give "
            "save_tables the same path on all ranks, in a file system that all of them see; what "
            "was there before stays"
        )


def _write(directory: Path, collection: EmbeddingCollection) -> None:
    files: dict[str, FileRecord] = {}
    records = [asdict(record) for record in write_tables(directory, collection, files)]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "collection_step": collection.step,
        "row_clock": collection.row_clock.state(),
        "seed": collection.seed,
        "resolved": {"tables": [table.model_dump(mode="json") for table in collection.tables]},
        "tables": records,
        "files": {name: asdict(record) for name, record in files.items()},
    }
    content = json.dumps(manifest, indent=1).encode() + b"\n"
    write_durably(directory / MANIFEST, content)
    write_durably(directory / SEAL, seal(content))
    sync_directory(directory)


def _commit(temporary: Path, final: Path) -> None:
    """Puts the written directory in its place, whole; the one before stays until it is there."""
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    sync_directory(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _is_of_tables(path: Path) -> bool:
    parts = _parts_of(path)
    try:
        content = json.loads(((parts[0] if parts else path) / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def load_tables(path: str | os.PathLike[str], collection: EmbeddingCollection) -> None:
    """See `EmbeddingCollection.load_tables`."""
    path = Path(path)
    replaced = path.with_name(path.name + _REPLACED)
    if not path.exists() and replaced.exists():
        # Its writer died between two renames.
        path = replaced
    ranks = collection.ranks
    with all_do(ranks, f"read the tables of {path}", "nothing was changed"):
        parts = _parts_of(path) or [path]
        manifests = [_read_manifest(part) for part in parts]
        _check_parts(parts, manifests, collection)
    first = manifests[0]
    content = [(saved.step, saved.seed, sorted(saved.files.items())) for saved in manifests]
    told = f"those of {path}, of step {first.step}: give load_tables the same on all ranks"
    check_one_for_all(ranks, content, told)
    fresh = collection.like_new(seed=first.seed)
    for number, (part, saved) in enumerate(zip(parts, manifests, strict=True)):
        import_tables(part, saved.records, fresh, number)
    set_row_clock(fresh, first.row_clock)
    fresh.step = first.step
    collection.take_over(fresh)


def _check_parts(
    parts: Sequence[Path], manifests: Sequence[_Saved], collection: EmbeddingCollection
) -> None:
    first = manifests[0]
    for part, saved in zip(parts, manifests, strict=True):
        verify_files(part, saved.files)
        check_kinds(f"checkpoint {part}", saved.kinds, collection.tables)
        if (saved.step, saved.seed) != (first.step, first.seed):
            raise CheckpointError(
                f"checkpoint {part} is of step {saved.step} and seed {saved.seed}, {parts[0]} of "
                f"step {first.step} and seed {first.seed}: they are not of one save_tables"
            )


def _parts_of(path: Path) -> list[Path]:
    """What each rank wrote, in their order; none: one process wrote all.

    Raises:
      CheckpointError: some are missing.
    """
    if not path.is_dir():
        return []
    found = {
        match.groups(): each for each in path.iterdir() if (match := _ANY_PART.fullmatch(each.name))
    }
    if not found:
        return []
    size = int(next(iter(found))[1])
    wanted = [_PART.format(rank, size) for rank in range(size)]
    missing = sorted(set(wanted) - {each.name for each in found.values()})
    if missing or len(found) != size:
        raise CheckpointError(
            f"checkpoint {path}: {', '.join(missing) or 'parts of other ranks'} "
            f"{'missing' if missing else 'are among those'} of {size} ranks; give load_tables what "
            "save_tables wrote, whole"
        )
    return [path / name for name in wanted]


class _Saved(NamedTuple):
    """What a manifest says of its tables."""

    step: int
    seed: int
    records: tuple[TableRecord, ...]
    kinds: dict[str, TableKind]
    files: dict[str, FileRecord]
    row_clock: Mapping[str, Any] | None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> _Saved:
        """Of a run's checkpoint, or of tables alone."""
        rules = {fields["name"]: fields["optimizer"] for fields in content["resolved"]["tables"]}
        # Older ones have no word of it.
        stacks = {
            fields["name"]: HashStack(**fields["hash_stack"])
            for fields in content["resolved"]["tables"]
            if fields.get("hash_stack")
        }
        records = tuple(TableRecord.from_json(fields) for fields in content["tables"])
        kinds = {
            record.name: TableKind(
                record.dim,
                record.dtype,
                rules[record.name]["kind"],
                record.state_dim,
                record.usage_dim,
                record.retention is not None,
                describe_stack(stacks.get(record.name)),
            )
            for record in records
        }
        is_of_run = content["format"] == _OF_A_RUN
        seed = content["job"]["training"]["seed"] if is_of_run else content["seed"]
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        row_clock = content.get("row_clock")
        return cls(content["collection_step"], seed, records, kinds, files, row_clock)


def _read_manifest(path: Path) -> _Saved:
    raw = read_sealed(path)
    try:
        content = json.loads(raw)
        found = content["format"], content["version"]
        if found in _READ:
            return _Saved.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} is not a manifest: {type(error).__name__}: {error}"
        ) from error
    raise CheckpointError(
        f"checkpoint {path}: {MANIFEST} has format {found[0]!r} version {found[1]}; this Penstock "
        f"reads tables of {' and '.join(f'{name!r} version {n}' for name, n in sorted(_READ))}"
    )
