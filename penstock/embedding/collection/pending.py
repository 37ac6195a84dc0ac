"""Gradients between backward and the update: checked together, given to the stores once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.config import FeatureConfig, TableConfig
from penstock.embedding.store import PooledGradient, PooledLookup, PoolingPlan, Store
from penstock.errors import CapacityError, ConfigError, PartialUpdateError

_MOST_NAMED = 4
# As many batches as a step of a job may have.
_MOST_PENDING = 1 << 16


class _Pending:
    """The gradient of one output."""

    def __init__(
        self,
        lookups: Sequence[PooledLookup],
        plans: Sequence[PoolingPlan],
        grad: Tensor,
        loss_scale: Tensor | None,
    ) -> None:
        """Begins to find out whether it is finite: now it is in the caches still."""
        self.lookups = lookups
        """Of each trained store."""
        self.plans = plans
        """Of every store: where its columns are."""
        self.grad = grad
        """Perhaps the caller's own: it is as large as the output, too much to copy."""
        self.loss_scale = loss_scale
        """By which a GradScaler had scaled its loss, and which is in the factor; None: if it was
        scaled, so is the gradient still.
        """
        self.factor: Tensor | float | None = None
        """By which it was scaled since; None: not at all."""
        if loss_scale is not None:
            self.multiply(loss_scale.reciprocal())
        self._version = grad._version
        """When it came: torch counts what changes it in place."""
        # In float64 a sum is finite just if every element is; on a CPU it takes longer.
        self._total = grad.sum(dtype=torch.float64 if grad.is_cuda else torch.float32)
        """Not finite if an element is not; in float32 also if all are huge."""
        self._total_there = self._total
        """Where the gradient is."""
        self._is_copied: torch.cuda.Event | None = None
        if grad.is_cuda:
            total = torch.empty((), dtype=torch.float64, pin_memory=True)
            self._total = total.copy_(self._total, non_blocking=True)
            self._is_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._is_copied.record(torch.cuda.current_stream(grad.device))

    @property
    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite, but for the factor."""
        if self._is_copied is not None:
            # Not for the stream: an optimizer may have begun to work on it.
            self._is_copied.synchronize()
        return math.isfinite(float(self._total)) or bool(self.grad.isfinite().all())

    def evidence(self) -> Tensor:
        """[] of any float type, on the gradient's device: finite just if every element is.

        But for the factor; waits for no GPU.
        """
        if not self.grad.is_cuda and self.is_finite:
            return torch.zeros(())
        return self._total_there

    def check(self) -> None:
        """Refuses a gradient that was changed since."""
        if self.grad._version != self._version:
            raise ConfigError(
                "a gradient of the embeddings was changed in place between backward and "
                "apply_gradients; scale the loss instead, or change the gradient in a hook of the "
                "output (register_hook), or give backward a copy"
            )

    def multiply(self, factor: Tensor | float) -> None:
        """Scales it by a number, or a tensor of one element on any device."""
        if isinstance(factor, Tensor):
            factor = factor.detach().reshape(()).float()
        self.factor = factor if self.factor is None else self.factor * factor

    def with_added(self, new: _Pending) -> _Pending:
        """The sum of two gradients of one output."""
        total = _Pending(self.lookups, self.plans, self.scaled() + new.scaled(), None)
        total.loss_scale = self.loss_scale if new.loss_scale is None else new.loss_scale
        return total

    def scaled(self) -> Tensor:
        """[B, W] float32, contiguous."""
        if self.factor is None:
            return self.grad
        factor = self.factor
        return self.grad * (factor.to(self.grad.device) if isinstance(factor, Tensor) else factor)


class PendingGradients:
    """The gradients of backward passes since the last update."""

    def __init__(self) -> None:
        """None."""
        self._parts: list[_Pending] = []

    def __len__(self) -> int:
        """Outputs that have one."""
        return len(self._parts)

    def add(
        self,
        lookups: Sequence[PooledLookup],
        plans: Sequence[PoolingPlan],
        grad: Tensor,
        loss_scale: Tensor | None = None,
    ) -> None:
        """Keeps the gradient of an output; several of one, of a graph that was kept, add up.

        Args:
          lookups: of the output, one a trained store.
          plans: of every store.
          grad: [B, columns of the plans] float32, contiguous; not copied, and not to be changed.
          loss_scale: [1], by which it is divided, as no scaler will; None: see `unscale`.
        """
        new = _Pending(lookups, plans, grad, loss_scale)
        for n, part in enumerate(self._parts):
            if part.lookups is lookups:
                part.check()
                self._parts[n] = part.with_added(new)
                return
        if len(self._parts) == _MOST_PENDING:
            raise ConfigError(
                f"gradients of {_MOST_PENDING} look-ups wait for an update, the most that one may "
                "be of: call apply_gradients(), or the step of the optimizer that the collection "
                "is attached to, more often"
            )
        self._parts.append(new)

    def scale(self, factor: Tensor | float) -> None:
        """Multiplies all there are by a number, or a tensor of one element on any device."""
        for part in self._parts:
            part.multiply(factor)

    def unscale(self, inverse_scale: Tensor) -> None:
        """What a scaler does to what it sees: divides those whose loss scale is not known.

        The others were divided as they came.
        """
        for part in self._parts:
            if part.loss_scale is None:
                part.multiply(inverse_scale)

    @property
    def is_of_scaled_loss(self) -> bool:
        """Whether one was divided by the scale of its loss, which may be why it is not finite."""
        return any(part.loss_scale is not None for part in self._parts)

    def clear(self) -> None:
        """Forgets them."""
        self._parts = []

    def first_non_finite(self) -> tuple[Tensor, Sequence[PoolingPlan]] | None:
        """The first gradient with an element that is NaN or infinite, and its plans; None: none is.

        On a GPU that waits for the backward pass, not for what came after.
        """
        for part in self._parts:
            part.check()
            if not part.is_finite:
                return part.grad, part.plans
            if part.factor is not None and not math.isfinite(float(part.factor)):
                return part.scaled(), part.plans
        return None

    def evidence(self) -> list[Tensor]:
        """Of each gradient a number [] on its device that is finite just if every element is.

        Waits for no GPU.
        """
        return [part.evidence() for part in self._parts]

    def norms(
        self, stores: Sequence[tuple[Store, PoolingPlan]], norm_type: float
    ) -> list[float | Tensor]:
        """Norms by store, see `Store.gradient_norm`."""
        if not self._parts:
            return []
        return [
            store.gradient_norm(plan, of_store, norm_type)
            for (store, plan), of_store in zip(stores, self._of_stores(stores), strict=True)
        ]

    def apply(
        self,
        stores: Sequence[tuple[Store, PoolingPlan]],
        step: int,
        rate_factor: float = 1.0,
        skip: Tensor | None = None,
    ) -> None:
        """One update of every store. All is checked before the first row changes.

        Args:
          stores: in the order of the look-ups.
          step: number of the update.
          rate_factor: of the learning rates of all tables.
          skip: see `Store.apply_gradients`.

        Raises:
          ConfigError, CapacityError: nothing is applied, and the gradients are kept.
          PartialUpdateError: some rows have taken the step. The gradients are gone, as after
            success, so that none has it twice.
        """
        gradients = self._of_stores(stores)
        if not self._parts:
            return
        if len(stores) > 1:  # one alone checks for itself
            for (store, plan), of_store in zip(stores, gradients, strict=True):
                store.check_gradients(plan, of_store)
        applied, is_taken = 0, False
        try:
            for (store, plan), of_store in zip(stores, gradients, strict=True):
                store.apply_gradients(plan, of_store, step, rate_factor, skip=skip)
                applied += 1
            is_taken = True
        except PartialUpdateError:
            is_taken = True
            raise
        except CapacityError as error:
            if not applied:
                raise
            stepped = [table.name for store, _ in stores[:applied] for table in store.tables]
            raise PartialUpdateError(
                f"step {step} is applied to the tables {', '.join(stepped)}, but not to others; go "
                f"on from a checkpoint: {error}"
            ) from error
        finally:
            if is_taken or applied:
                self.clear()

    def _of_stores(self, stores: Sequence[tuple[Store, PoolingPlan]]) -> list[list[PooledGradient]]:
        gradients: list[list[PooledGradient]] = [[] for _ in stores]
        for part in self._parts:
            part.check()
            grad = part.scaled()
            for of_store, lookup in zip(gradients, part.lookups, strict=True):
                of_store.append(PooledGradient(lookup, None, grad))
        return gradients


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # A sum is one pass, and finite unless something is not, or all are huge.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def describe_non_finite(
    grad: Tensor,
    plans: Sequence[PoolingPlan],
    features: Sequence[FeatureConfig],
    tables: Sequence[TableConfig],
) -> str:
    """Where a gradient of the stores' output, [B, columns of the plans], is NaN or infinite."""
    bad = ~grad.isfinite()
    sample = int(bad.any(1).nonzero()[0])
    dims = {table.name: table.dim for table in tables}
    by_column = bad.sum(0).cpu()
    counts = [0] * len(features)
    for one in (one for plan in plans for one in plan.features):
        width = dims[features[one.packed_feature].table] * (one.max_keys or 1)
        counts[one.packed_feature] = int(by_column[one.column : one.column + width].sum())
    named = [
        f"feature {feature.name!r} of table {feature.table!r} ({count:,})"
        for feature, count in zip(features, counts, strict=True)
        if count
    ]
    more = f" and {len(named) - _MOST_NAMED} others" if len(named) > _MOST_NAMED else ""
    return (
        f"the gradient of the embeddings is NaN or infinite in {int(bad.sum()):,} of "
        f"{bad.numel():,} elements: {', '.join(named[:_MOST_NAMED])}{more}; the first in sample "
        f"{sample} of its batch. No row was updated; lower the learning rates, clip, or look for "
        "extreme inputs"
    )
