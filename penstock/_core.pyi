"""The C++ core (csrc/bindings.cc). Arrays are C-contiguous numpy arrays."""

import enum
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class Status(enum.Enum):
    OK = 0
    OUT_OF_MEMORY = 1
    TOO_MANY_ROWS = 2
    STALE_CURSOR = 3

class BufferPool:
    def take_rows(self, rows: int, columns: int) -> NDArray[np.float32] | None: ...

def buffer_pool() -> BufferPool: ...

class PoolingPlan:
    def __init__(
        self,
        packed_feature: Sequence[int],
        table: Sequence[int],
        is_mean: Sequence[int],
        column: Sequence[int],
        stride: int,
    ) -> None: ...

class Lookup:
    def __init__(self) -> None: ...
    @property
    def num_missing(self) -> int: ...

class HostStore:
    def __init__(
        self,
        dim: int,
        optimizer: int,
        initializers: Sequence[tuple[int, float, float, int]],
        num_threads: int,
        max_bytes: int,
    ) -> None: ...
    def open(self) -> bool: ...
    def pooled_lookup(
        self,
        plan: PoolingPlan,
        keys: NDArray[np.int64],
        offsets: NDArray[np.int64],
        batch_size: int,
        insert: bool,
        out: NDArray[np.float32],
        lookup: Lookup,
    ) -> Status: ...
    def apply_gradients(
        self,
        plan: PoolingPlan,
        gradients: Sequence[
            tuple[Lookup, NDArray[np.int64], NDArray[np.int64], int, NDArray[np.float32]]
        ],
        hypers: NDArray[np.float32],
    ) -> tuple[Status, int]: ...
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
        values: NDArray[np.float32],
        state: NDArray[np.float32] | None,
    ) -> tuple[Status, int]: ...
    def erase(self, table: int, keys: NDArray[np.int64]) -> int: ...
    def export_batch(
        self,
        table: int,
        cursor: int,
        version: int,
        keys: NDArray[np.int64],
        values: NDArray[np.float32],
        state: NDArray[np.float32],
    ) -> tuple[Status, int, int]: ...
    def num_rows(self, table: int) -> int: ...
    def check_invariants(self) -> str: ...
    def memory(self) -> tuple[int, int, int, int, int, int]: ...
    @property
    def content_version(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def num_threads(self) -> int: ...
    @property
    def state_dim(self) -> int: ...

def xxh64(data: bytes, seed: int = 0) -> int: ...
