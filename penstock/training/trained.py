"""Opens what a run has learnt, for evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from pydantic import TypeAdapter
from torch import nn

from penstock.config import (
    FileSource,
    InitFrom,
    Job,
    JsonLinesSource,
    PythonSource,
    Source,
    StreamsSource,
    SyntheticSource,
    TextSource,
    files_of,
    format_of_path,
    parse_job,
)
from penstock.data.batches.loader import Loader
from penstock.data.dataset import Dataset, check_widths
from penstock.data.plan.audit import Audit
from penstock.data.plan.counting import Stages
from penstock.data.plan.parts import Part
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.embedding.durable_files import MANIFEST
from penstock.errors import CheckpointError, ConfigError
from penstock.position import Position
from penstock.training.checkpoint.best import OF_CHECKPOINTS
from penstock.training.checkpoint.checkpoint import (
    BEST,
    TrainState,
    checkpoint_of_step,
    latest_checkpoint,
    load_tables_and_model,
    read_manifest,
)
from penstock.training.checkpoint.files import Manifest, read_position
from penstock.training.checkpoint.initial import initialise
from penstock.training.checkpoint.job_difference import describe, differences
from penstock.training.evaluation import Evaluator
from penstock.training.objective import Objective
from penstock.training.setup import build

T = TypeVar("T")
_ATTEMPTS = 5

Labels: TypeAlias = Literal["required", "optional", "absent"]


@dataclass(frozen=True)
class Trained:
    """A checkpoint's tables and model, and the data to use them on."""

    job: Job
    collection: EmbeddingCollection
    model: nn.Module
    objective: Objective
    dataset: Dataset
    part: Part

    @property
    def evaluator(self) -> Evaluator:
        """Measures it."""
        return Evaluator(
            self.dataset, self.model, self.objective, self.collection, self.job.evaluation
        )

    def batches(self) -> Loader:
        """The rows to score, in order of reading, once."""
        batch_size = self.job.evaluation.batch_size
        return self.dataset.batches(self.part, batch_size=batch_size, shuffle=False, groups=True)


def open_trained(
    path: Path,
    data: str | None = None,
    labels: Labels = "required",
    change: Callable[[Any], Any] = lambda fields: fields,
) -> Trained:
    """Loads the newest checkpoint of a run.

    Args:
      path: a run folder, or one of its checkpoints.
      data: files to use it on, all rows; None: what the job holds out.
      labels: `optional`: the label column may be missing; `absent`: it is, also in text without a
        header. Either is for prediction, where every row needs its score: a malformed one fails.
      change: of the fields of the job, as overrides do; what a resumed run may change.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged.
      ConfigError: no data is given and the job holds nothing out; `change` makes no job, or
        another one.
      DataError: the data lacks a column.
    """
    manifest, position = read_newest(path, _read_description)
    origin = f"{path}: job of the checkpoint"
    job = parse_job(change(manifest.job), origin=origin, is_record=True)
    lines = differences(manifest.job, manifest.resolved, job, manifest.resolved)
    if lines:
        raise ConfigError(
            f"{path}: what was trained cannot be changed:\n{describe(lines)}\n"
            "set what is measured and how (evaluation.metrics, data.evaluation_source)"
        )
    if data is not None:
        job = _on_other_data(job, data, manifest.resolved)
        if labels != "required":
            job = _for_prediction(job, labels)
    elif job.data.split is None and job.data.evaluation_source is None:
        if isinstance(job.data.source, StreamsSource) and job.data.source.grows:
            raise ConfigError(
                "the job holds nothing out, and of streams that grow no part can be: name files "
                "with --data, or set data.evaluation_source"
            )
        raise ConfigError(
            "the job holds nothing out: set data.split or data.evaluation_source, or name files "
            "with --data"
        )
    inputs = [*manifest.resolved["numeric"], *_feature_names(manifest.resolved)]
    needed: Literal["required", "optional"] = "required" if labels == "required" else "optional"
    # What a fraction holds out depends on the files that the run began with.
    after = position if data is None and position.divided else None
    dataset = Dataset.open(job, labels=needed, order=inputs, after=after)
    check_widths(manifest.resolved.get("numeric_widths", {}), dataset.numeric_widths, origin)
    part: Part = "evaluation" if data is None else "train"

    def load(checkpoint: Path) -> Trained:
        state, _, objective, _ = build(job, dataset)
        load_tables_and_model(checkpoint, state.collection, state.model)
        return Trained(job, state.collection, state.model, objective, dataset, part)

    return read_newest(path, load)


def begin_from(config: InitFrom, state: TrainState) -> list[str]:
    """Puts what another run has learnt into one that begins, see `initialise`."""
    try:
        return read_newest(Path(config.run), lambda path: initialise(path, config, state))
    except CheckpointError as error:
        raise CheckpointError(f"training.init_from: {error}") from None


def _read_description(checkpoint: Path) -> tuple[Manifest, Position]:
    manifest = read_manifest(checkpoint)
    return manifest, read_position(checkpoint, manifest)


