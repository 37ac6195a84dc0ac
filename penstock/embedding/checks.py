"""What a store refuses: arguments of its verbs that are wrong, or do not belong together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from penstock.config import TableConfig
from penstock.embedding.retention import MAX_COUNT, RetentionState, check_usage, checked_numbers
from penstock.embedding.store import (
    MOST_UPDATE_KEYS,
    Candidates,
    PooledGradient,
    PooledLookup,
    PoolingPlan,
    RowLayout,
    TableRows,
)
from penstock.errors import ConfigError, StaleExportError
from penstock.types import KeyedJagged

MAX_TABLES = 65_535


def name_of(tables: Sequence[TableConfig]) -> str:
    """The tables of a store, for messages."""
    names = ", ".join(table.name for table in tables[:4])
    more = ", ..." if len(tables) > 4 else ""
    return f"{len(tables)} tables ({names}{more})"


def check_table(table: int, tables: Sequence[TableConfig]) -> None:
    """Refuses the number of a table that a store has not.

    Raises:
      ConfigError: it is none of theirs.
    """
    if not 0 <= table < len(tables):
        raise ConfigError(f"table number {table} of a store with {len(tables)} tables")


def checked(
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    name: str,
    device: torch.device,
) -> Tensor:
    """A tensor from the CPU or a store's device, contiguous on that device, or what is wrong.

    Args:
      tensor: that is given.
      dtype: it must have; where that is of floating point, float32 will do.
      shape: it must have; None: any size.
      name: of it, for the message.
      device: of the store.

    Raises:
      ConfigError: it has another dtype or shape, or is on another device.
    """
    is_shape = tensor.dim() == len(shape) and all(
        want in {None, have} for want, have in zip(shape, tensor.shape, strict=True)
    )
    dtypes = dict.fromkeys((dtype, torch.float32) if dtype.is_floating_point else (dtype,))
    is_near = tensor.is_cpu or tensor.device == device
    if tensor.dtype not in dtypes or not is_near or not is_shape:
        wanted = ["n" if size is None else size for size in shape]
        or_device = "" if device.type == "cpu" else f" or {device}"
        raise ConfigError(
            f"{name}: expected {' or '.join(map(str, dtypes))} of shape {wanted} on the "
            f"CPU{or_device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    return tensor.detach().to(device).contiguous()


def checked_keys(keys: Tensor, device: torch.device) -> Tensor:
    """Keys of one table, [n] int64 on the store's device; see `checked`."""
    return checked(keys, torch.int64, (None,), "keys", device)


def checked_rows(rows: TableRows, layout: RowLayout, device: torch.device) -> TableRows:
    """Rows to write, on the store's device; see `checked`.

    Raises:
      ConfigError: they are not of the layout, or a mark of use is none that a table has.
    """
    keys = checked_keys(rows.keys, device)
    count, usage = len(keys), None
    values = checked(rows.values, layout.dtype, (count, layout.dim), "values", device)
    state = checked(rows.state, torch.float32, (count, layout.state_dim), "state", device)
    if rows.usage is not None:
        usage = checked(rows.usage, torch.int64, (count, layout.usage_dim), "usage", device)
        check_usage(usage)
    return TableRows(keys, values, state, usage)


def checked_candidates(candidates: Candidates, device: torch.device) -> Candidates:
    """Counts to set, on the store's device; it would take wrong ones for something else.

    Raises:
      ConfigError: keys and counts are no [n] int64 each, or a count is not 1 to `MAX_COUNT`.
    """
    keys = checked_keys(candidates.keys, device)
    counts = checked(candidates.counts, torch.int64, (len(keys),), "counts", device)
    if bool(((counts < 1) | (counts > MAX_COUNT)).any()):
        raise ConfigError(f"counts of keys must lie in 1 to {MAX_COUNT}")
    return Candidates(keys, counts)


def checked_state(state: RetentionState, layout: RowLayout, device: torch.device) -> RetentionState:
    """What a table is to remember, on the store's device.

    Raises:
      ConfigError: the default row is not of the layout, or a number is missing or negative.
    """
    value = checked(state.default_value, torch.float32, (layout.dim,), "default_value", device)
    of_rule = checked(
        state.default_state, torch.float32, (layout.state_dim,), "default_state", device
    )
    return RetentionState(value, of_rule, checked_numbers(state.numbers))


def layout_of(tables: Sequence[TableConfig]) -> RowLayout:
    """The row layout of the tables of a store.

    Raises:
      ConfigError: there are several, or more tables than a store takes.
    """
    layouts = {RowLayout.of(table) for table in tables}
    if len(layouts) != 1:
        raise ConfigError(f"the tables of one store need one row layout, got {len(layouts)}")
    if len(tables) > MAX_TABLES:
        raise ConfigError(f"{len(tables)} tables of one row layout; at most {MAX_TABLES}")
    return layouts.pop()


