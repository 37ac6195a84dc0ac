"""Recall: whether the best of all items for a user hold the one that was taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.models import TwoTower
from penstock.training.items import Catalogue, item_ids
from penstock.types import Batch

_ITEMS_AT_ONCE = 8192
_BLOCK = 512
_ROUNDING = 1e-6
"""Of a dot product in float32, whose sum has another order in a matrix product; over the norms."""


class Recall:
    """Share of the positives whose item is among the k best of a catalogue, by weight.

    An item's rank is the number of other items with a higher score, and half of those with an
    equal one (up to rounding), so that a model that tells nothing apart gains nothing. All items
    of the catalogue are candidates, those that the user has had before too. The item vectors are
    made once, with the model as it is now.

    Args:
      catalogue: the candidates.
      at: each k.
      model: in evaluation mode.
      collection: likewise.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        at: Sequence[int],
        model: TwoTower,
        collection: EmbeddingCollection,
    ) -> None:
        self._catalogue = catalogue
        self._at = tuple(at)
        self._model = model
        count = len(catalogue.ids)
        parts = [
            torch.arange(first, min(first + _ITEMS_AT_ONCE, count))
            for first in range(0, count, _ITEMS_AT_ONCE)
        ]
        with torch.no_grad():
            made = [model.items(collection(catalogue.packed(part))) for part in parts]
        self._vectors = torch.cat(made) if made else torch.zeros(0, 1)
        self._hits = torch.zeros(len(self._at), dtype=torch.float64)
        self._weight = torch.zeros((), dtype=torch.float64)

    def update(self, batch: Batch, inputs: tuple[Tensor, ...]) -> None:
        """Ranks the items of the positives of a batch.

        Args:
          batch: with labels.
          inputs: of the model, on its device.
        """
        dense, embeddings = inputs
        chosen = batch.labels > 0.5
        with torch.no_grad():
            there = chosen.to(dense.device)
            users = self._model.users(dense[there], embeddings[there])
            items = self._model.items(embeddings[there])
        ids = item_ids(batch.sparse, self._model.item_features)[chosen]
        ranks = self._ranks(users, items, ids)
        weight = torch.ones(len(ids)) if batch.weights is None else batch.weights[chosen]
        is_hit = ranks.unsqueeze(0) < torch.tensor(self._at).unsqueeze(1)
        self._hits += (is_hit * weight.to(torch.float64)).sum(1)
        self._weight += weight.sum(dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """What was found.

        Returns:
          recall_at_<k> for each k; NaN without positives. recall_candidates: number of items;
          where the catalogue had to leave some out, recall is that among the rest, which is higher.
        """
        shares = (self._hits / self._weight).tolist()
        found: dict[str, float] = {
            f"recall_at_{k}": share for k, share in zip(self._at, shares, strict=True)
        }
        return {**found, "recall_candidates": len(self._vectors)}

    def _ranks(self, users: Tensor, items: Tensor, ids: Tensor) -> Tensor:
        """[P] rank of each user's own item, from 0, in halves."""
        own_score = (users * items).sum(1, keepdim=True)
        slack = _ROUNDING * users.norm(dim=1, keepdim=True) * items.norm(dim=1, keepdim=True)
        place = torch.searchsorted(self._catalogue.ids, ids)
        known = place.clamp(max=max(len(self._vectors) - 1, 0))
        is_known = self._catalogue.ids[known] == ids if len(self._vectors) else ids != ids
        known, is_known = known.to(users.device), is_known.to(users.device)
        ranks = torch.zeros(len(ids), device=users.device)
        # In blocks of scores that stay in cache: four times as fast as one large product.
        for low in range(0, len(ids), _BLOCK):
            rows = slice(low, low + _BLOCK)
            best, worst = own_score[rows] + slack[rows], own_score[rows] - slack[rows]
            for first in range(0, len(self._vectors), _BLOCK):
                scores = users[rows] @ self._vectors[first : first + _BLOCK].t()
                # The own item does not compete with itself, whatever the rounding of its score.
                at = known[rows] - first
                mine = (is_known[rows] & (at >= 0) & (at < scores.shape[1])).nonzero()[:, 0]
                scores[mine, at[mine]] = -torch.inf
                ranks[rows] += 0.5 * ((scores > best).sum(1) + (scores >= worst).sum(1))
        return ranks.cpu()
