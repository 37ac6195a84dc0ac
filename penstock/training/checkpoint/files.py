"""The manifest of a checkpoint, which names all its files.

The format is documented in
docs/checkpoint_format.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from penstock.embedding.collection.table_files import TableRecord
from penstock.embedding.durable_files import (
    MANIFEST,
    SEAL,
    FileRecord,
    read_sealed,
    verify_files,
)
from penstock.errors import CheckpointError
from penstock.position import Counts, LanePosition, Position

# FORMAT: never change these; see docs/checkpoint_format.md.
FORMAT = "penstock checkpoint"
VERSION = 3
READABLE = (1, 2, 3)
INPUT = "input.json"
_PLAIN_BLOCK_ROWS = 8_192
"""Of a block that is not shuffled, in version 1."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything of a checkpoint but its tensors."""

    step: int
    """Steps trained."""
    collection_step: int
    """Updates applied to the tables; the bias correction of Adam and the schedules use it."""
    position: Position
    """Where the first batch after this checkpoint begins. Its files are in a file of their own, see
    `read_position`.
    """
    created: str
    """ISO 8601, UTC."""
    versions: Mapping[str, str]
    """Of penstock, python, torch, numpy, safetensors."""
    job: Mapping[str, Any]
    """The job's fields."""
    resolved: Mapping[str, Any]
    """What the job came to: `numeric` names, `features` and `tables` in order."""
    tables: tuple[TableRecord, ...]
    optimizer: Mapping[str, Any] | None
    """State of the dense optimizer by parameter and name; `{"tensor": key}` for tensors."""
    files: Mapping[str, FileRecord]
    """Every file of the checkpoint but the manifest and its seal."""
    row_clock: Mapping[str, Any] | None = None
    """State of the tables' `RowClock`; None in checkpoints written before there was one."""
    best: Mapping[str, Any] | None = None
    """State of `TrainState.best` by name; None in checkpoints written before there was one."""

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        position = self.position.to_dict()
        del position["files"]
        content = {"format": FORMAT, "version": VERSION, **asdict(self), "position": position}
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_json`, from the parsed object; KeyError or TypeError where it is not."""
        younger = {"row_clock", "best"}
        names = {field.name for field in fields(cls)} - younger
        known = {name: content[name] for name in names}
        known |= {name: content.get(name) for name in younger}
        if content["version"] == 1:
            known["position"] = _position_of_version_1(known["position"], known["job"])
        else:
            position = known["position"]
            if content["version"] == 2:
                position = _with_one_lane(position)
            known["position"] = Position.from_dict({**position, "files": ()})
        known["tables"] = tuple(TableRecord.from_json(table) for table in known["tables"])
        known["files"] = {name: FileRecord(**record) for name, record in known["files"].items()}
        return cls(**known)


def is_complete(path: Path) -> bool:
    """Whether the directory holds a seal and a manifest that parses; says nothing of damage."""
    try:
        content = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and (path / SEAL).is_file()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and checks the manifest of the checkpoint directory `path`; no other file.

    Raises:
      CheckpointError: no checkpoint there, a damaged manifest, or one of another version.
    """
    path = Path(path)
    raw = read_sealed(path)
    try:
        content = json.loads(raw)
        if content["format"] != FORMAT or content["version"] not in READABLE:
            raise CheckpointError(
                f"checkpoint {path}: {MANIFEST} has format {content['format']!r} version "
                f"{content['version']}; this Penstock reads {FORMAT!r} up to version {VERSION}"
            )
        return Manifest.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} is not a manifest: {type(error).__name__}: {error}"
        ) from error


def input_files(position: Position) -> bytes:
    """The bytes of input.json: name, bytes and digest of each file of the training part."""
    return json.dumps(position.to_dict()["files"]).encode() + b"\n"


def read_position(path: Path, manifest: Manifest) -> Position:
    """The position of a checkpoint, with the files that it was taken on.

    Raises:
      CheckpointError: the list of files is missing or none.
    """
    if INPUT not in manifest.files:
        return manifest.position
    try:
        files = json.loads((path / INPUT).read_bytes())
        return Position.from_dict({**manifest.position.to_dict(), "files": files})
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot read {INPUT}: {error}") from error


def _with_one_lane(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a position of version 2, which knew no lanes, as those of now."""
    of_lane = {"pieces": "pieces", "cursor": "cursor", "samples": "block_size"}
    rest = {name: value for name, value in fields.items() if name not in of_lane.values()}
    return {**rest, "lanes": [{now: fields[before] for now, before in of_lane.items()}]}


def _position_of_version_1(fields: Mapping[str, Any], job: Mapping[str, Any]) -> Position:
    """What version 1 says: the extent and good row where the block begins, and no files.

    A block was called a window, an extent a split. The rows of a block followed from the job.
    """
    data, negatives = job["data"], job["data"].get("negatives")
    per_row = 1 if negatives is None else 1 + int(negatives["per_positive"])
    batch_size = int(job["training"]["batch_size"])
    unit = batch_size // math.gcd(batch_size, per_row)
    rows = int(data["shuffle"]["window_rows"]) or _PLAIN_BLOCK_ROWS
    samples = int(fields["samples"])
    # What was left out before is not known.
    applied = samples // per_row
    return Position(
        epoch=int(fields["epoch"]),
        block=int(fields["window"]),
        block_row=int(fields["window_row"]),
        lanes=(LanePosition(),),
        samples=samples,
        counts=Counts(read=applied, applied=applied),
        version_1=(int(fields["split"]), int(fields["split_row"]), -(-rows // unit) * unit),
    )


def verify(path: str | os.PathLike[str], part: tuple[int, int] = (0, 1)) -> Manifest:
    """Checks that exactly the files of the manifest are there, with their sizes and checksums.

    Reads every byte of the checkpoint; `part`: a rank of so many its share of them.

    Raises:
      CheckpointError: names the file and what is wrong with it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    verify_files(path, manifest.files, part)
    return manifest
