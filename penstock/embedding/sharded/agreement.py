"""Whether all ranks made the same collection, and did their part of a task: else an error on all.

Rows would be another rank's in silence, or a rank would wait for ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from penstock.config import FeatureConfig, TableConfig
from penstock.embedding.sharded.exchange import Exchange
from penstock.errors import ConfigError, FailedElsewhere, GroupError, PenstockError

_MOST_NAMED = 4


def described(
    tables: Sequence[TableConfig], features: Sequence[FeatureConfig], **options: object
) -> dict[str, str]:
    """What ranks must have alike of a collection, by what a message calls it."""
    parts: dict[str, object] = {
        "the order of tables": [table.name for table in tables],
        "the order of features": [feature.name for feature in features],
    }
    for what, configs in (("table", tables), ("feature", features)):
        for config in configs:
            parts |= _flat(f"{what} {config.name!r}:", config.model_dump(mode="json"))
    return {name: json.dumps(value) for name, value in {**parts, **options}.items()}


def _flat(prefix: str, fields: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in fields.items():
        path = f"{prefix} {name}"
        flat |= _flat(path, value) if isinstance(value, dict) else {path: value}
    return flat


def check_made_alike(exchange: Exchange, made: Mapping[str, str]) -> None:
    """Compares what all ranks made; each must call it.

    Args:
      exchange: of the ranks.
      made: from `described`.

    Raises:
      ConfigError: on every rank; names what differs between it and another one.
      GroupError: a rank is gone.
    """
    if exchange.size == 1:
        return
    mine = json.dumps(made).encode()
    digest = int.from_bytes(hashlib.blake2b(mine, digest_size=8).digest(), "little", signed=True)
    once = [1] * exchange.size
    # Of one size on all ranks, whatever each has made.
    heads = _to_all(exchange, torch.tensor([[digest, len(mine)]]), once, once)
    others = (heads[:, 0] != heads[exchange.rank, 0]).nonzero()[:, 0].tolist()
    if bool((heads[:, 0] == heads[0, 0]).all()):
        return
    content = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    lengths = heads[:, 1].tolist()
    texts = _to_all(exchange, content, [len(mine)] * exchange.size, lengths)
    other, start = others[0], sum(lengths[: others[0]])
    theirs = json.loads(bytes(texts[start : start + lengths[other]].tolist()))
    raise ConfigError(
        f"rank {exchange.rank} and rank {other} of {exchange.size} made unlike collections over "
        f"one group: {_difference(exchange.rank, made, other, theirs)}; make it of the same "
        "tables, features and options on every rank"
    )


@contextmanager
def told_to_all(
    total: Callable[[int], int], elsewhere: Callable[[int], FailedElsewhere]
) -> Iterator[None]:
    """Ends when every rank has done its part of a task; one that could not ends it for all.

    Args:
      total: the sum over ranks of a number, which waits until every rank has given its own.
      elsewhere: what to raise on ranks that could, given how many could not.

    Raises:
      OSError, PenstockError: this rank's own. Where `total` was lost, the `GroupError` of that.
    """
    error: OSError | PenstockError | None = None
    try:
        yield
    except (OSError, PenstockError) as raised:
        error = raised
    if isinstance(error, PenstockError) and (
        error.is_known_to_all or isinstance(error, GroupError)
    ):
        raise error  # the others know, or are gone
    failed = total(int(error is not None))
    if isinstance(error, PenstockError):
        error.is_known_to_all = True
    if error is not None:
        raise error
    if failed:
        raise elsewhere(failed)


def _to_all(exchange: Exchange, rows: Tensor, sent: list[int], wanted: list[int]) -> Tensor:
    repeated = rows.repeat(exchange.size, *[1] * (rows.dim() - 1))
    return exchange.to_all("comparison", repeated, sent, wanted).cpu()


def _difference(rank: int, mine: Mapping[str, str], other: int, theirs: Mapping[str, str]) -> str:
    absent = "none"
    unlike = [
        f"{name} is {mine.get(name, absent)} on rank {rank}, {theirs.get(name, absent)} on {other}"
        for name in dict.fromkeys([*mine, *theirs])
        if mine.get(name) != theirs.get(name)
    ]
    more = f" and {len(unlike) - _MOST_NAMED} more" if len(unlike) > _MOST_NAMED else ""
    return ", ".join(unlike[:_MOST_NAMED]) + more
