"""The network of a job over nn.EmbeddingBag and torch's optimizers: what Penstock is held against.

The twin of a run sees the same batches and begins with the same weights. Its tables are ordinary
parameters with one row for each key that occurs in the data, so it needs a pass over the data to
know them. It supports what torch does: no row-wise Adagrad, no weight decay of sparse rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penstock.config import (
    SGD,
    Adagrad,
    Adam,
    DenseOptimizer,
    FeatureConfig,
    Job,
    Optimizer,
    TableConfig,
)
from penstock.data.dataset import Dataset
from penstock.embedding.rules.initializer import initial_values
from penstock.training.evaluation import Evaluator
from penstock.training.setup import build
from penstock.training.steps.step import model_inputs
from penstock.types import KeyedJagged

Keys = dict[str, NDArray[np.int64]]
"""By table: its keys, sorted and distinct."""


class EmbeddingBags(nn.Module):
    """What `EmbeddingCollection` computes: an nn.EmbeddingBag, or of a sequence nn.Embedding."""

    def __init__(
        self,
        tables: Sequence[TableConfig],
        features: Sequence[FeatureConfig],
        keys: Keys,
        *,
        seed: int,
        sparse: bool,
    ) -> None:
        super().__init__()
        self.features = tuple(features)
        self.weights = {
            table.name: nn.Parameter(
                torch.from_numpy(
                    initial_values(table.initializer, seed, table.name, keys[table.name], table.dim)
                )
            )
            for table in tables
        }
        self._keys = {name: torch.from_numpy(of_table) for name, of_table in keys.items()}
        self.bags = nn.ModuleList()
        for feature in self.features:
            weight = self.weights[feature.table]
            bag: nn.Embedding | nn.EmbeddingBag
            if feature.pooling == "sequence":
                bag = nn.Embedding(*weight.shape, sparse=sparse)
            else:
                bag = nn.EmbeddingBag(*weight.shape, mode=feature.pooling, sparse=sparse)
            bag.weight = weight  # Features of one table share it.
            self.bags.append(bag)

    device = torch.device("cpu")

    def to_device(self, sparse: KeyedJagged) -> KeyedJagged:
        """The batch itself."""
        return sparse

    def forward(self, sparse: KeyedJagged) -> Tensor:
        """Vectors of all features, [B, W] float32."""
        assert sparse.weights is None, "the twin knows no weights of keys"
        parts = []
        for feature, bag in zip(self.features, self.bags, strict=True):
            column = sparse[feature.name]
            rows = self._row_numbers(feature.table, column.values)
            if feature.pooling == "sequence":
                lengths = column.offsets.diff()
                bags = torch.arange(len(lengths)).repeat_interleave(lengths)
                places = torch.arange(len(rows)) - column.offsets[bags]
                padded = torch.zeros(len(lengths), feature.max_keys, bag.embedding_dim)
                # Not pad_sequence: its gradient writes all of the padded array once a bag.
                parts.append(padded.index_put((bags, places), bag(rows)).flatten(1))
            else:
                parts.append(bag(rows, column.offsets[:-1]))
        return torch.cat(parts, 1)

    def sequence_lengths(self, sparse: KeyedJagged) -> Tensor:
        """[B, S] keys of each sequence."""
        lengths = [
            sparse[feature.name].offsets.diff()
            for feature in self.features
            if feature.pooling == "sequence"
        ]
        return torch.stack(lengths, 1) if lengths else torch.zeros(sparse.batch_size, 0)

    def _row_numbers(self, table: str, values: Tensor) -> Tensor:
        known = self._keys[table]
        rows = torch.searchsorted(known, values)
        assert torch.equal(known[rows.clamp(max=len(known) - 1)], values), f"{table}: unknown key"
        return rows


class Twin:
    """A job's network, trained by torch alone.

    Args:
      job: what to train; its optimizers must be ones that torch has.
      dataset: the job's data.
      keys: all keys of the data, see `keys_of`.
      sparse: gradients of the tables are sparse and torch's sparse optimizers update the touched
        rows; False: dense gradients and optimizers, which update every row in every step.
    """

    def __init__(self, job: Job, dataset: Dataset, keys: Keys, *, sparse: bool) -> None:
        _refuse_unsupported(job)
        self._job = job
        self._dataset = dataset
        # Penstock's weights, from the same seed; its tables stay empty and unused.
        state, _, self.objective, _ = build(job, dataset)
        self.model = state.model
        # Both read the lanes of the data in one order.
        self._start = state.position
        self.bags = EmbeddingBags(
            dataset.tables, dataset.features, keys, seed=job.training.seed, sparse=sparse
        )
        dense = job.training.optimizer
        self._optimizers: list[tuple[Optimizer | DenseOptimizer, torch.optim.Optimizer]] = [
            (dense, torch.optim.Adam(self.model.parameters(), lr=dense.learning_rate))
        ]
        for config in dict.fromkeys(table.optimizer for table in dataset.tables):
            weights = [
                self.bags.weights[table.name]
                for table in dataset.tables
                if table.optimizer == config
            ]
            self._optimizers.append((config, _table_optimizer(config, weights, sparse)))

    def train(self) -> Iterator[float]:
        """Trains step by step; yields the loss of each batch before its update."""
        training = self._job.training
        with self._dataset.batches(
            "train",
            batch_size=training.batch_size,
            seed=training.seed,
            epochs=training.epochs,
            start=self._start,
        ) as batches:
            for step, batch in enumerate(islice(batches, training.max_steps)):
                inputs = model_inputs(self.bags, batch, self.bags(batch.sparse))
                loss, _ = self.objective(self.model, inputs, batch)
                loss.backward()
                self._update(step)
                yield loss.item()

    def measure(self) -> dict[str, Any]:
        """Metrics of the held-out part; a key never trained reads as its initial value."""
        evaluation = self._job.evaluation
        evaluator = Evaluator(self._dataset, self.model, self.objective, self.bags, evaluation)
        with self._dataset.batches(
            "evaluation", batch_size=evaluation.batch_size, groups=True
        ) as batches:
            return evaluator.measure(batches)

    def _update(self, step: int) -> None:
        for config, optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * config.schedule.factor(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def keys_of(dataset: Dataset, batch_size: int = 8192) -> Keys:
    """All keys that the data holds, both parts, by table."""
    found: dict[str, list[NDArray[np.int64]]] = {table.name: [] for table in dataset.tables}
    parts = ("train", "evaluation") if dataset.has_evaluation else ("train",)
    for part in parts:
        with dataset.batches(part, batch_size=batch_size, shuffle=False) as batches:
            for batch in batches:
                for feature in dataset.features:
                    values = batch.sparse[feature.name].values.numpy()
                    found[feature.table].append(np.unique(values))
    return {table: np.unique(np.concatenate(keys)) for table, keys in found.items()}


def _table_optimizer(
    config: Optimizer, weights: list[nn.Parameter], sparse: bool
) -> torch.optim.Optimizer:
    match config:
        case Adam():
            kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
            betas = (config.beta1, config.beta2)
            return kind(weights, lr=config.learning_rate, betas=betas, eps=config.eps)
        case Adagrad():
            return torch.optim.Adagrad(
                weights,
                lr=config.learning_rate,
                eps=config.eps,
                initial_accumulator_value=config.initial_accumulator,
            )
        case SGD():
            return torch.optim.SGD(weights, lr=config.learning_rate)
    raise ValueError(f"torch has no counterpart of the table optimizer {config.kind!r}")


def _refuse_unsupported(job: Job) -> None:
    tables = [job.table_defaults, *job.tables]
    if any(table.optimizer.weight_decay for table in tables):
        raise ValueError("torch's sparse optimizers have no weight decay; set it to 0")
    training = job.training
    if training.optimizer.kind != "adam" or training.optimizer.weight_decay:
        raise ValueError("the twin's dense optimizer is plain Adam; use training.optimizer adam")
    if training.clip_gradient_norm is not None:
        raise ValueError("the twin does not clip; leave training.clip_gradient_norm out")
