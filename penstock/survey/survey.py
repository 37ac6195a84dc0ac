"""All that is found out about unknown data: its files, its columns, their roles, its label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.config import AnyFileSource, JsonLinesSource, TextSource
from penstock.data.files import list_files
from penstock.data.formats.lines import OpenQuote
from penstock.data.formats.text import guess_delimiter
from penstock.data.opening import open_source
from penstock.data.plan.counting import Progress
from penstock.data.source import Chunk, Source
from penstock.errors import DataError
from penstock.survey.label_rate import LabelRate, label_rate
from penstock.survey.profile import DataProfile, profile_source
from penstock.survey.roles import Roles, assign_roles

_MOST_MALFORMED = 1000


@dataclass(frozen=True)
class Survey:
    """What there is to say about data, and to write a job from."""

    source: AnyFileSource
    bytes: int
    """Of all files."""
    num_groups: int | None
    """Row groups, stripes or record batches; None: not known."""
    profile: DataProfile
    roles: Roles
    rate: LabelRate | None
    """None: nothing looks like a label."""
    items: tuple[str, ...]
    """Columns of the item, where the user says that every row is a positive."""
    malformed: int
    """Rows that cannot be read and are in none of the figures."""
    malformed_example: str
    """Where the first of them is, and what is wrong with it."""

    @property
    def text_types(self) -> Mapping[str, Literal["int64", "string"]]:
        """Types that columns of text files need and would not have by their use."""
        return _text_types(self.source, self.profile, self.roles)

    @property
    def null_values(self) -> tuple[str, ...]:
        """Texts that mean null among numbers."""
        return _null_values(self.profile)


def survey_data(
    source: AnyFileSource,
    *,
    max_rows: int | None = None,
    label: str | None = None,
    items: Sequence[str] = (),
    event_time: str | None = None,
    progress: Callable[[str], Progress] = lambda stage: lambda rows, share: None,
) -> Survey:
    """Reads files of one schema: once for all columns, and labels and times once more.

    Args:
      source: the files.
      max_rows: look at no more rows than this; None: at all.
      label: the label's column, where the user knows better than its name and values tell.
      items: columns of the item, where there is no label since every row is a positive.
      event_time: the column of times, where the user knows better.
      progress: given a stage of the work, what to call after each chunk of it.

    Raises:
      ConfigError: a column is named that is not there or cannot be what it is said to be.
      DataError: a file cannot be read, or most of its rows cannot.

    Effects: bounded memory, see `profile_source`.
    """
    if isinstance(source, TextSource | JsonLinesSource):
        source = source.model_copy(update={"on_malformed_row": "quarantine"})
    if isinstance(source, TextSource) and source.delimiter is None:
        source = source.model_copy(update={"delimiter": guess_delimiter(source)})
    try:
        opened, profile, malformed = _profile(source, max_rows, progress)
    except OpenQuote:
        assert isinstance(source, TextSource)
        source = source.model_copy(update={"quoted_line_breaks": True})
        opened, profile, malformed = _profile(source, max_rows, progress)
    roles = assign_roles(profile, label=label, items=items, event_time=event_time)
    source, types = _as_read(source, profile, roles)
    rate = label_rate(
        open_source(source, types),
        profile,
        roles,
        max_rows=max_rows,
        progress=progress("label"),
    )
    filesystem, paths = list_files(source.path)
    return Survey(
        source=source,
        bytes=sum(info.size for info in filesystem.get_file_info(paths)),
        num_groups=opened.num_groups,
        profile=profile,
        roles=roles,
        rate=rate,
        items=tuple(items),
        malformed=malformed.rows,
        malformed_example=malformed.example,
    )


def _profile(
    source: AnyFileSource, max_rows: int | None, progress: Callable[[str], Progress]
) -> tuple[Source, DataProfile, _MalformedRows]:
    malformed = _MalformedRows()
    opened = open_source(source, {})
    tell = progress("columns")

    def told(rows: int, share: float | None) -> None:
        malformed.good = rows
        tell(rows, share)

    untyped = set(opened.schema.names) if isinstance(source, TextSource) else set()
    profile = profile_source(
        opened,
        max_rows=max_rows,
        as_text=untyped - set(source.partitions),
        progress=told,
        watch=malformed.watch,
    )
    return opened, profile, malformed


class _MalformedRows:
    """Counts malformed rows and keeps the first; gives up where most rows are malformed."""

    def __init__(self) -> None:
        self.good = 0
        """Rows that could be read so far."""
        self.rows = 0
        self.example = ""

    def watch(self, chunk: Chunk) -> None:
        """Counts those of a chunk."""
        if not chunk.malformed:
            return
        if not self.rows:
            path, first = chunk.place.span(0, 0).path, chunk.malformed[0]
            self.example = f"{path}:{chunk.malformed_lines[0]}: {first.reason}"
        self.rows += len(chunk.malformed)
        if self.rows > max(_MOST_MALFORMED, self.good):
            raise DataError(
                f"{self.example}; {self.rows:,} of the first {self.rows + self.good:,} rows "
                "are malformed: give the right --format, and --columns if there is no header"
            )


def _as_read(
    source: AnyFileSource, profile: DataProfile, roles: Roles
) -> tuple[AnyFileSource, dict[str, Literal["int64", "float64"]]]:
    """The source as a job would read it, and the types that its label and time have there."""
    types: dict[str, Literal["int64", "float64"]] = {}
    if roles.label is not None:
        types[roles.label] = "float64"
    if roles.event_time is not None:
        types[roles.event_time] = "int64"
    if isinstance(source, TextSource):
        given = dict(source.types) | _text_types(source, profile, roles)
        nulls = tuple(dict.fromkeys((*source.null_values, *_null_values(profile))))
        source = source.model_copy(update={"types": given, "null_values": nulls})
    return source, types


def _text_types(
    source: AnyFileSource, profile: DataProfile, roles: Roles
) -> dict[str, Literal["int64", "string"]]:
    types: dict[str, Literal["int64", "string"]] = {}
    if isinstance(source, TextSource):
        for name in roles.named("categorical", "event time"):
            if name in source.partitions:
                continue  # has the type that was declared
            if profile[name].kind == "integer":
                types[name] = "int64"
            elif name == roles.event_time:
                types[name] = "string"
    return types


def _null_values(profile: DataProfile) -> tuple[str, ...]:
    return tuple(sorted({text for one in profile.columns for text in one.null_texts}))
