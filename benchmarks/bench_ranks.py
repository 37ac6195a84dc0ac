"""Look-up and update of tables over two processes on one machine: TorchRec's, and one process.

    python benchmarks/bench_ranks.py --peer-python PYTHON [--check]

PYTHON is an interpreter with TorchRec (`pip install torch fbgemm-gpu-cpu torchrec`, in an
environment of its own). Three contestants train the same tables with row-wise Adagrad on the same
indices: Penstock over 2 processes (Gloo, a thread each), TorchRec over 2 processes (Gloo, a thread
each, whole tables to a process, fused updates), and Penstock in one process of 2 threads on all
samples. They take turns, some steps each, and wait without work in between; a round gives a ratio.
Figures are medians of the rounds' step times and ratios, with the interval in which the ratio lies
with 95 % (bootstrap over rounds).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from circumstances import commit, end_check, hardware
from torch import Tensor, distributed

GOAL = 3.0
RANKS, BATCHES, LEARNING_RATE, EPS = 2, 4, 0.05, 1e-8


@dataclass(frozen=True)
class Case:
    """Tables of so many rows, of which each sample reads some keys each."""

    tables: int
    rows: int
    dim: int
    keys: int
    draws: str
    batch: int = 4096
    """Of a rank."""

    @property
    def name(self) -> str:
        """As results have it."""
        return (
            f"{self.tables} tables x {self.rows} rows, D{self.dim}, {self.keys} keys a feature, "
            f"{self.draws}, batch {self.batch} a rank"
        )


CASES = [
    Case(8, 100_000, 64, 10, "Zipf 1.05"),
    Case(8, 100_000, 64, 10, "uniform"),
    Case(26, 100_000, 16, 1, "Zipf 1.05"),
]


def indices(case: Case, rank: int) -> list[np.ndarray]:
    """[tables, batch, keys] row numbers of a rank's batches, the same in every process."""
    weights = np.ones(case.rows)
    if case.draws != "uniform":
        weights = 1.0 / np.arange(1, case.rows + 1) ** 1.05
    cumulated = np.cumsum(weights) / weights.sum()
    of_table = np.random.default_rng(0)
    rank_to_row = np.stack([of_table.permutation(case.rows) for _ in range(case.tables)])
    rng = np.random.default_rng(1 + rank)
    size = case.tables, case.batch * case.keys
    drawn = [np.searchsorted(cumulated, rng.random(size)) for _ in range(BATCHES)]
    shape = case.tables, case.batch, case.keys
    taken = [np.take_along_axis(rank_to_row, each.clip(0, case.rows - 1), 1) for each in drawn]
    return [each.reshape(shape) for each in taken]


