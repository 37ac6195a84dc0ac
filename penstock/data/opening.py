"""Which source opens which configuration: one line for each format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.config import (
    ArrowSource,
    FileSource,
    JsonLinesSource,
    OrcSource,
    ParquetSource,
    PythonSource,
    StreamsSource,
    SyntheticSource,
    TextSource,
    TfRecordSource,
)
from penstock.config import Source as SourceConfig
from penstock.config.sources import AnyFileSource
from penstock.data.formats.arrow import ArrowFormat
from penstock.data.formats.columnar import GroupedFiles
from penstock.data.formats.json_lines import open_json_lines
from penstock.data.formats.orc import OrcFormat
from penstock.data.formats.parquet import ParquetFormat
from penstock.data.formats.partitioned import Partitioned
from penstock.data.formats.synthetic import SyntheticRows
from penstock.data.formats.text import open_text
from penstock.data.formats.tfrecord import TfRecordFormat
from penstock.data.formats.users_source import UsersSource
from penstock.data.source import Source, TextType
from penstock.data.windows.served import Streams, complete_now
from penstock.errors import DataError

TextTypes = Mapping[str, TextType]

OPENERS: Mapping[type, Callable[[Any, TextTypes, str | None], Source]] = {
    ParquetSource: lambda config, types, time: GroupedFiles(config, ParquetFormat(time)),
    OrcSource: lambda config, types, time: GroupedFiles(config, OrcFormat()),
    ArrowSource: lambda config, types, time: GroupedFiles(config, ArrowFormat()),
    TextSource: lambda config, types, time: open_text(config, types),
    JsonLinesSource: lambda config, types, time: open_json_lines(config, types),
    TfRecordSource: lambda config, types, time: GroupedFiles(config, TfRecordFormat(config)),
    PythonSource: lambda config, types, time: UsersSource(config),
    SyntheticSource: lambda config, types, time: SyntheticRows(config),
    StreamsSource: lambda config, types, time: _open_streams(config, types, time),
}
"""What opens a configuration, given as `open_source` is."""


def _open_streams(config: StreamsSource, text_types: TextTypes, time_column: str | None) -> Streams:
    def open_files(files: AnyFileSource) -> Source:
        return open_source(files, text_types, time_column, may_be_empty=True)

    # Of streams that grow, what is complete now.
    return Streams(config, open_files, complete_now(config) if config.grows else None)


def open_source(
    config: SourceConfig,
    text_types: TextTypes,
    time_column: str | None = None,
    *,
    may_be_empty: bool = False,
) -> Source:
    """Opens the files that a job, or nobody yet, reads.

    Args:
      config: which files.
      text_types: types of columns of text and JSON lines by name or glob, where `config` declares
        none.
      time_column: by which the rows will be divided.
      may_be_empty: whether its files may have no row, as others have some.

    Raises:
      ConfigError: columns or types of `config` do not fit together.
      DataError: files are missing or not what `config` says, or have no row.
    """
    source = OPENERS[type(config)](config, text_types, time_column)
    if isinstance(config, FileSource) and not may_be_empty and not source.extents():
        raise DataError(f"{source.paths[0]}: no rows; the source has none at all")
    if isinstance(config, FileSource) and config.partitions:
        return Partitioned(source, config.partitions)
    return source
