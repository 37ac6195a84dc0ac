"""What a collection takes as a batch, and in which shape a model gets its vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from penstock.config import FeatureConfig, TableConfig
from penstock.errors import ConfigError
from penstock.types import FeatureShape, Jagged, JaggedVectors, KeyedJagged, as_keys

Output = Literal["concatenated", "by_feature", "stacked"]
"""[B, W]; a dict by feature; or [B, F, D]."""
BatchLike = KeyedJagged | Mapping[str, Tensor | Jagged] | Tensor
"""A packed batch; columns by name; or [B, F], one key a feature and sample."""
Vectors = Tensor | dict[str, Tensor | JaggedVectors]


def read_batch(batch: BatchLike, inputs: Sequence[str]) -> KeyedJagged:
    """Packs a batch in any of its forms.

    Args:
      batch: packed, which is returned as it is; by name, `Jagged` or keys [B, ...], of which all
        after the first dimension are one bag; or [B, F] keys, a column each of `inputs`.
      inputs: columns that are read, in order. A dict may have others, which are left out.

    Raises:
      ConfigError: a column is missing, or of another batch size; a tensor that is not [B, F]; no
        integers.
    """
    if isinstance(batch, KeyedJagged):
        return batch
    if isinstance(batch, Tensor):
        if batch.dim() != 2 or batch.shape[1] != len(inputs):
            raise ConfigError(
                f"a batch of shape {list(batch.shape)}: expected [B, {len(inputs)}], one key of "
                f"each of {', '.join(inputs)}; give bags as a dict or a KeyedJagged"
            )
        values = as_keys(batch, "the batch").t().reshape(-1)
        return KeyedJagged(
            tuple(inputs), values, torch.arange(values.numel() + 1, device=values.device)
        )
    # Also a TensorDict, which is no Mapping.
    if not all(hasattr(type(batch), name) for name in ("keys", "__contains__", "__getitem__")):
        raise ConfigError(
            f"a batch that is a {type(batch).__name__}: expected a KeyedJagged, a dict of columns "
            f"with {', '.join(inputs)}, or a tensor [B, {len(inputs)}]"
        )
    missing = [name for name in inputs if name not in batch]
    if missing:
        raise ConfigError(f"the batch has no {', '.join(missing)}; it has {', '.join(batch)}")
    return KeyedJagged.pack({name: _column(name, batch[name]) for name in inputs})


def _column(name: str, column: Tensor | Jagged) -> Jagged:
    if isinstance(column, Jagged):
        return column
    if not isinstance(column, Tensor):
        raise ConfigError(
            f"feature {name!r} is a {type(column).__name__}: expected keys [B, ...] as a tensor, "
            "or a Jagged of tensors"
        )
    if not column.dim():
        raise ConfigError(f"feature {name!r} is a single number: expected keys [B, ...]")
    return Jagged.from_dense(column if column.dim() == 1 else column.flatten(1))


class OutputShape:
    """In which shape a collection returns the vectors of its features."""

    def __init__(
        self, output: Output, features: Sequence[FeatureConfig], tables: Sequence[TableConfig]
    ) -> None:
        """For features of tables that are there.

        Raises:
          ConfigError: an unknown output, or one that these features cannot have.
        """
        if output not in get_args(Output):
            raise ConfigError(f"output {output!r}: one of {', '.join(get_args(Output))}")
        dims = {table.name: table.dim for table in tables}
        self.shapes = tuple(
            FeatureShape(feature.name, dims[feature.table], feature.max_keys)
            for feature in features
            if feature.pooling != "none"
        )
        """Of each feature that is pooled or a sequence, in order."""
        self.output = output
        self._names = tuple(feature.name for feature in features)
        self._inputs = {each.name: each.input or each.name for each in features}
        self._widths = [shape.width for shape in self.shapes]
        ragged = [feature.name for feature in features if feature.pooling == "none"]
        if ragged and output != "by_feature":
            raise ConfigError(
                f"feature {ragged[0]!r} has pooling none, so that samples differ in size: set "
                "output='by_feature'"
            )
        is_even = len({shape.dim for shape in self.shapes}) <= 1
        lengths = [shape.name for shape in self.shapes if shape.length]
        if output == "stacked" and (lengths or not is_even):
            what = f"{lengths[0]!r} is a sequence" if lengths else "tables differ in dim"
            raise ConfigError(f"output 'stacked' is [B, F, D]: {what}; use 'by_feature'")

    def give(
        self, pooled: Tensor, ragged: Mapping[str, JaggedVectors], batch: BatchLike
    ) -> Vectors:
        """The vectors as the model gets them: views.

        Args:
          pooled: [B, W].
          ragged: of features of pooling `none`.
          batch: as it was given: a sequence from keys [B, ...] is [B, ..., D].
        """
        if self.output == "concatenated":
            return pooled
        if self.output == "stacked":
            dim = self.shapes[0].dim if self.shapes else 1
            return pooled.view(len(pooled), len(self.shapes), dim)
        parts = zip(self.shapes, torch.split(pooled, self._widths, 1), strict=True)
        vectors: dict[str, Tensor | JaggedVectors] = {
            shape.name: part if shape.length is None else self._positions(shape, part, batch)
            for shape, part in parts
        }
        vectors.update(ragged)
        missing = [name for name in self._names if name not in vectors]
        if missing:
            raise ConfigError(
                f"feature {missing[0]!r} has pooling none: on the meta device the size of its "
                "vectors is not known"
            )
        return {name: vectors[name] for name in self._names}

    def _positions(self, shape: FeatureShape, part: Tensor, batch: BatchLike) -> Tensor:
        """[B, length, D] of [B, length * D], or as many positions as dense keys had."""
        part = part.view(len(part), shape.length or 0, shape.dim)
        given = None if isinstance(batch, KeyedJagged | Tensor) else batch[self._inputs[shape.name]]
        if not isinstance(given, Tensor):
            return part
        rest = given.shape[1:]
        return part[:, : rest.numel()].view(len(part), *rest, shape.dim)
