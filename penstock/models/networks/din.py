"""DIN: attention of the candidate over what the user has had before (arXiv:1706.06978)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from penstock.config import DINConfig
from penstock.models.parts.inputs import CandidateAndSequence
from penstock.models.parts.mlp import glorot_linear, regularized
from penstock.types import FeatureShape

_EPS = 1e-8
_MOMENTUM = 0.1
"""Share of a batch in the statistics that evaluation uses."""


class Dice(nn.Module):
    """x * (p + (1 - p) * a), p = sigmoid of x normalized over the batch, a learnt: [N, C] alike.

    Source: arXiv:1706.06978 section 4.3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(width))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C] -> [N, C]; N may be 0."""
        # One row has no variance.
        of_batch = self.training and x.shape[0] > 1
        normed = batch_norm(
            x, self.mean, self.variance, training=of_batch, momentum=_MOMENTUM, eps=_EPS
        )
        gate = torch.sigmoid(normed)
        return x * (gate + (1 - gate) * self.slope)


def activated_mlp(
    inputs: int,
    widths: Sequence[int],
    activation: str,
    dropout: float = 0.0,
    *,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Linear layers, each followed by Dice or PReLU, then one linear output: -> [N, 1]."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [glorot_linear(inputs, width)]
        layers += [Dice(width) if activation == "dice" else nn.PReLU(width)]
        inputs = width
    layers = regularized(layers, dropout, batch_norm=batch_norm)
    return nn.Sequential(*layers, glorot_linear(inputs, 1))


class DIN(nn.Module):
    """Deep interest network: logit = MLP of [interest, candidate, numbers, other features].

    The interest is the sum over the keys of the sequence of a(key, candidate) * key, where a is an
    MLP of [candidate, key, candidate - key, candidate * key], without softmax, so that it tells
    strong interest from weak. The MLP of a reads keys alone: padding takes no part, not even in
    the statistics of Dice.

    Source: arXiv:1706.06978 section 4.2 and 4.3; the inputs of a are those of the authors' code.
    """

    def __init__(
        self, config: DINConfig, num_numeric: int, features: Sequence[FeatureShape]
    ) -> None:
        super().__init__()
        self.inputs = CandidateAndSequence(config.kind, features, config.candidate, config.sequence)
        dim = self.inputs.dim
        self.attention = activated_mlp(4 * dim, config.attention, config.activation)
        width = 2 * dim + num_numeric + self.inputs.others.numel()
        self.deep = activated_mlp(
            width, config.deep, config.activation, config.dropout, batch_norm=config.batch_norm
        )

    def forward(self, dense: Tensor, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """(dense [B, n], embeddings [B, W], lengths [B, 1]) -> logits [B]."""
        candidate, sequence_BLD, is_key_BL, others = self.inputs(embeddings, lengths)
        samples, places = is_key_BL.nonzero(as_tuple=True)
        key_ND, candidate_ND = sequence_BLD[samples, places], candidate[samples]
        pair = (candidate_ND, key_ND, candidate_ND - key_ND, candidate_ND * key_ND)
        share_N = self.attention(torch.cat(pair, dim=1)).squeeze(1)
        share_BL = share_N.new_zeros(is_key_BL.shape).index_put((samples, places), share_N)
        interest = torch.bmm(share_BL.unsqueeze(1), sequence_BLD).squeeze(1)
        logits: Tensor = self.deep(torch.cat((interest, candidate, dense, others), dim=1))
        return logits.squeeze(1)
