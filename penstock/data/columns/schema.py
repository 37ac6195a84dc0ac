"""Which column is what: patterns to columns, types, features and tables.

Pure: works on the names and types of a source, reads no row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import pyarrow as pa

from penstock.config import (
    CrossedFeature,
    FeatureColumns,
    FeatureConfig,
    FileSource,
    Job,
    JsonLinesSource,
    Label,
    NumericColumns,
    TableConfig,
    TextSource,
    TimeUnit,
    files_of,
)
from penstock.data.columns.checks import (
    is_number,
    is_one_key,
    is_text,
    is_time,
    key_remedy,
    nearest,
    number_remedy,
    vector_width,
)
from penstock.data.columns.negatives import NegativeColumns, negative_columns
from penstock.data.columns.transforms import is_list
from penstock.data.source import TextType, Vector
from penstock.errors import ConfigError, DataError

_GLOB = re.compile(r"[*?\[]")
TEACHER = "teacher"
"""Column of the true click probability, of synthetic sources alone."""


@dataclass(frozen=True, slots=True)
class FeatureColumn:
    """One categorical column."""

    name: str
    config: FeatureColumns


@dataclass(frozen=True, slots=True)
class NumericGroup:
    """Numeric columns that are treated alike."""

    config: NumericColumns
    names: tuple[str, ...]
    positions: tuple[int, ...]
    """Columns of `Batch.dense` that they fill; of vectors the first one."""
    widths: tuple[int | None, ...]
    """Numbers of each vector; None: a row holds one number, which may lie in a list."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What is read of a source, and as what."""

    labels: tuple[Label | None, ...]
    """In the order of `Batch.labels`. None: it has no column, and reads as `without_column`."""
    without_column: float
    """1 where every row is a positive; NaN in prediction."""
    weight: str | None
    event_time: str | None
    teacher: str | None
    numeric: tuple[NumericGroup, ...]
    features: tuple[FeatureColumn, ...]
    """In the order of the source."""
    crosses: tuple[CrossedFeature, ...] = ()
    time_unit: TimeUnit = "ms"
    """Of integers in `event_time`."""
    event_time_ahead_s: int = 2**62
    """See `DataConfig`."""
    groups: tuple[str, ...] = ()
    """Columns by which metrics are grouped; they may be features too."""
    negatives: NegativeColumns | None = None
    """None: every row is one sample."""

    @property
    def numeric_names(self) -> tuple[str, ...]:
        """Columns in the order of `Batch.dense`, which is that of the source."""
        placed = [
            (position, name)
            for group in self.numeric
            for position, name in zip(group.positions, group.names, strict=True)
        ]
        return tuple(name for _, name in sorted(placed))

    @property
    def numeric_widths(self) -> dict[str, int]:
        """Numbers of a row of each numeric column of vectors."""
        return {
            name: width
            for group in self.numeric
            for name, width in zip(group.names, group.widths, strict=True)
            if width is not None
        }

    @property
    def numeric_inputs(self) -> tuple[str, ...]:
        """The column of each column of `Batch.dense`."""
        widths = self.numeric_widths
        return tuple(name for name in self.numeric_names for _ in range(widths.get(name, 1)))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Columns of labels that the source has, each once."""
        return tuple(dict.fromkeys(label.column for label in self.labels if label is not None))

    @property
    def names(self) -> list[str]:
        """Every column that is read, each once."""
        special = (self.weight, self.event_time, self.teacher)
        return list(
            dict.fromkeys([
                *self.label_names,
                *(name for name in special if name is not None),
                *self.numeric_names,
                *(feature.name for feature in self.features),
                *(one.config.weights for one in self.features if one.config.weights is not None),
                *(name for one in self.crosses for name in one.columns),
                *self.groups,
                *self._negatives_read,
            ])
        )

    @property
    def _negatives_read(self) -> tuple[str, ...]:
        user = None if self.negatives is None else self.negatives.user
        return () if user is None else (user,)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """In the order of `Batch.sparse`: columns, then crosses."""
        names = [feature.name for feature in self.features]
        return (*names, *(one.name for one in self.crosses))


def resolve_columns(
    job: Job,
    schema: pa.Schema,
    origin: str,
    labels: Literal["required", "optional"],
    order: Sequence[str] = (),
) -> Columns:
    """Finds the columns that a job names and checks their types.

    Args:
      job: what is wanted.
      schema: what the source has.
      origin: names the source in errors, for instance its first file.
      labels: `optional` for prediction: the label column may be absent.
      order: names of numeric columns and features in the order to give them; a column that it
        does not name comes after, in the order of the source.

    Raises:
      ConfigError: a pattern matches nothing, or a column is claimed twice.
      DataError: a column is missing or of the wrong type.
    """
    data = job.data
    synthetic = data.source.format == "synthetic"
    is_optional = labels == "optional"
    found_labels = tuple(
        label
        if label.column in data.label_columns
        and not (is_optional and label.column not in schema.names)
        else None
        for label in data.labels
    )
    claims: dict[str, str] = {}
    for field, name in _special_columns(job, found_labels).items():
        if name not in schema.names:
            raise DataError(f"{origin}: no column {name!r} ({field}){nearest(name, schema.names)}")
        # Several labels may be made of one column.
        if not (field.startswith("data.label") and claims.get(name, "").startswith("data.label")):
            _claim(claims, name, field)
    reserved = {*data.label_columns, *claims, *([TEACHER] if synthetic else [])}
    reserved |= {feature.weights for feature in job.features if feature.weights is not None}
    place = {name: index for index, name in enumerate(dict.fromkeys([*order, *schema.names]))}
    numeric: list[tuple[NumericColumns, list[str]]] = []
    for index, group in enumerate(data.numeric):
        field = f"data.numeric.{index}"
        names = _match(group.columns, field, schema.names, reserved, origin)
        for name in names:
            _claim(claims, name, field)
        numeric.append((group, names))
    in_numeric = {name for _, names in numeric for name in names}
    claimed_features: dict[str, str] = {}
    features: list[FeatureColumn] = []
    for index, feature in enumerate(job.features):
        field = f"features.{index}"
        for name in _match(feature.columns, field, schema.names, reserved, origin):
            # A number that is put into buckets may be a numeric input as well.
            numeric_too = feature.buckets_numbers and name in in_numeric
            _claim(claimed_features if numeric_too else claims, name, field)
            features.append(FeatureColumn(name, feature))
    features.sort(key=lambda feature: place[feature.name])
    columns = Columns(
        labels=found_labels,
        without_column=math.nan if is_optional else 1.0,
        weight=data.weight,
        event_time=data.event_time,
        # Of a row with another item the teacher's probability is not known.
        teacher=TEACHER if synthetic and data.negatives is None else None,
        numeric=_numeric_groups(numeric, place, schema),
        features=tuple(features),
        crosses=job.crosses,
        time_unit=data.event_time_unit,
        event_time_ahead_s=data.event_time_ahead_s,
        groups=_group_columns(job, schema, origin) if labels == "required" else (),
    )
    _check_crosses(columns, schema, origin)
    _check_key_weights(job, columns, schema, origin)
    _check_types(columns, schema, origin, files_of(data.source))
    return replace(columns, negatives=_negative_columns(job, columns, schema, origin))


def _numeric_groups(
    groups: Sequence[tuple[NumericColumns, list[str]]],
    place: Mapping[str, int],
    schema: pa.Schema,
) -> tuple[NumericGroup, ...]:
    """Groups with the positions of their columns, which are in the order of `place`."""
    width = {
        name: vector_width(group, schema.field(name).type)
        for group, names in groups
        for name in names
    }
    position: dict[str, int] = {}
    begin = 0
    for name in sorted(width, key=place.__getitem__):
        position[name] = begin
        begin += width[name] or 1
    return tuple(
        NumericGroup(
            group,
            tuple(names),
            tuple(position[name] for name in names),
            tuple(width[name] for name in names),
        )
        for group, names in groups
    )


def _negative_columns(
    job: Job, columns: Columns, schema: pa.Schema, origin: str
) -> NegativeColumns | None:
    if job.data.negatives is None:
        return None
    features = [feature.name for feature in columns.features]
    of_one_key = [
        feature.name
        for feature in columns.features
        if feature.config.separator is None and is_one_key(schema.field(feature.name).type)
    ]
    return negative_columns(
        job.data.negatives,
        columns.numeric_inputs,
        features,
        columns.crosses,
        schema,
        origin,
        of_one_key=of_one_key,
    )


def _special_columns(job: Job, labels: Sequence[Label | None]) -> dict[str, str]:
    """By field of the job: columns that are no inputs."""
    is_one = isinstance(job.data.label, Label)
    named = {
        "data.label.column" if is_one else f"data.label.{place}.column": label.column
        for place, label in enumerate(labels)
        if label is not None
    }
    named |= {"data.weight": job.data.weight} if job.data.weight else {}
    return named | ({"data.event_time": job.data.event_time} if job.data.event_time else {})


def _check_crosses(columns: Columns, schema: pa.Schema, origin: str) -> None:
    taken = {feature.name for feature in columns.features}
    for index, one in enumerate(columns.crosses):
        field = f"crosses.{index}"
        if one.name in taken:
            raise ConfigError(f"{field}.name: another feature is named {one.name!r}; change one")
        taken.add(one.name)
        for name in one.columns:
            if name in columns.label_names:
                raise ConfigError(f"{field}.columns: {name!r} is the label; leave it out")
            if name not in schema.names:
                raise DataError(
                    f"{origin}: no column {name!r} ({field}){nearest(name, schema.names)}"
                )
            kind = schema.field(name).type
            if not is_one_key(kind):
                raise DataError(
                    f"{origin}: column {name!r} is {kind}; crossed columns hold one integer or "
                    "text a row; leave it out of the cross"
                )


def _check_key_weights(job: Job, columns: Columns, schema: pa.Schema, origin: str) -> None:
    for index, group in enumerate(job.features):
        if group.weights is not None and group.weights not in schema.names:
            raise DataError(
                f"{origin}: no column {group.weights!r} (features.{index}.weights)"
                f"{nearest(group.weights, schema.names)}"
            )
    for feature in columns.features:
        name = feature.config.weights
        if name is None:
            continue
        of_weights, of_keys = schema.field(name).type, schema.field(feature.name).type
        are_lists = is_list(of_keys) or feature.config.separator is not None
        if not is_number(of_weights) or is_list(of_weights) is not are_lists:
            wanted = "lists of numbers" if are_lists else "one number a row"
            raise DataError(
                f"{origin}: column {name!r} is {of_weights}, but the keys {feature.name!r} are "
                f"{of_keys}; their weights are {wanted}"
            )


def default_text_types(job: Job) -> Mapping[str, TextType]:
    """Types of text columns by name or glob, where the source declares none."""
    data = job.data
    types: dict[str, TextType] = dict.fromkeys(data.label_columns, "float64")
    if data.weight is not None:
        types[data.weight] = "float64"
    if data.event_time is not None:
        types[data.event_time] = "int64"
    numbers = [group.columns for group in data.numeric if group.width is None]
    numbers += [group.columns for group in job.features if group.buckets_numbers]
    numbers += [(group.weights,) for group in job.features if group.weights is not None]
    types |= {pattern: "float64" for patterns in numbers for pattern in patterns}
    return types | {
        pattern: Vector(group.width)
        for group in data.numeric
        if group.width is not None
        for pattern in group.columns
    }


def resolve_features(
    job: Job, columns: Columns
) -> tuple[tuple[FeatureConfig, ...], tuple[TableConfig, ...]]:
    """Gives every feature its table.

    Returns:
      Features in the order of `columns`; the tables of the job, then the implied ones.

    Raises:
      ConfigError: a feature names an unknown table, two tables have one name, or no feature reads
        a table.
    """
    tables: dict[str, TableConfig] = {}
    for table in job.tables:
        if table.name in tables:
            raise ConfigError(f"tables: two are named {table.name!r}; give each its own name")
        tables[table.name] = table
    _check_tables_are_there(job, list(tables))
    features = []
    for column in columns.features:
        name = column.config.table or column.name
        if name not in tables:
            tables[name] = _implied_table(job, name)
        pooling = column.config.pooling
        positions = column.config.max_keys if pooling == "sequence" else None
        features.append(
            FeatureConfig(name=column.name, table=name, pooling=pooling, max_keys=positions)
        )
    for one in columns.crosses:
        name = one.table or one.name
        if name not in tables:
            tables[name] = _implied_table(job, name)
        features.append(FeatureConfig(name=one.name, table=name))
    used = {feature.table for feature in features}
    for index, table in enumerate(job.tables):
        if table.name not in used:
            raise ConfigError(
                f"tables.{index}: no feature reads table {table.name!r}; set `table` of a feature "
                "or remove it"
            )
    return tuple(features), tuple(tables.values())


def _check_tables_are_there(job: Job, tables: list[str]) -> None:
    named = [(f"features.{index}", group.table) for index, group in enumerate(job.features)]
    named += [(f"crosses.{index}", one.table) for index, one in enumerate(job.crosses)]
    for field, table in named:
        if table is not None and table not in tables:
            raise ConfigError(
                f"{field}.table: no table {table!r} under `tables`{nearest(table, tables)}"
            )


def _implied_table(job: Job, name: str) -> TableConfig:
    try:
        return TableConfig(name=name, **dict(job.table_defaults))
    except ConfigError as error:
        raise ConfigError(
            f"column {name!r} gives its table a name that is not allowed ({error}); name a table "
            "for it: features[].table"
        ) from None


def _match(
    patterns: Sequence[str], field: str, names: Sequence[str], reserved: set[str], origin: str
) -> list[str]:
    """Columns that match, in the order of the source; exact names may be reserved ones."""
    found: set[str] = set()
    for pattern in patterns:
        if pattern in names:
            found.add(pattern)
            continue
        matches = {name for name in names if fnmatchcase(name, pattern)} - reserved
        if not matches and not _GLOB.search(pattern):
            raise DataError(f"{origin}: no column {pattern!r} ({field}){nearest(pattern, names)}")
        if not matches:
            raise ConfigError(
                f"{field}.columns: {pattern!r} matches no column of {origin}"
                f"{nearest(_GLOB.split(pattern)[0], names)}"
            )
        found |= matches
    return [name for name in names if name in found]


def _claim(claims: dict[str, str], name: str, field: str) -> None:
    if name in claims:
        raise ConfigError(
            f"column {name!r} is claimed by {claims[name]} and by {field}; leave it to one of them"
        )
    claims[name] = field


def _check_types(
    columns: Columns, schema: pa.Schema, origin: str, files: Sequence[FileSource]
) -> None:
    reads_text = any(isinstance(one, TextSource | JsonLinesSource) for one in files)

    def declared(name: str) -> str | None:
        if any(name in one.partitions for one in files):
            return "data.source.partitions"
        return "data.source.types" if reads_text else None

    def wrong(name: str, remedy: str) -> DataError:
        return DataError(f"{origin}: column {name!r} is {schema.field(name).type}; {remedy}")

    for number in (*columns.label_names, columns.weight):
        if number is not None and not is_number(schema.field(number).type):
            raise wrong(number, "labels and weights are numbers; convert it")
    for name in columns.numeric_names:
        remedy = number_remedy(schema.field(name).type, columns.numeric_widths.get(name))
        if remedy is not None:
            raise wrong(name, remedy)
    if columns.event_time is not None and not is_time(schema.field(columns.event_time).type):
        raise wrong(columns.event_time, "event times are timestamps, dates or integers (ms)")
    for feature in columns.features:
        kind = schema.field(feature.name).type
        remedy = key_remedy(feature.name, kind, feature.config, declared(feature.name))
        if remedy is not None:
            raise wrong(feature.name, remedy)


def _group_columns(job: Job, schema: pa.Schema, origin: str) -> tuple[str, ...]:
    """Columns by which metrics are grouped, if they are there and of a fitting type."""
    names = job.evaluation.metrics.columns
    for name in names:
        if name not in schema.names:
            raise DataError(
                f"{origin}: no column {name!r} (evaluation.metrics){nearest(name, schema.names)}"
            )
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise DataError(
                f"{origin}: column {name!r} is {kind}; evaluation.metrics groups rows by integers "
                "or strings; name another column"
            )
    return names
