"""A click log made by a known teacher, so that the best reachable AUC is known.

The teacher is logistic: an effect per key, which fades for rare keys, products of the tastes of
neighbouring features, and linear effects of the numbers. Row r is a pure function of (seed, r).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import csv

from penstock.config import SyntheticSource
from penstock.data.output import whole_file
from penstock.data.source import Chunk, Extent, RowCount, RowPlace
from penstock.position import FileTag

# FORMAT: all constants below decide what row r of a seed is; never change.
BLOCK_ROWS = 16_384
EXTENT_ROWS = 4 * BLOCK_ROWS
FIRST_TIME_MS = 1_767_225_600_000
"""2026-01-01T00:00:00Z."""
MS_PER_ROW = 1_000
_HEAD_RANKS = 65_536
_BIAS = -2.0
_KEY_EFFECT = 0.9
_PAIR_EFFECT = 0.4
_NUMBER_EFFECT = 0.8
_FADE_RANK = 4.0
"""Rank at which a key's effect has fallen to half: what a rare key teaches is noise."""

_KEY_SALT, _EFFECT_SALT, _TASTE_SALT = 1, 2, 3


class SyntheticRows:
    """Source of rows made from numbers. An `Extent` is [start, stop) in rows."""

    def __init__(self, config: SyntheticSource) -> None:
        self._config = config
        self.paths: Sequence[str] = (f"synthetic(seed={config.seed})",)
        self.num_groups: int | None = None
        self._head = _cumulative_weights(config.exponent, min(config.keys_per_feature, _HEAD_RANKS))
        self._tail = _tail_weight(config.exponent, self._head.size, config.keys_per_feature)
        self.schema = pa.schema(
            [("click", pa.int8()), ("event_time", pa.int64())]
            + [(f"n{number}", pa.float32()) for number in range(config.num_numeric)]
            + [(f"c{number}", pa.int64()) for number in range(config.num_categorical)]
            + [("teacher", pa.float32())]
        )

    def extents(self) -> Sequence[Extent]:
        """All extents, in the order of reading."""
        rows = self._config.rows
        return [
            Extent(self.paths[0], start, min(start + EXTENT_ROWS, rows))
            for start in range(0, rows, EXTENT_ROWS)
        ]

    def count_rows(self, extent: Extent) -> int:
        """Rows of the extent."""
        return extent.stop - extent.start

    def known_rows(self, extent: Extent) -> int:
        """Rows of the extent."""
        return self.count_rows(extent)

    def row_counts(self, extent: Extent) -> Iterator[int]:
        """Rows of the extent, at once."""
        yield self.count_rows(extent)

    def expected_rows(self, extents: Sequence[Extent]) -> RowCount:
        """Rows of the extents."""
        return RowCount(sum(map(self.count_rows, extents)), is_exact=True)

    def cut(self, extent: Extent, row: int) -> tuple[Extent, Extent]:
        """Cuts an extent before its row `row`."""
        middle = extent.start + row
        return Extent(extent.path, extent.start, middle), Extent(extent.path, middle, extent.stop)

    def read(self, extent: Extent, columns: Sequence[str]) -> Iterator[Chunk]:
        """Makes the rows of an extent in order."""
        for block in range(extent.start // BLOCK_ROWS, -(-extent.stop // BLOCK_ROWS)):
            first = block * BLOCK_ROWS
            start, stop = max(extent.start, first), min(extent.stop, first + BLOCK_ROWS)
            rows = self.block(block).slice(start - first, stop - start)
            yield Chunk(rows.select(list(columns)), RowPlace(extent.path, start))

    def may_hold(self, extent: Extent, column: str, low: int | None, high: int | None) -> bool:
        """Event times increase with the row."""
        if column != "event_time":
            return True
        first = FIRST_TIME_MS + extent.start * MS_PER_ROW
        last = FIRST_TIME_MS + extent.stop * MS_PER_ROW
        return (high is None or first < high) and (low is None or last > low)

    def identify(self, path: str, until: int = 0) -> FileTag:
        """The job says what the rows are, so nothing else can change them."""
        return FileTag(path, 0, "synthetic")

    def holds(self, path: str, before: FileTag) -> bool:
        """Whether the rows of before were made, too."""
        return before.digest == self.identify(path).digest

    def window(self, path: str) -> int:
        """There is one."""
        return 0

    def may_grow(self, path: str) -> bool:
        """It may not."""
        return False

    def block(self, block: int) -> pa.Table:
        """Makes rows [block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS) with all columns."""
        config = self._config
        seed = np.uint64(config.seed & (2**64 - 1))
        # random_raw, unlike the distributions of numpy, never changes between versions.
        philox = np.random.Philox(key=np.array([seed, block], dtype=np.uint64))
        per_row = config.num_categorical + 2 * config.num_numeric + 2
        raw = philox.random_raw(per_row * BLOCK_ROWS).reshape(per_row, BLOCK_ROWS)
        uniform = (raw >> np.uint64(11)) * 2.0**-53
        logit = np.full(BLOCK_ROWS, _BIAS)
        columns: dict[str, NDArray[np.generic]] = {}
        tastes = []
        for number in range(config.num_categorical):
            rank = self._ranks(uniform[number])
            key = _mix(seed, number, rank, _KEY_SALT)
            fade = 1.0 / (1.0 + rank / _FADE_RANK)
            logit += _KEY_EFFECT * fade * _bell(_mix(seed, number, rank, _EFFECT_SALT))
            tastes.append(fade * _bell(_mix(seed, number, rank, _TASTE_SALT)))
            columns[f"c{number}"] = key.view(np.int64)
        for left, right in zip(tastes[0:4:2], tastes[1:4:2], strict=False):
            logit += _PAIR_EFFECT * left * right
        rest = uniform[config.num_categorical :]
        for number in range(config.num_numeric):
            # Box-Muller; 1 - u lies in (0, 1].
            radius = np.sqrt(-2.0 * np.log1p(-rest[2 * number]))
            value = (radius * np.cos(2.0 * np.pi * rest[2 * number + 1])).astype(np.float32)
            logit += _NUMBER_EFFECT / (1 + number) * (-1) ** number * value
            columns[f"n{number}"] = value
        probability = 1.0 / (1.0 + np.exp(-logit))
        row = np.arange(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        columns["click"] = (rest[-1] < probability).astype(np.int8)
        # Within its own millisecond range, so that times increase.
        columns["event_time"] = (
            FIRST_TIME_MS + row * MS_PER_ROW + (rest[-2] * MS_PER_ROW).astype(np.int64)
        )
        columns["teacher"] = probability.astype(np.float32)
        return pa.table({name: columns[name] for name in self.schema.names}, schema=self.schema)

    def _ranks(self, uniform: NDArray[np.float64]) -> NDArray[np.uint64]:
        """Ranks (from 1) with weight rank ** -exponent; exact for the head, smooth in the tail."""
        head, exponent = self._head, self._config.exponent
        point = uniform * (head[-1] + self._tail)
        rank = np.searchsorted(head, point, side="right") + 1
        tail = point >= head[-1]
        if self._tail and tail.any():
            # Inverts the integral of x ** -exponent from head.size + 1/2.
            low = head.size + 0.5
            part = point[tail] - head[-1]
            if exponent == 1.0:
                x = low * np.exp(part)
            else:
                x = (low ** (1 - exponent) + (1 - exponent) * part) ** (1 / (1 - exponent))
            rank[tail] = np.minimum(np.rint(x), self._config.keys_per_feature)
        ranks: NDArray[np.uint64] = np.minimum(rank, self._config.keys_per_feature).astype(
            np.uint64
        )
        return ranks


def write_synthetic(
    config: SyntheticSource,
    path: Path,
    format: Literal["parquet", "csv", "tsv"],
    progress: Callable[[int], None] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes the rows to one file, an extent at a time.

    Args:
      config: what to make.
      path: file to write; it appears when it is complete.
      format: csv and tsv begin with a header.
      progress: called with the number of rows written so far.
      overwrite: whether the file may exist.

    Raises:
      ConfigError: the file exists or cannot be written.
    """
    source = SyntheticRows(config)
    with (
        whole_file(path, overwrite=overwrite) as part,
        _open_writer(part, source.schema, format) as writer,
    ):
        for extent in source.extents():
            chunks = source.read(extent, source.schema.names)
            writer.write_table(pa.concat_tables(chunk.table for chunk in chunks))
            if progress is not None:
                progress(extent.stop)


@contextmanager
def _open_writer(
    path: Path, schema: pa.Schema, format: str
) -> Iterator[pq.ParquetWriter | csv.CSVWriter]:
    if format == "parquet":
        with pq.ParquetWriter(path, schema) as writer:
            yield writer
        return
    delimiter = "\t" if format == "tsv" else ","
    # pyarrow would quote the names in the header, whatever the quoting style.
    options = csv.WriteOptions(include_header=False, delimiter=delimiter, quoting_style="none")
    with path.open("wb") as file:
        file.write(delimiter.join(schema.names).encode() + b"\n")
        with csv.CSVWriter(file, schema, write_options=options) as writer:
            yield writer


def _cumulative_weights(exponent: float, ranks: int) -> NDArray[np.float64]:
    return np.cumsum(np.arange(1, ranks + 1, dtype=np.float64) ** -exponent)


def _tail_weight(exponent: float, head: int, ranks: int) -> float:
    low, high = head + 0.5, ranks + 0.5
    if ranks <= head:
        return 0.0
    if exponent == 1.0:
        return float(np.log(high / low))
    return float((high ** (1 - exponent) - low ** (1 - exponent)) / (1 - exponent))


def _mix(seed: np.uint64, feature: int, rank: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """A random-looking 64-bit number for (seed, feature, rank, salt): two rounds of splitmix64."""
    start = (int(seed) * 0x9E3779B97F4A7C15 + (feature << 8 | salt) * 0xD1B54A32D192ED03) & (
        2**64 - 1
    )
    return _splitmix(_splitmix(rank ^ np.uint64(start)) + np.uint64(start))


def _splitmix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _bell(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Roughly normal numbers (mean 0, std 1) from 64 bits: a sum of four 16-bit uniforms."""
    parts = bits.view(np.uint16).reshape(-1, 4)
    bell: NDArray[np.float64] = (parts.sum(axis=1) / 65536.0 - 2.0 + 2.0 / 65536.0) * np.sqrt(3.0)
    return bell
