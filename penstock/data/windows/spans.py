"""Opens the windows of streams that grow, span after span, while a run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from penstock.config.streams import StreamsSource
from penstock.data.batches.blocks import FileTags
from penstock.data.batches.channel import Closed
from penstock.data.batches.stage import Stage
from penstock.data.files import resolve_path
from penstock.data.identity import WholeTags
from penstock.data.plan.parts import PartRows
from penstock.data.windows.graph import StoredPaths
from penstock.data.windows.growing import (
    Listing,
    has_ended,
    is_behind_end,
    next_span,
    waits_for,
)
from penstock.data.windows.late import LateFiles, words_of
from penstock.data.windows.served import Opener, Streams, complete_now
from penstock.data.windows.stored import listed_anew
from penstock.errors import DataError
from penstock.types import Cursor, FileTag, LanePosition, Position, Span

_LATE_POLLS = 30
"""While nothing comes, folders that were read are listed again after so many polls."""


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
        self.is_waiting = False
        self.on_wait: Callable[[str], None] = lambda words: None
        """Told, from a thread of the loader, what it waits for, each time that it begins to."""
        self.on_late: Callable[[str], None] = lambda words: None
        """Told, from a thread of the first rank's loader, which files came too late to be read."""
        self._late = LateFiles(config)
        self._late.add(listing)
        self._polls = 0
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
        first, is_told = end.span.first_file + len(end.files), False
        try:
            while True:
                found = from_first(lambda: self._found(end.span, first))
                if found == "ended":
                    return None
                if found != "waiting":
                    return self._stage(end, Listing.from_plain(found))
                self.is_waiting = True
                if not is_told and is_taken() and self._listed is not None:
                    is_told = True
                    self.on_wait(waits_for(self._config, self._listed, end.span.until_ms))
                if is_closed.wait(self._config.poll_s):
                    raise Closed
        finally:
            self.is_waiting = False

    def _found(self, span: Span | None, first: int) -> Any:
        assert span is not None
        if has_ended(self._config, span.until_ms):
            return "ended"
        paths = listed_anew(self._config)
        self._listed = paths
        listing = next_span(self._config, paths, span.until_ms, first)
        self._polls += 1
        if listing is not None or self._polls % _LATE_POLLS == 0:
            late = self._late.found(paths)
            if late:
                self.on_late(words_of(late, self._late.num_files))
        if listing is None:
            return "waiting"
        self._late.add(listing)
        return listing.to_plain()

    def _stage(self, end: Position, listing: Listing) -> Stage:
        streams = Streams(self._config, self._open_files, listing, self.first.schema)
        part = rows_of(streams)
        tags = [FileTag(path, -1, "") for path in part.files]
        first = part.first_file
        start = replace(
            end,
            block_row=0,
            lanes=tuple(LanePosition(cursor=Cursor(first)) for _ in end.lanes),
            files=tuple(tags),
            span=listing.span._replace(read=end.counts.read),
        )
        files = FileTags(tags, WholeTags(streams), shows=True, first=first)
        return Stage(part, files, start)


def rows_of(streams: Streams) -> PartRows:
    """All rows of a span."""
    assert streams.span is not None
    return PartRows(streams, streams.extents(), streams.paths, first_file=streams.span.first_file)


def listing_of(config: StreamsSource, position: Position) -> Listing:
    """The span in which a position is, with the files that it had.

    Raises:
      DataError: it was read on behind the end that a stream has by now.
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
    return Listing(position.span, [resolve_path(tag.path)[1] for tag in position.files])