def audit_run(path: Path, stages: Stages, change: Callable[[Any], Any]) -> Audit:
    """Counts anew what the newest checkpoint of a run says was read.

    Args:
      path: a run folder, or one of its checkpoints.
      stages: told of the counting.
      change: of the fields of the job: where the data is by now.

    Raises:
      CheckpointError: there is no checkpoint, or it is damaged.
      ConfigError: `change` makes no job.
      DataError: files are missing, or not what was read.
    """
    manifest, position = read_newest(path, _read_description)
    origin = f"{path}: job of the checkpoint"
    job = parse_job(change(manifest.job), origin=origin, is_record=True)
    return Dataset.open(job, after=position, stages=stages).audit(position, stages)


def read_newest(path: Path, read: Callable[[Path], T]) -> T:
    """What `read` makes of the newest checkpoint of a run, or of the checkpoint that `path` is.

    A process that trains removes and replaces checkpoints. Where it does so while `read` is at it,
    the one that is the newest then is read.

    Raises:
      CheckpointError: there is none, it is damaged, or all were removed too soon.
    """
    for _ in range(_ATTEMPTS):
        checkpoint = locate_checkpoint(path)
        before = _identity(checkpoint)
        try:
            return read(checkpoint)
        except (CheckpointError, OSError):
            if before is not None and _identity(checkpoint) == before:
                raise
        if checkpoint == path:
            break
    raise CheckpointError(
        f"{checkpoint}: was removed or replaced while it was read, by the process that trains; "
        "name the run folder, or keep more with checkpoint.keep_last"
    )


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a directory from another one of its name; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def locate_checkpoint(path: Path) -> Path:
    """The newest complete checkpoint of a run folder, or the checkpoint that `path` is.

    RUN/best is the one that `checkpoint.keep_best` keeps.

    Raises:
      CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    if path.name == BEST and not path.exists():
        return _best_of_run(path.parent)
    if not path.exists():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    return newest_of_run(path)


def _best_of_run(path: Path) -> Path:
    newest = newest_of_run(path)
    best = (read_manifest(newest).best or {}).get(OF_CHECKPOINTS)
    if best is None or best["value"] is None:
        raise CheckpointError(
            f"{path}: no best checkpoint is known; train with checkpoint.keep_best, or name the "
            "run for its newest one"
        )
    return checkpoint_of_step(path / "checkpoints", best["step"])


def newest_of_run(path: Path) -> Path:
    """The newest complete checkpoint of a run folder.

    Raises:
      CheckpointError: there is none.
    """
    newest = latest_checkpoint(path / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"{path}: no complete checkpoint in this run folder; look at the name, or train anew "
            "without --resume"
        )
    return newest


def _on_other_data(job: Job, path: str, resolved: Mapping[str, Any]) -> Job:
    """The same job, reading all rows of `path` instead of its own data.

    The format is the one that the name ends with; where it says nothing, that of the job's source.
    Of the columns, those are read that the job's patterns found when it was trained.
    """
    widths = resolved.get("numeric_widths", {})
    # Vectors are as wide as when it was trained, whatever the type of the files says.
    numeric = tuple(
        group.model_copy(update={"columns": names, "width": width})
        for group in job.data.numeric
        for width, names in _by_width(_matching(group.columns, resolved["numeric"]), widths).items()
    )
    crosses = {one.name for one in job.crosses}
    columns = [name for name in _feature_names(resolved) if name not in crosses]
    features = tuple(
        group.model_copy(update={"columns": _matching(group.columns, columns)})
        for group in job.features
    )
    changes = {
        "source": _source_like(job.data.source, path),
        "evaluation_source": None,
        "split": None,
        "numeric": numeric,
    }
    data = job.data.model_copy(update=changes)
    return job.model_copy(update={"data": data, "features": features})


def _for_prediction(job: Job, labels: Labels) -> Job:
    """The same job, in which each row is one sample, and a malformed one an error."""
    source: Source = job.data.source
    changes: dict[str, Any] = {}
    if isinstance(source, JsonLinesSource | TextSource):
        changes["on_malformed_row"] = "fail"
    if isinstance(source, TextSource) and labels == "absent" and source.columns is not None:
        absent = job.data.label_columns
        changes["columns"] = tuple(name for name in source.columns if name not in absent)
    source = source.model_copy(update=changes)
    data = job.data.model_copy(update={"source": source, "negatives": None})
    return job.model_copy(update={"data": data})


def _feature_names(resolved: Mapping[str, Any]) -> list[str]:
    return [feature["name"] for feature in resolved["features"]]


def _by_width(names: Sequence[str], widths: Mapping[str, int]) -> dict[int | None, tuple[str, ...]]:
    found: dict[int | None, tuple[str, ...]] = {}
    for name in names:
        width = widths.get(name)
        found[width] = (*found.get(width, ()), name)
    return found


def _matching(patterns: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if any(fnmatchcase(name, glob) for glob in patterns))


def _source_like(source: Source, path: str) -> Source:
    if isinstance(source, StreamsSource):
        source = files_of(source)[0]
    kind = format_of_path(path)
    if kind is None:
        without_files = isinstance(source, SyntheticSource | PythonSource)
        kind = "parquet" if without_files else source.format
    fields: dict[str, Any] = {"path": path, "format": kind}
    if isinstance(source, FileSource):
        fields["partitions"] = source.partitions
    text = {"csv", "tsv"}
    if source.format == kind or {source.format, kind} <= text:
        fields = source.model_dump() | fields
    like: Source = TypeAdapter(Source).validate_python(fields)
    return like
