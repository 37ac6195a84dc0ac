"""Cases of bench_gpu_store.py: sizes, keys, what FBGEMM took for them, what Penstock should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from penstock.config import SGD, Adagrad, Adam, Optimizer, RowWiseAdagrad, TableConfig
from penstock.embedding.store import PooledFeature, PoolingPlan
from penstock.types import KeyedJagged


class Peer(NamedTuple):
    """FBGEMM table-batched embeddings 1.6.0 on one H200, static tables without hashing: ms."""

    forward_ms: float
    train_ms: float


@dataclass(frozen=True)
class Case:
    """One shape of look-ups; keys follow a power law, permuted or plain."""

    name: str
    tables: int
    batch_size: int
    bag: int
    dim: int
    rows: int
    optimizer: Optimizer
    alpha: float
    permuted: bool
    fbgemm: Peer
    goal_ms: float | None = None
    """Of a training step."""

    @property
    def rows_of_table(self) -> int:
        return self.rows // self.tables

    @property
    def num_keys(self) -> int:
        return self.tables * self.batch_size * self.bag

    @property
    def state_dim(self) -> int:
        return {SGD: 0, RowWiseAdagrad: 1, Adagrad: self.dim, Adam: 2 * self.dim}[
            type(self.optimizer)
        ]

    def table_configs(self) -> list[TableConfig]:
        return [
            TableConfig(name=f"t{t}", dim=self.dim, optimizer=self.optimizer)
            for t in range(self.tables)
        ]

    def plan(self) -> PoolingPlan:
        features = tuple(PooledFeature(t, t, "sum", t * self.dim) for t in range(self.tables))
        return PoolingPlan(features, self.tables * self.dim)

    def batch(self, generator: torch.Generator) -> KeyedJagged:
        """A batch on the generator's device."""
        device = generator.device
        keys = [self._keys(generator) for _ in range(self.tables)]
        offsets = torch.arange(self.tables * self.batch_size + 1, device=device) * self.bag
        names = tuple(f"f{t}" for t in range(self.tables))
        return KeyedJagged(
            names, torch.cat(keys), offsets, is_checked=True, is_one_hot=self.bag == 1
        )

    def _keys(self, generator: torch.Generator) -> torch.Tensor:
        rows, power = self.rows_of_table, 1.0 - self.alpha
        size = self.batch_size * self.bag
        u = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
        keys = (u * (float(rows) ** power - 1.0) + 1.0) ** (1.0 / power)
        keys = keys.floor().long().clamp_(max=rows - 1)
        return (keys * 2654435761 + 12345) % rows if self.permuted else keys


def _one_hot(optimizer, plain, permuted, goal=None):
    name = type(optimizer).__name__
    shape = (10, 104_857, 1, 128, 16_777_216, optimizer, 1.05)
    return [
        Case(f"one-hot 10 x 104857, {name}, plain", *shape, False, Peer(*plain)),
        Case(f"one-hot 10 x 104857, {name}", *shape, True, Peer(*permuted), goal),
    ]


def _pooled(dim, forward, train, goal=None):
    shape = (26, 8192, 10, dim, 26_000_000, RowWiseAdagrad(), 1.05, True)
    return Case(f"pooled 26 x 8192 x 10, D={dim}", *shape, Peer(forward, train), goal)


def _criteo(size, forward, train, goal=None):
    shape = (26, size, 1, 128, 52_000_000, RowWiseAdagrad(), 1.05, True)
    return Case(f"one-hot 26 x {size}", *shape, Peer(forward, train), goal)


CASES = (
    *_one_hot(SGD(), (0.397, 0.979), (0.403, 1.066), 0.50),
    *_one_hot(RowWiseAdagrad(), (0.583, 1.273), (0.507, 1.304), 0.56),
    *_one_hot(Adagrad(), (0.465, 1.206), (0.459, 1.203)),
    *_one_hot(Adam(), (0.514, 1.563), (0.449, 1.578), 0.80),
    _pooled(16, 0.201, 0.903, 0.50),
    _pooled(32, 0.268, 0.957),
    _pooled(64, 0.220, 0.973),
    _pooled(128, 0.273, 1.390, 0.80),
    _pooled(256, 0.399, 1.873),
    _criteo(512, 0.199, 0.631, 0.15),
    _criteo(2048, 0.209, 0.879),
    _criteo(65_536, 0.560, 1.726, 1.0),
    Case("uniform 26 x 8192 x 20", 26, 8192, 20, 128, 52_000_000, RowWiseAdagrad(), 0.0, True,
         Peer(0.822, 3.856), 2.7),
)  # fmt: skip
