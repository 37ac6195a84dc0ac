"""Streams: sources mixed over windows of event time, which the paths of their files tell.

Data set > stream > source: a data set serves its streams one after the other or side by side, a
stream mixes its sources window by window, a source is files of one format.
"""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, date, datetime
from typing import Annotated, Any, ClassVar, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, Field, field_validator, model_validator

from penstock.config.base import MAY_CHANGE, Config
from penstock.config.sources import FILE_SOURCES, AnyFileSource, PythonSource, SyntheticSource

DATE_FIELDS = ("YYYY", "MM", "DD", "HH")
"""Of paths, the coarsest first."""
_FIELD = re.compile(r"\{(\w*)\}")
_DURATION = re.compile(r"(\d+) ?(s|min|h|d)")
_UNITS_MS = {"s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_MOST_MS = 366 * 86_400_000
_NOW = "now"
_MOST_WINDOWS = 1_000_000
_TIME = "ISO 8601 time of the years 1 to 9999; write it like 2026-01-31 or 2026-01-31T06"


def duration_ms(text: str, others: str = "") -> int:
    """Milliseconds of `90s`, `15min`, `6h` or `7d`; `others` may be written, too, for messages.

    Raises:
      ValueError: the text is none of these.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no duration; write one like {others}90s, 15min, 6h or 7d")
    ms = int(found[1]) * _UNITS_MS[found[2]]
    if ms > _MOST_MS:
        raise ValueError(f"{text!r} is more than 366d")
    return ms


def fields_of_path(path: str) -> tuple[str, ...]:
    """The date fields that a path has, the coarsest first.

    Raises:
      ValueError: it has a field that there is not, or a finer one without the coarser ones.
    """
    brace = re.search(r"[{}]", _FIELD.sub("", path))
    if brace is not None:
        raise ValueError(
            f"{path!r} has a {brace[0]} that belongs to no field; there are "
            + ", ".join(f"{{{name}}}" for name in DATE_FIELDS)
        )
    found = set(_FIELD.findall(path))
    unknown = sorted(found - set(DATE_FIELDS))
    if unknown:
        raise ValueError(
            f"{path!r} has a field {{{unknown[0]}}}; there are "
            + ", ".join(f"{{{name}}}" for name in DATE_FIELDS)
        )
    fields = tuple(name for name in DATE_FIELDS if name in found)
    if fields != DATE_FIELDS[: len(fields)] or len(fields) < 3:
        raise ValueError(
            f"{path!r} must say the year, month and day of a file's rows, and may say the hour: "
            "{YYYY}, {MM}, {DD}, {HH}"
        )
    return fields


def _without_slash(name: str) -> str:
    if "/" in name:
        raise ValueError("a name has no /, which stands between those of stream and source")
    return name


class StreamSource(Config):
    """Files of one format whose paths say when their rows happened."""

    name: Annotated[str, Field(min_length=1), AfterValidator(_without_slash)]
    files: Annotated[AnyFileSource, Field(discriminator="format")]
    """With one `path`, a glob with the fields {YYYY} {MM} {DD} and perhaps {HH}:
    `clicks/{YYYY}-{MM}-{DD}/{HH}/*.parquet`.
    """
    delay: str = "0s"
    """Its rows are served that much later than they happened: beside those of the other sources
    that are so much younger. `90s`, `15min`, `6h` or `7d`.
    """
    marker: Annotated[str | None, MAY_CHANGE] = None
    """Path, with the same fields, of a file that says that those of an hour or day are complete
    (`clicks/{YYYY}-{MM}-{DD}/{HH}/_SUCCESS`). Where it is missing, the run stops by name.
    """

    lateness: Annotated[str, MAY_CHANGE] = "0s"
    """Where a stream grows: how much event time a later file must be ahead of an hour or day, for
    its files to be complete. With a marker, that tells it.
    """
    closes_after: Annotated[str | None, MAY_CHANGE] = None
    """Where a stream grows: how long after its end, by the clock, an hour or day is complete also
    if no later file came.
    """

    @property
    def globs(self) -> tuple[str, ...]:
        """A glob of its files, of any time."""
        return (_FIELD.sub("*", str(self.files.path)),)

    @property
    def delay_ms(self) -> int:
        """`delay` in milliseconds."""
        return duration_ms(self.delay)

    @property
    def lateness_ms(self) -> int:
        """`lateness` in milliseconds."""
        return duration_ms(self.lateness)

    @property
    def closes_after_ms(self) -> int:
        """`closes_after` in milliseconds, where it is given."""
        return duration_ms(self.closes_after or "")

    @field_validator("delay", "lateness", "closes_after")
    @classmethod
    def _is_duration(cls, text: str | None) -> str | None:
        if text is not None:
            duration_ms(text)
        return text

    @model_validator(mode="after")
    def _paths_say_when(self) -> StreamSource:
        path = self.files.path
        if not isinstance(path, str):
            raise ValueError(f"{self.name}: give one path, a glob with date fields")
        if "**" in path:
            raise ValueError(f"{self.name}: {path!r} has **; name each level, by * or fields")
        fields = fields_of_path(path)
        _check_levels(path)
        if self.marker is not None and fields_of_path(self.marker) != fields:
            raise ValueError(f"{self.name}: the marker must have the date fields of the path")
        if self.marker is not None and re.search(r"[*?\[]", self.marker):
            raise ValueError(f"{self.name}: the marker names one file, so it has no * ? [")
        return self


def _check_levels(path: str) -> None:
    """Refuses folders that no file can be found by."""
    known: set[str] = set()
    for name in path.split("/"):
        new = [field for field in _FIELD.findall(name) if field not in known]
        coarsest = max((DATE_FIELDS.index(field) for field in known), default=0)
        late = next((field for field in new if DATE_FIELDS.index(field) < coarsest), None)
        if late is not None:
            raise ValueError(
                f"{path!r}: {{{late}}} stands below a finer field; folders go from the year to the "
                "hour"
            )
        if known and name in ("", ".", ".."):
            raise ValueError(
                f"{path!r} has {name!r} for a name below its fields; name each folder, and the "
                "files in the last one, by * where they vary"
            )
        known.update(new)


class Stream(Config):
    """Sources mixed over windows of event time: one window after the other, all of its sources."""

    name: Annotated[str, Field(min_length=1), AfterValidator(_without_slash)]
    window: str = "day"
    """`hour` and `day` are those of `zone`; a duration (`90s`, `15min`, `6h`, `7d`) counts from
    `start`.
    """
    zone: str = "UTC"
    """Time zone of the date fields in paths, and of `start` and `end` (`Europe/Paris`)."""
    start: str
    """The first moment, ISO 8601 (`2026-01-31` or `2026-01-31T06`)."""
    end: Annotated[str, MAY_CHANGE]
    """The moment behind the last one; `now`: there is none, and the run goes on with new files as
    they appear.
    """
    sources: tuple[StreamSource, ...]

    @field_validator("start", "end", mode="before")
    @classmethod
    def _moment_of_yaml(cls, at: Any) -> Any:
        # YAML reads ISO 8601 without quotation marks as a moment, and 20260131 as a number.
        if isinstance(at, int | float):
            raise ValueError(f"{at} is a number, not an {_TIME}")
        return at.isoformat() if isinstance(at, date) else at

    @field_validator("zone")
    @classmethod
    def _zone_is_known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(
                f"no time zone {name!r} is known; write one like UTC or Europe/Paris"
            ) from None
        return name

    @property
    def time_zone(self) -> ZoneInfo:
        """Of `zone`."""
        return ZoneInfo(self.zone)

    @property
    def start_ms(self) -> int:
        """`start` in ms since 1970 UTC."""
        return self._moment(self.start)

    @property
    def grows(self) -> bool:
        """Whether files appear while it is read."""
        return self.end == _NOW

    @property
    def end_ms(self) -> int:
        """`end` in ms since 1970 UTC; of a stream that has one."""
        return self._moment(self.end)

    @property
    def unit(self) -> Literal["hour", "day"] | int:
        """Of the windows: an hour or day of the zone, or a fixed length in ms."""
        named: dict[str, Literal["hour", "day"]] = {"hour": "hour", "day": "day"}
        return named.get(self.window) or duration_ms(self.window, "hour, day, ")

    @field_validator("window")
    @classmethod
    def _is_unit(cls, text: str) -> str:
        if text not in ("hour", "day"):
            duration_ms(text, "hour, day, ")
        return text

    def _moment(self, text: str) -> int:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=self.time_zone)
        return round(moment.astimezone(UTC).timestamp() * 1000)

    @model_validator(mode="after")
    def _times_are_times(self) -> Stream:
        for field, text in (("start", self.start), ("end", self.end)):
            if field == "end" and self.grows:
                return self
            try:
                self._moment(text)
            except (ValueError, OverflowError):
                raise ValueError(f"{field} {text!r} is no {_TIME}") from None
        if self.start_ms >= self.end_ms:
            raise ValueError(f"end {self.end!r} is not after start {self.start!r}")
        return self

    @model_validator(mode="after")
    def _windows_hold_files(self) -> Stream:
        if not self.sources:
            raise ValueError("sources: there is none; give one")
        unit = self.unit
        ms = unit if isinstance(unit, int) else {"hour": 3_600_000, "day": 86_400_000}[unit]
        if not ms:
            raise ValueError("window 0s: a window has some length")
        number = 0 if self.grows else (self.end_ms - self.start_ms) // ms
        if number > _MOST_WINDOWS:
            raise ValueError(
                f"{number:,} windows {self.window!r} from start {self.start!r} to end "
                f"{self.end!r}, at most {_MOST_WINDOWS:,}; set end to where the files end"
            )
        for source in self.sources:
            of_hours = "HH" in fields_of_path(str(source.files.path))
            if ms < (3_600_000 if of_hours else 86_400_000):
                parts = "hours" if of_hours else "days"
                raise ValueError(
                    f"window {self.window!r} is shorter than the {parts} by which the paths of "
                    f"source {source.name!r} tell files apart; make it longer"
                )
        _refuse_twice("source", [source.name for source in self.sources])
        return self


class StreamsSource(Config):
    """A data set of streams of files, in windows of event time."""

    extents: ClassVar[str] = "pieces"
    format: Literal["streams"] = "streams"
    streams: tuple[Stream, ...]
    together: bool = False
    """Whether streams are served side by side, by the end of their windows; false: one after the
    other.
    """
    poll: Annotated[str, MAY_CHANGE] = "10s"
    """Where a stream grows: how often folders are listed while there is nothing to read."""

    @property
    def poll_s(self) -> float:
        """`poll` in seconds."""
        return duration_ms(self.poll) / 1000

    @property
    def grows(self) -> bool:
        """Whether files appear while it is read."""
        return any(stream.grows for stream in self.streams)

    @field_validator("poll")
    @classmethod
    def _is_some_time(cls, text: str) -> str:
        if not duration_ms(text):
            raise ValueError("poll 0s: folders are listed again after some time; write 10s")
        return text

    @model_validator(mode="after")
    def _only_the_last_grows(self) -> StreamsSource:
        first = next((n for n, stream in enumerate(self.streams) if stream.grows), None)
        if first is not None and not self.together and first + 1 < len(self.streams):
            raise ValueError(
                f"stream {self.streams[first].name!r} has no end, so those behind it would never "
                "be read; put it last, or serve streams side by side (together: true)"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> StreamsSource:
        if not self.streams:
            raise ValueError("streams: there is none; give one")
        _refuse_twice("stream", [stream.name for stream in self.streams])
        return self

    @property
    def sources(self) -> tuple[StreamSource, ...]:
        """Those of all streams."""
        return tuple(source for stream in self.streams for source in stream.sources)

    @property
    def globs(self) -> tuple[str, ...]:
        """Globs of the files of all sources, of any time."""
        return tuple(glob for source in self.sources for glob in source.globs)


def files_of(source: Source) -> tuple[AnyFileSource, ...]:
    """The files that a source is made of, by their format; none of one without files."""
    if isinstance(source, StreamsSource):
        return tuple(one.files for one in source.sources)
    return () if isinstance(source, SyntheticSource | PythonSource) else (source,)


def _refuse_twice(what: str, names: list[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"two {what}s are named {twice!r}; give each its own name")


Source = Annotated[
    AnyFileSource | PythonSource | SyntheticSource | StreamsSource, Field(discriminator="format")
]

SOURCES: tuple[type[Config], ...] = (
    *FILE_SOURCES,
    PythonSource,
    SyntheticSource,
    StreamsSource,
)
