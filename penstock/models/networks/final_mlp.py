"""FinalMLP: two MLPs of gated inputs, joined by a bilinear form (arXiv:2304.00902)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import FinalMLPConfig
from penstock.models.parts.inputs import columns_where, pooled_dims, which_match
from penstock.models.parts.mlp import MLP, glorot_linear
from penstock.types import FeatureShape

_LEARNT_CONTEXT = 16
"""Width of what a gate reads that reads no feature."""


class InputGate(nn.Module):
    """Weighs the inputs of a stream: x * 2 sigmoid(MLP(context)).

    The context is the embeddings of some features, or a learnt vector.

    Source: arXiv:2304.00902 (AAAI 2023), stream-specific feature selection.

    Args:
      width: of x.
      hidden: hidden widths of the MLP.
      columns: of the context in the embeddings; none: a learnt vector.
    """

    def __init__(self, width: int, hidden: Sequence[int], columns: Tensor) -> None:
        super().__init__()
        # Not persistent: they follow from the features.
        self.columns: Tensor
        self.register_buffer("columns", columns, persistent=False)
        self.constant: nn.Parameter | None = None
        if not columns.numel():
            # Not zero, where the ReLU behind it would never learn.
            self.constant = nn.Parameter(torch.randn(_LEARNT_CONTEXT) * _LEARNT_CONTEXT**-0.5)
        self.hidden = MLP(columns.numel() or _LEARNT_CONTEXT, hidden, is_gate=True)
        self.weights = glorot_linear(self.hidden.outputs, width)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """(x [B, width], embeddings [B, W]) -> [B, width]."""
        context: Tensor | None = self.constant
        if context is None:
            context = embeddings.index_select(1, self.columns)
        return x * (2 * torch.sigmoid(self.weights(self.hidden(context))))


class BilinearFusion(nn.Module):
    """logit = bias + linear in both + sum over heads of first_h . (W_h second_h).

    Source: arXiv:2304.00902 (AAAI 2023), stream-level interaction aggregation.
    """

    def __init__(self, first: int, second: int, heads: int) -> None:
        super().__init__()
        self.linear = glorot_linear(first + second, 1)
        self.bilinear = nn.Parameter(torch.empty(heads, first // heads, second // heads))
        # As one linear layer of all products.
        nn.init.normal_(self.bilinear, std=(2 / (self.bilinear.numel() + 1)) ** 0.5)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """(first [B, P], second [B, Q]) -> [B]."""
        linear = self.linear(torch.cat((first, second), dim=1)).squeeze(1)
        heads, rows, columns = self.bilinear.shape
        first_BHP = first.view(-1, heads, rows)
        second_BHQ = second.view(-1, heads, columns)
        products = torch.einsum("bhp,hpq->bhq", first_BHP, self.bilinear) * second_BHQ
        logits: Tensor = linear + products.sum((1, 2))
        return logits


class FinalMLP(nn.Module):
    """Two streams: an MLP each of all inputs, weighed by a gate of its own; then `BilinearFusion`.

    The inputs are numbers and embeddings, of any dims.

    Source: arXiv:2304.00902 (AAAI 2023). Differs: numbers enter as they are.
    """

    def __init__(
        self, config: FinalMLPConfig, num_numeric: int, features: Sequence[FeatureShape]
    ) -> None:
        super().__init__()
        width = num_numeric + sum(pooled_dims(config.kind, features))
        contexts = [
            columns_where(which_match("first_context", config.first_context, features), features),
            columns_where(which_match("second_context", config.second_context, features), features),
        ]
        gated = [] if config.gate is None else contexts
        self.gates = nn.ModuleList(InputGate(width, config.gate or (), one) for one in gated)
        self.streams = nn.ModuleList([MLP(width, config.first), MLP(width, config.second)])
        self.fusion = BilinearFusion(config.first[-1], config.second[-1], config.heads)

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, sum of dims]) -> logits [B]."""
        x = torch.cat((dense, embeddings), dim=1)
        inputs = [gate(x, embeddings) for gate in self.gates] or [x, x]
        first, second = (
            stream(of_stream) for stream, of_stream in zip(self.streams, inputs, strict=True)
        )
        logits: Tensor = self.fusion(first, second)
        return logits