def gradient(case: Case, samples: int) -> Tensor:
    """[samples, tables * dim]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, case.tables * case.dim, generator=generator) * 1e-3


def penstock_step(case: Case, drawn: list[np.ndarray], *, grouped: bool) -> Callable[[int], None]:
    from penstock import EmbeddingCollection, FeatureConfig, KeyedJagged, TableConfig
    from penstock.config import RowWiseAdagrad

    rule = RowWiseAdagrad(learning_rate=LEARNING_RATE, eps=EPS)
    names = tuple(f"t{t}" for t in range(case.tables))
    embeddings = EmbeddingCollection(
        [TableConfig(name=name, dim=case.dim, optimizer=rule) for name in names],
        [FeatureConfig(name=name, table=name, pooling="sum") for name in names],
        num_threads=torch.get_num_threads(),
        group=distributed.group.WORLD if grouped else None,
    )
    samples = drawn[0].shape[1]
    offsets = torch.arange(0, case.tables * samples * case.keys + 1, case.keys)
    # A bijection of row numbers to scattered 64-bit keys.
    keys = [
        (each.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64) for each in drawn
    ]
    batches = [KeyedJagged(names, torch.from_numpy(each.ravel()), offsets) for each in keys]
    grad = gradient(case, samples)

    def step(number: int) -> None:
        embeddings(batches[number % len(batches)]).backward(grad)
        embeddings.apply_gradients()

    return step


def torchrec_step(case: Case, drawn: list[np.ndarray]) -> Callable[[int], None]:
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    names = [f"t{t}" for t in range(case.tables)]
    bags = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(
                name=name, embedding_dim=case.dim, num_embeddings=case.rows, feature_names=[name]
            )
            for name in names
        ],
    )
    options = {"lr": LEARNING_RATE, "eps": EPS}
    apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), options)
    whole = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    topology = Topology(
        world_size=RANKS, local_world_size=RANKS, compute_device="cpu", ddr_cap=20 * 2**30
    )
    planner = EmbeddingShardingPlanner(topology=topology, constraints=dict.fromkeys(names, whole))
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(bags, sharders, distributed.GroupMember.WORLD)
    model = DistributedModelParallel(
        bags, device=torch.device("cpu"), plan=plan, sharders=sharders, init_data_parallel=True
    )
    lengths = torch.full((case.tables * case.batch,), case.keys, dtype=torch.int32)
    batches = [
        KeyedJaggedTensor(keys=names, values=torch.from_numpy(each.ravel()), lengths=lengths)
        for each in drawn
    ]
    grad = gradient(case, case.batch)

    def step(number: int) -> None:
        out = model(batches[number % len(batches)])
        out = out.wait() if hasattr(out, "wait") else out
        out.values().backward(grad)

    return step


def serve(kind: str, rank: int, port: int, case: Case) -> None:
    """Takes numbers of steps from standard input; answers with seconds a step."""
    alone = kind == "alone"
    torch.set_num_threads(RANKS if alone else 1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS)}
    if alone:
        parts = zip(*(indices(case, each) for each in range(RANKS)), strict=True)
        step = penstock_step(case, [np.concatenate(part, 1) for part in parts], grouped=False)
    else:
        address = f"tcp://127.0.0.1:{port}"
        distributed.init_process_group("gloo", address, rank=rank, world_size=RANKS)
        drawn = indices(case, rank)
        ranks = penstock_step(case, drawn, grouped=True) if kind == "ranks" else None
        step = ranks or torchrec_step(case, drawn)
    done = 0
    for line in sys.stdin:
        if not alone:
            distributed.barrier()
        begin = time.perf_counter()
        for number in range(int(line)):
            step(done + number)
        if not alone:
            distributed.barrier()
        done += int(line)
        print(json.dumps((time.perf_counter() - begin) / int(line)), flush=True)


class Contestant:
    """Processes that serve one case."""

    def __init__(self, kind: str, python: str, case: Case) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        content = json.dumps(asdict(case))
        self.processes = [
            subprocess.Popen(
                [python, __file__, "--serve", kind, "--rank", str(rank), "--port", port, content],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(RANKS if kind == "alone" else 1)},
            )
            for rank in range(1 if kind == "alone" else RANKS)
        ]

    def steps(self, number: int) -> float:
        """Seconds a step, of the slower process."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes if process.stdout]
        return max(json.loads(answer) for answer in answers)

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.wait()


def median_and_interval(ratios: np.ndarray) -> tuple[float, list[float]]:
    """With the 95 % interval of the median, by bootstrap."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return round(float(np.median(ratios)), 3), [round(float(low), 3), round(float(high), 3)]


def measure(case: Case, peer_python: str, rounds: int, steps: int) -> dict[str, object]:
    """One line of results."""
    kinds = {"ranks": sys.executable, "alone": sys.executable, "torchrec": peer_python}
    contestants = {kind: Contestant(kind, python, case) for kind, python in kinds.items()}
    try:
        for contestant in contestants.values():
            # Twice all batches: every row is there.
            contestant.steps(2 * BATCHES)
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(rounds):
            order = list(kinds)[:: 1 if number % 2 else -1]
            for kind in order:
                times[kind].append(contestants[kind].steps(steps))
    finally:
        for contestant in contestants.values():
            contestant.close()
    ours = np.array(times["ranks"])
    over_peer, peer_interval = median_and_interval(np.array(times["torchrec"]) / ours)
    over_alone, alone_interval = median_and_interval(ours / np.array(times["alone"]))
    return {
        "case": case.name,
        "step_ms": {kind: round(1e3 * float(np.median(each)), 1) for kind, each in times.items()},
        "torchrec_over_ranks": over_peer,
        "torchrec_interval": peer_interval,
        "ranks_over_alone": over_alone,
        "alone_interval": alone_interval,
        "rounds": rounds,
        "steps_a_round": steps,
        "commit": commit(),
        "hardware": hardware(f"torch {torch.__version__}, TorchRec 1.8.0, 2 processes by Gloo"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="?", help="of --serve, as JSON")
    parser.add_argument("--peer-python", help="an interpreter with TorchRec")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--check", action="store_true", help=f"exit 1 below {GOAL} x TorchRec")
    parser.add_argument("--serve")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.rank, options.port, Case(**json.loads(options.case)))
        return
    missed = []
    for case in CASES:
        result = measure(case, options.peer_python, options.rounds, options.steps)
        print(json.dumps(result), flush=True)
        ratio = result["torchrec_over_ranks"]
        assert isinstance(ratio, float)
        if ratio < GOAL:
            missed.append(f"{case.name}: {ratio} x TorchRec, not {GOAL}")
    if options.check:
        end_check(missed)


if __name__ == "__main__":
    main()
