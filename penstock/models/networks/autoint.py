"""AutoInt: layers of attention among the fields of a sample (arXiv:1810.11921)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import AutoIntConfig
from penstock.models.parts.fields import join_fields, numeric_vectors
from penstock.models.parts.inputs import common_dim
from penstock.models.parts.mlp import LogitHead, glorot_linear
from penstock.types import FeatureShape


class InteractingLayer(nn.Module):
    """Attention of each field over all fields, by several heads.

    Field m of a head becomes sum over k of softmax_k(query_m . key_k) value_k; the heads are
    joined, and ReLU(joined + field) comes out, the field projected if its width differs.

    Source: arXiv:1810.11921 section 4.4, formulas (5) to (8).
    """

    def __init__(self, inputs: int, heads: int, outputs: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = glorot_linear(inputs, outputs, bias=False)
        self.key = glorot_linear(inputs, outputs, bias=False)
        self.value = glorot_linear(inputs, outputs, bias=False)
        self.residual = (
            nn.Identity() if inputs == outputs else glorot_linear(inputs, outputs, bias=False)
        )

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, inputs] -> [B, F, outputs]."""
        query, key, value = (
            part(fields).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        shares_BHFF = torch.softmax(query @ key.transpose(2, 3), dim=3)
        joined = (shares_BHFF @ value).transpose(1, 2).flatten(2)
        return torch.relu(joined + self.residual(fields))


class AutoInt(nn.Module):
    """logit = linear in the fields behind the attention, + deep MLP of the fields if there is one.

    Source: arXiv:1810.11921 section 4; with an MLP, its AutoInt+ (section 5.5). Numbers are fields
    as in its section 4.3: value times a learnt vector.
    """

    def __init__(
        self, config: AutoIntConfig, num_numeric: int, features: Sequence[FeatureShape]
    ) -> None:
        super().__init__()
        dim = common_dim(config.kind, features, instead="dcn_v2")
        self.dim = config.numeric_dim if dim is None else dim
        self.numeric_vectors = numeric_vectors(num_numeric, self.dim)
        self.num_fields = num_numeric + len(features)
        widths = [self.dim, *[config.attention] * config.layers]
        self.attention = nn.Sequential(*[
            InteractingLayer(inputs, config.heads, outputs)
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
        ])
        self.head = LogitHead(self.num_fields * config.attention, ())
        self.deep = LogitHead(self.num_fields * self.dim, config.deep) if config.deep else None

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, F * D]) -> logits [B]."""
        fields = join_fields(dense, self.numeric_vectors, embeddings)
        by_field = fields.view(-1, self.num_fields, self.dim)
        logits: Tensor = self.head(self.attention(by_field).flatten(1))
        return logits if self.deep is None else logits + self.deep(fields)
