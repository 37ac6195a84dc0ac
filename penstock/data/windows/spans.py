"""Opens the windows of streams that grow, span after span, while a run goes on."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from pyarrow import fs

from penstock.config import Source as SourceConfig
from penstock.config.streams import StreamsSource
from penstock.data.batches.blocks import FileTags
from penstock.data.batches.channel import Closed
from penstock.data.batches.stage import Stage
from penstock.data.files import resolve_path
from penstock.data.identity import WholeTags
from penstock.data.plan.parts import PartRows
from penstock.data.windows.folders import Tries
from penstock.data.windows.graph import StoredPaths
from penstock.data.windows.growing import (
    Listing,
    has_ended,
    is_behind_end,
    listed_windows,
    next_span,
    waits_for,
)
from penstock.data.windows.late import LateFiles, words_of
from penstock.data.windows.served import Opener, Streams, complete_now
from penstock.data.windows.stored import PassedOver, listed_anew, stored_paths
from penstock.errors import DataError, ListingError
from penstock.position import FileTag, LanePosition, Position, Span

_LATE_POLLS = 30
"""While nothing comes, folders that were read are listed again after so many polls."""
_MOST_WAITING_FILES = 1 << 14
"""Each checkpoint lists them."""


class Spans:
    """Of the training part of a job."""

    def __init__(
        self,
        config: StreamsSource,
        open_files: Opener,
        listing: Listing | None,
    ) -> None:
        """Opens the files of the first span.

        Args:
          config: the streams.
          open_files: opens the files of one source.
          listing: of the span with which to begin; None: what is complete now.

        Raises:
          DataError: no window is complete, or as `Streams`.
        """
        self._config, self._open_files = config, open_files
        listing = listing or complete_now(config)
        self.first = Streams(config, open_files, listing)
        """The span with which to begin; the columns and types are those of all that follow."""
        self.is_waiting, self.waited_s = False, 0.0
        self.on_wait: Callable[[str], None] = lambda words: None
        """Told, from a thread of the loader, what it waits for, each time that it begins to."""
        self.on_late: Callable[[str], None] = lambda words: None
        """Told, from a thread of the first rank's loader, which files came too late to be read."""
        self._late = LateFiles(config)
        self._late.add(listing)
        self._tries, self._passed_over, self._polls = Tries(), PassedOver(), 0
        self._listed: Mapping[str, StoredPaths] | None = None
        """At the last poll; None: another rank lists."""

    def within_first(self, start: Position) -> Position:
        """A position at the beginning of the first span, or one within it.

        Raises:
          DataError: it is in another span.
        """
        span = self.first.span
        if start.span is None:
            return replace(start, span=span)
        if start.span.first_file != (span and span.first_file):
            raise DataError(
                "the position is in windows that are not open; open the data with the position to "
                "go on from"
            )
        return start

    def after(
        self,
        end: Position,
        from_first: Callable[[Callable[[], Any]], Any],
        is_closed: threading.Event,
        is_taken: Callable[[], bool],
    ) -> Stage | None:
        """See `Following`."""
        assert end.span is not None
        first, is_told = _behind(end), False
        try:
            while True:
                found = from_first(lambda: self._found(end.span, first))
                if found == "ended":
                    waiting = waiting_rows(end)
                    return None if waiting is None else self._stage(end, waiting, is_final=True)
                if found != "waiting":
                    return self._stage(end, joined(waiting_rows(end), Listing.from_plain(found)))
                self.is_waiting = True
                if not is_told and is_taken() and self._listed is not None:
                    # Some of it may be listed for these words alone.
                    with suppress(ListingError):
                        words = waits_for(self._config, self._listed, end.span.until_ms)
                        is_told = True
                        self.on_wait(words)
                begin_s = time.monotonic() if is_taken() else math.inf
                if is_closed.wait(self._config.poll_s):
                    raise Closed
                self.waited_s += max(0.0, time.monotonic() - begin_s)
        finally:
            self.is_waiting = False

    def _found(self, span: Span | None, first: int) -> Any:
        assert span is not None
        if has_ended(self._config, span.until_ms):
            return "ended"
        return self._tries.of(lambda: self._next(span, first), self.on_late) or "waiting"

    def _next(self, span: Span, first: int) -> Any:
        """Lists what comes next, as JSON has it; tells of files that came too late."""
        paths = listed_anew(self._config)
        listing = next_span(self._config, paths, span.until_ms, first)
        self._listed = paths
        self._polls += 1
        if words := self._passed_over.new(paths):
            self.on_late(words)
        if listing is not None or self._polls % _LATE_POLLS == 0:
            late = self._late.found(paths)
            if late:
                self.on_late(words_of(late, self._late.num_files))
        if listing is None:
            # Windows without a file are in no span.
            return "waiting" if self._config.grows else "ended"
        self._late.add(listing)
        return listing.to_plain()

    def _stage(self, end: Position, listing: Listing, *, is_final: bool = False) -> Stage:
        streams = Streams(self._config, self._open_files, listing, self.first.schema)
        part = rows_of(streams)
        first = part.first_file
        start = in_next_span(end, listing.span, part.files)
        files = FileTags(start.files, WholeTags(streams), shows=True, first=first)
        return Stage(part, files, start, is_final)


