"""Random data in memory, as files of extents and chunks; some rows are no samples."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from penstock.config import parse_job
from penstock.data.batches.blocks import FileTags
from penstock.data.batches.loader import Loader, ReadAhead
from penstock.data.batches.loader_plan import LoaderPlan
from penstock.data.batches.stage import Stage
from penstock.data.columns.schema import resolve_columns
from penstock.data.identity import WholeTags
from penstock.data.plan.parts import PartRows
from penstock.data.quarantine import MalformedRow, Quarantine
from penstock.data.source import Chunk, Extent, KeptPlace, RowPlace
from penstock.types import Cursor, FileTag, LanePosition, Position, Span, SpanWindow
from tests.world.oracle import BAGS

SCHEMA = pa.schema([
    ("label", pa.int64()),
    ("id", pa.int64()),
    ("one", pa.int64()),
    ("bag", pa.list_(pa.int64())),
])
_JOB = parse_job({
    "data": {"source": {"format": "parquet", "path": "-"}, "label": {"column": "label"}},
    "features": [{"columns": ["id"]}, {"columns": ["one"]}, {"columns": ["bag"]}],
})
COLUMNS = resolve_columns(_JOB, SCHEMA, "memory", "required")
_EDGES = np.array([2**63 - 1, -(2**63), 0, -1])


class MemorySource:
    """What a loader asks of a `Source`."""

    schema = SCHEMA

    def __init__(self, files, *, windows, grows):
        self.paths = list(files)
        self.files = files
        """Chunks by path and extent."""
        self._windows = dict(zip(files, windows, strict=True))
        self._grows = grows

    def extents(self):
        """Numbered within their file."""
        return [Extent(path, n, n + 1) for path in self.paths for n in range(len(self.files[path]))]

    def read(self, extent, columns):
        """The chunks of an extent."""
        for chunk in self.files[extent.path][extent.start]:
            yield chunk._replace(table=chunk.table.select(columns))

    def identify(self, path, until=0):
        """As of a file that never changes."""
        return FileTag(path, 1 + self.paths.index(path), path)

    def window(self, path):
        """Of event time."""
        return self._windows[path]

    def may_grow(self, path):
        """Whether a position at the end of a file waits for more rows of it."""
        return self._grows


class Data(NamedTuple):
    """What a schedule reads."""

    source: MemorySource
    samples: dict
    """Key of `one` and keys of `bag`, by id."""
    malformed: int
    of_windows: list
    """Samples of each window of event time."""


def drawn(rng, pooling):
    """Files with extents of unlike sizes, empty ones among them, of bags that are pooled so."""
    span = int(rng.choice([2, 9, 40]))
    most_rows = int(rng.choice([3, 12, 30]))
    samples, files, malformed = {}, {}, 0

    def key():
        return int(rng.choice(_EDGES) if rng.random() < 0.2 else rng.integers(-span, span))

    def chunk(path, first):
        nonlocal malformed
        ids, ones, bags, kept, bad = [], [], [], [], []
        read = int(rng.integers(0, most_rows)) * (rng.random() < 0.9)
        leaves_out = rng.random() < 0.3
        for row in range(read):
            if leaves_out and rng.random() < 0.3:
                if rng.random() < 0.5:
                    bad.append(row)
                continue
            number = len(samples)
            bag = [key() for _ in range(rng.integers(0, BAGS[pooling] + 1))]
            samples[number] = key(), bag
            kept.append(row)
            ids.append(number)
            ones.append(samples[number][0])
            bags.append(bag)
        malformed += len(bad)
        table = pa.table([[0] * len(ids), ids, ones, bags], schema=SCHEMA)
        place = RowPlace(path, first)
        if len(kept) == read:
            return Chunk(table, place)
        rows = np.array(kept, np.int64)
        wrong = [MalformedRow(row, "no row", "?") for row in bad]
        lines = [first + row + 1 for row in bad]
        return Chunk(table, KeptPlace(place, rows), read, rows, wrong, lines)

    while not samples:
        files, malformed = {}, 0
        for number in range(int(rng.integers(1, 5))):
            path, first, extents = f"file-{number}", 0, []
            for _ in range(int(rng.integers(1, 4))):
                chunks = []
                for _ in range(int(rng.integers(1, 3))):
                    chunks.append(chunk(path, first))
                    first += chunks[-1].num_read
                extents.append(chunks)
            files[path] = extents
    grows = bool(rng.random() < 0.5)
    windows = np.cumsum(rng.integers(0, 1 + int(rng.integers(0, 4)), len(files))).tolist()
    of_windows = dict.fromkeys(windows, 0)
    for window, extents in zip(windows, files.values(), strict=True):
        of_windows[window] += sum(one.table.num_rows for chunks in extents for one in chunks)
    source = MemorySource(files, windows=windows, grows=grows)
    return Data(source, samples, malformed, list(of_windows.values()))


class Growing:
    """What comes behind a span: as many windows as the first rank says."""

    is_waiting = False

    def __init__(self, source, seed):
        self._source, self._rng = source, np.random.default_rng(seed)

    def stage(self, start):
        """The span of a position; of none, that with which a run begins."""
        if start.span is None:
            # As every rank draws it.
            return self._next(start, 0, int(self._rng.integers(1, 4)))
        files = [tag.path for tag in start.files]
        return self._stage(start, files, list(start.files))

    def after(self, end, from_first, is_closed, is_taken):
        """See `Following`."""
        first = end.span.first_file + len(end.files)
        windows = from_first(lambda: int(self._rng.integers(1, 4)))
        if first == len(self._source.paths):
            return None
        return self._next(end, first, windows)

    def _next(self, end, first, windows):
        files = self._source.paths[first:]
        among = sorted({self._source.window(path) for path in files})[:windows]
        files = [path for path in files if self._source.window(path) in among]
        spans = [
            SpanWindow(0, one, one + 1, (sum(self._source.window(path) == one for path in files),))
            for one in among
        ]
        tags = [FileTag(path, -1, "") for path in files]
        start = replace(
            end,
            block_row=0,
            lanes=tuple(LanePosition(cursor=Cursor(first)) for _ in end.lanes),
            files=tuple(tags),
            span=Span(first, (among[-1] + 1,), tuple(spans)),
        )
        return self._stage(start, files, tags)

    def _stage(self, start, files, tags):
        first = start.span.first_file
        extents = [one for one in self._source.extents() if one.path in set(files)]
        return Stage(
            PartRows(self._source, extents, files, first_file=first),
            FileTags(tags, WholeTags(self._source), shows=True, first=first),
            start,
        )


class Reading(NamedTuple):
    """How a schedule reads its data."""

    lanes: int
    batch_size: int
    block_rows: int
    block_bytes: int
    epochs: int
    shuffled: bool
    prefetch: int
    grows: bool
    """Whether windows appear while they are read."""

    @classmethod
    def drawn(cls, rng):
        """At random."""
        grows = bool(rng.random() < 0.5)
        return cls(
            lanes=int(rng.integers(1, 9)),
            batch_size=int(rng.integers(3, 40)),
            block_rows=int(rng.integers(1, 90)),
            block_bytes=int(rng.integers(200, 4000)) if rng.random() < 0.3 else 2**40,
            epochs=1 if grows else int(rng.integers(1, 3)),
            shuffled=bool(rng.random() < 0.7),
            prefetch=int(rng.integers(1, 5)),
            grows=grows,
        )

    def start(self):
        """The beginning."""
        return Position(lanes=(LanePosition(),) * self.lanes)

    def loader(self, data, seed, start, ranks=None, luck=None):
        """Reads the data from a position on, as `Dataset.batches` does.

        `luck`: a seed of which windows are there when somebody looks; None: all are.
        """
        plan = LoaderPlan.of(
            self.batch_size, self.block_rows, seed, self.epochs, start, shuffled=self.shuffled
        )
        source = data.source
        begun = [tag for tag in start.files if tag.is_begun]
        unread = [FileTag(path, -1, "") for path in source.paths]
        growing = None if luck is None or not self.grows else Growing(source, luck)
        stage = Stage(
            PartRows(source, source.extents(), source.paths),
            FileTags(begun + unread[len(begun) :], WholeTags(source), shows=True),
            start,
        )
        return Loader(
            stage if growing is None else growing.stage(start),
            COLUMNS,
            replace(plan, block_bytes=self.block_bytes),
            ReadAhead(self.prefetch, self.prefetch),
            quarantine=Quarantine(None),
            ranks=ranks,
            following=growing,
        )
