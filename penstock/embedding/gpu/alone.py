"""Verbs of a GPU store, one at a time, whichever threads call them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from penstock.errors import CapacityError

Verb = TypeVar("Verb", bound=Callable[..., Any])


def alone(verb: Verb) -> Verb:
    """A verb that runs alone in its store, and says what was short if the GPU has no memory.

    The store has a lock that a thread may take again, `_lock`, and a `_name` for messages.
    """

    @wraps(verb)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        with self._lock:
            try:
                return verb(self, *arguments, **named)
            except torch.OutOfMemoryError as error:
                raise CapacityError(
                    f"{self._name}: no working memory for {verb.__name__}; use smaller batches, or "
                    f"free memory of the GPU ({error})"
                ) from None

    return cast("Verb", call)
