"""Embedding optimizers: one small class a rule, and its numbers at a step as one array a store.

The C++ core applies the same rules to fp32 rows (csrc/rows/optimizer_rules.h); `update` here is the
plain float64 form, which the tests compare it with. docs/optimizers.md says how to add one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from penstock.config import (
    FTRL,
    LAMB,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    MomentumSGD,
    Optimizer,
    RowWiseAdagrad,
    RowWiseAdam,
    TableConfig,
    ValueType,
)
from penstock.embedding.rules.rounding import largest_within

FloatArray = NDArray[np.float64]


class Hyper(NamedTuple):
    """Settings of one table's optimizer at one step, in the order of csrc/rows/row_kernels.h."""

    learning_rate: float
    weight_decay: float
    clip_norm: float
    """0: no clipping."""
    eps: float = 0.0
    momentum: float = 0.0
    one_minus_beta1: float = 0.0
    one_minus_beta2: float = 0.0
    l1: float = 0.0
    inverse_bias1: float = 0.0
    inverse_bias2: float = 0.0
    weight_bound: float = 0.0
    """Largest absolute value; 0: any."""


class OptimizerRule(ABC):
    """What a store needs of a rule."""

    config: type[Any]
    code: int
    """Number of the rule in csrc/rows/row_kernels.h."""
    follows_steps = False
    """Whether `hyper` depends on the step."""

    @staticmethod
    @abstractmethod
    def state_dim(dim: int) -> int:
        """Floats of optimizer state of a row of `dim` columns."""

    @staticmethod
    @abstractmethod
    def hyper(config: Any, common: Hyper, step: int) -> Hyper:
        """The rule's own settings at `step`, counted from 0, beside those that all rules have."""

    @staticmethod
    @abstractmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        """One step of one row in place: value `w` [D], state `s` [S], gradient `g` [D]."""


class _Sgd(OptimizerRule):
    config, code = SGD, 0

    @staticmethod
    def state_dim(dim: int) -> int:
        return 0

    @staticmethod
    def hyper(config: SGD, common: Hyper, step: int) -> Hyper:
        return common

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        w -= h.learning_rate * (g + h.weight_decay * w)


class _Adagrad(OptimizerRule):
    config, code = Adagrad, 1

    @staticmethod
    def state_dim(dim: int) -> int:
        return dim

    @staticmethod
    def hyper(config: Adagrad, common: Hyper, step: int) -> Hyper:
        return common._replace(eps=config.eps)

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        g = g + h.weight_decay * w
        s += g * g
        w -= h.learning_rate * g / (np.sqrt(s) + h.eps)


class _RowWiseAdagrad(OptimizerRule):
    config, code = RowWiseAdagrad, 2

    @staticmethod
    def state_dim(dim: int) -> int:
        return 1

    @staticmethod
    def hyper(config: RowWiseAdagrad, common: Hyper, step: int) -> Hyper:
        return common._replace(eps=config.eps)

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        g = g + h.weight_decay * w
        s += np.mean(g * g)
        w -= h.learning_rate * g / (np.sqrt(s) + h.eps)


class _Adam(OptimizerRule):
    config, code = Adam, 3
    follows_steps = True

    @staticmethod
    def state_dim(dim: int) -> int:
        return 2 * dim

    @staticmethod
    def hyper(config: Adam | AdamW | RowWiseAdam, common: Hyper, step: int) -> Hyper:
        moments = _moments(config, common)
        bias1, bias2 = 1.0 - config.beta1 ** (step + 1), 1.0 - config.beta2 ** (step + 1)
        return moments._replace(learning_rate=common.learning_rate * math.sqrt(bias2) / bias1)

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        g = g + h.weight_decay * w
        mean, variance = s[: len(w)], s[len(w) :]
        mean += h.one_minus_beta1 * (g - mean)
        variance += h.one_minus_beta2 * (g * g - variance)
        w -= h.learning_rate * mean / (np.sqrt(variance) + h.eps)


