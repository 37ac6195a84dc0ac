"""xDeepFM: products of fields of any order, compressed layer by layer (arXiv:1803.05170)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from penstock.config import XDeepFMConfig
from penstock.models.parts.fields import join_fields, numeric_vectors
from penstock.models.parts.first_order import FirstOrder, vector_dim
from penstock.models.parts.mlp import LogitHead, glorot_linear
from penstock.types import FeatureShape


class CompressedInteractions(nn.Module):
    """Compressed interaction network: [B, F, D] -> sums of the vectors of all layers, [B, sum H].

    Vector h of layer k is sum over i, j of W_k[h, i, j] (vector i of layer k - 1) * (field j),
    column by column; the fields themselves are layer 0. Each vector of each layer is summed over
    its D columns.

    Source: arXiv:1803.05170 section 3.2.
    """

    def __init__(self, num_fields: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            glorot_linear(before * num_fields, width, bias=False)
            for before, width in zip((num_fields, *widths[:-1]), widths, strict=True)
        )

    def forward(self, fields: Tensor) -> Tensor:
        """[B, F, D] -> [B, sum H]."""
        # Columns before fields, so that a layer is one matrix product.
        fields_BDF = fields.transpose(1, 2)
        vectors_BDH = fields_BDF
        sums = []
        for layer in self.layers:
            products = vectors_BDH.unsqueeze(3) * fields_BDF.unsqueeze(2)
            vectors_BDH = layer(products.flatten(2))
            sums.append(vectors_BDH.sum(1))
        return torch.cat(sums, dim=1)


class XDeepFM(nn.Module):
    """logit = linear term + linear in the compressed interactions + deep MLP of all vectors.

    Fields, and where the weights of the linear term lie, are as in `DeepFM`.

    Source: arXiv:1803.05170 section 3.4. Layers of interactions have no activation, which the paper
    finds best; all of their vectors are summed and go on.
    """

    def __init__(
        self, config: XDeepFMConfig, num_numeric: int, features: Sequence[FeatureShape]
    ) -> None:
        super().__init__()
        self.dim = vector_dim(config.kind, features, config.numeric_dim)
        self.first_order = FirstOrder(num_numeric, [feature.dim for feature in features])
        self.numeric_vectors = numeric_vectors(num_numeric, self.dim)
        self.num_fields = num_numeric + len(features)
        self.interactions = CompressedInteractions(self.num_fields, config.interactions)
        self.of_interactions = glorot_linear(sum(config.interactions), 1, bias=False)
        self.deep = LogitHead(self.num_fields * self.dim, config.deep)

    def forward(self, dense: Tensor, embeddings: Tensor) -> Tensor:
        """(dense [B, numeric columns], embeddings [B, F * D]) -> logits [B]."""
        linear, vectors = self.first_order(dense, embeddings)
        fields = join_fields(dense, self.numeric_vectors, vectors)
        sums = self.interactions(fields.view(-1, self.num_fields, self.dim))
        logits: Tensor = linear + self.of_interactions(sums).squeeze(1) + self.deep(fields)
        return logits
