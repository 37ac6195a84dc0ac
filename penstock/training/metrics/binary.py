"""Metrics of a click predictor, summed batch by batch in bounded memory.

The state is additive: metrics of two parts of a data set merge into those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from penstock.errors import DataError, NonFiniteError
from penstock.training.metrics.sample_metrics import CPU

MAX_BINS = 1 << 20
"""Bins of the histogram behind the AUC; with them it takes 20 MB."""
_PENDING_LOGITS = {"cpu": 1 << 16, "cuda": 1 << 19}
"""Samples kept as they came until they are summed: many small batches cost as one."""
_PENDING_SAMPLES = 1 << 19
"""Samples kept as they came until they are sorted into the histogram."""


class BinaryMetrics:
    """Log loss, normalized entropy, AUC and calibration of logits against labels in {0, 1}.

    Sums are float64. The AUC counts equal scores half. It comes from a histogram of the scores,
    one bin for each float32 value, so it is exact as long as at most `MAX_BINS` different ones
    came. Beyond that, neighbouring bins are joined two by two (the last bit of every score is
    dropped) until they fit: with any number of samples a bin is then at most about 2^-12 of its
    score wide, and the error stays below 1e-4 unless most scores lie closer together than that.
    The bins depend on the set of scores alone, not on their order.

    Args:
      max_bins: different scores that are told apart, 20 bytes each; None: all, for an exact AUC.
      device: where samples are kept and summed. A GPU is waited for once in some 2^19 samples, not
        at every update; there weighted sums have the same bits again just if torch's deterministic
        algorithms are used.
    """

    def __init__(self, max_bins: int | None = MAX_BINS, device: torch.device = CPU) -> None:
        self._device = device
        # Weighted sums of: loss, prediction, label, one; then the numbers of samples, positives.
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self._histogram = _ScoreHistogram(max_bins, device)
        self._pending: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._num_pending = 0
        self._num_in_histogram = 0
        """Of the pending updates, the first so many."""

    def update(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Adds samples.

        Args:
          logits: [B] any float type.
          labels: [B] in {0, 1}; a probability in between counts as a part of each.
          weights: [B] >= 0; None: 1 each.

        Raises:
          NonFiniteError: a logit is NaN or infinite; on a GPU when it is summed up.
          DataError: a label is NaN, which is how data without a label column reads; as before.
        """
        scores = logits.detach().to(self._device, torch.float32, copy=True)
        labels = labels.detach().to(self._device, torch.float32, copy=True)
        if not scores.is_cuda:
            _check(scores, labels)
        if weights is not None:
            weights = weights.detach().to(self._device, torch.float32, copy=True)
        self._pending.append((scores, labels, weights))
        self._num_pending += scores.numel()
        if self._num_pending >= _PENDING_LOGITS[self._device.type]:
            self._settle()

    def _settle(self) -> None:
        """Adds what is pending to the histogram and the sums."""
        self._settle_histogram()
        self._sums = self._all_sums()
        self._pending.clear()
        self._num_pending = self._num_in_histogram = 0

    def _settle_histogram(self) -> None:
        """Adds what is pending to the histogram alone: its weights do not depend on when."""
        scores, label, weight = self._join_pending(self._num_in_histogram)
        self._num_in_histogram = len(self._pending)
        if scores.is_cuda:
            _check(scores, label)
        if scores.numel():
            self._histogram.add(scores.to(torch.float32), label * weight, (1 - label) * weight)

    def _all_sums(self) -> Tensor:
        """The sums with those of what is pending, which stays so."""
        if not self._pending:
            return self._sums
        logit, label, weight = self._join_pending()
        # -log(p) for label 1, -log(1 - p) for label 0, without computing p.
        loss = logit.clamp(min=0) - logit * label + torch.log1p(torch.exp(-logit.abs()))
        total = weight.sum()
        return self._sums + torch.stack((
            (loss * weight).sum(),
            (torch.sigmoid(logit) * weight).sum(),
            (label * weight).sum(),
            total,
            torch.full_like(total, label.numel()),
            (label > 0.5).sum(dtype=torch.float64),
        ))

    def _join_pending(self, start: int = 0) -> Tensor:
        """[3, samples] float64: logits (of float32), labels, weights; from update `start` on."""
        pending = self._pending[start:]
        if not pending:
            return torch.zeros(3, 0, dtype=torch.float64, device=self._device)
        scores, labels, weights = zip(*pending, strict=True)
        given = [
            torch.ones_like(score) if weight is None else weight
            for score, weight in zip(scores, weights, strict=True)
        ]
        return torch.stack([
            torch.cat([part.to(torch.float64) for part in parts])
            for parts in (scores, labels, given)
        ])

    def merge(self, other: BinaryMetrics) -> None:
        """Adds all samples of `other`, which stays as it is."""
        self._settle()
        other._settle()
        self._sums += other._sums
        self._histogram.merge(other._histogram)

    def compute(self) -> dict[str, float]:
        """The metrics of all samples so far.

        Returns:
          log_loss: mean, natural logarithm.
          normalized_entropy: log_loss over that of always predicting the mean label; below 1 is
            better than that.
          auc: probability that a positive has a larger logit than a negative.
          calibration: mean prediction over mean label.
          samples, positives: numbers of samples, without weights.

          NaN where undefined: all of them without samples (or weight), auc and
          normalized_entropy with labels of one class, calibration without positives.
        """
        self._settle_histogram()
        loss, prediction, label, weight, samples, positives = self._all_sums().tolist()
        log_loss = loss / weight if weight else math.nan
        entropy = _entropy(label / weight) if weight else math.nan
        return {
            "auc": self._histogram.auc(),
            "log_loss": log_loss,
            "normalized_entropy": log_loss / entropy if entropy else math.nan,
            "calibration": prediction / label if label else math.nan,
            "samples": int(samples),
            "positives": int(positives),
        }

    def calibration_buckets(self, count: int) -> list[list[float]]:
        """Predicted and observed rates by the height of the score.

        Returns:
          At most `count` buckets of about equal weight, from low to high scores, each a list of
          mean prediction, mean label and weight. Equal scores lie in one bucket. The prediction is
          that of the first score of each bin of the histogram.
        """
        self._settle_histogram()
        return self._histogram.buckets(count)

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors of fixed names; not shared with this object.

        What is pending stays so, that the sums are rounded as if nobody had asked.
        """
        self._settle_histogram()
        state = {"sums": self._sums.clone(), "pending": self._join_pending()}
        state |= self._histogram.state_dict()
        return {name: one.cpu() for name, one in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`; replaces what was there."""
        self._sums = state["sums"].to(self._device, copy=True)
        scores, labels, weights = state["pending"].to(self._device, copy=True)
        self._pending = [(scores, labels, weights)] if len(scores) else []
        self._num_pending = len(scores)
        self._num_in_histogram = len(self._pending)
        self._histogram.load_state_dict(state)


