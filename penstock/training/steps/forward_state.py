"""What a forward pass changes besides rows: kept from before it, for a step that fails."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from penstock.embedding.collection.collection import EmbeddingCollection

_MOST_BYTES = 1 << 20
"""Of buffers: copying more would take a share of the step that one notices."""


class ForwardState:
    """Persistent buffers of a model (running statistics), torch's generators, the row clock.

    Rows that a failed batch was the first to meet stay; they hold their initial values.
    """

    def __init__(self, model: nn.Module, collection: EmbeddingCollection) -> None:
        persistent = set(model.state_dict(keep_vars=True))
        self._model = model
        self._collection = collection
        self._clock = replace(collection.row_clock)
        self._places = [
            (module, name)
            for prefix, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and (f"{prefix}.{name}" if prefix else name) in persistent
        ]
        size = sum(buffer.nbytes for buffer in self._buffers())
        self.is_complete = size <= _MOST_BYTES
        """False: the model has so large buffers that they are not kept."""
        self._kept: list[Tensor] = []
        self._generator = torch.get_rng_state()
        self._gpu_generator: Tensor | None = None

    def keep(self) -> None:
        """Remembers the state as it is. On a GPU, waits for nothing."""
        if self.is_complete and self._places:
            self._kept = [buffer.clone() for buffer in self._buffers()]
        self._clock = replace(self._collection.row_clock)
        self._generator = torch.get_rng_state()
        device = self._collection.device
        if device.type == "cuda":
            self._gpu_generator = torch.cuda.get_rng_state(device)

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes the state that of the last `keep`, and drops gradients."""
        for (module, name), kept in zip(self._places, self._kept, strict=False):
            module._buffers[name] = kept
        torch.set_rng_state(self._generator)
        if self._gpu_generator is not None:
            torch.cuda.set_rng_state(self._gpu_generator, self._collection.device)
        self._collection.row_clock.set_state(self._clock.state())
        self._collection.discard_gradients()
        self._model.zero_grad(set_to_none=True)

    def _buffers(self) -> list[Tensor]:
        found = (module._buffers[name] for module, name in self._places)
        return [buffer for buffer in found if buffer is not None]
