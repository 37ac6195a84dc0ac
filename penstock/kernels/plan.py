"""Which features a store serves, as its kernels read it: arrays on the device, made once a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SUM, MEAN, SQRT_N, SEQUENCE = 0, 1, 2, 3
POOLING_CODES = {"sum": SUM, "mean": MEAN, "sqrt_n": SQRT_N, "sequence": SEQUENCE}


class FeatureOnDevice(NamedTuple):
    """One feature that a store serves."""

    packed_feature: int
    table: int
    pooling: int
    column: int
    max_keys: int
    """Positions of a sequence; 0 for the other poolings."""


class DevicePlan(NamedTuple):
    """The features that a store serves."""

    packed_feature: Tensor
    """[F] int32 number of the feature in the packed batch."""
    table: Tensor
    """[F] int32"""
    pooling: Tensor
    """[F] int32, of `POOLING_CODES`."""
    column: Tensor
    """[F] int32 first column of the output."""
    max_keys: Tensor
    """[F] int32"""
    table_of_packed: Tensor
    """[P] int32 by feature of the packed batch; -1: another store's."""
    feature_of_packed: Tensor
    """[P] int32 number of the feature in this plan; -1: another store's."""
    stride: int
    """Columns of the output."""
    num_features: int
    dim: int
    """Columns of one vector."""
    divides: bool
    """Whether a feature is pooled to a mean or by the square root."""
    has_sequences: bool
    serves_all: bool
    """Whether all features of the packed batch are this store's."""
    is_by_key: bool = False
    """Whether every key is a row of the output; see `PoolingPlan.by_key`."""

    @classmethod
    def make(
        cls,
        features: Sequence[FeatureOnDevice],
        *,
        num_packed: int,
        stride: int,
        dim: int,
        device: torch.device,
    ) -> DevicePlan:
        """The arrays of `features`, for batches of `num_packed` features."""
        of_packed = [-1] * num_packed
        for number, feature in enumerate(features):
            of_packed[feature.packed_feature] = number
        columns = [list(column) for column in zip(*features, strict=True)] or [[]] * 5
        tables = [features[f].table if f >= 0 else -1 for f in of_packed]
        packed, table, pooling, column, max_keys, of_table, of_feature = (
            torch.tensor(numbers, dtype=torch.int32, device=device)
            for numbers in (*columns, tables, of_packed)
        )
        codes = {feature.pooling for feature in features}
        return cls(
            packed,
            table,
            pooling,
            column,
            max_keys,
            of_table,
            of_feature,
            stride,
            len(features),
            dim,
            bool(codes & {MEAN, SQRT_N}),
            SEQUENCE in codes,
            min(of_packed, default=0) >= 0,
        )
