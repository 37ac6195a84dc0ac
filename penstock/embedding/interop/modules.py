"""A collection in the place of TorchRec's EmbeddingBagCollection and EmbeddingCollection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from penstock.config import FeatureConfig, Pooling, TableConfig
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.embedding.interop.keyed_jagged import from_keyed_jagged_tensor, torchrec_part
from penstock.errors import ConfigError

MakeTable = Callable[[str, int], TableConfig]
"""A table of a name and dim, with the optimizer and rules that it is to have."""
_POOLINGS: dict[str, Pooling] = {"SUM": "sum", "MEAN": "mean"}


class _OfConfigs(nn.Module):
    """What both modules are: a collection made by TorchRec's configs."""

    collection: EmbeddingCollection
    """The tables; `apply_gradients` or `attach` is to be called on it."""

    def __init__(
        self,
        configs: Sequence[Any],
        poolings: Sequence[Pooling | None],
        make_table: MakeTable | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self._configs = list(configs)
        make = make_table or (lambda name, dim: TableConfig(name=name, dim=dim))
        tables = []
        for config in configs:
            table = make(config.name, config.embedding_dim)
            if (table.name, table.dim) != (config.name, config.embedding_dim):
                raise ConfigError(
                    f"make_table gave table {table.name!r} of dim {table.dim} for TorchRec's "
                    f"{config.name!r} of {config.embedding_dim}: keep name and dim"
                )
            tables.append(table)
        self._names_by_table = _names_by_table(configs)
        features = [
            FeatureConfig(name=name, table=config.name, pooling=pooling or "none", input=column)
            for config, names, pooling in zip(configs, self._names_by_table, poolings, strict=True)
            for name, column in zip(names, _columns_of(config), strict=True)
        ]
        self._dims = [
            config.embedding_dim
            for config, names in zip(configs, self._names_by_table, strict=True)
            for _ in names
        ]
        self._names = [feature.name for feature in features]
        self.collection = EmbeddingCollection(tables, features, **options)

    @property
    def device(self) -> torch.device:
        """Where rows and outputs are."""
        return self.collection.device


class TorchRecBags(_OfConfigs):
    """In the place of a torchrec EmbeddingBagCollection: KeyedJaggedTensor in, KeyedTensor out.

    Any id is a key: `num_embeddings` of the configs bounds nothing, and new keys begin with the
    initial values of their table. `import_state_dict` takes over trained tables.
    """

    def __init__(
        self,
        tables: Sequence[Any],
        is_weighted: bool = False,
        *,
        make_table: MakeTable | None = None,
        **options: Any,
    ) -> None:
        """Makes empty tables.

        Args:
          tables: TorchRec's EmbeddingBagConfigs, or what has their `name`, `embedding_dim`,
            `feature_names` and `pooling`.
          is_weighted: whether the weights of a batch count; else they are ignored.
          make_table: the table for a name and dim; None: one with the optimizer that TableConfig
            has by default.
          options: of the collection: `seed`, `device`, `num_threads`, `deterministic`.

        Raises:
          ConfigError: a pooling that is neither SUM nor MEAN; a name twice.
        """
        poolings = [_pooling_of(config) for config in tables]
        super().__init__(tables, poolings, make_table, options)
        self._is_weighted = is_weighted

    def forward(self, features: Any) -> Any:
        """Pools a KeyedJaggedTensor: a KeyedTensor [B, sum of dims].

        Raises:
          ConfigError: see `from_keyed_jagged_tensor`; weights are missing.
        """
        sparse = from_keyed_jagged_tensor(features, self.collection.inputs)
        if self._is_weighted and sparse.weights is None:
            raise ConfigError("the KeyedJaggedTensor has no weights, and is_weighted is set")
        if not self._is_weighted and sparse.weights is not None:
            sparse = sparse.without_weights()
        sparse = sparse.to(self.device)
        keyed = torchrec_part("sparse.jagged_tensor", "a KeyedTensor").KeyedTensor
        return keyed(
            keys=list(self._names), length_per_key=self._dims, values=self.collection(sparse)
        )

    def embedding_bag_configs(self) -> list[Any]:
        """As they were given."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether the weights of a batch count."""
        return self._is_weighted


class TorchRecSequences(_OfConfigs):
    """In the place of a torchrec EmbeddingCollection: a dict of JaggedTensors, a vector a key."""

    def __init__(
        self,
        tables: Sequence[Any],
        need_indices: bool = False,
        *,
        make_table: MakeTable | None = None,
        **options: Any,
    ) -> None:
        """Makes empty tables.

        Args:
          tables: TorchRec's EmbeddingConfigs, all of one `embedding_dim`.
          need_indices: whether the JaggedTensors have the keys as weights.
          make_table: as of `TorchRecBags`.
          options: of the collection.

        Raises:
          ConfigError: dims differ; a name twice.
        """
        dims = sorted({config.embedding_dim for config in tables})
        if len(dims) > 1:
            raise ConfigError(f"tables of dims {dims}: an EmbeddingCollection has one for all")
        options = {**options, "output": "by_feature"}
        super().__init__(tables, [None] * len(tables), make_table, options)
        self._need_indices = need_indices

    def forward(self, features: Any) -> dict[str, Any]:
        """A JaggedTensor of vectors for each feature, weights left out.

        Raises:
          ConfigError: see `from_keyed_jagged_tensor`.
        """
        sparse = from_keyed_jagged_tensor(features, self.collection.inputs).without_weights()
        jagged = torchrec_part("sparse.jagged_tensor", "a JaggedTensor").JaggedTensor
        found = self.collection(sparse.to(self.device))
        keys = {
            feature.name: sparse[feature.input or feature.name].values
            for feature in (self.collection.features if self._need_indices else ())
        }
        return {
            name: jagged(values=each.values, lengths=each.offsets.diff(), weights=keys.get(name))
            for name, each in found.items()
        }

    def embedding_configs(self) -> list[Any]:
        """As they were given."""
        return self._configs

    def need_indices(self) -> bool:
        """Whether the JaggedTensors have the keys as weights."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """Of all tables."""
        return int(self._configs[0].embedding_dim) if self._configs else -1

    def embedding_names_by_table(self) -> list[list[str]]:
        """Names of the outputs: `feature@table` where several tables read a feature."""
        return self._names_by_table


def _columns_of(config: Any) -> list[str]:
    return list(config.feature_names) or [config.name]


def _names_by_table(configs: Sequence[Any]) -> list[list[str]]:
    read = Counter(name for config in configs for name in _columns_of(config))
    return [
        [name if read[name] == 1 else f"{name}@{config.name}" for name in _columns_of(config)]
        for config in configs
    ]


def _pooling_of(config: Any) -> Pooling:
    name = getattr(config.pooling, "name", str(config.pooling))
    if name not in _POOLINGS:
        raise ConfigError(
            f"table {config.name!r}: pooling {name}; an EmbeddingBagCollection has SUM and MEAN"
        )
    return _POOLINGS[name]
