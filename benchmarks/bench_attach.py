"""What `attach` costs a step: a loop of one's own with it, beside the same loop by apply_gradients.

    python benchmarks/bench_attach.py [--check]

Both train the same small network over 26 features of one key, of 16 columns, on the same batches.
They take turns, some steps each; a pair of turns gives one ratio, and which of the two goes first
changes. The figure is the median of the ratios, with the interval in which it lies with 95 %
(bootstrap over the pairs). Times are of the processor, on one thread, so that other work on the
machine counts little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from circumstances import commit, end_check, hardware
from torch import Tensor, nn

from penstock import (
    Adagrad,
    EmbeddingCollection,
    FeatureConfig,
    Jagged,
    KeyedJagged,
    TableConfig,
)

GOAL = 1.03
FEATURES, DIM, NUMBERS = 26, 16, 13
BATCHES = 16


class Model(nn.Module):
    """Numbers and pooled vectors through an MLP of 512, 256 and 1."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [
            TableConfig(name=name, dim=DIM, optimizer=Adagrad(learning_rate=0.02)) for name in names
        ]
        features = [FeatureConfig(name=name, table=name) for name in names]
        self.embeddings = EmbeddingCollection(tables, features, num_threads=1)
        self.head = nn.Sequential(
            nn.Linear(NUMBERS + FEATURES * DIM, 512),
            nn.ReLU(),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Linear(256, 1),
        )

    def forward(self, numbers: Tensor, sparse: KeyedJagged) -> Tensor:
        scores: Tensor = self.head(torch.cat([numbers, self.embeddings(sparse)], 1))[:, 0]
        return scores


def stepper(names: list[str], batches: list[tuple[Tensor, KeyedJagged, Tensor]], *, attached: bool):
    """A function that takes so many steps."""
    model = Model(names)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=1e-3, fused=True)
    if attached:
        model.embeddings.attach(optimizer)

    def steps(count: int) -> None:
        for n in range(count):
            numbers, sparse, label = batches[n % len(batches)]
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(numbers, sparse), label).backward()
            optimizer.step()
            if not attached:
                model.embeddings.apply_gradients()

    return steps


def make_batches(names: list[str], size: int) -> list[tuple[Tensor, KeyedJagged, Tensor]]:
    """Keys of a Zipf-like law over a million a feature."""
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(BATCHES):
        keys = (1e6 ** rng.random((len(names), size))).astype(np.int64)
        columns = {
            name: Jagged.from_dense(torch.from_numpy(of_name))
            for name, of_name in zip(names, keys, strict=True)
        }
        numbers = torch.from_numpy(rng.standard_normal((size, NUMBERS)).astype(np.float32))
        label = torch.from_numpy((rng.random(size) < 0.3).astype(np.float32))
        batches.append((numbers, KeyedJagged.pack(columns), label))
    return batches


def seconds_of(call: Callable[[int], None], count: int) -> float:
    """Of the processor that it takes."""
    begin = time.process_time()
    call(count)
    return time.process_time() - begin


def measure(size: int, pairs: int, steps: int) -> dict[str, object]:
    """One line of results."""
    names = [f"c{n}" for n in range(FEATURES)]
    batches = make_batches(names, size)
    without, attached = (stepper(names, batches, attached=each) for each in (False, True))
    for call in (without, attached):
        call(2 * BATCHES)
    ratios, bare = [], []
    for n in range(pairs):
        order = [without, attached] if n % 2 else [attached, without]
        took = {id(call): seconds_of(call, steps) for call in order}
        ratios.append(took[id(attached)] / took[id(without)])
        bare.append(took[id(without)] / steps)
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(ratios, (2000, len(ratios))), 1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "case": f"26 features of {DIM} columns, batch {size}",
        "step_ms": round(1e3 * float(np.median(bare)), 3),
        "attached_over_not": round(float(np.median(ratios)), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "pairs": pairs,
        "commit": commit(),
        "hardware": hardware(f"torch {torch.__version__}"),
    }


def main() -> None:
    """Prints one line of JSON a case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--steps", type=int, default=4, help="of one turn")
    parser.add_argument("--check", action="store_true", help=f"fail above {GOAL}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    missed = []
    for size in given.sizes:
        line = measure(size, given.pairs, given.steps)
        print(json.dumps(line), flush=True)
        if line["attached_over_not"] > GOAL:
            missed.append(f"{line['case']}: {line['attached_over_not']} > {GOAL}")
    if given.check:
        end_check(missed)


if __name__ == "__main__":
    main()
