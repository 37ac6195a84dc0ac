"""Where in the input a run is: enough to go on bit for bit, on however many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class FileTag(NamedTuple):
    """Which file it is: its name is shown, its size and digest are compared.

    Neither time of change nor folder counts, as copying changes both.
    """

    path: str
    size: int
    """Bytes; -1 while no row of it was read."""
    digest: str
    """Of blocks at its front and end, see `penstock.data.identity`; empty while no row was read."""

    @property
    def is_begun(self) -> bool:
        """Whether the file was read from, so that it must stay as it is."""
        return bool(self.digest)


class Cursor(NamedTuple):
    """Where a reader goes on: between two rows of the input. Rows left out count, too."""

    file: int = 0
    """Number in `Position.files`."""
    start: int = 0
    """Where the extent (unit of reading) begins, in the unit of its source: rows, bytes, lines."""
    row: int = 0
    """Rows of the extent that lie before."""


class Piece(NamedTuple):
    """Rows [first, stop) of an extent, those that are left out among them."""

    file: int
    start: int
    """Of the extent, as in `Cursor`."""
    first: int
    stop: int


class LanePosition(NamedTuple):
    """Where one lane of the data is: its part of the block being delivered, and behind it."""

    pieces: tuple[Piece, ...] = ()
    """What its part of the block is made of, if the block was begun."""
    cursor: Cursor = Cursor()
    """Where its part of the next block begins."""
    samples: int = 0
    """Of its part of the block, if the block was begun."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        pieces = [list(piece) for piece in self.pieces]
        return {"pieces": pieces, "cursor": self.cursor._asdict(), "samples": self.samples}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LanePosition:
        """Inverse of `to_dict`."""
        pieces = tuple(Piece(*map(int, piece)) for piece in fields["pieces"])
        return cls(pieces, Cursor(**fields["cursor"]), int(fields["samples"]))


class Taken(NamedTuple):
    """Extents that were read to their end, where lanes take them as they come to them."""

    before: tuple[int, int] = (0, 0)
    """All that lie before it: number of a file, and where an extent starts there."""
    beyond: tuple[tuple[int, int], ...] = ()
    """And these."""


class Counts(NamedTuple):
    """Rows since the beginning of the run, in all epochs: read = filtered + quarantined + applied.

    Those that a block leaves out are counted with its first batch.
    """

    read: int = 0
    filtered: int = 0
    """Of another part, by their time; or, at the end of streams, without others to draw negatives
    from."""
    quarantined: int = 0
    """Malformed ones; each once an epoch, while the quarantine has it once."""
    applied: int = 0
    """Given to the model. Where negatives are drawn: samples over samples a row, rounded down."""


class SpanWindow(NamedTuple):
    """A window of event time and what it has; only windows with a file are in a span."""

    stream: int
    """Number among those of the job."""
    start_ms: int
    stop_ms: int
    files: tuple[int, ...]
    """Of each of the stream's sources, how many."""


class Span(NamedTuple):
    """The windows that a run reads at present whose streams grow; those before are behind it.

    So neither a position nor a listing grows with what was read.
    """

    first_file: int
    """Number of the first of `Position.files`: files of the windows before count, too."""
    until_ms: tuple[int, ...]
    """Of each stream, where the windows begin that come after these."""
    windows: tuple[SpanWindow, ...]
    """In the order of reading, which is that of `Position.files`."""
    read: int = 0
    """Rows that were read when it began, of `Counts`."""
    begins: tuple[Cursor, ...] = ()
    """Of each lane, where it began: in windows that were in the span before, too, if some lane had
    rows there that waited for others to draw negatives from. Empty: with the first file."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Span:
        """Inverse of `_asdict`, which JSON may have carried."""
        windows = [
            SpanWindow(int(one[0]), int(one[1]), int(one[2]), tuple(one[3]))
            for one in fields["windows"]
        ]
        first, read = int(fields["first_file"]), int(fields["read"])
        begins = tuple(Cursor(*map(int, one)) for one in fields.get("begins", ()))
        return cls(first, tuple(fields["until_ms"]), tuple(windows), read, begins)


@dataclass(frozen=True, slots=True)
class Position:
    """Where in the input the next unread sample lies; enough to continue a run bit for bit.

    A block is a run of rows that are shuffled together. One that was begun is finished as it was
    cut, whatever the size of batches and blocks is by then.
    """

    epoch: int = 0
    block: int = 0
    """Number within the epoch of the block being delivered, or of the next one."""
    block_row: int = 0
    """Samples of the block already delivered."""
    lanes: tuple[LanePosition, ...] = ()
    """Of each part into which the data is divided; empty where nothing was read yet, so that any
    number of them may begin."""
    samples: int = 0
    """Samples delivered since the beginning of the run."""
    counts: Counts = Counts()
    files: tuple[FileTag, ...] = ()
    """Of the part, in the order of reading."""
    divided: int = 0
    """Number of files, the first ones, of which a fraction is held out; 0: no split by fraction."""
    span: Span | None = None
    """Where streams grow, the windows of `files`; None: `files` are all that there are."""
    taken: Taken | None = None
    """Where lanes take extents as they come to them: those of the epoch that were taken to their
    end. The rest of one at whose row a lane's cursor is belongs to that lane, others to nobody."""
    version_1: tuple[int, int, int] | None = None
    """Of a checkpoint of version 1, which knows no files: number of the extent in which the block
    begins, good rows of it before the block, and rows of the block unless it is the last one.
    """

    @property
    def block_size(self) -> int:
        """Samples of the block, if it was begun."""
        return sum(lane.samples for lane in self.lanes)

    @property
    def is_in_block(self) -> bool:
        """Whether the block was begun."""
        return any(lane.pieces for lane in self.lanes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a manifest."""
        return {
            **asdict(self),
            "lanes": [lane.to_dict() for lane in self.lanes],
            "counts": self.counts._asdict(),
            "files": [list(tag) for tag in self.files],
            "span": None if self.span is None else self.span._asdict(),
            "taken": None if self.taken is None else list(self.taken),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Position:
        """Inverse of `to_dict`."""
        before, span, taken = fields["version_1"], fields.get("span"), fields.get("taken")
        return cls(**{
            **fields,
            "lanes": tuple(map(LanePosition.from_dict, fields["lanes"])),
            "counts": Counts(**fields["counts"]),
            "files": tuple(FileTag(str(p), int(size), str(d)) for p, size, d in fields["files"]),
            "span": None if span is None else Span.from_dict(span),
            "taken": None if taken is None else Taken(tuple(taken[0]), tuple(map(tuple, taken[1]))),
            "version_1": None if before is None else (before[0], before[1], before[2]),
        })