class _MomentumSgd(OptimizerRule):
    config, code = MomentumSGD, 4

    @staticmethod
    def state_dim(dim: int) -> int:
        return dim

    @staticmethod
    def hyper(config: MomentumSGD, common: Hyper, step: int) -> Hyper:
        return common._replace(momentum=config.momentum)

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        s[:] = h.momentum * s + g + h.weight_decay * w
        w -= h.learning_rate * s


class _RowWiseAdam(OptimizerRule):
    config, code = RowWiseAdam, 5
    follows_steps = True
    hyper = staticmethod(_Adam.hyper)

    @staticmethod
    def state_dim(dim: int) -> int:
        return dim + 1

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        g = g + h.weight_decay * w
        mean, variance = s[: len(w)], s[len(w) :]
        mean += h.one_minus_beta1 * (g - mean)
        variance += h.one_minus_beta2 * (np.mean(g * g) - variance)
        w -= h.learning_rate * mean / (np.sqrt(variance) + h.eps)


class _Ftrl(OptimizerRule):
    config, code = FTRL, 6

    @staticmethod
    def state_dim(dim: int) -> int:
        return 2 * dim

    @staticmethod
    def hyper(config: FTRL, common: Hyper, step: int) -> Hyper:
        return common._replace(eps=config.beta, l1=config.l1)

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        z, n = s[: len(w)], s[len(w) :]
        root = np.sqrt(n + g * g)
        z += g - (root - np.sqrt(n)) / h.learning_rate * w
        n += g * g
        shrunk = z - np.sign(z) * h.l1
        step = -shrunk / ((h.eps + root) / h.learning_rate + h.weight_decay)
        w[:] = np.where(np.abs(z) > h.l1, step, 0.0)


class _Lamb(OptimizerRule):
    config, code = LAMB, 7
    follows_steps = True

    @staticmethod
    def state_dim(dim: int) -> int:
        return 2 * dim

    @staticmethod
    def hyper(config: LAMB, common: Hyper, step: int) -> Hyper:
        return _moments(config, common)._replace(
            inverse_bias1=1.0 / (1.0 - config.beta1 ** (step + 1)),
            inverse_bias2=1.0 / (1.0 - config.beta2 ** (step + 1)),
        )

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        mean, variance = s[: len(w)], s[len(w) :]
        mean += h.one_minus_beta1 * (g - mean)
        variance += h.one_minus_beta2 * (g * g - variance)
        step = h.inverse_bias1 * mean / (np.sqrt(h.inverse_bias2 * variance) + h.eps)
        step += h.weight_decay * w
        norms = np.linalg.norm(w), np.linalg.norm(step)
        w -= h.learning_rate * (norms[0] / norms[1] if all(norms) else 1.0) * step


class _AdamW(OptimizerRule):
    """`weight_decay` holds the share of the value that a step takes off: lr * weight_decay."""

    config, code = AdamW, 8
    follows_steps = True
    state_dim = staticmethod(_Adam.state_dim)

    @staticmethod
    def hyper(config: AdamW, common: Hyper, step: int) -> Hyper:
        share = common.learning_rate * common.weight_decay
        return _Adam.hyper(config, common, step)._replace(weight_decay=share)

    @staticmethod
    def update(w: FloatArray, s: FloatArray, g: FloatArray, h: Hyper) -> None:
        decay = h.weight_decay * w
        _Adam.update(w, s, g, h._replace(weight_decay=0.0))
        w -= decay


_ALL: tuple[type[OptimizerRule], ...] = (
    _Sgd,
    _Adagrad,
    _RowWiseAdagrad,
    _Adam,
    _MomentumSgd,
    _RowWiseAdam,
    _Ftrl,
    _Lamb,
    _AdamW,
)
_RULES = {rule.config: rule for rule in _ALL}


def rule_of(optimizer: Optimizer) -> type[OptimizerRule]:
    """The rule that a configuration names."""
    return _RULES[type(optimizer)]


