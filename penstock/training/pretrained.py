"""Begins a table with vectors by key that were learnt elsewhere, from Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from penstock.config import PretrainedVectors, TableConfig
from penstock.data.columns.transforms import BadValue, KeyTransform, one_array, read_keys
from penstock.data.files import list_files
from penstock.embedding.collection.collection import EmbeddingCollection
from penstock.errors import ConfigError, DataError

_ROWS_AT_ONCE = 1 << 16


class Loaded(NamedTuple):
    """What became of the vectors of one table."""

    table: str
    rows: int
    """Read, one a key."""
    kept: int
    """That the table holds: fewer, where its `max_bytes` and eviction let some go."""


def load_pretrained(
    configs: Sequence[PretrainedVectors],
    collection: EmbeddingCollection,
    transforms_of_table: Callable[[str], Sequence[tuple[str, Sequence[KeyTransform]]]],
) -> list[Loaded]:
    """Gives tables the vectors that a job names, see `_load_vectors`.

    Args:
      configs: what is read.
      collection: of a run that begins.
      transforms_of_table: name and transforms of each feature that reads a table.
    """
    return [
        _load_vectors(one, collection, _transforms_of(one, transforms_of_table(one.table)))
        for one in configs
    ]


def _load_vectors(
    config: PretrainedVectors, collection: EmbeddingCollection, transforms: Sequence[KeyTransform]
) -> Loaded:
    """Gives the keys of files their vectors; every key is admitted, optimizer states begin anew.

    The keys are read first, to find those that are there twice before anything changes, and last
    to count those that a `max_bytes` left; vectors are streamed.

    Args:
      config: what is read.
      collection: of a run that begins.
      transforms: of the keys, as the features of the table have them.

    Raises:
      ConfigError: there is no such table, or it is a hash stack.
      DataError: a file or column is missing or of a wrong type; a null, a vector that is not
        finite or of another length than `dim`, a key twice; says which.
      CapacityError: `max_bytes` of the table holds fewer rows, and it evicts none.
    """
    table = _table_of(config, collection)
    what = f"pretrained vectors of table {table.name!r}"
    _check_keys(config, transforms, what)
    rows = 0
    for batch, where in _batches(config, [config.key, config.vector], what):
        keys = torch.from_numpy(_keys_of(batch, config.key, transforms, where))
        values = torch.from_numpy(_vectors_of(batch, config.vector, table.dim, where))
        collection.assign(table.name, keys, values)
        rows += len(keys)
    kept = rows
    if table.max_bytes is not None:
        kept = 0
        for batch, where in _batches(config, [config.key], what):
            keys = torch.from_numpy(_keys_of(batch, config.key, transforms, where))
            kept += int(collection.find(table.name, keys).found.sum())
    return Loaded(table.name, rows, kept)


def _table_of(config: PretrainedVectors, collection: EmbeddingCollection) -> TableConfig:
    for table in collection.tables:
        if table.name == config.table and table.hash_stack is not None:
            raise ConfigError(
                f"training.pretrained: table {table.name!r} is a hash_stack, whose rows keys "
                "share: there is no row for the vector of one key"
            )
        if table.name == config.table:
            return table
    names = ", ".join(table.name for table in collection.tables)
    raise ConfigError(f"training.pretrained: no table {config.table!r}; there are {names}")


def _check_keys(config: PretrainedVectors, transforms: Sequence[KeyTransform], what: str) -> None:
    parts = [
        _keys_of(batch, config.key, transforms, where)
        for batch, where in _batches(config, [config.key], what)
    ]
    keys = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        raise DataError(
            f"{what}: key {int(twice[0])} has two vectors in {config.path} ({len(twice)} such rows "
            "in all); leave one"
        )


def _batches(
    config: PretrainedVectors, columns: list[str], what: str
) -> Iterator[tuple[pa.RecordBatch, str]]:
    """Batches of rows of all files, each with where it begins, for messages."""
    filesystem, paths = list_files(config.path)
    for path in paths:
        first = 0
        try:
            with filesystem.open_input_file(path) as opened:
                file = pq.ParquetFile(opened)
                missing = [name for name in columns if name not in file.schema_arrow.names]
                if missing:
                    raise DataError(
                        f"{what}: {path} has no column {missing[0]!r}; it has "
                        f"{', '.join(file.schema_arrow.names)}"
                    )
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                    yield batch, f"{what}: {path} from row {first}"
                    first += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{what}: {path} cannot be read as Parquet: {error}") from None


def _keys_of(
    batch: pa.RecordBatch, name: str, transforms: Sequence[KeyTransform], where: str
) -> NDArray[np.int64]:
    column = batch.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind) or (not pa.types.is_integer(kind) and not transforms):
        raise DataError(
            f"{where}: column {name!r} is {column.type}; keys are integers, or texts with the "
            "transforms that the features of the table have"
        )
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{where}: the key of row {row} after it is null; leave the row out")
    try:
        return read_keys(column, transforms, None).values.view(np.int64)
    except BadValue as bad:
        raise DataError(
            f"{where}: column {name!r}, row {bad.index} after it: {bad.reason}; mend the file, or "
            "set transforms as the features of the table have them"
        ) from None


def _vectors_of(batch: pa.RecordBatch, name: str, dim: int, where: str) -> NDArray[np.float32]:
    column = one_array(batch.column(name))
    is_list = any(
        test(column.type)
        for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    )
    if not is_list or not pa.types.is_floating(column.type.value_type):
        raise DataError(
            f"{where}: column {name!r} is {column.type}; expected lists of {dim} floats"
        )
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    if (lengths != dim).any():
        row = int(np.flatnonzero(lengths != dim)[0])
        raise DataError(
            f"{where}: the vector of row {row} after it has {lengths[row]} numbers, and the table "
            f"a dim of {dim}; set the table's dim, or mend the file"
        )
    values: Any = pc.list_flatten(column).cast(pa.float32())
    numbers = values.to_numpy(zero_copy_only=False).reshape(-1, dim)
    finite = np.isfinite(numbers).all(1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise DataError(
            f"{where}: the vector of row {row} after it is null, NaN or infinite in a column; "
            "leave the row out: its key then begins with its initial value"
        )
    return np.array(numbers, dtype=np.float32)


def _transforms_of(
    config: PretrainedVectors, by_feature: Sequence[tuple[str, Sequence[KeyTransform]]]
) -> Sequence[KeyTransform]:
    """How the keys of files become keys of a table: as those of its features.

    Args:
      config: its own transforms, if it has some, are these.
      by_feature: name and transforms of each feature that reads the table.

    Raises:
      ConfigError: features differ, and the config says nothing.
    """
    if config.transforms is not None:
        return config.transforms
    kinds = {tuple(transforms) for _, transforms in by_feature}
    if len(kinds) > 1:
        names = ", ".join(name for name, _ in by_feature)
        raise ConfigError(
            f"training.pretrained of table {config.table!r}: its features {names} have different "
            "transforms; say which the keys of the file need (transforms)"
        )
    return next(iter(kinds), ())
