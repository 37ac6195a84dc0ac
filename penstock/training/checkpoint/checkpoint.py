"""Checkpoints: one consistent cut of all training state, written in two phases.

A checkpoint is a directory `step-000000123`. It is written beside, as `step-000000123.tmp-<pid>`,
brought to the disk, and only then renamed: a directory without suffix is complete, whatever
happened to its writer. docs/checkpoint_format.md describes the files.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

import penstock
from penstock.config import Job
from penstock.embedding import EmbeddingCollection
from penstock.embedding.collection.table_files import import_tables, set_row_clock
from penstock.embedding.durable_files import (
    MANIFEST,
    SEAL,
    read_tensors,
    seal,
    sync_directory,
    write_durably,
    write_tensors,
)
from penstock.errors import CheckpointError
from penstock.position import Position
from penstock.ranks.group import ALONE, Group
from penstock.ranks.together import from_first, of_checkpoint
from penstock.training.checkpoint.best import OF_CHECKPOINTS, BestSoFar
from penstock.training.checkpoint.directory import (
    REPLACED,
    checkpoint_of_step,
    latest_checkpoint,
    list_checkpoints,
    remove,
    tidy,
)
from penstock.training.checkpoint.files import (
    INPUT,
    Manifest,
    input_files,
    read_manifest,
    read_position,
    verify,
)
from penstock.training.checkpoint.job_difference import (
    describe,
    differences,
    no_widths,
    refuse_other,
    resolve,
    resolved_differences,
)
from penstock.training.checkpoint.shares import (
    Share,
    check_in_one_place,
    remembered,
    share_of_all,
    write_share,
)
from penstock.training.checkpoint.state import (
    check_model,
    check_optimizer,
    load_optimizer,
    optimizer_state,
    random_state,
    set_random_state,
)

__all__ = [
    "Checkpoints",
    "Manifest",
    "TrainState",
    "checkpoint_of_step",
    "latest_checkpoint",
    "load_tables_and_model",
    "position_of",
    "read_manifest",
    "verify",
]

# FORMAT: never change these; see docs/checkpoint_format.md.
DENSE = "dense.safetensors"
OPTIMIZER = "optimizer.safetensors"
_METRICS = "metrics.safetensors"
_RANDOM = "random.json"
BEST = "best"
"""In a run folder, where there is nothing of that name: the checkpoint that is kept as the best."""

_log = logging.getLogger(__name__)


class Stateful(Protocol):
    """Something whose state is tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """All state by fixed names."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""


@dataclass(slots=True)
class TrainState:
    """All state of a training run between two steps. `Checkpoints.restore` changes it in place."""

    step: int
    """Steps trained."""
    position: Position
    """Where the next batch begins."""
    collection: EmbeddingCollection
    model: nn.Module
    optimizer: torch.optim.Optimizer | None = None
    """None where the model has no trainable parameter."""
    metrics: Stateful | None = None
    """Of the samples trained on so far, or since the last log line; the caller's choice. Over ranks
    `state_dict` is called on all of them, and has the samples of all; `load_state_dict` on the
    first one alone.
    """
    best: Mapping[str, BestSoFar] = field(default_factory=dict)
    """Best evaluations by what goes by them; the checkpoint of `OF_CHECKPOINTS` is kept."""


class Checkpoints:
    """The checkpoints of one run, in one directory. One run at a time may write there.

    Over ranks, all of them call `save` and `restore` at the same place: each writes its own rows,
    the first one all else, and they have the same verdict.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        keep_last: int,
        job: Job,
        *,
        numeric: Sequence[str] = (),
        numeric_widths: Mapping[str, int] = no_widths,
        group: Group = ALONE,
    ) -> None:
        """Touches nothing on disk.

        Args:
          directory: made by the first `save`.
          keep_last: complete checkpoints that `save` leaves; at least 1.
          job: stored in each checkpoint, and compared by `restore`.
          numeric: names of the numeric columns, in the order of `Batch.dense`; likewise.
          numeric_widths: numbers of a row of those that hold vectors; likewise.
          group: the ranks over which the tables of the run are spread.
        """
        assert keep_last >= 1
        self._group = group
        self._directory = Path(directory)
        self._keep_last = keep_last
        self._job = job
        self._numeric = tuple(numeric)
        self._widths = dict(numeric_widths)
        # Step of the newest checkpoint that is of this run: restored or saved.
        self._own_step: int | None = None

    def _resolved(self, collection: EmbeddingCollection) -> dict[str, Any]:
        return resolve(self._numeric, collection.features, collection.tables, self._widths)

    def latest(self) -> Path | None:
        """The newest complete checkpoint; None where there is none.

        See `latest_checkpoint`.
        """
        return latest_checkpoint(self._directory)

    def save(self, state: TrainState) -> Path:
        """Writes a checkpoint, then removes those that are too many.

        Returns:
          Its directory `step-<state.step>`. An existing one of that step is replaced.

        Raises:
          CheckpointError: the disk is full or fails on any rank (the checkpoints that were there
            stay), or the directory holds later checkpoints of another run.
          GroupError: a rank is gone.

        Effects: blocks until the disk has everything. Reads the state, the random generators
        included, and changes none of it.
        """
        final = self._directory / f"step-{state.step:09d}"
        self._save(final, state)
        self._own_step = state.step
        with of_checkpoint(self._group, f"clear away what is older than {final}"):
            if self._group.rank == 0:
                self._clear_away(final, state.best.get(OF_CHECKPOINTS))
        return final

    def _save(self, final: Path, state: TrainState) -> None:
        group = self._group
        is_first = group.rank == 0
        given_up: list[Path] = []
        pid = from_first(group, os.getpid)
        temporary = final.with_name(f"{final.name}.tmp-{pid}")
        try:
            with self._part_of_save(final, state):
                if is_first:
                    given_up = self._given_up(state.step)
                    self._make_directory()
                    tidy(self._directory)
                    os.mkdir(temporary)
            states = remembered(state.collection, group)
            metrics = None if state.metrics is None else state.metrics.state_dict()
            with self._part_of_save(final, state):
                share = write_share(temporary, state.collection, group, states)
            share = share_of_all(group, share)
            with self._part_of_save(final, state):
                if is_first:
                    check_in_one_place(temporary, share.files)
                    self._write(temporary, state, share, metrics)
                    self._commit(temporary, final, given_up)
        finally:
            if is_first:
                shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def _part_of_save(self, final: Path, state: TrainState) -> Iterator[None]:
        """What ranks do before they go on together."""
        with of_checkpoint(self._group, f"write checkpoint {final}"):
            try:
                yield
            except OSError as error:
                raise CheckpointError(self._explain_failure(final, state, error)) from error

    def _clear_away(self, final: Path, kept: BestSoFar | None) -> None:
        """Removes checkpoints that are too many."""
        try:
            tidy(self._directory)
            for step, old in list_checkpoints(self._directory)[: -self._keep_last]:
                if kept is None or step != kept.step:
                    remove(old)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {final} is complete, but an older one could not be removed: "
                f"{error}; remove it by hand"
            ) from error

    def restore(self, path: str | os.PathLike[str], state: TrainState) -> None:
        """Puts a checkpoint's content into `state` and into the global random generators.

        Every check, checksums included, comes before the first change.

        Args:
          path: a directory that `save` or `latest` returned.
          state: of a newly built run: its tables must be empty.

        Raises:
          CheckpointError: damaged (names the file, and which older checkpoint is whole), of
            another job (names the fields), or `state` already holds rows.
        """
        path = Path(path)
        group = self._group
        with of_checkpoint(group, f"read checkpoint {path}"):
            manifest = _verify_or_suggest(path, (group.rank, group.size))
            resolved = self._resolved(state.collection)
            refuse_other(path, differences(manifest.job, manifest.resolved, self._job, resolved))
            dense = _load_dense(path, state.collection, state.model)
            try:
                check_optimizer(manifest.optimizer, state.optimizer, state.model)
            except CheckpointError as error:
                raise CheckpointError(f"checkpoint {path}: {error}") from None
            random = (path / _RANDOM).read_bytes()
            position = read_position(path, manifest)
            metrics = read_tensors(path / _METRICS) if _METRICS in manifest.files else None

        import_tables(path, manifest.tables, state.collection)
        set_row_clock(state.collection, manifest.row_clock)
        state.collection.step = manifest.collection_step
        state.model.load_state_dict(dense)
        if state.optimizer is not None and manifest.optimizer is not None:
            tensors = read_tensors(path / OPTIMIZER)
            load_optimizer(state.optimizer, state.model, manifest.optimizer, tensors)
        if state.metrics is not None and metrics is not None:
            state.metrics.load_state_dict(metrics)
        for name, best in state.best.items():
            if name in (manifest.best or {}):
                best.load((manifest.best or {})[name])
        state.step = manifest.step
        state.position = position
        set_random_state(random, state.collection.device)
        self._own_step = manifest.step

    def _given_up(self, step: int) -> list[Path]:
        """Checkpoints that this run has left behind by restoring an earlier one."""
        existing = list_checkpoints(self._directory)
        if existing and self._own_step is None:
            raise CheckpointError(
                f"{self._directory} already holds {existing[-1][1].name}, which this run was not "
                "resumed from; resume it, or train in a new run folder"
            )
        since = self._own_step if self._own_step is not None else step
        # That of the same step is replaced, not removed.
        return [path for number, path in existing if number > since and number != step]

    def _make_directory(self) -> None:
        if not self._directory.is_dir():
            self._directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self._directory.parent)

    def _write(
        self,
        directory: Path,
        state: TrainState,
        share: Share,
        metrics: Mapping[str, Tensor] | None,
    ) -> None:
        """Writes all but the tables, which are there, and then the manifest of everything."""
        files = dict(share.files)
        files[DENSE] = write_tensors(directory / DENSE, state.model.state_dict())
        optimizer = None
        if state.optimizer is not None:
            optimizer, tensors = optimizer_state(state.optimizer, state.model)
            files[OPTIMIZER] = write_tensors(directory / OPTIMIZER, tensors)
        if metrics is not None:
            files[_METRICS] = write_tensors(directory / _METRICS, metrics)
        files[_RANDOM] = write_durably(directory / _RANDOM, random_state(state.collection.device))
        files[INPUT] = write_durably(directory / INPUT, input_files(state.position))
        manifest = Manifest(
            step=state.step,
            collection_step=state.collection.step,
            position=state.position,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={
                "penstock": penstock.__version__,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "numpy": np.__version__,
                "safetensors": safetensors.__version__,
            },
            job=self._job.model_dump(mode="json"),
            resolved=self._resolved(state.collection),
            tables=share.tables,
            optimizer=optimizer,
            files=files,
            row_clock=state.collection.row_clock.state(),
            best={name: one.state() for name, one in state.best.items()},
        ).to_json()
        write_durably(directory / MANIFEST, manifest)
        write_durably(directory / SEAL, seal(manifest))
        sync_directory(directory)

    def _commit(self, temporary: Path, final: Path, given_up: Sequence[Path]) -> None:
        """Makes the written directory a checkpoint; on OSError the one of its step is as it was."""
        # First, so that the newest one is of this run whenever the process dies.
        for path in given_up:
            remove(path)
        replaced = final.with_name(final.name + REPLACED)
        done: list[tuple[Path, Path]] = []
        renames = [(temporary, final)]
        if final.exists():
            renames.insert(0, (final, replaced))
        try:
            for source, target in renames:
                os.rename(source, target)
                done.append((source, target))
            sync_directory(self._directory)
        except OSError:
            for source, target in reversed(done):
                os.rename(target, source)
            raise

    def _explain_failure(self, final: Path, state: TrainState, error: OSError) -> str:
        existing = self._directory
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        last = self.latest()
        remedy = (
            f"free some space and resume; the last complete checkpoint, {last.name}, stays"
            if last
            else "free some space and train anew; there is no checkpoint to resume from"
        )
        return (
            f"cannot write checkpoint {final}: {error.strerror or error}; it needs about "
            f"{_needed_bytes(state):,} bytes, {free:,} bytes are free on its file system; "
            f"{remedy}"
        )