class RankingMetrics:
    """AUC of scores that are no logits: where labels are of one class, only their number."""

    def __init__(self, max_bins: int | None = MAX_BINS, device: torch.device = CPU) -> None:
        self._binary = BinaryMetrics(max_bins, device)

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Adds samples; see `BinaryMetrics.update`."""
        self._binary.update(scores, labels, weights)

    def compute(self) -> dict[str, float]:
        """The AUC if there is one; samples and positives."""
        found = self._binary.compute()
        auc = {} if math.isnan(found["auc"]) else {"auc": found["auc"]}
        return {**auc, "samples": found["samples"], "positives": found["positives"]}

    def state_dict(self) -> dict[str, Tensor]:
        """All state as tensors."""
        return self._binary.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self._binary.load_state_dict(state)


def auc_of_scores(scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Exact AUC of any scores, equal ones half; NaN with labels of one class or no sample.

    Args:
      scores: [B] float32; logits, probabilities, or anything that grows with them.
      labels: [B] in {0, 1}.
      weights: [B] >= 0; None: 1 each.
    """
    histogram = _ScoreHistogram(None, CPU)
    label = labels.to(torch.float64)
    weight = torch.ones_like(label) if weights is None else weights.to(torch.float64)
    histogram.add(scores.to(torch.float32), label * weight, (1 - label) * weight)
    return histogram.auc()


def logits_of_probabilities(probabilities: Tensor) -> Tensor:
    """[B] probabilities in [0, 1] -> [B] float32 logits, finite: 0 and 1 become -+36.7."""
    smallest = 2.0**-53
    return torch.logit(probabilities.to(torch.float64), eps=smallest).to(torch.float32)


def _check(scores: Tensor, labels: Tensor) -> None:
    # A sum is one pass; it is finite unless something is not, or all are huge.
    if not math.isfinite(float(scores.sum())):
        bad = scores.numel() - int(torch.isfinite(scores).sum())
        if bad:
            raise NonFiniteError(f"{bad} of {scores.numel()} logits are NaN or infinite")
    if math.isnan(float(labels.sum())):
        raise DataError("metrics need labels, but the data has no label column")


def _entropy(probability: float) -> float:
    """Log loss of always predicting `probability` where it is the mean label, in nats."""
    if not 0.0 < probability < 1.0:
        return 0.0
    rest = 1.0 - probability
    return -probability * math.log(probability) - rest * math.log(rest)


