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
from penstock.data.windows.growing import Listing
from penstock.data.windows.spans import in_next_span, joined, waiting_rows
from penstock.position import FileTag, LanePosition, Position, Span, SpanWindow
from tests.world.oracle import BAGS

SCHEMA = pa.schema([
    ("label", pa.int64()),
    ("id", pa.int64()),
    ("one", pa.int64()),
    ("bag", pa.list_(pa.int64())),
    ("item", pa.int64()),
    ("user", pa.int64()),
])
_FIELDS = {
    "data": {"source": {"format": "parquet", "path": "-"}, "label": {"column": "label"}},
    "features": [{"columns": ["id"]}, {"columns": ["one"]}, {"columns": ["bag"]}],
}
_DRAWING = {
    "source": _FIELDS["data"]["source"],
    "numeric": [{"columns": ["item"]}],
    "negatives": {"per_positive": 2, "columns": ["item"], "user": "user"},
}
COLUMNS, DRAWING_COLUMNS = (
    resolve_columns(parse_job(fields), SCHEMA, "memory", "required")
    for fields in (_FIELDS, {**_FIELDS, "data": _DRAWING})
)
"""Without negatives, and with some."""
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
        ids, ones, bags, items, users, kept, bad = [], [], [], [], [], [], []
        num_items = int(rng.choice([1, 2, 30]))
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
            items.append(int(rng.integers(num_items)))
            users.append(int(rng.integers(0, 20)))
        malformed += len(bad)
        table = pa.table([[0] * len(ids), ids, ones, bags, items, users], schema=SCHEMA)
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

    is_waiting, waited_s = False, 0.0

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
        waiting = waiting_rows(end)
        if first < len(self._source.paths):
            return self._next(end, first, windows, waiting)
        return waiting and self._stage_of(end, waiting, is_final=True)

    def _next(self, end, first, windows, waiting=None):
        files = self._source.paths[first:]
        among = sorted({self._source.window(path) for path in files})[:windows]
        files = [path for path in files if self._source.window(path) in among]
        spans = [
            SpanWindow(0, one, one + 1, (sum(self._source.window(path) == one for path in files),))
            for one in among
        ]
        listing = Listing(Span(first, (among[-1] + 1,), tuple(spans)), files)
        return self._stage_of(end, joined(waiting, listing))

    def _stage_of(self, end, listing, *, is_final=False):
        first = listing.span.first_file
        files = self._source.paths[first : first + len(listing.paths)]
        # At the beginning nothing comes before.
        before = end if end.span else replace(end, span=Span(0, (0,), ()))
        start = in_next_span(before, listing.span, files)
        return self._stage(start, files, list(start.files), is_final=is_final)

    def _stage(self, start, files, tags, *, is_final=False):
        first = start.span.first_file
        extents = [one for one in self._source.extents() if one.path in set(files)]
        return Stage(
            PartRows(self._source, extents, files, first_file=first),
            FileTags(tags, WholeTags(self._source), shows=True, first=first),
            start,
            is_final,
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
    draws: bool
    """Whether negatives are drawn; then blocks are large, as few rows have none."""

    @property
    def samples_per_row(self):
        """With negatives."""
        return DRAWING_COLUMNS.negatives.samples_per_row if self.draws else 1

    @classmethod
    def drawn(cls, rng):
        """At random."""
        draws = bool(rng.random() < 0.4)
        grows = bool(rng.random() < 0.5)
        return cls(
            lanes=int(rng.integers(1, 9)),
            batch_size=int(rng.integers(3, 40)),
            block_rows=5000 if draws else int(rng.integers(1, 90)),
            block_bytes=2**40 if draws or rng.random() < 0.7 else int(rng.integers(200, 4000)),
            epochs=1 if grows else int(rng.integers(1, 3)),
            shuffled=bool(rng.random() < 0.7),
            prefetch=int(rng.integers(1, 5)),
            grows=grows,
            draws=draws,
        )

    def start(self):
        """The beginning."""
        return Position(lanes=(LanePosition(),) * self.lanes)

    def loader(self, data, seed, start, ranks=None, luck=None, ledger=None):
        """Reads the data from a position on, as `Dataset.batches` does.

        `luck`: a seed of which windows are there when somebody looks; None: all are. `ledger`: of
        what lanes take as they come to it; None: each has its own.
        """
        plan = LoaderPlan.of(
            self.batch_size,
            self.block_rows,
            seed,
            self.epochs,
            start,
            shuffled=self.shuffled,
            samples_per_row=self.samples_per_row,
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
            DRAWING_COLUMNS if self.draws else COLUMNS,
            replace(plan, block_bytes=self.block_bytes, joins_windows=self.draws),
            ReadAhead(self.prefetch, self.prefetch),
            quarantine=Quarantine(None),
            ranks=ranks,
            following=growing,
            ledger=ledger,
        )
