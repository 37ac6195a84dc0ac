"""All that the tables of a collection hold, as one tensor: what a `state_dict` carries.

Rows, optimizer states, marks of use, default rows, counted keys, the step and the seed of the
initial values lie in one uint8 tensor, in the safetensors format, with a checksum at its end. So
savers that know tensors alone (safetensors, accelerate) take it, `torch.load(weights_only=True)`
reads it, and a state that somebody has cast or averaged is refused instead of read as rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from penstock.config import HashStack, TableConfig
from penstock.embedding.retention import RetentionState, retains
from penstock.embedding.sharded.all_ranks import all_do, check_one_for_all
from penstock.embedding.store import Candidates, RowLayout, TableRows
from penstock.errors import CheckpointError

if TYPE_CHECKING:
    from penstock.embedding.collection.collection import EmbeddingCollection

# FORMAT: never change these; see docs/torch.md.
FORMAT = "penstock tables"
VERSION = 1
_DIGEST_BYTES = 32
_HEADER = "penstock"
_ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class TableKind:
    """What the rows of a table must have in common with those that are read into it."""

    dim: int
    dtype: str
    optimizer: str
    state_dim: int
    """Columns of optimizer state."""
    usage_dim: int
    """Columns of marks of use."""
    retains: bool
    """Whether there are a default row and counters."""
    hash_stack: str = ""
    """Rounds and size; none: rows are those of single keys."""

    @classmethod
    def of(cls, table: TableConfig) -> TableKind:
        """Of a table as it is configured."""
        layout = RowLayout.of(table)
        return cls(
            layout.dim,
            layout.value_type,
            table.optimizer.kind,
            layout.state_dim,
            layout.usage_dim,
            retains(table),
            describe_stack(table.hash_stack),
        )


def describe_stack(stack: HashStack | None) -> str:
    """`2 x 1000000`."""
    return "" if stack is None else f"{stack.rounds} x {stack.size}"


def check_kinds(what: str, saved: Mapping[str, TableKind], tables: Sequence[TableConfig]) -> None:
    """Refuses tables other than those of a collection, by name.

    Raises:
      CheckpointError: a table is missing or too many, or its rows are of another kind.
    """
    here = {table.name: TableKind.of(table) for table in tables}
    lines = [f"table {name!r}: only in what was saved" for name in saved if name not in here]
    lines += [f"table {name!r}: only in the collection" for name in here if name not in saved]
    for name in saved:
        if name not in here or saved[name] == here[name]:
            continue
        before, now = asdict(saved[name]), asdict(here[name])
        differing = [
            f"{field} was {before[field]!r}, is {now[field]!r}"
            for field in now
            if now[field] != before[field]
        ]
        lines.append(f"table {name!r}: {', '.join(differing)}")
    if lines:
        raise CheckpointError(
            f"{what} has other tables than this collection: {'; '.join(lines)}. Nothing was "
            "changed; make the collection with the tables that were saved, or take rows over one "
            "table at a time with import_rows"
        )


def check_part(part: tuple[int, int], collection: EmbeddingCollection) -> None:
    """Refuses a state of other ranks' rows: those that are not this rank's would be lost.

    Args:
      part: whose rows they are: a rank and how many ranks there were.
      collection: that is to hold them.

    Raises:
      CheckpointError: it is another rank's, or there are not as many.
    """
    here = (0, 1) if collection.ranks is None else collection.ranks.part
    if part[1] > 1 and part != here:
        raise CheckpointError(
            f"the state has the rows of rank {part[0]} of {part[1]}, and this is rank {here[0]} of "
            f"{here[1]}: give each of {part[1]} ranks its own, or go over to another number of "
            "ranks by save_tables and load_tables. Nothing was changed"
        )


def pack_tables(collection: EmbeddingCollection, *, rows: bool = True) -> Tensor:
    """Copies everything that the tables hold.

    Args:
      collection: read, not changed.
      rows: False leaves the tables out: what is packed says only which step they were at.

    Returns:
      [n] uint8 on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    if rows:
        for number, table in enumerate(collection.tables):
            for name, part in _contents(collection, table):
                tensors[f"{number}.{name}"] = part
    header = {
        "format": FORMAT,
        "version": VERSION,
        "step": collection.step,
        "row_clock": collection.row_clock.state(),
        "seed": collection.seed,
        "has_rows": rows,
        "part": (0, 1) if collection.ranks is None else collection.ranks.part,
        "tables": [
            {"name": table.name, **asdict(TableKind.of(table))} for table in collection.tables
        ],
    }
    content = safetensors.torch.save(tensors, {_HEADER: json.dumps(header)})
    digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
    return torch.frombuffer(bytearray(content + digest), dtype=torch.uint8)


def _contents(collection: EmbeddingCollection, table: TableConfig) -> Iterator[tuple[str, Tensor]]:
    parts = list(collection.export_table(table.name, _ROWS_AT_ONCE))
    if parts:
        for name, column in zip(TableRows._fields, zip(*parts, strict=True), strict=True):
            if column[0] is not None:
                yield name, torch.cat(column)
    if not retains(table):
        return
    yield from collection.retention_state(table.name).tensors().items()
    counted = list(collection.export_candidates(table.name))
    if counted:
        for name, column in zip(Candidates._fields, zip(*counted, strict=True), strict=True):
            yield f"candidates.{name}", torch.cat(column)


