"""Arrow's view types, which newer writers use, as types that all of pyarrow takes.

A view of text (as polars writes to Arrow files) has another layout than text, and pyarrow neither
filters nor takes from it. Lists of views and dictionaries of views are read likewise. Views of
lists stay, and are refused as inputs: pyarrow's cast of them to lists loses values.
"""

from __future__ import annotations

import pyarrow as pa


def without_views(schema: pa.Schema) -> pa.Schema:
    """The schema of what `plain_table` makes of tables of `schema`."""
    return pa.schema([field.with_type(_plain_type(field.type)) for field in schema])


def plain_table(table: pa.Table) -> pa.Table:
    """The same values, views as what they are views of. No copy where there are none.

    Raises:
      pa.ArrowException: a type within a type that pyarrow cannot cast.
    """
    schema = without_views(table.schema)
    if schema.equals(table.schema):
        return table
    columns = [
        pa.chunked_array([_plain_array(chunk, field.type) for chunk in column.chunks], field.type)
        for column, field in zip(table.columns, schema, strict=True)
    ]
    return pa.table(columns, schema=schema)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _plain_type(kind.value_type), kind.ordered)
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind))
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind), kind.list_size)
    return kind


def _plain_field(kind: pa.DataType) -> pa.Field:
    return kind.value_field.with_type(_plain_type(kind.value_type))


def _plain_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    if pa.types.is_dictionary(kind):
        values = array.dictionary.cast(kind.value_type)
        return pa.DictionaryArray.from_arrays(array.indices, values, ordered=kind.ordered)
    return array.cast(kind)
