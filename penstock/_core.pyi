"""The C++ core (csrc/bindings/bindings.cc). Arrays are C-contiguous numpy arrays."""

import enum
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

version: str
"""Of the package that the core was built for."""
built_from: str
"""See `built_core.digest`."""

class Status(enum.Enum):
    OK = 0
    OUT_OF_MEMORY = 1
    NO_WORKING_MEMORY = 2
    NO_THREADS = 3
    HALF_UPDATED = 4
    TOO_MANY_ROWS = 5
    STALE_CURSOR = 6
    BAD_OFFSETS = 7
    BAD_WEIGHTS = 8
    BAG_TOO_LONG = 9
    OVER_BUDGET = 11

class BufferPool:
    def take_rows(self, rows: int, columns: int) -> NDArray[np.float32] | None: ...

def buffer_pool() -> BufferPool: ...

class PoolingPlan:
    def __init__(
        self,
        packed_feature: Sequence[int],
        table: Sequence[int],
        pooling: Sequence[int],
        max_keys: Sequence[int],
        column: Sequence[int],
        stride: int,
    ) -> None: ...
    @staticmethod
    def by_key(tables: int, dim: int) -> PoolingPlan: ...

class Lookup:
    def __init__(self) -> None: ...
    @property
    def num_missing(self) -> int: ...
    @property
    def is_applied(self) -> bool: ...
    def reads_default(self, reads: NDArray[np.bool_]) -> None: ...

class RetentionPolicy:
    """Rules of one table; the arguments are those of `retention.policy_of`."""

    def __init__(self, **rules: float) -> None: ...

