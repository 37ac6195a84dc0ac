"""One training step of 26 embedding tables on a CPU, by Penstock and its peers, on the same keys.

Run with `--serve` this file times the contestants of its own interpreter for a benchmark in
another process: a case as a JSON line in, step times as a JSON line out.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import numpy as np
import torch
from native import compile_library

TABLES = 26
ROWS = 100_000
BATCHES = 8
LEARNING_RATE = 0.05
EPS = 1e-8


@dataclass(frozen=True)
class Case:
    """26 tables x 100 k rows, one key a feature, Zipf 1.05."""

    dim: int
    batch_size: int

    @property
    def name(self) -> str:
        return f"D{self.dim} B{self.batch_size}"


def zipf_batches(case: Case) -> list[np.ndarray]:
    """[TABLES, B] row numbers in [0, ROWS), the same in every process."""
    weights = 1.0 / np.arange(1, ROWS + 1, dtype=np.float64) ** 1.05
    cumulated = np.cumsum(weights) / weights.sum()
    rng = np.random.default_rng(0)
    rank_to_row = [rng.permutation(ROWS) for _ in range(TABLES)]

    def draw() -> np.ndarray:
        return np.searchsorted(cumulated, rng.random(case.batch_size)).clip(0, ROWS - 1)

    return [np.stack([rows[draw()] for rows in rank_to_row]) for _ in range(BATCHES)]


def gradient(case: Case) -> torch.Tensor:
    """[B, TABLES * dim]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.batch_size, TABLES * case.dim, generator=generator) * 1e-3


Step = Callable[[int], None]


def penstock_step(case: Case) -> Step:
    """Row-wise Adagrad over a hash table; keys are full 64-bit, in random order of insertion."""
    from penstock.config import FeatureConfig, RowWiseAdagrad, TableConfig
    from penstock.embedding import EmbeddingCollection
    from penstock.types import KeyedJagged

    rule = RowWiseAdagrad(learning_rate=LEARNING_RATE, eps=EPS)
    names = tuple(f"t{t}" for t in range(TABLES))
    embeddings = EmbeddingCollection(
        [TableConfig(name=name, dim=case.dim, optimizer=rule) for name in names],
        [FeatureConfig(name=name, table=name) for name in names],
        num_threads=torch.get_num_threads(),
    )

    def key_of(rows: np.ndarray) -> np.ndarray:
        # A bijection of row numbers to scattered 64-bit keys.
        return (rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)

    offsets = torch.arange(TABLES * case.batch_size + 1)
    batches = [
        KeyedJagged(names, torch.from_numpy(key_of(rows.reshape(-1))), offsets)
        for rows in zipf_batches(case)
    ]
    everything = np.random.default_rng(2).permutation(ROWS)
    for part in np.array_split(everything, 10):
        keys = torch.from_numpy(np.tile(key_of(part), TABLES))
        embeddings(KeyedJagged(names, keys, torch.arange(TABLES * len(part) + 1)))
    grad = gradient(case)

    def step(i: int) -> None:
        embeddings(batches[i % BATCHES]).backward(grad)
        embeddings.apply_gradients()

    return step


