"""The data of a job: what is read, as what, in which parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Literal

from penstock.config import (
    FeatureConfig,
    Job,
    PythonSource,
    StreamsSource,
    SyntheticSource,
    TableConfig,
    TimeSplit,
    check_lanes,
)
from penstock.config import Source as SourceConfig
from penstock.data.batches.agreement import ReaderGroup
from penstock.data.batches.blocks import FileTags
from penstock.data.batches.loader import Loader, ReadAhead
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.stage import Stage
from penstock.data.columns.schema import (
    Columns,
    default_text_types,
    resolve_columns,
    resolve_features,
)
from penstock.data.columns.transforms import KeyTransform
from penstock.data.files import common_file
from penstock.data.identity import WholeTags, check_files
from penstock.data.opening import open_source
from penstock.data.plan.audit import Audit, audit
from penstock.data.plan.counting import Stages, no_stages
from penstock.data.plan.parts import Part, PartRows, divide
from penstock.data.quarantine import Quarantine
from penstock.data.source import RowCount, Source
from penstock.data.windows.growing import Listing
from penstock.data.windows.served import Streams
from penstock.data.windows.spans import Spans, opened_spans, rows_of
from penstock.errors import ConfigError, DataError, JobNote
from penstock.ledger.client import LedgerClient, open_ledger
from penstock.ledger.file import LedgerFile, copy_ledger
from penstock.position import FileTag, LanePosition, Position


class Dataset:
    """Rows of a job's source, divided into training and evaluation. Starts no thread itself."""

    numeric: tuple[str, ...]
    """Numeric columns, in the order of `Batch.dense`."""
    numeric_widths: Mapping[str, int]
    """Numbers of a row of those that hold vectors; the others have one."""
    num_numeric: int
    """Columns of `Batch.dense`."""
    features: tuple[FeatureConfig, ...]
    """Features of `Batch.sparse`, in the order of the source's columns."""
    tables: tuple[TableConfig, ...]
    """Those of the job, then one for each feature without a table."""
    labels: tuple[str, ...]
    """Names of the labels that the source has; in prediction some may be missing."""

    def __init__(
        self,
        job: Job,
        columns: Columns,
        parts: dict[Part, PartRows],
        quarantine: Quarantine,
        spans: Spans | None = None,
    ) -> None:
        self.numeric = columns.numeric_names
        self.numeric_widths = columns.numeric_widths
        self.num_numeric = len(columns.numeric_inputs)
        self.features, self.tables = resolve_features(job, columns)
        self.labels = tuple(label.title for label in columns.labels if label is not None)
        self._job = job
        self._columns = columns
        self._parts = parts
        self._quarantine = quarantine
        self._spans = spans
        self._tags = {part: WholeTags(rows.source) for part, rows in parts.items()}
        self._ledger: Path | None = None
        self._tell: Callable[[str], None] = lambda words: warnings.warn(words, JobNote, 2)
        self._told: set[str] = set()
        """Of rows that are left out."""
        self._checked: tuple[FileTag, ...] = ()
        """Files of a position that were found to be those of the training part."""

    def transforms_of(self, table: str) -> list[tuple[str, tuple[KeyTransform, ...]]]:
        """Name and transforms of each feature that reads a table; not of crosses."""
        tables = {feature.name: feature.table for feature in self.features}
        return [
            (column.name, column.config.transforms)
            for column in self._columns.features
            if tables[column.name] == table
        ]

    @classmethod
    def open(
        cls,
        job: Job,
        *,
        quarantine: Path | None = None,
        writes_quarantine: bool = True,
        after: Position | None = None,
        labels: Literal["required", "optional"] = "required",
        order: Sequence[str] = (),
        stages: Stages = no_stages,
        listing: Listing | None = None,
    ) -> Dataset:
        """Lists the files and extents of a job and checks columns and types.

        Args:
          job: what to read.
          quarantine: JSON lines file to which malformed rows are appended; None: only counted.
          writes_quarantine: False: another rank, which hears of the same rows, writes that file.
          after: where a run stopped that is to go on: what it held out stays so.
          labels: `optional` for prediction: without the label column, labels are NaN.
          order: names of numeric columns and features in the order to give them, as those of
            another data set; empty: that of the source.
          stages: told where rows must be counted to divide them.
          listing: of streams that grow, the windows with which a run begins; None: those that are
            complete now.

        Raises:
          ConfigError: columns, features or tables of the job do not fit together.
          DataError: files or columns are missing or not what the job says; files that were read
            before `after` are not what they were.

        Effects: reads the metadata of files; to divide text by a fraction it counts all rows, and
        to divide anything by time it reads times until both parts have a row, on all cores.
        """
        data = job.data
        text_types = default_text_types(job)
        by_time = data.event_time if isinstance(data.split, TimeSplit) else None

        def open_files(files: SourceConfig, *, of_streams: bool = True) -> Source:
            return open_source(files, text_types, by_time, may_be_empty=of_streams)

        spans, held_out = opened_spans(data.source, open_files, after, listing), None
        source = spans.first if spans else open_files(data.source, of_streams=False)
        columns = resolve_columns(job, source.schema, source.paths[0], labels, order)
        if spans is not None:
            train = rows_of(spans.first)
        else:
            train, held_out = divide(
                source,
                data.split,
                data.event_time,
                data.event_time_unit,
                0 if after is None else after.divided,
                stages,
            )
        if data.evaluation_source is not None:
            other = open_source(data.evaluation_source, text_types)
            other_columns = resolve_columns(job, other.schema, other.paths[0], labels, order)
            _refuse_common_rows(data.source, source, data.evaluation_source, other)
            _check_equal(columns, other_columns, other.paths[0])
            held_out, _ = divide(other, None, data.event_time)
        parts: dict[Part, PartRows] = {"train": train}
        if held_out is not None:
            parts["evaluation"] = held_out
        dataset = cls(job, columns, parts, Quarantine(quarantine, writes=writes_quarantine), spans)
        if after is not None:
            dataset.check(after)
        return dataset

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts that there are."""
        return tuple(self._parts)

    @property
    def has_evaluation(self) -> bool:
        """Whether rows are held out."""
        return "evaluation" in self._parts

    @property
    def grows(self) -> bool:
        """Whether more than is listed may come to be trained on."""
        return self._spans is not None

    @property
    def quarantined_rows(self) -> int:
        """Malformed rows left out so far, each counted once."""
        return self._quarantine.rows

    def num_rows(self, part: Part, stages: Stages = no_stages) -> int:
        """Rows of a part, malformed ones included. May read the part's files once to count."""
        return self._rows(part).count_rows(stages)

    def num_samples(self, part: Part, stages: Stages = no_stages) -> int:
        """Samples of one epoch: rows, and the negatives drawn for each. Counts as `num_rows`."""
        return self.num_rows(part, stages) * self._samples_per_row

    def expected_samples(self, part: Part) -> RowCount | None:
        """Samples of one epoch of a part: its rows, and the negatives drawn for each.

        As far as that is known without reading anything: it is learnt as rows are read. None: not
        at all yet.
        """
        expected = self._rows(part).expected_rows()
        if expected is None or (part == "train" and self.grows):
            return None
        return expected._replace(rows=expected.rows * self._samples_per_row)

    @property
    def _samples_per_row(self) -> int:
        negatives = self._columns.negatives
        return 1 if negatives is None else negatives.samples_per_row

    def batches(
        self,
        part: Part,
        *,
        batch_size: int,
        seed: int = 0,
        epochs: int = 1,
        start: Position = Position(),  # noqa: B008 (frozen)
        shuffle: bool | None = None,
        groups: bool = False,
        ranks: ReaderGroup | None = None,
    ) -> Loader:
        """Starts reading a part.

        Args:
          part: `train` or `evaluation`; the latter is always read in order.
          batch_size: samples of every batch but the last of an epoch.
          seed: of the shuffling.
          epochs: passes over the part, counted from epoch 0 whatever `start` is.
          start: where to begin; the `end` of a batch continues exactly after it. The part is
            divided into the lanes that it has; into one, where it has none.
          shuffle: False: in order, and negatives, if there are any, the same in every epoch and
            for every seed, as in evaluation; None: as the job says.
          groups: also read the columns by which metrics are grouped, into `Batch.groups`.
          ranks: that read the lanes together, each from its own process, in lockstep: every rank
            has as many batches, of each the samples of its lanes; None: this process reads all.

        Returns:
          An iterator of batches with threads of its own; close it, or use it in a `with`.

        Raises:
          ConfigError: there is no such part, or it cannot be shuffled.
          DataError: `start` lies outside the data.
        """
        start = _with_lanes(start, ranks)
        if self._spans is not None and part == "train":
            start = self._spans.within_first(start)
        if batch_size <= 0 or epochs <= 0:
            raise ConfigError(f"batch_size {batch_size} and epochs {epochs} must be positive")
        rows = self._rows(part)
        block = self._job.data.shuffle.block_rows
        if shuffle and (part == "evaluation" or not block):
            why = "evaluation is read in order" if block else "data.shuffle.block_rows is 0"
            raise ConfigError(f"shuffle=True: {why}")
        training = part == "train" and shuffle is not False
        plan = LoaderPlan.of(
            batch_size,
            block if training or self._samples_per_row > 1 else 0,
            seed,
            epochs,
            start,
            shuffled=training and block > 0,
            samples_per_row=self._samples_per_row,
            redraws=training,
        )
        plan = replace(
            plan,
            block_bytes=self._job.data.shuffle.block_bytes,
            joins_windows=isinstance(rows.source, Streams) and self._samples_per_row > 1,
            trains=part == "train",
            most_malformed=self._job.data.malformed_limits,
        )
        run = self._job.run
        columns = self._columns if groups else replace(self._columns, groups=())
        begun, first = self._files(part, start), rows.first_file
        files = FileTags(begun, self._tags[part], shows=plan.trains, first=first)
        loader = Loader(
            Stage(rows, files, start, start.span is None),
            columns,
            plan,
            ReadAhead(run.reader_threads, run.prefetch_batches),
            quarantine=self._quarantine,
            ranks=ranks,
            following=self._spans if part == "train" else None,
            ledger=self._opened_ledger(plan, ranks) if training and self._is_elastic else None,
        )
        loader.on_left_out = self._tell_once
        return loader

    def _tell_once(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            self._tell(words)

    def keep_ledger(self, path: Path) -> None:
        """Says in which file the order of training batches is kept; else in memory."""
        self._ledger = path

    @property
    def _is_elastic(self) -> bool:
        return self._job.data.policy == "elastic"

    def _opened_ledger(
        self, plan: LoaderPlan, ranks: ReaderGroup | None
    ) -> LedgerFile | LedgerClient:
        replay, path = self._job.data.replay, self._ledger

        def begin() -> None:
            if replay is not None and path is not None and not path.exists():
                copy_ledger(Path(replay) / path.name, path, plan.sizes_of_blocks, plan.num_lanes)

        return open_ledger(path, ranks, begin)

    def audit(self, position: Position, stages: Stages = no_stages) -> Audit:
        """Counts anew what a position says was read of the training part. May read its files.

        Raises:
          DataError: a file has changed since it was read, or cannot be read; or the position is of
            a checkpoint of version 1, which does not say what was read.
        """
        if position.version_1 is not None:
            raise DataError("a checkpoint of version 1 does not say what was read; train on first")
        self.check(position)
        return audit(self._rows("train"), position, self._samples_per_row, stages)

    def tell_of_waits(self, tell: Callable[[str], None]) -> None:
        """Has `tell` called, from another thread, with what reading waits for."""
        if self._spans is not None:
            self._spans.on_wait = tell

    def tell_of_left_out(self, tell: Callable[[str], None]) -> None:
        """Has `tell` called with rows that cannot be used, or, from another thread, come late."""
        self._tell = tell
        if self._spans is not None:
            self._spans.on_late = tell

    def take_up_quarantine(self, after: Position) -> None:
        """Takes up the entries that a run left, without those that it made behind a position.

        Raises:
          DataError: the file cannot be read or written, or is none of ours.
        """
        known = after.version_1 is None
        self._quarantine.resume(after.counts.quarantined if known else None)
        source = self._rows("train").source
        self._quarantine.know(source, source.paths)

    def sync_quarantine(self) -> None:
        """Returns once the disk has the malformed rows of all batches that were taken.

        Raises:
          DataError: the disk fails.
        """
        self._quarantine.sync()

    def check(self, start: Position) -> None:
        """Compares the files of the training part with those that a position was taken on.

        Raises:
          DataError: a file that was read before is gone, has changed or moved, or others come
            before it; names it.
        """
        if start.files and start.files != self._checked:
            rows = self._rows("train")
            if start.divided != rows.divided:
                raise DataError(
                    f"{rows.files[start.divided]}: added since the run began, which held out a "
                    "fraction of the files before it; open the data with the position to go on from"
                )
            check_files(rows.source, rows.files, start)
            self._checked = start.files

    def _files(self, part: Part, start: Position) -> list[FileTag]:
        """The files of a part, as far as they were read before `start`."""
        rows, tags = self._rows(part), self._tags[part]
        unread = [FileTag(path, -1, "") for path in rows.files]
        if part == "evaluation":
            return unread
        self.check(start)
        begun = [
            tag._replace(path=path)
            for tag, path in zip(start.files, rows.files, strict=False)
            if tag.is_begun
        ]
        if not start.files:
            # Where a fraction is cut depends on all files; version 1 does not say what was read.
            read = rows.divided
            if start.version_1 is not None:
                extents = rows.extents if start.epoch else rows.extents[: start.version_1[0]]
                passed = {one.path for one in extents}
                read = max(read, *(n for n, path in enumerate(rows.files, 1) if path in passed), 0)
            begun = tags.of_all(rows.files[:read])
        return begun + unread[len(begun) :]

    def _rows(self, part: Part) -> PartRows:
        if part not in self._parts:
            raise ConfigError(
                f"no {part} rows: nothing is held out; set data.split or data.evaluation_source"
            )
        return self._parts[part]


def _with_lanes(start: Position, ranks: ReaderGroup | None) -> Position:
    if not start.lanes:
        start = replace(start, lanes=(LanePosition(),))
    lanes = len(start.lanes)
    check_lanes(1 if ranks is None else ranks.size, lanes)
    return start


def paths_of(job: Job) -> list[str]:
    """Files, directories, globs and URIs that a job reads."""
    sources = [job.data.source, job.data.evaluation_source]
    return [path for one in sources if one is not None for path in one.globs]


def _refuse_common_rows(
    config: SourceConfig, source: Source, other_config: SourceConfig, other: Source
) -> None:
    """Rows that are trained on say nothing of others."""
    shared = _shared(config, source, other_config, other)
    if shared is not None:
        trained, held_out = shared
        name = held_out if trained == held_out else f"{held_out} ({trained})"
        raise ConfigError(
            f"data.evaluation_source: {name} is in data.source, too, so rows that were trained on "
            "would be measured; name other files, or hold some out with data.split"
        )


def _shared(
    config: SourceConfig, source: Source, other_config: SourceConfig, other: Source
) -> tuple[str, str] | None:
    """Names, in both sources, of a file or part that both have."""
    if isinstance(config, PythonSource) and isinstance(other_config, PythonSource):
        if config.factory != other_config.factory:
            return None
        tags = {source.identify(path).digest: path for path in source.paths}
        theirs = ((tags.get(other.identify(path).digest), path) for path in other.paths)
        return next(((mine, path) for mine, path in theirs if mine is not None), None)
    if isinstance(config, SyntheticSource) or isinstance(other_config, SyntheticSource):
        same = config == other_config.model_copy(update={"rows": getattr(config, "rows", 0)})
        return (source.paths[0], other.paths[0]) if same else None
    if isinstance(config, PythonSource) or isinstance(other_config, PythonSource):
        return None
    pairs = product(_parts(config, source), _parts(other_config, other))
    found = (common_file(*one, *two) for one, two in pairs)
    return next((pair for pair in found if pair is not None), None)


def _parts(config: SourceConfig, source: Source) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """By file system: what names files, and the files."""
    if isinstance(source, Streams):
        assert isinstance(config, StreamsSource)
        globs = {
            f"{stream.name}/{one.name}": one.globs
            for stream in config.streams
            for one in stream.sources
        }
        for name, part in source.sources.items():
            yield globs[name], part.paths
    else:
        yield config.globs, source.paths


def _check_equal(columns: Columns, other: Columns, origin: str) -> None:
    """Patterns must resolve to the same columns in both sources."""
    for kind, expected, found in (
        ("numeric columns", columns.numeric_names, other.numeric_names),
        ("features", columns.feature_names, other.feature_names),
    ):
        if list(expected) != list(found):
            raise ConfigError(
                f"data.evaluation_source: {origin} has other {kind} ({', '.join(found)}) than "
                f"data.source ({', '.join(expected)}); name the columns that both have"
            )
    check_widths(columns.numeric_widths, other.numeric_widths, origin)


def check_widths(expected: Mapping[str, int], found: Mapping[str, int], origin: str) -> None:
    """Raises DataError where a numeric column holds vectors of another width than it should."""
    for name in {**expected, **found}:
        before, now = expected.get(name, 1), found.get(name, 1)
        if before != now:
            raise DataError(
                f"{origin}: column {name!r} has {now} numbers a row, but {before} are read of it; "
                "mend the file"
            )