def grouped_keys(
    keys: NDArray[np.int64], groups: NDArray[np.int64], num_groups: int, once: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Keys [n] by group: those that differ (without `once` all), group sizes, numbers by place."""

class NumberedBags:
    """Bags of rows by number: copies, checked once; ValueError says what does not fit."""

    def __init__(
        self,
        plan: PoolingPlan,
        offsets: NDArray[np.int64],
        weights: NDArray[np.float32] | None,
        batch_size: int,
        numbers: NDArray[np.uint32],
        rows: int,
        dim: int,
    ) -> None: ...

class BagSums:
    def __init__(self, dim: int, num_threads: int) -> None: ...
    def pool(
        self, bags: NumberedBags, rows: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None: ...
    def sum(
        self, bags: NumberedBags, grad: NDArray[np.float32], sums: NDArray[np.float32]
    ) -> None: ...
    def split_bags(
        self,
        plan: PoolingPlan,
        keys: NDArray[np.int64],
        offsets: NDArray[np.int64],
        weights: NDArray[np.float32] | None,
        batch_size: int,
        words: NDArray[np.int64],
        of_bucket: NDArray[np.int64],
        of_table: NDArray[np.int64],
        places: NDArray[np.int64],
        num_ranks: int,
        rank: int,
    ) -> tuple[
        NDArray[np.int64],
        NDArray[np.int64],
        NDArray[np.float32],
        NDArray[np.uint8],
        NDArray[np.int64],
        int,
        int,
        NDArray[np.float32],
    ]:
        """The fields of `BagParts`: own keys, offsets and weights, message, counts, and so on."""

class HostStore:
    def __init__(
        self,
        *,
        dim: int,
        value_type: int,
        state_dim: int,
        usage_dim: int,
        optimizer: int,
        tables: Sequence[tuple[int, float, float, int, RetentionPolicy]],
        num_threads: int,
        max_bytes: int,
        most_isa: str,
        scan_from: int,
    ) -> None: ...
    def pooled_lookup(
        self,
        plan: PoolingPlan,
        keys: NDArray[np.int64],
        offsets: NDArray[np.int64],
        weights: NDArray[np.float32] | None,
        batch_size: int,
        insert: bool,
        out: NDArray[np.float32],
        lookup: Lookup,
    ) -> Status: ...
    def look_up_keys(
        self,
        keys: NDArray[np.int64],
        offsets: NDArray[np.int64],
        insert: bool,
        out: NDArray[np.float32],
        lookup: Lookup,
    ) -> Status: ...
    def apply_gradients(
        self,
        plan: PoolingPlan,
        gradients: Sequence[tuple[Lookup, NDArray[np.float32]]],
        hypers: NDArray[np.float32],
        step: int,
        is_order_free: bool,
        default_sums: NDArray[np.float32] | None,
        touched: NDArray[np.bool_] | None,
    ) -> tuple[Status, int]: ...
    def read_looked_up(self, lookup: Lookup, vectors: NDArray[np.float32]) -> Status: ...
    def gradient_norm(
        self,
        plan: PoolingPlan,
        gradients: Sequence[tuple[Lookup, NDArray[np.float32]]],
        order: float,
        is_order_free: bool,
    ) -> tuple[Status, float]: ...
    def find(
        self,
        table: int,
        keys: NDArray[np.int64],
        insert: bool,
        values: NDArray[np.float32],
        state: NDArray[np.float32],
        found: NDArray[np.bool_],
    ) -> Status: ...
    def insert_or_assign(
        self,
        table: int,
        keys: NDArray[np.int64],
        values: NDArray[np.float32] | NDArray[np.int16],
        state: NDArray[np.float32],
        usage: NDArray[np.int64] | None,
    ) -> tuple[Status, int]: ...
    def erase(self, table: int, keys: NDArray[np.int64]) -> tuple[Status, int]: ...
    def export_batch(
        self,
        table: int,
        cursor: int,
        version: int,
        keys: NDArray[np.int64],
        values: NDArray[np.float32] | NDArray[np.int16],
        state: NDArray[np.float32],
        usage: NDArray[np.int64],
    ) -> tuple[Status, int, int]: ...
    def advance(self, step: int, seconds: int) -> Status: ...
    def num_candidates(self, table: int) -> int: ...
    def export_candidates(
        self,
        table: int,
        cursor: int,
        version: int,
        keys: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> tuple[Status, int, int]: ...
    def import_candidates(
        self, table: int, keys: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> Status: ...
    def counters(
        self,
        rows: NDArray[np.int64],
        candidates: NDArray[np.int64],
        numbers: NDArray[np.int64],
    ) -> None: ...
    def retention(
        self,
        table: int,
        value: NDArray[np.float32],
        state: NDArray[np.float32],
        numbers: NDArray[np.int64],
    ) -> None: ...
    def set_retention(
        self,
        table: int,
        value: NDArray[np.float32],
        state: NDArray[np.float32],
        numbers: NDArray[np.int64],
    ) -> None: ...
    def num_rows(self, table: int) -> int: ...
    def longest_probe(self) -> int: ...
    def row_slots(self, table: int, slots: NDArray[np.uint32]) -> None:
        """Where the table's rows are: slots [num_rows] uint32, in the order of the index."""

    def check_invariants(self) -> str: ...
    def memory(self) -> tuple[int, int, int, int, int]: ...
    @property
    def content_version(self) -> int: ...
    @property
    def isa(self) -> str: ...

def keep_freed_memory() -> None:
    """Keeps up to half a gigabyte of freed memory in this process, for its next large arrays.

    A tensor of some megabytes that is made anew in every step otherwise costs its page faults each
    time. With C libraries that cannot, nothing happens.
    """

def xxh64(data: bytes, seed: int = 0) -> int:
    """XXH64 of `data`, unsigned."""

def hash_strings(
    offsets: NDArray[np.int32] | NDArray[np.int64],
    bytes: NDArray[np.uint8],
    seed: int = 0,
    buckets: int = 0,
) -> NDArray[np.int64]:
    """XXH64 of the strings `bytes[offsets[i]:offsets[i + 1]]`, modulo `buckets` unless it is 0."""

def hash_integers(
    values: NDArray[np.int64] | NDArray[np.uint64], seed: int = 0, buckets: int = 0
) -> NDArray[np.int64]:
    """XXH64 of the decimal text of each value, modulo `buckets` unless it is 0."""

def cross_keys(
    keys: NDArray[np.int64],
    valid: NDArray[np.uint8] | None,
    first_bit: int,
    hashes: NDArray[np.uint64],
) -> None:
    """Replaces each of `hashes` [n] by XXH64 of the 8 bytes of its key, with the hash as seed.

    Of no bytes where bit `first_bit + i` of `valid` is not set.
    """

def parse_hex(
    offsets: NDArray[np.int32] | NDArray[np.int64], bytes: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], int]:
    """Keys of 1 to 16 hexadecimal digits, and the index of the first bad string (-1: none)."""

