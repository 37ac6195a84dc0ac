"""A DLRM's training step on a GPU: what torch.compile makes of it with the tables inside.

    python benchmarks/bench_gpu_compile.py [--steps 60] [--turns 5] [--json] [--check]

Four ways, by turns, on the same batches: all of it eager; the dense model compiled and the tables
outside; the whole model, tables inside, compiled as one graph; and the dense model alone, compiled,
on vectors that are there: what a step without tables would take. MLPerf's layer sizes, 26 tables of
dim 128, one key a feature, keys on the GPU, bfloat16 autocast, Adagrad by row. Times are medians
between CUDA events; the goal is that compiling the tables along costs at most 3 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from circumstances import commit, end_check
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from penstock.config import DLRMConfig, FeatureConfig, RowWiseAdagrad, TableConfig
from penstock.embedding import EmbeddingCollection
from penstock.models import build_model
from penstock.types import KeyedJagged

TABLES, DIM, NUMBERS, ROWS = 26, 128, 13, 1_000_000
BATCHES = 8
GOAL = 1.03
DEVICE = torch.device("cuda")


class Whole(nn.Module):
    """Tables and dense model in one module."""

    def __init__(self, tables: EmbeddingCollection, dense: nn.Module) -> None:
        super().__init__()
        self.tables, self.dense = tables, dense

    def forward(self, numbers: Tensor, keys: KeyedJagged) -> Tensor:
        """(numbers [B, n], keys) -> logits [B]."""
        logits: Tensor = self.dense(numbers, self.tables(keys))
        return logits


class Way:
    """One way to do a step, with weights of its own."""

    def __init__(self, name: str, batch_size: int) -> None:
        torch.manual_seed(0)
        tables = [
            TableConfig(name=f"t{n}", dim=DIM, optimizer=RowWiseAdagrad()) for n in range(TABLES)
        ]
        features = [FeatureConfig(name=f"f{n}", table=f"t{n}") for n in range(TABLES)]
        self.name = name
        self.tables = EmbeddingCollection(tables, features, device=DEVICE)
        config = DLRMConfig(bottom=(512, 256, DIM), top=(1024, 1024, 512, 256))
        dense = build_model(config, NUMBERS, self.tables.feature_shapes).to(DEVICE)
        self.optimizer = torch.optim.Adam(dense.parameters(), fused=True)
        self._batches = list(batches(batch_size))
        self._vectors = torch.randn(batch_size, TABLES * DIM, device=DEVICE)
        compiled = dense if name == "eager" else torch.compile(dense)
        self._forward: Callable[[Tensor, KeyedJagged], Tensor]
        if name == "tables compiled along":
            self._forward = torch.compile(Whole(self.tables, dense), fullgraph=True)
        elif name == "no tables":
            self._forward = lambda numbers, keys: compiled(numbers, self._vectors)
        else:
            self._forward = lambda numbers, keys: compiled(numbers, self.tables(keys))

    def step(self, number: int) -> None:
        """Forward, backward and update."""
        numbers, keys, labels = self._batches[number % BATCHES]
        with torch.autocast("cuda", torch.bfloat16):
            logits = self._forward(numbers, keys)
        binary_cross_entropy_with_logits(logits.float(), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.name != "no tables":
            self.tables.apply_gradients()


def batches(batch_size: int) -> list[tuple[Tensor, KeyedJagged, Tensor]]:
    """Numbers, keys and labels of some batches."""
    made = []
    generator = torch.Generator(DEVICE).manual_seed(1)
    offsets = torch.arange(TABLES * batch_size + 1, device=DEVICE)
    names = tuple(f"f{n}" for n in range(TABLES))
    for _ in range(BATCHES):
        shape = (TABLES * batch_size,)
        keys = torch.randint(0, ROWS, shape, generator=generator, device=DEVICE)
        numbers = torch.rand(batch_size, NUMBERS, generator=generator, device=DEVICE)
        labels = (torch.rand(batch_size, generator=generator, device=DEVICE) < 0.3).float()
        made.append((numbers, KeyedJagged(names, keys, offsets), labels))
    return made


def median_ms(way: Way, steps: int) -> float:
    """Median time of a step between events."""
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(steps)
    ]
    for number, (begin, end) in enumerate(events):
        begin.record()
        way.step(number)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 if the goal is missed")
    arguments = parser.parse_args()
    missed = []
    for batch_size in (65_536, 2_048):
        ways = [
            Way(name, batch_size)
            for name in ("eager", "dense compiled", "tables compiled along", "no tables")
        ]
        times: dict[str, list[float]] = {way.name: [] for way in ways}
        for way in ways:
            for number in range(3 * BATCHES):  # compiles, and inserts the keys
                way.step(number)
        for _ in range(arguments.turns):
            for way in ways:
                times[way.name].append(median_ms(way, arguments.steps))
        ratios = [
            along / outside
            for along, outside in zip(
                times["tables compiled along"], times["dense compiled"], strict=True
            )
        ]
        result = {
            "benchmark": "gpu_compile",
            "batch_size": batch_size,
            "ms": {name: round(statistics.median(each), 3) for name, each in times.items()},
            "along_over_outside": [round(one, 3) for one in sorted(ratios)],
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        if arguments.json:
            print(json.dumps(result))
        else:
            print(f"batch {batch_size:,}: {result['ms']} along / outside {sorted(ratios)}")
        if statistics.median(ratios) > GOAL:
            missed.append(f"batch {batch_size:,}: {statistics.median(ratios):.3f} > {GOAL}")
    if arguments.check:
        end_check(missed)


if __name__ == "__main__":
    main()
