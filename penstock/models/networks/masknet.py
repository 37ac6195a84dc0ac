"""MaskNet: blocks that multiply what they read by a mask of all inputs (arXiv:2102.07619)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from penstock.config import MaskNetConfig
from penstock.models.parts.fields import join_fields, numeric_vectors
from penstock.models.parts.inputs import common_dim
from penstock.models.parts.mlp import LogitHead, glorot_linear
from penstock.types import FeatureShape


class FieldNorm(nn.Module):
    """Layer norm of each field by itself, with a scale and a shift of its own.

    Source: arXiv:2102.07619 section 3.
    """

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_fields, dim))
        self.shift = nn.Parameter(torch.zeros(num_fields, dim))

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, D] -> [B, F, D]."""
        return layer_norm(fields, fields.shape[2:]) * self.scale + self.shift


class MaskBlock(nn.Module):
    """ReLU(layer norm(W (mask * x))), the mask a linear MLP of one hidden layer of the embeddings.

    Source: arXiv:2102.07619 section 3.

    Args:
      embeddings: width of what the mask is made of.
      inputs: width of x, and of the mask.
      outputs: width of what comes out.
      reduction: hidden width of the mask's MLP over `inputs`.
    """

    def __init__(self, embeddings: int, inputs: int, outputs: int, reduction: float) -> None:
        super().__init__()
        hidden = max(1, round(inputs * reduction))
        self.mask = nn.Sequential(
            glorot_linear(embeddings, hidden), nn.ReLU(), glorot_linear(hidden, inputs)
        )
        self.hidden = nn.Sequential(
            glorot_linear(inputs, outputs, bias=False), nn.LayerNorm(outputs), nn.ReLU()
        )

    def forward(self, embeddings: Tensor, x: Tensor) -> Tensor:
        """(embeddings [B, E], x [B, inputs]) -> [B, outputs]."""
        out: Tensor = self.hidden(self.mask(embeddings) * x)
        return out


class MaskNet(nn.Module):
    """Mask blocks of the fields, side by side or one on the other, and a deep MLP on them.

    Fields are features and numeric columns, as in `AutoInt`. Every mask is made of the fields as
    they are; what it multiplies is the normalized fields, or (`serial`) the block before.

    Source: arXiv:2102.07619 section 3.
    """

    def __init__(
        self, config: MaskNetConfig, num_numeric: int, features: Sequence[FeatureShape]
    ) -> None:
        super().__init__()
        dim = common_dim(
            config.kind,
            features,
            at_least=2,
            because="each is normalized by itself",
            instead="final_mlp",
        )
        self.dim = config.numeric_dim if dim is None else dim
        self.numeric_vectors = numeric_vectors(num_numeric, self.dim)
        self.num_fields = num_numeric + len(features)
        self.norm = FieldNorm(self.num_fields, self.dim)
        self.is_parallel = config.structure == "parallel"
        width = self.num_fields * self.dim
        inputs = [width] * len(config.blocks) if self.is_parallel else [width, *config.blocks[:-1]]
        self.blocks = nn.ModuleList(
            MaskBlock(width, of_block, outputs, config.reduction)
            for of_block, outputs in zip(inputs, config.blocks, strict=True)
        )
        self.head = LogitHead(
            sum(config.blocks) if self.is_parallel else config.blocks[-1], config.deep
        )

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, F * D]) -> logits [B]."""
        fields = join_fields(dense, self.numeric_vectors, embeddings)
        x = self.norm(fields.view(-1, self.num_fields, self.dim)).flatten(1)
        if self.is_parallel:
            x = torch.cat([block(fields, x) for block in self.blocks], dim=1)
        else:
            for block in self.blocks:
                x = block(fields, x)
        logits: Tensor = self.head(x)
        return logits