class JaggedBlock:
    """The jagged columns of a block of rows that lies in several chunks; copies none of them."""

    def __init__(
        self,
        columns: Sequence[
            tuple[NDArray[np.int64], NDArray[np.int64] | None, NDArray[np.float32] | None]
        ],
        starts: Sequence[int],
        stops: Sequence[int],
    ) -> None:
        """Joins rows [starts[p], stops[p]) of the chunks p, in order.

        Args:
          columns: [parts * features], part by part, of each feature: values, offsets [rows + 1]
            (None: one key a row) and a weight for each value (None, then in every part: 1). They
            must not change while the block lives.
          starts: [parts]
          stops: [parts]
        """

    def locate(self, rows: NDArray[np.int64]) -> Places:
        """Finds the rows of those numbers.

        Raises:
          IndexError: a row lies outside the block.
        """

    def locate_run(self, first: int, rows: int) -> Places:
        """As `locate`, of `rows` rows from `first` on; copying them is faster."""

    def cut(
        self,
        places: Places,
        batch: int,
        others: Places | None = None,
        of_others: Sequence[bool] = (),
    ) -> tuple[
        NDArray[np.int64],
        NDArray[np.int64] | None,
        NDArray[np.int64] | None,
        NDArray[np.float32] | None,
    ]:
        """Copies the bags of n rows into batches of `batch` rows (the last may be short).

        Args:
          places: of the n rows, found by this block.
          batch: rows of a batch.
          others: of n rows from which features are taken instead; None: none are.
          of_others: [features] which ones; with `others` alone.

        Returns:
          values: of each batch packed feature by feature, batch after batch.
          offsets: of each batch, from 0, [features * its rows + 1], batch after batch; None, as is
            the next: every bag has one key.
          starts: [batches + 1] where the values of each batch begin.
          weights: by value; None: no column has weights.
        """

    def take(self, places: Places, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Copies n rows of a plain array that lies in the same chunks.

        Args:
          places: of the n rows, found by this block.
          parts: of each chunk its array, with at least the rows up to `stops[p]`; 4 bytes an
            element, or a multiple of them.

        Returns:
          [n, ...]
        """

class Places:
    """Rows of a block, in the order wanted; of use to that block alone."""

    def __len__(self) -> int: ...

def fill_missing(
    values: NDArray[np.int64], valid: NDArray[np.uint8], first_bit: int, missing: int
) -> NDArray[np.int64]:
    """`values` [n], but `missing` where bit `first_bit + i` of `valid` is not set."""

class NumberPlan:
    """What is done to numbers: a fill for missing ones (None: an error), then steps in order."""

    def __init__(self, fill: float | None, steps: Sequence[tuple[int, float, float]]) -> None:
        """Steps are (0, _, _) log, (1, low, high) clip, (2, offset, factor) scale."""

_Numbers: TypeAlias = NDArray[np.int32] | NDArray[np.int64] | NDArray[np.float32 | np.float64]

def transform_numbers(
    columns: Sequence[tuple[_Numbers, NDArray[np.uint8] | None, int, NumberPlan, int]], rows: int
) -> tuple[NDArray[np.float32], int, int]:
    """Fills, transforms in float64 and joins columns of numbers.

    Args:
      columns: values [rows]; bits, from the next number on, of those that are not null (None: all);
        the number of row 0's bit; what is done; the column of the result, each once. Null and NaN
        are missing.
      rows: how many.

    Returns:
      out: [rows, len(columns)]
      column: the first of `columns` with a number that is missing without a fill, or not finite in
        the end; -1: there is none.
      row: its first such row.
    """

def shuffle(key0: int, key1: int, n: int) -> NDArray[np.int64]:
    """[n] a random order of 0 to n - 1: the one that sorts the bits of numpy's Philox.

    Args:
      key0: first word of the generator's key.
      key1: its second word.
      n: how many; below 2^32.
    """

def find_non_object(bytes: NDArray[np.uint8]) -> int:
    """Number (from 0) of the first line without the outer form of one JSON object; -1: none.

    An object here closes what it opens, is nested at most 64 deep, and is alone on its line.
    """

def count_newlines(bytes: NDArray[np.uint8]) -> int:
    """Number of bytes equal to 10."""

def quote_states_after(
    bytes: NDArray[np.uint8], delimiter: int, quote: int
) -> tuple[int, int, int, int]:
    """The state of quoting after the bytes, from each of the four states (csrc/data/quoted_text.h).

    0: a field begins, 1: in plain text, 2: in quotes, 3: after a quote in quotes.
    """

def find_row_ends(
    bytes: NDArray[np.uint8], delimiter: int, quote: int, state: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Finds the line feeds outside of quotes.

    Returns:
      The places after them; the numbers of the rows that have a line break in quotes and text
      after a closing quote; the state after the bytes.
    """

def find_open_quote(bytes: NDArray[np.uint8], delimiter: int, quote: int) -> int:
    """Number (from 0) of the first line that ends in quotes, if each line is a row; -1: none."""

class KernelLauncher:
    """Starts compiled GPU kernels through the driver, by what their compiled form depends on."""

    def __init__(self, launch: int = 0) -> None:
        """Finds the driver.

        Args:
          launch: address of a function to call instead of `cuLaunchKernel`; for tests.

        Raises:
          RuntimeError: there is none on this machine.
        """

    def launch(
        self, kernel: int, stream: int, grid: tuple[int, ...], arguments: tuple[Tensor | int, ...]
    ) -> bool:
        """Starts a form that was added for a kernel's number; False: none fits.

        Args:
          kernel: number.
          stream: address of a CUDA stream.
          grid: one to three numbers of programs.
          arguments: all that are no constants of the source.

        Raises:
          RuntimeError: the driver refuses, or reports an earlier kernel's failure.
        """

    def add(
        self,
        kernel: int,
        arguments: tuple[Tensor | int, ...],
        types: Sequence[str],
        function: int,
        threads: int,
        shared_bytes: int,
    ) -> None:
        """Notes a compiled form for arguments of these kinds.

        Args:
          kernel: number, from 0.
          arguments: like those of later launches: tensors of the same dtypes and alignment,
            integers that are 1, divisible by 16 and within 32 bits alike.
          types: of each argument, as Triton names them; `constexpr`: compiled in.
          function: address of the driver's function.
          threads: of one program.
          shared_bytes: of one program.

        Raises:
          ValueError: arguments and types do not go together.
        """
