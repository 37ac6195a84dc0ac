"""Gradients between backward and the update: checked together, given to the stores once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from penstock.embedding.store import PooledGradient, PooledLookup, PoolingPlan, Store
from penstock.errors import CapacityError, ConfigError, PartialUpdateError


class _Pending(NamedTuple):
    """The gradient of one output."""

    lookups: Sequence[PooledLookup]
    """Of each store."""
    grad: Tensor
    """Perhaps the caller's own: it is as large as the output, and a copy would cost a fifth of a
    step.
    """
    version: int
    """Of `grad` when it came: torch counts what changes it in place."""

    def check(self) -> None:
        """Refuses a gradient that was changed since."""
        if self.grad._version != self.version:
            raise ConfigError(
                "a gradient of the embeddings was changed in place between backward and "
                "apply_gradients; scale the loss instead, or change the gradient in a hook of the "
                "output (register_hook), or give backward a copy"
            )


class PendingGradients:
    """The gradients of backward passes since the last update."""

    def __init__(self) -> None:
        """None."""
        self._parts: list[_Pending] = []

    def __len__(self) -> int:
        """Outputs that have one."""
        return len(self._parts)

    def add(self, lookups: Sequence[PooledLookup], grad: Tensor) -> None:
        """Keeps the gradient of an output; several of one, of a graph that was kept, add up.

        Args:
          lookups: of the output, one a store.
          grad: [B, W] float32, contiguous; not copied, and not to be changed.
        """
        for n, part in enumerate(self._parts):
            if part.lookups is lookups:
                part.check()
                total = part.grad + grad
                self._parts[n] = _Pending(lookups, total, total._version)
                return
        self._parts.append(_Pending(lookups, grad, grad._version))

    def clear(self) -> None:
        """Forgets them."""
        self._parts = []

    def apply(self, stores: Sequence[tuple[Store, PoolingPlan]], step: int) -> None:
        """One update of every store. All is checked before the first row changes.

        Raises:
          ConfigError, CapacityError: nothing is applied, and the gradients are kept.
          PartialUpdateError: some rows have taken the step. The gradients are gone, as after
            success, so that none has it twice.
        """
        gradients: list[list[PooledGradient]] = [[] for _ in stores]
        for part in self._parts:
            part.check()
            for of_store, lookup in zip(gradients, part.lookups, strict=True):
                of_store.append(PooledGradient(lookup, None, part.grad))
        if not self._parts:
            return
        if len(stores) > 1:  # one alone checks for itself
            for (store, plan), of_store in zip(stores, gradients, strict=True):
                store.check_gradients(plan, of_store)
        applied, is_taken = 0, False
        try:
            for (store, plan), of_store in zip(stores, gradients, strict=True):
                store.apply_gradients(plan, of_store, step)
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
