"""Models: plain modules over numbers and pooled embeddings.

Every model has `forward(dense [B, numeric columns], embeddings [B, sum of feature dims])` and
returns logits [B]. `build_model` makes the one that a job names; a user's own module takes its
place with `model: {kind: custom, factory: module:name}`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from penstock.config import CustomModel, DCNConfig, DeepFMConfig, DLRMConfig, Model, WideDeepConfig
from penstock.errors import ConfigError
from penstock.models.custom import build_custom
from penstock.models.dcn import DCN
from penstock.models.deepfm import DeepFM
from penstock.models.dlrm import DLRM
from penstock.models.wide_deep import WideDeep

__all__ = ["DCN", "DLRM", "DeepFM", "WideDeep", "build_model"]


def build_model(
    config: Model,
    num_numeric: int,
    feature_dims: tuple[int, ...],
    feature_names: Sequence[str] = (),
) -> nn.Module:
    """Makes the model of a job, with initial weights from torch's default generator.

    Args:
      config: which model, and its widths.
      num_numeric: columns of `dense`.
      feature_dims: [F] columns of each feature in `embeddings`, in order.
      feature_names: [F] for messages; empty: features are named by their place.

    Returns:
      A module in training mode: (dense [B, num_numeric] float32, embeddings [B, sum of
      feature_dims] float32) -> logits [B] float32.

    Raises:
      ConfigError: there is no input at all, DLRM or DeepFM with features of several dims, a glob of
        Wide & Deep that matches no feature, or a custom model that cannot be imported, called, or
        that returns something else than logits [B].
    """
    if num_numeric == 0 and not feature_dims:
        raise ConfigError(
            "the model has no input: no numeric column and no feature matches; "
            "declare `data.numeric` or `features`"
        )
    match config:
        case DLRMConfig():
            return DLRM(config, num_numeric, feature_dims, feature_names)
        case DCNConfig():
            return DCN(config, num_numeric, feature_dims)
        case DeepFMConfig():
            return DeepFM(config, num_numeric, feature_dims, feature_names)
        case WideDeepConfig():
            return WideDeep(config, num_numeric, feature_dims, feature_names)
        case CustomModel():
            return build_custom(config, num_numeric, feature_dims)