def fbgemm_step(case: Case) -> Step:
    """TorchRec's CPU kernel: one table-batched embedding, fused row-wise Adagrad, static rows."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table = (ROWS, case.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)
    embeddings = SplitTableBatchedEmbeddingBagsCodegen(
        [table] * TABLES,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=EPS,
    )
    embeddings.init_embedding_weights_uniform(-0.05, 0.05)
    batches = [torch.from_numpy(rows.reshape(-1)) for rows in zipf_batches(case)]
    offsets = torch.arange(TABLES * case.batch_size + 1)
    grad = gradient(case)
    return lambda i: embeddings(batches[i % BATCHES], offsets).backward(grad)


def torch_step(case: Case) -> Step:
    """26 nn.EmbeddingBag(sparse=True) and torch.optim.Adagrad (torch has no row-wise one)."""
    bags = [torch.nn.EmbeddingBag(ROWS, case.dim, mode="sum", sparse=True) for _ in range(TABLES)]
    weights = [bag.weight for bag in bags]
    optimizer = torch.optim.Adagrad(weights, lr=LEARNING_RATE, eps=EPS)
    batches = [[torch.from_numpy(row).view(-1, 1) for row in rows] for rows in zipf_batches(case)]
    grad = gradient(case)

    def step(i: int) -> None:
        pooled = [bag(rows) for bag, rows in zip(bags, batches[i % BATCHES], strict=True)]
        optimizer.zero_grad(set_to_none=True)
        torch.cat(pooled, 1).backward(grad)
        optimizer.step()

    return step


def equal_rows(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """What bare_step.cc is told of [T, B] row numbers: number, unique, begin, order, count."""
    tables, size = rows.shape
    number, unique, order = (np.empty((tables, size), dtype=np.uint32) for _ in range(3))
    begin, count = np.empty((tables, size + 1), dtype=np.uint32), np.empty(tables, dtype=np.uint32)
    for t, row in enumerate(rows):
        distinct, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first)
        number[t] = np.argsort(by_appearance)[inverse]
        count[t] = len(distinct)
        unique[t, : count[t]] = distinct[by_appearance]
        order[t] = np.argsort(number[t], kind="stable")
        begin[t, : count[t] + 1] = np.searchsorted(number[t][order[t]], np.arange(count[t] + 1))
    return number, unique, begin, order, count


def huge_zeros(*shape: int) -> np.ndarray:
    """float32 on 2 MiB pages, where the system has them."""
    memory = mmap.mmap(-1, 4 * math.prod(shape))
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, dtype=np.float32).reshape(shape)
    array[:] = 0.0
    return array


class BareStep:
    """The machine's limit: the place of each key and which keys are equal are known."""

    def __init__(self, case: Case) -> None:
        if case.dim not in (16, 128):
            raise ValueError(f"bare_step.cc is compiled for rows of 16 and 128, not {case.dim}")
        self._core = compile_library("bare_step.cc", "system/thread_pool.cc", "system/fork.cc")
        self._core.start_pool.restype = ctypes.c_void_p
        threads = ctypes.c_int(torch.get_num_threads())
        self._pool = ctypes.c_void_p(self._core.start_pool(threads))
        self.rows = huge_zeros(TABLES * ROWS, case.dim)
        self.states = huge_zeros(TABLES * ROWS)
        self.out = huge_zeros(case.batch_size, TABLES * case.dim)
        self._sizes = [ctypes.c_int64(n) for n in (case.dim, TABLES, case.batch_size)]
        first_row = np.arange(TABLES)[:, None] * ROWS
        places = [(rows + first_row).astype(np.uint32) for rows in zipf_batches(case)]
        self._batches = [[each, *equal_rows(each)] for each in places]
        self._grad = gradient(case)

    def __call__(self, i: int) -> None:
        arrays = (self.rows, self.states, *self._batches[i % BATCHES], self.out)
        rows, states, *batch, out = (each.ctypes.data_as(ctypes.c_void_p) for each in arrays)
        grad = ctypes.c_void_p(self._grad.data_ptr())
        rates = ctypes.c_float(LEARNING_RATE), ctypes.c_float(EPS)
        self._core.bare_step(self._pool, rows, states, *self._sizes, *batch, out, grad, *rates)

    def __del__(self) -> None:
        self._core.stop_pool(self._pool)


CONTESTANTS: dict[str, tuple[str, Callable[[Case], Step]]] = {
    "penstock": ("penstock", penstock_step),
    "fbgemm": ("fbgemm_gpu", fbgemm_step),
    "torch": ("torch", torch_step),
    "bare": ("torch", BareStep),
}


def runs_here(contestant: str) -> bool:
    """Whether this interpreter has what the contestant needs."""
    return find_spec(CONTESTANTS[contestant][0]) is not None


def time_steps(step: Step, first: int, seconds: float) -> list[float]:
    """Milliseconds of each step, for about `seconds` and at least 3 steps."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        step(first + len(times))
        times.append((time.perf_counter() - start) * 1e3)
    return times


def serve() -> None:
    """Answers lines {contestant, threads, case, seconds} with lists of milliseconds."""
    held: tuple[object, Step] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        case = Case(**request["case"])
        torch.set_num_threads(request["threads"])
        name = (request["contestant"], case)
        if held is None or held[0] != name:
            held = None
            held = (name, CONTESTANTS[request["contestant"]][1](case))
            time_steps(held[1], 0, 0.0)
        print(json.dumps(time_steps(held[1], 0, request["seconds"])), flush=True)


def request_line(contestant: str, threads: int, case: Case, seconds: float) -> str:
    """One request of `serve`."""
    return json.dumps({
        "contestant": contestant,
        "threads": threads,
        "case": asdict(case),
        "seconds": seconds,
    })


if __name__ == "__main__":
    if sys.argv[1:] != ["--serve"]:
        sys.exit("this file is run by the benchmarks; see bench_host_store.py")
    serve()