class _ScoreHistogram:
    """Weight of positives and negatives by score.

    A bin is a run of 2 ** shift neighbouring float32 values. Only bins that are not empty are
    kept, in order.
    """

    def __init__(self, max_bins: int | None, device: torch.device) -> None:
        self._max_bins = max_bins
        self._shift = 0
        self._bins = torch.zeros(0, dtype=torch.int32, device=device)
        self._positive = torch.zeros(0, dtype=torch.float64, device=device)
        self._negative = torch.zeros(0, dtype=torch.float64, device=device)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_pending = 0

    def add(self, scores: Tensor, positive: Tensor, negative: Tensor) -> None:
        """Adds [B] float32 scores with their [B] float64 weights; keeps the weights' tensors."""
        self._pending.append((_ordered_bits(scores), positive, negative))
        self._num_pending += scores.numel()
        if self._num_pending >= _PENDING_SAMPLES:
            self._settle()

    def merge(self, other: _ScoreHistogram) -> None:
        self._settle()
        other._settle()
        self._coarsen(max(self._shift, other._shift))
        self._pending.append((
            # Back to the first float32 value of the bin, as if that had been the score.
            other._bins << other._shift,
            other._positive,
            other._negative,
        ))
        self._settle()

    def auc(self) -> float:
        self._settle()
        weight = float(self._positive.sum()) * float(self._negative.sum())
        if not weight:
            return math.nan
        below = self._negative.cumsum(0) - 0.5 * self._negative
        return float((self._positive * below).sum()) / weight

    def buckets(self, count: int) -> list[list[float]]:
        self._settle()
        weight = self._positive + self._negative
        total = float(weight.sum())
        if not total:
            return []
        middle = weight.cumsum(0) - 0.5 * weight
        bucket = (middle * (count / total)).to(torch.int64).clamp(max=count - 1)
        scores = _score_of_bits(self._bins << self._shift).to(torch.float64)
        sums = torch.zeros(3, count, dtype=torch.float64, device=self._bins.device)
        for row, amount in enumerate((torch.sigmoid(scores) * weight, self._positive, weight)):
            sums[row].index_add_(0, bucket, amount)
        sums = sums[:, sums[2] > 0]
        rates: list[list[float]] = torch.stack((*(sums[:2] / sums[2]), sums[2]), 1).tolist()
        return rates

    def state_dict(self) -> dict[str, Tensor]:
        self._settle()
        return {
            "bins": self._bins.clone(),
            "positive": self._positive.clone(),
            "negative": self._negative.clone(),
            "shift": torch.tensor(self._shift),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._pending.clear()
        self._num_pending = 0
        device = self._bins.device
        self._bins = state["bins"].to(device, copy=True)
        self._positive = state["positive"].to(device, copy=True)
        self._negative = state["negative"].to(device, copy=True)
        self._shift = int(state["shift"])

    def _settle(self) -> None:
        """Sorts what is pending into the bins, and coarsens these while they are too many."""
        if self._pending:
            bits, positive, negative = (
                torch.cat(parts) for parts in zip(*self._pending, strict=True)
            )
            self._pending.clear()
            self._num_pending = 0
            self._sum_equal(
                torch.cat((self._bins, bits >> self._shift)),
                torch.cat((self._positive, positive)),
                torch.cat((self._negative, negative)),
            )
        while self._max_bins is not None and self._bins.numel() > self._max_bins:
            self._coarsen(self._shift + 1)

    def _coarsen(self, shift: int) -> None:
        if shift != self._shift:
            self._sum_equal(self._bins >> (shift - self._shift), self._positive, self._negative)
            self._shift = shift

    def _sum_equal(self, bins: Tensor, positive: Tensor, negative: Tensor) -> None:
        # Bin and place in one number: numpy sorts plain int64 five times as fast as torch sorts
        # int32 with its order, and equal bins keep their order, which fixes the sums' rounding.
        packed = (bins.to(torch.int64) << 32) | torch.arange(bins.numel(), device=bins.device)
        packed = (
            packed.sort().values if packed.is_cuda else torch.from_numpy(np.sort(packed.numpy()))
        )
        ordered = (packed >> 32).to(torch.int32)
        order = packed & 0xFFFFFFFF
        is_first = torch.ones_like(ordered, dtype=torch.bool)
        is_first[1:] = ordered[1:] != ordered[:-1]
        self._bins = ordered[is_first]
        place = is_first.cumsum(0) - 1
        empty = torch.zeros(self._bins.numel(), dtype=torch.float64, device=bins.device)
        self._positive = empty.index_add(0, place, positive[order])
        self._negative = empty.index_add(0, place, negative[order])


def _ordered_bits(scores: Tensor) -> Tensor:
    """[B] float32 -> [B] int32 in the same order; one score, one number."""
    # Adding zero turns -0.0, which equals 0.0 but has other bits, into 0.0.
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _score_of_bits(bits: Tensor) -> Tensor:
    """Inverse of `_ordered_bits`."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
