"""In-batch softmax: what two towers learn by, and what is measured of their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import Label
from penstock.models import TwoTower
from penstock.training.items import item_ids
from penstock.training.metrics.binary import RankingMetrics
from penstock.training.metrics.sample_metrics import CPU
from penstock.training.objective import Outcome, RunningMetrics
from penstock.training.tasks import BinaryTask, Task
from penstock.types import Batch


class InBatchSoftmax:
    """For each row of label 1: -log of the share of its item among the items of the batch.

    The score of an item is that of the pair, less log p, where p is how often samples have the
    item, estimated as they stream by: popular items are in more batches, so without it they would
    be pushed down for being popular. Other rows with the very item of a row are no negatives of it
    and are left out. The loss is the mean over the rows, weighted by label and sample weight.

    Source: doi:10.1145/3298689.3346996 (Yi et al., RecSys 2019) section 4. Differs: p is counted
    (`FrequencySketch`) instead of taken from the steps between two occurrences, which cannot tell
    an item that comes once a batch from one that comes often.

    Args:
      label: binary.
    """

    def __init__(self, label: Label) -> None:
        self.tasks: tuple[Task, ...] = (BinaryTask(label, gives_logits=False),)

    def __call__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        batch: Batch,
        totals: Tensor | None = None,
    ) -> Outcome:
        """See `Objective`; also counts the batch's items in the model's frequencies."""
        assert isinstance(model, TwoTower)
        dense, embeddings = inputs
        users, items = model.users(dense, embeddings), model.items(embeddings)
        ids = item_ids(batch.sparse, model.item_features)
        scores_BB = users @ items.t() / model.temperature
        is_other_of_same = (ids.unsqueeze(1) == ids).fill_diagonal_(False)
        logits_BB = scores_BB - model.frequencies.observe(ids)
        logits_BB = logits_BB.masked_fill(is_other_of_same, -math.inf)
        losses = logits_BB.logsumexp(1) - logits_BB.diagonal()
        weights = _weights(batch)
        total = weights.sum() if totals is None else totals[0]
        total = total.clamp_min(torch.finfo(torch.float32).tiny)
        return Outcome((losses * weights).sum() / total, scores_BB.diagonal())

    def total_weights(self, batch: Batch) -> Tensor:
        """See `Objective`; the weights of positives."""
        return _weights(batch).sum(dtype=torch.float32).reshape(1)

    def metrics(self, device: torch.device = CPU) -> RunningMetrics:
        """Mean loss, and the AUC of the pairs' scores where there are negatives."""
        return RunningRankingMetrics(device)

    def scores(self, outputs: Tensor) -> dict[str, Tensor]:
        """The scores of the pairs as they are: they are no probabilities."""
        (task,) = self.tasks
        return {task.name: task.prediction(outputs)}


class RunningRankingMetrics:
    """Mean loss of training steps, weighted by their positives, and `RankingMetrics`."""

    def __init__(self, device: torch.device = CPU) -> None:
        self._ranking = RankingMetrics(device=device)
        # Sum of the loss times the weight of the positives, and that weight.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, batch: Batch, outputs: Tensor, loss: float) -> None:
        """See `RunningMetrics`."""
        self._ranking.update(outputs, batch.labels, batch.weights)
        weights = batch.labels if batch.weights is None else batch.labels * batch.weights
        positive = weights.sum(dtype=torch.float64)
        self._sums += torch.stack((positive * loss, positive))

    def compute(self) -> dict[str, Any]:
        """loss: NaN without positives; then what `RankingMetrics.compute` gives."""
        loss, positive = self._sums.tolist()
        return {"loss": loss / positive if positive else math.nan, **self._ranking.compute()}

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors."""
        return {"loss_sums": self._sums.to("cpu", copy=True), **self._ranking.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self._sums = state["loss_sums"].to(self._sums.device, copy=True)
        self._ranking.load_state_dict(state)


def _weights(batch: Batch) -> Tensor:
    """[B] of the rows in the loss; 0 of those that are no positives."""
    return batch.labels if batch.weights is None else batch.labels * batch.weights
