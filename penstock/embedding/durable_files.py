"""Durable files with checksums: written until the disk has them, read only if they are whole.

Knows nothing of what the files hold. docs/checkpoint_format.md documents the format.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from penstock.errors import CheckpointError

# FORMAT: never change these; see docs/checkpoint_format.md.
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


def read_sealed(path: Path) -> bytes:
    """The bytes of the manifest of the directory `path`, if they match its seal.

    Raises:
      CheckpointError: no such directory, no manifest, or a damaged one.
    """
    raw = _read(path, MANIFEST)
    if _read(path, SEAL) != seal(raw):
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} does not match its checksum in {SEAL}; "
            "one of the two is damaged"
        )
    return raw


def verify_files(
    path: Path, files: Mapping[str, FileRecord], part: tuple[int, int] = (0, 1)
) -> None:
    """Checks that `path` holds exactly these files and its manifest; reads every byte.

    Args:
      path: a directory.
      files: by name.
      part: this rank and how many divide the reading among them.

    Raises:
      CheckpointError: names the file and what is wrong with it.
    """
    names = sorted(files, key=lambda name: (-files[name].bytes, name)) if part[1] > 1 else files
    for name in list(names)[part[0] :: part[1]]:
        record = files[name]
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
    extra = {file.name for file in path.iterdir()} - {MANIFEST, SEAL, *files}
    if extra:
        raise CheckpointError(
            f"checkpoint {path}: {', '.join(sorted(extra))} is not in the manifest; "
            "move it elsewhere"
        )


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
    return CheckpointError(f"checkpoint {path}: cannot read {name}: {error.strerror or error}")