def check_lookup(
    plan: PoolingPlan,
    batch: KeyedJagged,
    out: Tensor,
    *,
    dim: int,
    num_tables: int,
    device: torch.device,
) -> None:
    """Refuses a batch, plan and output of a look-up that do not fit each other and the store.

    Nothing that would have to be read is looked at.

    Raises:
      ConfigError: see `Store.pooled_lookup`.
    """
    check_keys(batch, device)
    check_weights(batch)
    features, tables = _needs(plan, dim)
    num_features, num_bags = len(batch.features), batch.offsets.numel() - 1
    if tables > num_tables or (features > num_features and num_bags > 0):
        raise ConfigError(
            f"a plan of packed features and tables up to {features - 1} and {tables - 1}, for a "
            f"batch of {num_features} features and a store of {num_tables} tables"
        )
    if plan.is_by_key:
        if features != num_features or num_bags != num_features or batch.weights is not None:
            raise ConfigError(
                f"a batch by key of {num_features} features, {num_bags} bags and "
                f"{'no' if batch.weights is None else 'with'} weights, of a store of {num_tables} "
                "tables: expected a bag for each table, and no weights"
            )
        shape = (batch.values.numel(), dim)
    else:
        shape = (num_bags // num_features if num_features else 0, plan.stride)
    is_there = out.dtype is torch.float32 and out.shape == shape and out.device == device
    if not is_there or not out.is_contiguous():
        raise ConfigError(
            f"out: expected contiguous float32 {list(shape)} on {device}, got {out.dtype} "
            f"{list(out.shape)} on {out.device}"
        )


@lru_cache(maxsize=256)
def _needs(plan: PoolingPlan, dim: int) -> tuple[int, int]:
    """How many packed features, and tables, a plan for rows of `dim` columns is of."""
    for feature in plan.features:
        end = feature.column + dim * (feature.max_keys or 1)
        if end > plan.stride:
            raise ConfigError(f"{feature} ends at column {end} of {plan.stride}")
    served = [feature.packed_feature for feature in plan.features]
    tables = [feature.table for feature in plan.features]
    return max(served, default=-1) + 1, max(tables, default=-1) + 1


def check_gradients(
    store: object, device: torch.device, plan: PoolingPlan, gradients: Sequence[PooledGradient]
) -> None:
    """See `Store.check_gradients`; `device` is the store's."""
    seen = set()
    num_keys = 0
    for lookup, batch, grad in gradients:
        if not isinstance(lookup, PooledLookup) or lookup.store is not store:
            raise ConfigError(
                f"the gradient of a look-up that this store did not make, but {_origin(lookup)}; "
                "give each store the gradients of its own look-ups"
            )
        if lookup.is_applied or id(lookup) in seen:
            what = "has been applied before" if lookup.is_applied else "is given twice"
            raise ConfigError(
                f"the gradient of a look-up {what}; look the batch up again, or add its gradients "
                "before they are applied"
            )
        if not lookup.plan.reads_as(plan):
            raise ConfigError("the gradient of a look-up by another plan than this update's")
        if batch is not None:
            check_same(lookup, batch)
        wanted = (lookup.num_outputs, lookup.plan.stride)
        is_near = grad.is_cpu or grad.device == device
        if grad.dtype != torch.float32 or grad.shape != wanted or not is_near:
            or_device = "" if device.type == "cpu" else f" or {device}"
            raise ConfigError(
                f"gradient: expected float32 {list(wanted)} on the CPU{or_device}, got "
                f"{grad.dtype} {list(grad.shape)} on {grad.device}"
            )
        if not grad.is_contiguous():
            raise ConfigError(f"gradient {list(wanted)}: not contiguous; use grad.contiguous()")
        seen.add(id(lookup))
        num_keys += lookup.num_keys
    if num_keys > MOST_UPDATE_KEYS:
        raise ConfigError(
            f"an update of {num_keys} keys; at most {MOST_UPDATE_KEYS}: use smaller batches"
        )


def check_same(lookup: PooledLookup, batch: KeyedJagged) -> None:
    """Refuses a batch of another size than the one that was looked up."""
    of_lookup = lookup.batch_size, lookup.num_keys, lookup.is_weighted
    of_batch = batch.batch_size, batch.values.numel(), batch.weights is not None
    if of_lookup != of_batch:
        raise ConfigError(
            "the gradient's batch is not the one that was looked up: (samples, keys, weighted) are "
            f"{of_batch}, and were {of_lookup}"
        )


def _origin(lookup: object) -> str:
    return "another one" if isinstance(lookup, PooledLookup) else f"a {type(lookup).__name__}"


def stale_export(store: str) -> StaleExportError:
    """That `store` changed under an export."""
    return StaleExportError(f"{store} changed while it was exported; begin the export again")


def check_keys(batch: KeyedJagged, device: torch.device) -> None:
    """Refuses keys and offsets that are not contiguous int64 arrays on the CPU or a device."""
    values, offsets = batch.values, batch.offsets
    if not _are_keys(values, device) or not _are_keys(offsets, device):
        name, tensor = ("offsets", offsets) if _are_keys(values, device) else ("values", values)
        or_device = "" if device.type == "cpu" else f" or {device}"
        raise ConfigError(
            f"{name} of the batch: expected contiguous int64 [n] on the CPU{or_device}, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    num_offsets, num_features = offsets.numel(), len(batch.features)
    if not num_offsets or (num_features and (num_offsets - 1) % num_features):
        raise ConfigError(
            f"{num_offsets} offsets for {num_features} features: expected features * B + 1"
        )


def _are_keys(tensor: Tensor, device: torch.device) -> bool:
    is_flat = tensor.dtype is torch.int64 and tensor.dim() == 1 and tensor.is_contiguous()
    return is_flat and (tensor.is_cpu or tensor.device == device)


def check_weights(batch: KeyedJagged) -> None:
    """Refuses weights that are not one float32 a key. Whether they are finite is not looked at."""
    weights = batch.weights
    if weights is None:
        return
    device = batch.values.device
    is_flat = weights.shape == batch.values.shape and weights.is_contiguous()
    if weights.dtype != torch.float32 or weights.device != device or not is_flat:
        where = "the CPU" if device.type == "cpu" else str(device)
        raise ConfigError(
            f"weights of the batch: expected contiguous float32 {list(batch.values.shape)} on "
            f"{where}, one a key, got {weights.dtype} {list(weights.shape)} on {weights.device}"
        )


def check_batch(plan: PoolingPlan, batch: KeyedJagged) -> None:
    """Refuses what cannot be looked up; all that `KeyedJagged.is_checked` promises.

    Raises:
      ConfigError: see `Store.pooled_lookup`.
    """
    check_weights(batch)
    if not batch.is_checked:
        check_offsets(batch)
        check_sequences(plan, batch)
        check_finite_weights(batch)


def check_offsets(batch: KeyedJagged) -> None:
    """Refuses offsets that do not rise from 0 to the number of keys."""
    offsets, num_keys = batch.offsets, batch.values.numel()
    ends = int(offsets[0]), int(offsets[-1])
    if ends != (0, num_keys) or bool((offsets.diff() < 0).any()):
        raise bad_offsets(*ends, num_keys)


def bad_offsets(first: int, last: int, num_keys: int) -> ConfigError:
    """What is wrong with offsets from `first` to `last`."""
    return ConfigError(
        f"offsets of the batch must rise from 0 to the number of keys ({num_keys}), got "
        f"{first} to {last}"
    )


def check_finite_weights(batch: KeyedJagged) -> None:
    """Refuses weights that are NaN or infinite, by feature and sample."""
    if batch.weights is None or bool(batch.weights.isfinite().all()):
        return
    place = int((~batch.weights.isfinite()).nonzero()[0])
    bag = int(torch.searchsorted(batch.offsets, place, right=True)) - 1
    feature, sample = divmod(bag, batch.batch_size)
    raise ConfigError(
        f"feature {batch.features[feature]!r}, sample {sample} of the batch: the weight of key "
        f"{int(batch.values[place])} is {float(batch.weights[place])}; weights must be finite"
    )


def check_sequences(plan: PoolingPlan, batch: KeyedJagged) -> None:
    """Refuses a bag with more keys than its sequence has positions, by feature and sample."""
    lengths = batch.offsets.diff()
    for feature in plan.features:
        if feature.max_keys is None:
            continue
        first = feature.packed_feature * batch.batch_size
        sizes = lengths[first : first + batch.batch_size]
        if (sizes > feature.max_keys).any():
            sample = int((sizes > feature.max_keys).nonzero()[0])
            name = batch.features[feature.packed_feature]
            raise ConfigError(
                f"feature {name!r}, sample {sample} of the batch: {int(sizes[sample])} keys for a "
                f"sequence of {feature.max_keys} positions; raise max_keys, or cut the bags with "
                "Jagged.truncate"
            )
