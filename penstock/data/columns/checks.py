"""Checks of single columns: which one a name may mean, and what a type can be read as."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import pyarrow as pa

from penstock.config import FeatureColumns, Hash, Hex, NumericColumns
from penstock.data.columns.transforms import is_list
from penstock.errors import ConfigError


def check_types(types: Iterable[str], names: Sequence[str], path: str) -> None:
    """Raises ConfigError where a name or glob of `data.source.types` is that of no column."""
    for pattern in types:
        if not any(is_named(name, pattern) for name in names):
            raise ConfigError(
                f"data.source.types: {pattern!r} matches no column of {path}"
                f"{nearest(pattern, names)}"
            )


def is_named(name: str, pattern: str) -> bool:
    """Whether a column's name is `pattern`, brackets and all, or matches it as a glob."""
    return name == pattern or fnmatchcase(name, pattern)


def nearest(name: str, names: Sequence[str]) -> str:
    """What an error adds about a name that is not there: those most like it, or which there are."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(repr(one) for one in near)}?"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"; there are {shown}" if names else "; there are none"


def is_one_key(kind: pa.DataType) -> bool:
    """Whether values are single integers or texts."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    return bool(whole or is_text(kind) or pa.types.is_null(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values are numbers, or lists of them."""
    if is_list(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    )


def vector_width(group: NumericColumns, kind: pa.DataType) -> int | None:
    """Numbers of each row of a numeric column that holds vectors; None: it holds one number."""
    if group.width is None and pa.types.is_fixed_size_list(kind) and kind.list_size > 1:
        return int(kind.list_size)
    return group.width


def number_remedy(kind: pa.DataType, width: int | None) -> str | None:
    """What to do about the type of a numeric column; None if it is fine.

    `width`: numbers of each row, where it holds vectors.
    """
    if width is not None and is_text(kind):
        return "vectors are lists of numbers; write them to Parquet, Arrow or JSON"
    if not is_number(kind):
        return "numeric columns are numbers; list it under `features` (transform hash)"
    if width is None or pa.types.is_null(kind):
        return None
    if not is_list(kind):
        return f"with width {width} its rows are lists of numbers; remove the width"
    if pa.types.is_fixed_size_list(kind) and kind.list_size != width:
        return f"but its width is {width}; mend the file, or data.numeric"
    return None


def is_time(kind: pa.DataType) -> bool:
    """Whether values are moments, or integers or text that stand for them."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_timestamp(kind)
        or pa.types.is_date(kind)
        or is_text(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """Whether values are strings or bytes."""
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def key_remedy(
    name: str, kind: pa.DataType, config: FeatureColumns, declared: str | None
) -> str | None:
    """What to do about the type of a feature's column; None if it is fine.

    `declared`: field by which the source could be told another type; None: there is none.
    """
    if config.separator is not None:
        return _separated_remedy(kind, config, declared)
    if is_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return None
    if config.buckets_numbers:
        return None if is_number(kind) else "the transform bucketize reads numbers; remove it"
    as_text = is_text(kind)
    if not as_text and not pa.types.is_integer(kind) and not pa.types.is_boolean(kind):
        if pa.types.is_floating(kind):
            return (
                "keys are integers or strings: cast it to int64 (nullable) where it is written, or "
                "list it under `data.numeric`"
            )
        return "keys are integers, strings or lists of these; convert it"
    for transform in config.transforms:
        if isinstance(transform, Hex) and not as_text:
            return "the transform hex reads text; remove it, or put it first"
        as_text = as_text and not isinstance(transform, Hash | Hex)
    if as_text:
        declare = f", or declare {declared}: {{{name}: int64}}" if declared else ""
        return f"keys are 64-bit integers: add the transform hash (or hex){declare}"
    return None


def _separated_remedy(
    kind: pa.DataType, config: FeatureColumns, declared: str | None
) -> str | None:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if is_text(kind) or pa.types.is_null(kind):
        return None
    declare = f", or declare it as string in {declared}" if declared else ""
    return f"the separator {config.separator!r} splits text; remove it{declare}"