def unpack_tables(state: object, collection: EmbeddingCollection) -> None:
    """Puts what `pack_tables` made in the place of everything that `collection` holds.

    Every check comes before the first change, on all ranks together; gradients that are not applied
    yet are dropped. Old and new rows are in memory together until it is done.

    Raises:
      CheckpointError: not such a tensor, changed since, or of other tables; or it was packed
        without rows, and the collection is not at the step that it says. Or that is so on another
        rank, or it has another one's step.
      CapacityError: no memory for the rows.
    """
    with all_do(collection.ranks, "load their state of the tables", "nothing was changed"):
        content = _checked(state)
        header, tensors = _parse(content)
        tables = header["tables"]
        part = tuple(header.get("part", (0, 1)))
        _check_fits(header, part, collection)
    step, seed, has_rows = (header[name] for name in ("step", "seed", "has_rows"))
    # Of several ranks each has a part of its own.
    all_rows = content if part[1] == 1 and collection.ranks is not None else b""
    digest = hashlib.blake2b(all_rows, digest_size=_DIGEST_BYTES).digest()
    told = f"a state of step {step} and seed {seed}, of {part[1]} ranks: give load_state_dict what"
    check_one_for_all(
        collection.ranks,
        (step, seed, has_rows, part[1], digest),
        f"{told} all ranks had together",
    )
    if not has_rows:
        return
    fresh = collection.like_new(seed=header["seed"])
    parts: list[dict[str, Tensor]] = [{} for _ in tables]
    for full_name, tensor in tensors.items():
        number, name = full_name.split(".", 1)
        parts[int(number)][name] = tensor
    for fields, of_table in zip(tables, parts, strict=True):
        _fill(fresh, fields["name"], of_table, part)
    fresh.step = header["step"]
    if "row_clock" in header:
        fresh.row_clock.set_state(header["row_clock"])
    collection.take_over(fresh)


def _check_fits(
    header: Mapping[str, Any], part: tuple[int, int], collection: EmbeddingCollection
) -> None:
    kinds = {
        fields["name"]: TableKind(**{k: v for k, v in fields.items() if k != "name"})
        for fields in header["tables"]
    }
    check_kinds("the state", kinds, collection.tables)
    check_part(part, collection)
    if not header["has_rows"] and collection.step != header["step"]:
        raise CheckpointError(
            f"the state was taken without its tables, at step {header['step']}, and this "
            f"collection is at step {collection.step}; call load_tables with what "
            "save_tables wrote at that step, then load_state_dict"
        )


def _fill(
    collection: EmbeddingCollection,
    table: str,
    parts: Mapping[str, Tensor],
    part: tuple[int, int],
) -> None:
    if "retention" in parts:
        here = (0, 1) if collection.ranks is None else collection.ranks.part
        state = RetentionState.from_tensors(parts).of_rank(part[0], *here)
        collection.set_retention_state(table, state)
    if "keys" in parts:
        rows = {name: parts[name] for name in TableRows._fields if name in parts}
        collection.import_rows(table, TableRows(**rows))
    if "candidates.keys" in parts:
        counted = {name: parts[f"candidates.{name}"] for name in Candidates._fields}
        collection.import_candidates(table, Candidates(**counted))


def copy_tables(source: EmbeddingCollection, target: EmbeddingCollection) -> None:
    """Copies everything that the tables of `source` hold into the empty, equal ones of `target`."""
    for table in source.tables:
        if retains(table):
            target.set_retention_state(table.name, source.retention_state(table.name))
        for rows in source.export_table(table.name, _ROWS_AT_ONCE):
            target.import_rows(table.name, rows)
        if retains(table):
            for counted in source.export_candidates(table.name):
                target.import_candidates(table.name, counted)
    target.step = source.step


def _checked(state: object) -> bytes:
    remedy = "give load_state_dict the state as state_dict returned it"
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
        got = f"{state.dtype} {list(state.shape)}" if isinstance(state, Tensor) else type(state)
        raise CheckpointError(
            f"the state of the tables is a tensor uint8 [n], got {got}: it was cast; {remedy}"
        )
    raw = state.cpu().contiguous().numpy().tobytes()
    content, digest = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
    if hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest() != digest:
        raise CheckpointError(
            f"the state of the tables ({len(raw)} bytes) does not match its checksum: it is "
            f"damaged, or was averaged or changed in place; {remedy}"
        )
    return content


def _parse(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_HEADER])
        found = header["format"], header["version"]
        tensors = safetensors.torch.load(content) if found == (FORMAT, VERSION) else {}
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the state of the tables cannot be read: {type(error).__name__}: {error}"
        ) from error
    if found != (FORMAT, VERSION):
        raise CheckpointError(
            f"the state of the tables has format {found[0]!r} version {found[1]}; this Penstock "
            f"reads {FORMAT!r} version {VERSION}"
        )
    return header, tensors