def initial_state(optimizer: Optimizer) -> float:
    """Value of every float of the state of a new row."""
    return optimizer.initial_accumulator if isinstance(optimizer, Adagrad | RowWiseAdagrad) else 0.0


def with_learning_rate(
    tables: Sequence[TableConfig], number: int, learning_rate: float
) -> tuple[TableConfig, ...]:
    """The same tables, but for the learning rate of one.

    Raises:
      ConfigError: it is no number above 0.
    """
    table = tables[number]
    settings = {**table.optimizer.model_dump(), "learning_rate": learning_rate}
    changed = table.model_copy(update={"optimizer": type(table.optimizer)(**settings)})
    return (*tables[:number], changed, *tables[number + 1 :])


def hyper_at(
    optimizer: Optimizer, step: int, rate_factor: float = 1.0, dtype: ValueType = "float32"
) -> Hyper:
    """Settings of an optimizer for the update number `step`, counted from 0.

    `rate_factor` is of the learning rate, beside the schedule's; `dtype` is of the rows.
    """
    bound = optimizer.weight_bound
    rate = optimizer.learning_rate * optimizer.schedule.factor(step) * rate_factor
    common = Hyper(rate, optimizer.weight_decay, optimizer.clip_norm or 0.0)
    settings = rule_of(optimizer).hyper(optimizer, common, step)
    if bound is None:
        return settings
    # A number that rows can hold, so that none is rounded to beyond it.
    return settings._replace(weight_bound=largest_within(bound, dtype))


def update_row(
    optimizer: Optimizer,
    value: FloatArray,
    state: FloatArray,
    grad: FloatArray,
    step: int,
    rate_factor: float = 1.0,
    dtype: ValueType = "float32",
) -> None:
    """One optimizer step of one row, in place, in float64: the reference of all kernels."""
    hyper = hyper_at(optimizer, step, rate_factor, dtype)
    norm = float(np.linalg.norm(grad))
    if hyper.clip_norm and norm > hyper.clip_norm:
        grad = grad * (hyper.clip_norm / norm)
    rule_of(optimizer).update(value, state, grad, hyper)
    if hyper.weight_bound:
        np.clip(value, -hyper.weight_bound, hyper.weight_bound, out=value)


class Hypers:
    """Optimizer settings of the tables of one store, as one array a step."""

    def __init__(self, tables: Sequence[TableConfig]) -> None:
        # Tables mostly share their optimizer's settings: each distinct one is asked once a step.
        optimizers = [table.optimizer for table in tables]
        self._distinct = list(dict.fromkeys(optimizers))
        number = {each: n for n, each in enumerate(self._distinct)}
        self._of_table = np.array([number[each] for each in optimizers])
        self.are_one = len(self._distinct) == 1
        """All tables have the same settings."""
        self.are_constant = not any(
            rule_of(each).follows_steps or each.schedule.warmup_steps or each.schedule.decay_steps
            for each in self._distinct
        )
        """Every step has the same settings."""
        self._dtype = tables[0].dtype if tables else "float32"
        self._constant: tuple[float, NDArray[np.float32]] | None = None

    def at(self, step: int, rate_factor: float = 1.0) -> NDArray[np.float32]:
        """[T, fields of `Hyper`] float32 for the update number `step`, counted from 0.

        Not to be written to: where all steps have the same settings, it is the same array.
        """
        if self._constant is not None and self._constant[0] == rate_factor:
            return self._constant[1]
        distinct = np.array(
            [hyper_at(each, step, rate_factor, self._dtype) for each in self._distinct], np.float32
        )
        hypers = np.ascontiguousarray(distinct[self._of_table])
        if self.are_constant:
            self._constant = rate_factor, hypers
        return hypers


def _moments(config: Adam | AdamW | RowWiseAdam | LAMB, common: Hyper) -> Hyper:
    return common._replace(
        eps=config.eps,
        one_minus_beta1=1.0 - config.beta1,
        one_minus_beta2=1.0 - config.beta2,
    )
