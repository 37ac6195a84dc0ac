"""HSTU: attention without softmax along a sequence up to the candidate (arXiv:2402.17152)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from penstock.config import HSTUConfig
from penstock.errors import ConfigError
from penstock.models.parts.inputs import CandidateAndSequence
from penstock.models.parts.mlp import LogitHead, glorot_linear
from penstock.types import FeatureShape


class HSTULayer(nn.Module):
    """x + W (norm(A V) * U); U, V, Q, K = SiLU(linear of norm(x)), A = SiLU(Q K^T + r) / T.

    A is causal; r is a learnt bias for each distance. T positions; heads as in other attention.

    Source: arXiv:2402.17152 section 3, equations (1) to (3), without the bias of the times.
    """

    def __init__(self, dim: int, heads: int, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.uvqk = glorot_linear(dim, 4 * dim, bias=False)
        self.distance_bias = nn.Parameter(torch.zeros(positions))
        self.out_norm = nn.LayerNorm(dim)
        self.out = glorot_linear(dim, dim)
        distance = torch.arange(positions).unsqueeze(1) - torch.arange(positions)
        # Not persistent: they follow from the number of positions.
        self.distance: Tensor
        self.is_causal: Tensor
        self.register_buffer("distance", distance.clamp(min=0), persistent=False)
        self.register_buffer("is_causal", distance >= 0, persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; what comes out at a position depends on it and those before."""
        samples, positions, dim = x_BTD.shape
        u, *vqk = silu(self.uvqk(self.norm(x_BTD))).chunk(4, dim=2)
        of_head = (samples, positions, self.heads, dim // self.heads)
        v, q, k = (part.reshape(of_head).transpose(1, 2) for part in vqk)
        attention_BHTT = silu(q @ k.transpose(2, 3) + self.distance_bias[self.distance])
        mixed_BHTd = (attention_BHTT * self.is_causal) @ v / positions
        mixed_BTD = mixed_BHTd.transpose(1, 2).flatten(2)
        added: Tensor = self.out(self.out_norm(mixed_BTD) * u)
        return x_BTD + added


class HSTU(nn.Module):
    """Logit = MLP of [what HSTU layers give at the candidate, numbers, other features].

    The sequence is the keys, oldest first, then the candidate right behind the last of them, then
    padding, which no position before it sees.

    Source: arXiv:2402.17152 section 3. Differs: one sequence of one kind of keys; no times; the
    candidate's output goes through an MLP with the other inputs.
    """

    def __init__(
        self, config: HSTUConfig, num_numeric: int, features: Sequence[FeatureShape]
    ) -> None:
        super().__init__()
        self.inputs = CandidateAndSequence(config.kind, features, config.candidate, config.sequence)
        dim, positions = self.inputs.dim, self.inputs.length + 1
        if dim % config.heads:
            raise ConfigError(
                f"model hstu: {config.heads} heads do not divide the embedding dim {dim}; change "
                "model.heads or the dim of the table"
            )
        self.layers = nn.Sequential(
            *(HSTULayer(dim, config.heads, positions) for _ in range(config.layers))
        )
        width = dim + num_numeric + self.inputs.others.numel()
        self.head = LogitHead(width, config.deep)

    def forward(self, dense: Tensor, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """(dense [B, n], embeddings [B, W], lengths [B, 1]) -> logits [B]."""
        candidate, sequence_BLD, _, others = self.inputs(embeddings, lengths)
        at_candidate = lengths.unsqueeze(2).expand(-1, 1, self.inputs.dim)
        x_BTD = nn.functional.pad(sequence_BLD, (0, 0, 0, 1))
        x_BTD = x_BTD.scatter(1, at_candidate, candidate.unsqueeze(1))
        seen = self.layers(x_BTD).gather(1, at_candidate).squeeze(1)
        logits: Tensor = self.head(torch.cat((seen, dense, others), dim=1))
        return logits
