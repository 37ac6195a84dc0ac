"""The manifest of a checkpoint, which names all its files.

The format is documented in
docs/checkpoint_format.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from penstock.embedding.durable_files import (
    MANIFEST,
    SEAL,
    FileRecord,
    read_sealed,
    verify_files,
)
from penstock.embedding.table_files import TableRecord
from penstock.errors import CheckpointError
from penstock.types import Position

# FORMAT: never change these; see docs/checkpoint_format.md.
FORMAT = "penstock checkpoint"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything of a checkpoint but its tensors."""

    step: int
    """Steps trained."""
    collection_step: int
    """Updates applied to the tables; the bias correction of Adam and the schedules use it."""
    position: Position
    """Where the first batch after this checkpoint begins."""
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

    def to_json(self) -> bytes:
        """The bytes of manifest.json."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Manifest:
        """Inverse of `to_json`, from the parsed object; KeyError or TypeError where it is not."""
        known = {field.name: content[field.name] for field in fields(cls)}
        known["position"] = Position.from_dict(known["position"])
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
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise CheckpointError(
                f"checkpoint {path}: {MANIFEST} has format {content['format']!r} version "
                f"{content['version']}; this Penstock reads {FORMAT!r} version {VERSION}"
            )
        return Manifest.from_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} is not a manifest: {type(error).__name__}: {error}"
        ) from error


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Checks that exactly the files of the manifest are there, with their sizes and checksums.

    Reads every byte of the checkpoint.

    Raises:
      CheckpointError: names the file and what is wrong with it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    verify_files(path, manifest.files)
    return manifest