def position_of(path: Path, job: Job) -> Position:
    """Where a run of a job that goes on from a checkpoint begins; for `restore` to verify.

    Raises:
      CheckpointError: damaged; names which older checkpoint is whole. Or of another job, as far as
        its fields tell: what the data is opened by.
    """
    try:
        manifest = read_manifest(path)
        position = read_position(path, manifest)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_suggest_other(path)}") from None
    refuse_other(path, differences(manifest.job, manifest.resolved, job, manifest.resolved))
    return position


def load_tables_and_model(
    path: str | os.PathLike[str], collection: EmbeddingCollection, model: nn.Module
) -> Manifest:
    """Reads what evaluation and prediction need; no optimizer, no random state.

    Args:
      path: directory of a checkpoint.
      collection: empty, with the checkpoint's features and tables.
      model: built as the checkpoint's.

    Raises:
      CheckpointError: as `Checkpoints.restore`. Nothing has been changed then.
    """
    path = Path(path)
    manifest = _verify_or_suggest(path)
    resolved = resolve(
        manifest.resolved["numeric"],
        collection.features,
        collection.tables,
        manifest.resolved.get("numeric_widths", {}),
    )
    lines = resolved_differences(manifest.resolved, resolved)
    if lines:
        raise CheckpointError(f"checkpoint {path} has other tables or features:\n{describe(lines)}")
    dense = _load_dense(path, collection, model)
    import_tables(path, manifest.tables, collection)
    set_row_clock(collection, manifest.row_clock)
    collection.step = manifest.collection_step
    model.load_state_dict(dense)
    return manifest


