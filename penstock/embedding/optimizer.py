"""What the stores need to know of an optimizer: its state's size, its numbers at a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.config import SGD, Adagrad, Adam, Optimizer, RowWiseAdagrad, Schedule, TableConfig

KINDS: dict[type, int] = {SGD: 0, Adagrad: 1, RowWiseAdagrad: 2, Adam: 3}

# Columns of `hypers`, the order of csrc/row_kernels.h.
LEARNING_RATE, WEIGHT_DECAY, EPS, BETA1, BETA2, ONE_MINUS_BETA1, ONE_MINUS_BETA2 = range(7)


def state_dim(optimizer: Optimizer, dim: int) -> int:
    """Floats of optimizer state of a row of `dim` columns."""
    match optimizer:
        case SGD():
            return 0
        case Adagrad():
            return dim
        case RowWiseAdagrad():
            return 1
        case Adam():
            return 2 * dim


def initial_state(optimizer: Optimizer) -> float:
    """Value of every float of the state of a new row."""
    return optimizer.initial_accumulator if isinstance(optimizer, Adagrad | RowWiseAdagrad) else 0.0


class Hypers:
    """Optimizer settings of the tables of one store, as one array a step."""

    def __init__(self, tables: Sequence[TableConfig]) -> None:
        self._optimizers = [table.optimizer for table in tables]
        self._base = np.array([_settings(optimizer) for optimizer in self._optimizers])
        # Tables mostly share their schedule: each distinct one is evaluated once a step.
        distinct = list(dict.fromkeys(_clock(optimizer) for optimizer in self._optimizers))
        self._clocks = distinct
        self._clock_of_table = np.array(
            [distinct.index(_clock(optimizer)) for optimizer in self._optimizers], dtype=np.int64
        )

    def at(self, step: int) -> NDArray[np.float32]:
        """[T, 7] float32 for the update number `step`, counted from 0."""
        factors = np.array([clock.factor(step) for clock in self._clocks])
        hypers = self._base.copy()
        hypers[:, LEARNING_RATE] *= factors[self._clock_of_table]
        return hypers.astype(np.float32)


def _settings(optimizer: Optimizer) -> list[float]:
    beta1, beta2 = (optimizer.beta1, optimizer.beta2) if isinstance(optimizer, Adam) else (0.0, 0.0)
    eps = 0.0 if isinstance(optimizer, SGD) else optimizer.eps
    return [
        optimizer.learning_rate,
        optimizer.weight_decay,
        eps,
        beta1,
        beta2,
        1.0 - beta1,
        1.0 - beta2,
    ]


class _Clock(NamedTuple):
    """What makes the learning rate depend on the step."""

    schedule: Schedule
    betas: tuple[float, float] | None
    """Of Adam, for its bias correction."""

    def factor(self, step: int) -> float:
        factor = self.schedule.factor(step)
        if self.betas is None:
            return factor
        beta1, beta2 = self.betas
        return factor * math.sqrt(1.0 - beta2 ** (step + 1)) / (1.0 - beta1 ** (step + 1))


def _clock(optimizer: Optimizer) -> _Clock:
    betas = (optimizer.beta1, optimizer.beta2) if isinstance(optimizer, Adam) else None
    return _Clock(optimizer.schedule, betas)
