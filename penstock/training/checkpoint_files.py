"""Files of a checkpoint: durable writing, checksums, and the manifest that names them all.

Reads and writes single files and knows nothing of training. The format is documented in
docs/checkpoint_format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from penstock.config import ValueType
from penstock.errors import CheckpointError
from penstock.types import Position

# FORMAT: never change these; see docs/checkpoint_format.md.
FORMAT = "penstock checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest.b2sum"
_DIGEST_BYTES = 32

_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest says of one file."""

    bytes: int
    blake2b: str
    """Hexadecimal BLAKE2b checksum of 256 bits, as `b2sum -l 256` prints."""


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
        known["tables"] = tuple(
            TableRecord(**{
                **table,
                "shards": tuple(table["shards"]),
                "counts": tuple(table.get("counts", ())),
            })
            for table in known["tables"]
        )
        known["files"] = {name: FileRecord(**record) for name, record in known["files"].items()}
        return cls(**known)


def write_durably(path: Path, content: bytes) -> FileRecord:
    """Writes a new file and returns once the disk has it; OSError where it cannot."""
    checksum = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        rest = memoryview(content)
        while rest:
            written = os.write(descriptor, rest[:_CHUNK_BYTES])
            checksum.update(rest[:written])
            rest = rest[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(len(content), checksum.hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes tensors as one safetensors file, each by its own copy of its elements."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        local = tensor.detach().cpu().contiguous()
        # The format has no aliases: tied parameters are written once a name.
        storage = local.untyped_storage().data_ptr()
        plain[name] = local.clone() if storage in seen else local
        seen.add(storage)
    return write_durably(path, safetensors.torch.save(plain))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file into memory of its own."""
    return safetensors.torch.load(path.read_bytes())


def seal(manifest: bytes) -> bytes:
    """The bytes of manifest.b2sum, which `b2sum -l 256 -c` can check."""
    checksum = hashlib.blake2b(manifest, digest_size=_DIGEST_BYTES).hexdigest()
    return f"{checksum}  {MANIFEST}\n".encode()


def sync_directory(path: Path) -> None:
    """Returns once the disk has the directory's list of names."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    raw = _read(path, MANIFEST)
    if _read(path, SEAL) != seal(raw):
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} does not match its checksum in {SEAL}; "
            "one of the two is damaged"
        )
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
    for name, record in manifest.files.items():
        try:
            with (path / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != record.bytes:
                    raise CheckpointError(
                        f"checkpoint {path}: {name} has {size} bytes, "
                        f"the manifest says {record.bytes}"
                    )
                if _digest(file) != record.blake2b:
                    raise CheckpointError(
                        f"checkpoint {path}: {name} does not match its checksum in {MANIFEST}; "
                        "the file is damaged"
                    )
        except OSError as error:
            raise _unreadable(path, name, error) from error
    extra = {file.name for file in path.iterdir()} - {MANIFEST, SEAL, *manifest.files}
    if extra:
        raise CheckpointError(
            f"checkpoint {path}: {', '.join(sorted(extra))} is not in the manifest; "
            "move it elsewhere"
        )
    return manifest


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise _unreadable(path, name, error) from error


def _unreadable(path: Path, name: str, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError) and not path.exists():
        return CheckpointError(f"no checkpoint at {path}: there is no such directory")
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"checkpoint {path}: {name} is missing")
    return CheckpointError(f"checkpoint {path}: cannot read {name}: {error.strerror}")
