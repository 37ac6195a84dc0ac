"""Models: plain modules over numbers and embeddings.

Every model has `forward(dense [B, numeric columns], embeddings [B, W])`, W the sum of the
features' widths, and returns logits [B]; of a job of L > 1 labels it returns [B, L]. A model of a
job with sequences takes a third argument, lengths [B, S] int64: the keys of each sequence.
`build_model` makes the one that a job names; a user's own module takes its place with
`model: {kind: custom, factory: module:name}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from penstock.config import (
    CustomModel,
    DCNConfig,
    DeepFMConfig,
    DINConfig,
    DLRMConfig,
    HSTUConfig,
    MMoEConfig,
    Model,
    SharedBottomConfig,
    TwoTowerConfig,
    WideDeepConfig,
)
from penstock.config.base import Config
from penstock.errors import ConfigError
from penstock.models.custom import build_custom
from penstock.models.dcn import DCN
from penstock.models.deepfm import DeepFM
from penstock.models.din import DIN
from penstock.models.dlrm import DLRM
from penstock.models.hstu import HSTU
from penstock.models.mmoe import MMoE
from penstock.models.shared_bottom import SharedBottom
from penstock.models.two_tower import TwoTower
from penstock.models.wide_deep import WideDeep
from penstock.types import FeatureShape

__all__ = [
    "DCN",
    "DIN",
    "DLRM",
    "DeepFM",
    "HSTU",
    "MMoE",
    "SharedBottom",
    "TwoTower",
    "WideDeep",
    "build_model",
]


_OF_ONE_LABEL: Mapping[type[Config], Callable[[Any, int, Sequence[FeatureShape]], nn.Module]] = {
    DLRMConfig: DLRM,
    DCNConfig: DCN,
    DeepFMConfig: DeepFM,
    WideDeepConfig: WideDeep,
    DINConfig: DIN,
    HSTUConfig: HSTU,
    TwoTowerConfig: TwoTower,
}


def build_model(
    config: Model, num_numeric: int, features: Sequence[FeatureShape], num_tasks: int = 1
) -> nn.Module:
    """Makes the model of a job, with initial weights from torch's default generator.

    Args:
      config: which model, and its widths.
      num_numeric: columns of `dense`.
      features: what the columns of `embeddings` are, in order.
      num_tasks: labels of the job.

    Returns:
      A module in training mode: (dense [B, num_numeric] float32, embeddings [B, W] float32) ->
      logits [B] float32, or [B, num_tasks]; with a third argument where there are sequences.

    Raises:
      ConfigError: there is no input at all, features or the number of labels do not fit the model,
        or a custom model cannot be imported, called, or returns something else than such logits.
    """
    if num_numeric == 0 and not features:
        raise ConfigError(
            "the model has no input: no numeric column and no feature matches; "
            "declare `data.numeric` or `features`"
        )
    match config:
        case SharedBottomConfig():
            return SharedBottom(config, num_numeric, features, num_tasks)
        case MMoEConfig():
            return MMoE(config, num_numeric, features, num_tasks)
        case CustomModel():
            return build_custom(config, num_numeric, features, num_tasks)
    if num_tasks > 1:
        raise ConfigError(
            f"model {config.kind} predicts one label, but data.label names {num_tasks}; use model "
            "kind shared_bottom or mmoe"
        )
    return _OF_ONE_LABEL[type(config)](config, num_numeric, features)
