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
    AutoIntConfig,
    CustomModel,
    DCNConfig,
    DeepFMConfig,
    DINConfig,
    DLRMConfig,
    ESMMConfig,
    FinalMLPConfig,
    HSTUConfig,
    MaskNetConfig,
    MMoEConfig,
    Model,
    PLEConfig,
    Regularized,
    SharedBottomConfig,
    TwoTowerConfig,
    WideDeepConfig,
    XDeepFMConfig,
)
from penstock.config.base import Config
from penstock.errors import ConfigError
from penstock.models.multi_task.esmm import ESMM
from penstock.models.multi_task.mmoe import MMoE
from penstock.models.multi_task.ple import PLE
from penstock.models.multi_task.shared_bottom import SharedBottom
from penstock.models.networks.autoint import AutoInt
from penstock.models.networks.custom import build_custom
from penstock.models.networks.dcn import DCN
from penstock.models.networks.deepfm import DeepFM
from penstock.models.networks.din import DIN, Dice
from penstock.models.networks.dlrm import DLRM
from penstock.models.networks.final_mlp import FinalMLP
from penstock.models.networks.hstu import HSTU
from penstock.models.networks.masknet import MaskNet
from penstock.models.networks.two_tower import TwoTower
from penstock.models.networks.wide_deep import WideDeep
from penstock.models.networks.xdeepfm import XDeepFM
from penstock.models.parts.mlp import MLP, BatchNorm
from penstock.types import FeatureShape

__all__ = [
    "ESMM",
    "PLE",
    "MaskNet",
    "FinalMLP",
    "XDeepFM",
    "AutoInt",
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
    "looks_at_other_samples",
]


_OF_ONE_LABEL: Mapping[type[Config], Callable[[Any, int, Sequence[FeatureShape]], nn.Module]] = {
    DLRMConfig: DLRM,
    DCNConfig: DCN,
    DeepFMConfig: DeepFM,
    WideDeepConfig: WideDeep,
    AutoIntConfig: AutoInt,
    XDeepFMConfig: XDeepFM,
    FinalMLPConfig: FinalMLP,
    MaskNetConfig: MaskNet,
    DINConfig: DIN,
    HSTUConfig: HSTU,
    TwoTowerConfig: TwoTower,
}

_OF_SEVERAL_LABELS: Mapping[
    type[Config], Callable[[Any, int, Sequence[FeatureShape], int], nn.Module]
] = {
    SharedBottomConfig: SharedBottom,
    MMoEConfig: MMoE,
    PLEConfig: PLE,
    ESMMConfig: ESMM,
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
    if isinstance(config, CustomModel):
        return build_custom(config, num_numeric, features, num_tasks)
    if type(config) in _OF_SEVERAL_LABELS:
        model = _OF_SEVERAL_LABELS[type(config)](config, num_numeric, features, num_tasks)
        return _regularized(model, config)
    if num_tasks > 1:
        raise ConfigError(
            f"model {config.kind} predicts one label, but data.label names {num_tasks}; use model "
            "kind shared_bottom, mmoe, ple or esmm"
        )
    return _regularized(_OF_ONE_LABEL[type(config)](config, num_numeric, features), config)


def _regularized(model: nn.Module, config: Regularized) -> nn.Module:
    """The model with dropout and batch norm in its MLPs, as its configuration wants."""
    if not config.dropout and not config.batch_norm:
        return model
    for part in model.modules():
        if isinstance(part, MLP) and not part.is_gate:
            part.regularize(config.dropout, batch_norm=config.batch_norm)
    if not any(isinstance(part, nn.Dropout | BatchNorm) for part in model.modules()):
        raise ConfigError(
            "model: dropout and batch_norm are of hidden layers, and this one has none; give it "
            "some, or remove them"
        )
    return model


def looks_at_other_samples(model: nn.Module) -> bool:
    """Whether what a model makes of a sample in training depends on the others of its batch."""
    kinds = (nn.modules.batchnorm._BatchNorm, Dice, TwoTower)
    return any(isinstance(part, kinds) for part in model.modules())