def _needed_bytes(state: TrainState) -> int:
    tensors: Iterable[Tensor] = state.model.state_dict().values()
    if state.optimizer is not None:
        tensors = [*tensors, *optimizer_state(state.optimizer, state.model)[1].values()]
    rows = sum(8 * table.rows + table.bytes for table in state.collection.table_stats())
    return rows + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _load_dense(path: Path, collection: EmbeddingCollection, model: nn.Module) -> dict[str, Tensor]:
    """Reads the model's tensors and checks that they, and the rows, have where to go."""
    held = sum(table.rows for table in collection.table_stats())
    if held:
        raise CheckpointError(
            f"checkpoint {path}: the tables already hold {held} rows; "
            "restore into an EmbeddingCollection that has not been used"
        )
    dense = read_tensors(path / DENSE)
    try:
        check_model(model, dense)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    return dense


def _verify_or_suggest(path: Path, part: tuple[int, int] = (0, 1)) -> Manifest:
    try:
        return verify(path, part)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_suggest_other(path)}") from None


def _suggest_other(path: Path) -> str:
    others = [other for _, other in list_checkpoints(path.parent) if other.name != path.name]
    for other in reversed(others):
        try:
            verify(other)
        except CheckpointError as error:
            _log.warning("%s", error)
            continue
        return f"{other.name} is whole: move {path.name} away to resume from it"
    return f"there is no other whole checkpoint in {path.parent}"