def _behind(end: Position) -> int:
    """Number of the first file behind a span."""
    assert end.span is not None
    return end.span.first_file + len(end.files)


def waiting_rows(end: Position) -> Listing | None:
    """The windows at the end of a span from the first on in which a lane has rows left.

    Such rows wait for others to draw negatives from. None: there are none.

    Args:
      end: behind the span; lanes without such rows are behind its files.

    Raises:
      DataError: rows have waited over too many files.
    """
    assert end.span is not None
    number, first = 0, end.span.first_file
    waits = min(lane.cursor.file for lane in end.lanes)
    if waits >= _behind(end):
        return None
    while first + sum(end.span.windows[number].files) <= waits:
        first += sum(end.span.windows[number].files)
        number += 1
    files = end.files[first - end.span.first_file :]
    if len(files) > _MOST_WAITING_FILES:
        raise DataError(
            f"{files[waits - first].path}: rows wait since {len(files):,} files for others of "
            "their lane to draw negatives from, as all have one item, or a user has all items; "
            "take longer windows or fewer lanes, or set data.negatives.user: false"
        )
    span = Span(first, end.span.until_ms, end.span.windows[number:])
    return Listing(span, [resolve_path(tag.path)[1] for tag in files])


def joined(waiting: Listing | None, listing: Listing) -> Listing:
    """A span with windows of the one before it, in which rows wait."""
    if waiting is None:
        return listing
    windows = (*waiting.span.windows, *listing.span.windows)
    span = listing.span._replace(first_file=waiting.span.first_file, windows=windows)
    return Listing(span, [*waiting.paths, *listing.paths])


def in_next_span(end: Position, span: Span, paths: Sequence[str]) -> Position:
    """The beginning of a span.

    Args:
      end: behind the span before it.
      span: which may begin with windows of that one.
      paths: of all its files.
    """
    assert end.span is not None
    known = [
        tag._replace(path=path)
        for tag, path in zip(
            end.files[span.first_file - end.span.first_file :], paths, strict=False
        )
    ]
    return replace(
        end,
        block_row=0,
        lanes=tuple(LanePosition(cursor=lane.cursor) for lane in end.lanes),
        files=(*known, *(FileTag(path, -1, "") for path in paths[len(known) :])),
        span=span._replace(read=end.counts.read, begins=tuple(lane.cursor for lane in end.lanes)),
    )


def rows_of(streams: Streams) -> PartRows:
    """All rows of a span."""
    assert streams.span is not None
    return PartRows(streams, streams.extents(), streams.paths, first_file=streams.span.first_file)


def listing_of(config: StreamsSource, position: Position) -> Listing:
    """The span in which a position is, with the files that it had.

    Raises:
      DataError: it was read on behind the end that a stream has by now, or a file is gone.
    """
    assert position.span is not None
    left = iter(position.files)
    for window in position.span.windows:
        files = list(islice(left, sum(window.files)))
        if is_behind_end(config, window) and any(tag.is_begun for tag in files):
            stream = config.streams[window.stream]
            raise DataError(
                f"{files[0].path}: was begun, but stream {stream.name!r} ends at {stream.end!r}, "
                "before it; set a later end"
            )
    listing = Listing(position.span, [resolve_path(tag.path)[1] for tag in position.files])
    _check_present(config, listing, {tag.path for tag in position.files if tag.is_begun})
    return listing


def _check_present(config: StreamsSource, listing: Listing, begun: Collection[str]) -> None:
    """Raises DataError where a file is gone that the windows at hand had; names it."""
    of_sources: dict[str, list[str]] = defaultdict(list)
    for stream, _, parts in listed_windows(config, listing):
        for source, files in parts:
            of_sources[f"{stream.name}/{source.name}"] += files
    for name, stored in stored_paths(config).items():
        infos = stored.filesystem.get_file_info(of_sources[name])
        gone = next((info.path for info in infos if info.type == fs.FileType.NotFound), None)
        if gone is not None:
            what = "rows of it were read" if gone in begun else "it was still to be read"
            raise DataError(
                f"{gone}: removed, and {what} in the windows at hand; put it back (a copy will do) "
                "until the run has come to later windows, or train in a new run folder"
            )


def opened_spans(
    config: SourceConfig,
    open_files: Opener,
    after: Position | None,
    listing: Listing | None,
) -> Spans | None:
    """The windows of streams that grow, or grew while a run read them; None: of others.

    Raises:
      DataError: as `Spans` and `listing_of`; or the streams had an end when the run began.
    """
    if not isinstance(config, StreamsSource):
        return None
    if after is not None and after.span is not None:
        return Spans(config, open_files, listing_of(config, after))
    if not config.grows:
        return None
    if after is not None and after.files:
        raise DataError(
            "data.source.streams: a run that began with streams that end cannot go on with `end: "
            "now`; give them an end, or begin a new run, with training.init_from for what it learnt"
        )
    return Spans(config, open_files, listing)
