"""Penstock trains recommendation models whose embedding tables outgrow a GPU.

What a script needs is here: `from penstock import EmbeddingCollection, TableConfig, KeyedJagged`.
Names are imported when they are first used, so that `import penstock` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.config.schedule import Schedule
    from penstock.config.tables import (
        FTRL,
        LAMB,
        SGD,
        Adagrad,
        Adam,
        AdamW,
        AdmitAtRandom,
        AdmitFrequent,
        Constant,
        Eviction,
        FeatureConfig,
        HashStack,
        MomentumSGD,
        Normal,
        RowWiseAdagrad,
        RowWiseAdam,
        TableConfig,
        Uniform,
    )
    from penstock.embedding.collection.clipping import clip_grad_norm_
    from penstock.embedding.collection.collection import EmbeddingCollection
    from penstock.embedding.collection.torch_idioms import average_tables
    from penstock.embedding.sharded.store import Ranks
    from penstock.embedding.store import TableRows
    from penstock.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DataError,
        GroupError,
        NonFiniteError,
        PenstockError,
    )
    from penstock.types import Jagged, KeyedJagged

__version__ = "0.1.0"

_HOMES = {
    "penstock.config.schedule": "Schedule",
    "penstock.config.tables": (
        "FTRL LAMB SGD Adagrad Adam AdamW AdmitAtRandom AdmitFrequent Constant Eviction "
        "FeatureConfig HashStack MomentumSGD Normal RowWiseAdagrad RowWiseAdam TableConfig Uniform"
    ),
    "penstock.embedding.collection.clipping": "clip_grad_norm_",
    "penstock.embedding.collection.collection": "EmbeddingCollection",
    "penstock.embedding.sharded.store": "Ranks",
    "penstock.embedding.store": "TableRows",
    "penstock.embedding.collection.torch_idioms": "average_tables",
    "penstock.errors": (
        "CapacityError CheckpointError ConfigError DataError GroupError NonFiniteError "
        "PenstockError"
    ),
    "penstock.types": "Jagged KeyedJagged",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "__version__",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdmitAtRandom",
    "AdmitFrequent",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "Constant",
    "DataError",
    "EmbeddingCollection",
    "Eviction",
    "FTRL",
    "FeatureConfig",
    "HashStack",
    "Jagged",
    "KeyedJagged",
    "LAMB",
    "MomentumSGD",
    "NonFiniteError",
    "Normal",
    "PenstockError",
    "RowWiseAdagrad",
    "RowWiseAdam",
    "SGD",
    "Schedule",
    "TableConfig",
    "TableRows",
    "Uniform",
    "average_tables",
    "clip_grad_norm_",
    "Ranks",
    "GroupError",
]


def __getattr__(name: str) -> Any:
    if name == "_core":
        # The import of a submodule that is found unfit leaves its name here all the same.
        from penstock.built_core import load

        try:
            globals()[name] = load()
        except ImportError:
            globals().pop(name, None)
            raise
        return globals()[name]
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
